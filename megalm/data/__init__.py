"""Corpora, tokenizers, token shards, the order of samples, and the loader."""
