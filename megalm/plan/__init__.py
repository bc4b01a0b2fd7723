"""What a run will be, known before it starts: what is wrong with it, its sizes, what its devices can do. No torch."""
