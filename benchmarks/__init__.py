"""Run from the root of the repository: `python -m benchmarks.factors`."""
