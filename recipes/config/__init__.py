"""The configuration: one YAML file, checked to the last key before anything is loaded."""
