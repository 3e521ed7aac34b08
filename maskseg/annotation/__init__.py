"""Masks for annotators: proposals from boxes and class activation maps, and their review."""
