"""The report: the page, its pictures, the comparison of runs, the model card."""
