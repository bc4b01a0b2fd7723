"""The ``megalm`` command."""
