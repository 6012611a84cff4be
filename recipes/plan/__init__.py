"""The plan: what memory a run will need, before anything is loaded."""
