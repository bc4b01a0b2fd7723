"""The version, for those who must not import all that ``megalm`` offers."""

__version__ = "0.1.0"
