"""Benchmark suites of `tools/benchmark.py`."""
