"""The order of samples, and the loader that reads them."""
