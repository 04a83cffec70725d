"""Benchmarks of the kernels and of the methods.

On any machine: `pytest benchmarks/ --benchmark-only`. On one with a GPU:
`python -m benchmarks.on_gpu --output DIR`.
"""
