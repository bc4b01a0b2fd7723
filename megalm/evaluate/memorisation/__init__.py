"""How much of its own training text a model continues word for word, by how often the run has read it."""
