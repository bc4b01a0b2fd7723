"""Files that somebody else wrote, read without running anything in them."""
