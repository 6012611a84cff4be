"""Rewards: what a completion earns, and the judges that read an answer out of text."""
