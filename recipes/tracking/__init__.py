"""Tracking: the run folder, time and memory by phase, the terminal."""
