"""Rules that a config must satisfy: one file per group of settings, by the group's name."""
