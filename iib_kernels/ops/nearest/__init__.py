"""The nearest prototype of every modality (method page, section 2)."""
