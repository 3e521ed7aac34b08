"""Datasets by format, each a source of splits, and the synthetic one."""
