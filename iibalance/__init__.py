"""iibalance: budget-aware multimodal training (IIBalance, arXiv 2603.17347).

The equations are this project's own formulation (iibalance/README.md). From the bottom up:

    errors, files             what is wrong with input; whole files
    checks, method_names      what an option may be; which methods there are
    config, config_files      every option; options as files and arguments
    metrics, budgets          numbers about predictions; what a modality can tell
    data                      sources, splits, standardisation, corruption
    nn                        encoders, prototypes, loss, gate, head, classifier
    methods                   this project's method and those it is compared with
    training                  one run, from data to report
    estimator                 the same behind scikit-learn's interface
    comparison                every method under one protocol
    cli                       the command line

Each may import what stands above it here, and :mod:`iib_kernels`; nothing imports the command line.

The public names stand in ``__init__.pyi``, and are imported when first used, so that
``iibalance --help`` does not wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
