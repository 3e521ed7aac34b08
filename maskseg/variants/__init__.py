"""Variants of the model, each a unit of its own; the core never imports them, nor do they import each other."""
