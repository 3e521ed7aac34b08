"""Measurements, side by side: what `tools/benchmark.py` runs."""
