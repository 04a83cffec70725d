"""The model: encoders, and the head over their embeddings with its prototypes, gate and loss.

    encoders      built-in encoders by the shape of a sample
    own_encoders  a user's encoders: modules or functions that make them
    encoding      what an encoder is asked: an embedding, its size
    prototypes    moving-average class prototypes, and how far a sample lies from them
    loss          the training objective
    gate          sample-wise fusion
    head          embeddings in; logits, weights and loss out
    model         named encoders and a head; predictions in batches
    contributions what each modality adds to the prediction of a sample
    calibration   fits the gate on held-out samples
    missing       rows of missing modalities

What may come in: config, errors, budgets, metrics, data and iib_kernels; nothing of methods or
training.
"""
