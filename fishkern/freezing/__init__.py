"""Statistics over time: what stops training, and when."""
