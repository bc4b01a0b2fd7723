"""megalm: pretraining of language models in 3-D parallel, from a laptop to 1,024 GPUs."""

__version__ = "0.1.0"
