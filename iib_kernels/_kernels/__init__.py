"""Triton code only: `@triton.jit` functions, launched from the modules one level up."""
