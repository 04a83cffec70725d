"""The whole objective as one scalar, with its gradients (method page, section 5)."""
