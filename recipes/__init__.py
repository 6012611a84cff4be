"""What a run is made of: its configuration, model, task, tracking and report."""
