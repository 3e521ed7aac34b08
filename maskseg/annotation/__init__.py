"""Tools for annotation: mask proposals from boxes and class activation maps, and their review."""
