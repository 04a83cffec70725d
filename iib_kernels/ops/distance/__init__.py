"""The matrix of squared distances to class prototypes (method page, section 2)."""
