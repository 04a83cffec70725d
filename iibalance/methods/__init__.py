"""Training methods behind one interface. ``make_method("concat")`` is the way in.

    base        Method: the hooks of a training
    step        the training step that calls them
    gradients   clipping, groups of parameters, what processes share
    heads       heads that several methods share, and their temperature fit
    registry    methods by name, and what a comparison tunes of each
    <method>    one file a method, with its paper's formula

What may come in: nn, data, budgets, metrics, config, files and iib_kernels; never training.
"""

from iibalance.methods.base import Method
from iibalance.methods.registry import (
    METHODS,
    ablation_of,
    make_method,
    method_class,
    own_source,
    search_of,
    tuned,
)

__all__ = [
    "METHODS",
    "Method",
    "ablation_of",
    "make_method",
    "method_class",
    "own_source",
    "search_of",
    "tuned",
]
