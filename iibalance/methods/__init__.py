"""Training methods behind one interface. ``make_method("concat", config)`` is the way in; ``METHODS`` lists them."""
from __future__ import annotations

from iibalance.config import RunConfig
from iibalance.errors import InputError
from iibalance.methods.base import Method
from iibalance.methods.concat import Concat
from iibalance.methods.iibalance import IIBalance
from iibalance.methods.late import Ensemble, Sum, Unimodal

__all__ = ["METHODS", "Method", "make_method"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (IIBalance, Concat, Sum, Unimodal, Ensemble)}


def make_method(name: str, config: RunConfig) -> Method:
    """The method called ``name``; InputError lists those there are.

    >>> make_method("concat", RunConfig()).name
    'concat'
    """
    if name not in METHODS:
        raise InputError(f"method: {name!r} is none of {', '.join(METHODS)}")
    return METHODS[name](config)
