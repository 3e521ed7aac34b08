"""Variants of the model, each a unit of its own, imported neither by the core nor by another."""
