"""One file per family of metrics; each gives statistics of single items that add up. No torch."""
