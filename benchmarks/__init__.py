"""What was measured, and how: every figure of the documentation comes from a command in here."""
