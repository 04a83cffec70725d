"""A user's own encoders: modules or functions that make them, and what may be asked of either."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from iibalance.config import TrainingConfig
from iibalance.errors import InputError

Factory = Callable[[], nn.Module]
#: What a user gives for a modality: a module, or a function (or class) that makes one.
Encoder = nn.Module | Factory
#: An encoder -> groups of its parameters, as an optimiser takes them.
GroupMaker = Callable[[nn.Module], list[dict]]


def as_factories(
    encoders: Mapping[str, Encoder] | None, modalities: Sequence[str]
) -> dict[str, Factory]:
    """Modality name -> function that makes a new encoder.

    A run trains several copies of each encoder (folds, alone, joint). Copies of a module all start
    from the weights it has; a function may draw new ones.

    Raises InputError for a modality that is not there and for what is neither.

    >>> layer = nn.Linear(2, 3)
    >>> make = as_factories({"audio": layer}, ["audio", "video"])["audio"]
    >>> make() is layer, bool((make().weight == layer.weight).all())
    (False, True)
    """
    if encoders is None:
        return {}
    if not isinstance(encoders, Mapping):
        raise InputError(
            f"encoders: is a {type(encoders).__name__}; "
            "give a dict of modules (or functions that make them) by modality"
        )
    for name in encoders:
        if name not in modalities:
            raise InputError(
                f"encoders: {name!r} is none of the data's modalities ({', '.join(modalities)})"
            )
    return {name: _Factory(name, encoder) for name, encoder in encoders.items()}


class _Factory:
    """Makes encoders of one modality; a class and no closure, so that it can be pickled."""

    def __init__(self, name: str, encoder: Encoder):
        if not isinstance(encoder, nn.Module) and not callable(encoder):
            raise InputError(
                f"encoders: {name} is a {type(encoder).__name__}; "
                "give a torch.nn.Module, or a function without arguments that makes one"
            )
        self.name, self.encoder = name, encoder

    def __call__(self) -> nn.Module:
        if isinstance(self.encoder, nn.Module):
            return copy.deepcopy(self.encoder)
        try:
            made = self.encoder()
        except TypeError as error:
            raise InputError(
                f"encoders: {self.name}: calling it without arguments failed ({_short(error)}); "
                "give a torch.nn.Module, or a function without arguments that makes one"
            ) from error
        if not isinstance(made, nn.Module):
            raise InputError(
                f"encoders: {self.name}: the function made a {type(made).__name__}; "
                "it must make a torch.nn.Module"
            )
        return made


def _short(error: Exception) -> str:
    """An exception's message as part of one line."""
    return " ".join(str(error).split())[:160]


def with_own_groups(
    groups: list[dict], model: nn.Module, makers: Mapping[str, GroupMaker]
) -> list[dict]:
    """An optimiser's ``groups`` with those a user wants for an encoder taken out of them.

    Args:
        groups: of the method, each with ``params`` and ``scale``.
        model: a :class:`~iibalance.nn.model.MultimodalClassifier`.
        makers: modality name -> function of its encoder that gives groups: ``params``, and any of
            ``scale`` (multiplies the learning rate) and ``weight_decay``. Parameters that it leaves
            out stay where they are.

    Raises InputError for what is no group, and for parameters that are not the encoder's or are in
    two groups.
    """
    for name, encoder in zip(model.modalities, model.encoders):
        if name in makers:
            left = {id(value) for value in encoder.parameters()}
            inside = frozenset(left)
            for group in _groups(name, makers[name](encoder)):
                values = _parameters(name, group, inside)
                if not {id(value) for value in values} <= left:
                    raise InputError(
                        f"parameter_groups: {name}: a parameter is in two groups; give each to one"
                    )
                left -= {id(value) for value in values}
                groups = _moved(groups, [value for value in values if value.requires_grad], group)
    return groups


def with_own_rates(groups: list[dict], model: nn.Module, training: TrainingConfig) -> list[dict]:
    """``groups`` with the modalities that ``training`` names at rates and decays of their own.

    Those of a modality are its encoder's parameters and its own classifier's.

    >>> from iibalance.nn.model import MultimodalClassifier
    >>> model = MultimodalClassifier({"a": nn.Linear(3, 4), "b": nn.Linear(5, 4)}, num_classes=2)
    >>> groups = [{"params": list(model.parameters()), "scale": 1.0}]
    >>> training = TrainingConfig(learning_rate=1e-2, learning_rates={"b": 1e-3})
    >>> [(len(g["params"]), round(g["scale"], 3)) for g in with_own_rates(groups, model, training)]
    [(..., 1.0), (4, 0.1)]
    """
    for name in dict.fromkeys([*training.learning_rates, *training.weight_decays]):
        if name not in model.modalities:
            continue  # a training of another modality alone
        index, options = model.modalities.index(name), {}
        parts = [model.encoders[index]]
        if hasattr(model.head, "classifiers"):
            parts.append(model.head.classifiers[index])
        if name in training.learning_rates:
            options["scale"] = training.learning_rates[name] / training.learning_rate
        if name in training.weight_decays:
            options["weight_decay"] = training.weight_decays[name]
        values = [value for part in parts for value in part.parameters() if value.requires_grad]
        groups = _moved(groups, values, options)
    return groups


def _groups(name: str, made: Any) -> list[Mapping]:
    """What a user's function made, as a list of groups."""
    if isinstance(made, (Mapping, str)) or not isinstance(made, Iterable):
        shown = list(made) if isinstance(made, Mapping) else f"a {type(made).__name__}"
        raise InputError(
            f"parameter_groups: {name}: made {shown}; give a list of dicts of params and any of "
            "scale, weight_decay"
        )
    groups = list(made)
    for group in groups:
        known = {"params", "scale", "weight_decay"}
        if not isinstance(group, Mapping) or "params" not in group or set(group) - known:
            shown = list(group) if isinstance(group, Mapping) else f"a {type(group).__name__}"
            raise InputError(
                f"parameter_groups: {name}: {shown} is no group; "
                "give dicts of params and any of scale, weight_decay"
            )
        for option in known - {"params"}:
            value = group.get(option, 0)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InputError(
                    f"parameter_groups: {name}: {option}: {value!r} cannot be used; "
                    "give a number >= 0"
                )
    return groups


def _parameters(name: str, group: Mapping, inside: frozenset[int]) -> list[Tensor]:
    given = group["params"]
    if not isinstance(given, (Tensor, Iterable)):
        raise InputError(
            f"parameter_groups: {name}: params are a {type(given).__name__}; "
            "give parameters of the encoder"
        )
    values = [given] if isinstance(given, Tensor) else list(given)
    for value in values:
        if id(value) not in inside:
            raise InputError(
                f"parameter_groups: {name}: holds a parameter that is not this encoder's; "
                "take them from the encoder that the function is given"
            )
    return values


def _moved(groups: list[dict], values: list[Tensor], options: Mapping) -> list[dict]:
    """``values`` moved to groups of their own, one for each group they were in."""
    wanted, result, added = {id(value) for value in values}, [], []
    for group in groups:
        own = [value for value in group["params"] if id(value) in wanted]
        rest = [value for value in group["params"] if id(value) not in wanted]
        if rest or not own:
            result.append({**group, "params": rest})
        if own:
            changed = {**group, "params": own}
            changed["scale"] = group.get("scale", 1.0) * float(options.get("scale", 1.0))
            if "weight_decay" in options:
                changed["weight_decay"] = float(options["weight_decay"])
            added.append(changed)
    return result + added
