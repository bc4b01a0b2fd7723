"""Self-attention, whole or split over heads and over the sequence."""
