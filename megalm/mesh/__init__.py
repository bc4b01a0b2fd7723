"""The mesh of ranks: degrees, coordinates, groups, and what of each parameter a rank holds."""
