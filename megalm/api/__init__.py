"""What ``import megalm`` offers; see ``megalm/__init__.py`` for its names."""
