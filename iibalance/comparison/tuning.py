"""What every method tries on validation data, and what wins.

The settings are the same for every method, and so is their number. A method whose encoders are
trained separately chooses learning rate and weight decay for each modality by itself, as separate
trainings can: the modality's own validation NLL in the very same trials decides. So does a method
that goes on from encoders trained alone, by these encoders' trials, which are its own first stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from iibalance.comparison.cells import REFERENCE, Cell, cell_files
from iibalance.comparison.statistics import best_trial
from iibalance.config import CompareConfig
from iibalance.files import read_json
from iibalance.methods import ablation_of, make_method, method_class, search_of
from iibalance.training.sampling import derive_seed


class Choice(NamedTuple):
    """What validation chose for a method on a data set, or on one split of it."""

    trial: int  #: of the lowest validation NLL
    #: Modality -> the trial of its own lowest validation NLL; empty for methods whose encoders are
    #: never trained alone.
    by_modality: dict[str, int]
    #: Whether the method's own trial counts beside them: for its main parameter.
    joint: bool = False


def settings_of(config: CompareConfig, method: str) -> list[dict]:
    """The ``trials`` settings that a method tries: the defaults, then draws.

    Learning rates and weight decays are the same for every method.
    """
    parameter, values = next(iter(search_of(method_class(method)).items()), (None, ()))
    settings = []
    for trial in range(config.trials):
        generator = torch.Generator().manual_seed(derive_seed("settings", trial))
        draw = torch.rand(2, generator=generator).tolist()
        rate, decay = (0.5, 0.5) if trial == 0 else draw
        setting = {
            "learning_rate": config.training.learning_rate
            * 3 ** (2 * rate - 1),  # a third to three times
            "weight_decay": config.training.weight_decay
            * 10 ** (2 * decay - 1),  # a tenth to ten times
        }
        if parameter is not None:
            setting[parameter] = values[trial % len(values)]
        settings.append(setting)
    return settings


def tuned_as(name: str) -> str:
    """The method whose settings this one takes: an ablation those of its whole."""
    return ablation_of(method_class(name)) or name


def choose(folder: Path, trials: Sequence[Cell], settings: dict) -> tuple[dict, dict]:
    """(data set, method) -> the trial that wins, and all that was tried.

    The lowest mean validation NLL wins. A trial that failed with one seed is out, unless all have.
    """
    chosen, searched = {}, {}
    for (data, method), by_trial in _validated(folder, trials).items():
        searched[data, method] = tried = {}
        for trial, rows in by_trial.items():
            means = {n: sum(row[n] for row in rows) / len(rows) for n in ("nll", "accuracy")}
            means = {f"validation_{name}": value for name, value in means.items()}
            tried[trial] = {**settings[method][trial], **means, "seeds": len(rows)}
        chosen[data, method] = best_trial(tried)
    return chosen, searched


def choices(folder: Path, trials: Sequence[Cell], chosen: Mapping) -> dict:
    """(data set, method) -> :class:`Choice`, by the trials that :func:`choose` has chosen."""
    found, validated = {}, _validated(folder, trials)
    for (data, method), by_trial in validated.items():
        own: dict[str, dict[int, dict]] = {}
        alone = by_trial if not method_class(method).joint else {}
        if not alone and make_method(method).starts_alone:
            alone = validated.get((data, REFERENCE), {})
        for trial, rows in alone.items():
            for modality in rows[0].get("modalities", {}):
                values = [row["modalities"][modality] for row in rows]
                # None: no validation sample has the modality.
                values = [value["nll"] for value in values if value is not None]
                if values:
                    mean = {"validation_nll": sum(values) / len(values), "seeds": len(values)}
                    own.setdefault(modality, {})[trial] = mean
        best = {modality: best_trial(tried) for modality, tried in own.items()}
        found[data, method] = Choice(chosen[data, method], best, method_class(method).joint)
    return found


def chosen_setting(settings: Sequence[Mapping], choice: Choice) -> dict:
    """The setting that a choice stands for: its trial's, with each modality's own rate and decay.

    >>> tried = [{"learning_rate": rate, "weight_decay": 0.01} for rate in (0.1, 0.2)]
    >>> chosen_setting(tried, Choice(0, {"audio": 0, "video": 1}))["learning_rates"]
    {'audio': 0.1, 'video': 0.2}
    """
    setting = dict(settings[choice.trial])
    if set(choice.by_modality.values()) <= {choice.trial}:
        return setting
    for option, one in (("learning_rates", "learning_rate"), ("weight_decays", "weight_decay")):
        setting[option] = {name: settings[t][one] for name, t in choice.by_modality.items()}
    return setting


def wins(choices: Iterable[Choice], trials: int) -> dict[str, list[int]]:
    """How often each trial was chosen: by ``""``, the whole method, or by each modality.

    >>> wins([Choice(0, {}), Choice(2, {}), Choice(2, {})], 3)
    {'': [1, 0, 2]}
    """
    found: dict[str, list[int]] = {}
    for choice in choices:
        whole = {"": choice.trial} if choice.joint or not choice.by_modality else {}
        for name, trial in (whole | choice.by_modality).items():
            found.setdefault(name, [0] * trials)[trial] += 1
    return found


def _validated(folder: Path, trials: Sequence[Cell]) -> dict:
    """(data set, method) -> trial -> the validation metrics of each seed that has finished it."""
    found: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for cell in trials:
        path = cell_files(folder, cell)[0]
        if path.exists():
            rows = found.setdefault((cell.data, cell.method), {}).setdefault(cell.trial, [])
            rows.append(read_json(path)["validation"])
    return found
