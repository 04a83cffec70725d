"""Gated fusion and its cross-entropies (method page, section 4 and section 5)."""
