"""The model: encoders, and the head over their embeddings with its prototypes, gate and loss.

    encoders      built-in encoders by the shape of a sample
    prototypes    moving-average class prototypes, and how far a sample lies from them
    loss          the training objective
    gate          sample-wise fusion
    head          embeddings in; logits, weights and loss out
    model         named encoders and a head; predictions in batches
    calibration   fits the gate on held-out samples
    missing       rows of missing modalities

What may come in: config, errors, budgets, metrics, data and iib_kernels; nothing of methods or
training.
"""
