"""Models in other formats, as sources and targets of weights under megalm's names; see ``weights.py``."""
