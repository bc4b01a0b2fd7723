"""Hugging Face folders: read, written, with their tokenizers."""
