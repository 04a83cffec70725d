"""Examples, each a script to read from top to bottom: ``python -m iibalance.examples.NAME``.

    plain_pytorch        a loop of your own around IIBalanceHead, budgets before and a gate after
    with_accelerate      the same on one process or several
    with_lightning       a LightningModule around MultimodalClassifier
    with_transformers    a BERT and a ViT as encoders, by ``train`` and by the classifier
    with_scikit_learn    a DataFrame, a Pipeline, cross-validation

What may come in: ``iibalance`` and ``iib_kernels`` themselves, never a module inside them, and the
library that an example is about. Nothing imports the examples.
"""
