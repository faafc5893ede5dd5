"""What comparisons of arms share: the runs and their order, their records, when to stop, and how time is taken."""
