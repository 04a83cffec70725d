"""Modules: encoders, the head with its gate and prototypes, the loss, the classifier."""
