"""What was measured, and how: every figure in the documentation comes from a command in this folder."""
