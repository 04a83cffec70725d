"""Prototype contrast and relative alignment of all modalities (method page, section 3)."""
