"""Tasks: what a trained model is asked, and how its answers are scored. No torch."""
