"""Tokenizers, what their tokens are for, chat templates, and how they are trained. No torch."""
