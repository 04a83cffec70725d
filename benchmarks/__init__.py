"""Benchmarks: `pytest benchmarks/ --benchmark-only` on any machine, `python -m benchmarks.on_gpu --output DIR` on one with a GPU."""
