"""Corpora ▶ token shards: reading, cleaning, tokenising, packing, and the data card. No torch."""
