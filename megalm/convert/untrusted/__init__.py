"""Files from elsewhere: validated before use, and read without executing anything in them."""
