"""The format of prepared datasets: written, read, checked, wherever the files lie. No torch."""
