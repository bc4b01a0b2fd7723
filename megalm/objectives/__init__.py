"""What is learnt. One objective is one class: its examples, heads, loss terms and metrics; see ``base.Objective``."""
