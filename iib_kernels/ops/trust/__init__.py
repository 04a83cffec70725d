"""Fusion of experts that may each be wrong (method page, section 4)."""
