"""Models and tokenizers: loading, generating, checkpoints."""
