"""A run's folder: what it starts from, what it has done, its config of every start, its trained model."""
