"""Training: the trainer, the warm start, the evaluation and what watches over them."""
