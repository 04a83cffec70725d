"""iibalance: budget-aware multimodal training (IIBalance, arXiv 2603.17347).

The equations are this project's own formulation (iibalance/README.md). From the bottom up:

    errors, config, files     what is wrong with input; every option; whole files
    metrics, budgets          numbers about predictions; what a modality can tell
    data                      sources, splits, standardisation, corruption
    nn                        encoders, prototypes, loss, gate, head, classifier
    methods                   this project's method and those it is compared with
    training                  one run, from data to report
    comparison                every method under one protocol
    cli                       the command line

Each may import what stands above it here, and :mod:`iib_kernels`; nothing imports the command line.

Names are imported when first used, so that ``iibalance --help`` does not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Budgets": "budgets",  # estimated or given budgets, with standard errors, anchor and prior
    "Gate": "nn.gate",  # sample-wise fusion, calibrated by fit()
    "HeadOutput": "nn.head",
    "IIBalanceHead": "nn.head",  # embeddings in; logits, weights and loss out
    "IIBalanceLoss": "nn.loss",  # the objective and its schedule
    "InputError": "errors",  # raised for input that cannot be used
    "LossOutput": "nn.loss",
    "Method": "methods",  # one way to train and fuse: subclass it
    "MultimodalClassifier": "nn.model",  # named encoders and a head
    "Prediction": "nn.model",
    "PrototypeBank": "nn.prototypes",  # EMA prototypes
    "RunConfig": "config",  # every option of a run
    "budgets_from_logits": "budgets",
    "build_encoder": "nn.encoders",  # built-in encoders by shape
    "estimate_budgets": "training.budget_stage",
    "load": "training.saving",  # a run's folder -> model
    "load_config": "config",
    "make_method": "methods",  # "ogm_ge", ... or your own, for any loop
    "train": "training.run",  # a whole run
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
