"""Every option of a run and of a comparison, once: typed dataclasses, the one place for defaults.

The command line and YAML files are made from these classes; the modules that take an option as an
argument take its default from here. A value out of range is refused when its object is made.

What may come in: errors and files. Nothing here reads data or trains.
"""

from __future__ import annotations

import math
from argparse import ArgumentError
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from iibalance.errors import InputError
from iibalance.files import write_text

INFINITY = math.inf


def _require(right: bool, name: str, value: object, expected: str) -> None:
    if not right:
        raise InputError(f"{name}: {value} cannot be used; give {expected}")


@dataclass
class DataConfig:
    """Which data to train on: what ``iibalance train --data.name npz --data.path clips.npz`` fills.

    >>> DataConfig(name="npz", path="clips.npz", modalities="audio,video").modality_list()
    ('audio', 'video')
    """

    name: str = "digits"
    """Source: ``digits`` (three views of scikit-learn's handwritten digits, nothing to download) or
    ``npz`` (your own file)."""
    path: str | None = None
    """The npz file: arrays ``x_<modality>`` [N, ...] and ``y`` [N]; optional ``split``,
    ``mask_<modality>``, ``classes``, group columns."""
    modalities: str | list[str] | None = None
    """Modalities to use, in this order: a list, or names joined by commas. All of them by
    default."""
    groups: str | None = None
    """npz column (speaker, subject, video): splits and folds made here never share one of its
    values; a split column is taken as it is."""
    split: str = "split"
    """npz column with 0 = train, 1 = validation, 2 = test. Where the file has no ``split``, a
    stratified 70/10/20 split is made."""
    layouts: dict[str, str] = field(default_factory=dict)
    """Modality -> vector, sequence, image or video, where the shape alone does not tell (see
    ``infer_layout``)."""
    train_fraction: float = 1.0
    """Share of the training samples to keep, stratified by class: for low-data experiments."""
    split_seed: int = 0
    """Seed of every split made here, apart from the training seed: runs over seeds share their test
    samples."""

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction <= 1:
            raise InputError(
                f"data.train_fraction: {self.train_fraction} is no share of the training samples; "
                "give more than 0, at most 1"
            )
        if not 0 <= self.split_seed < 2**32:
            raise InputError(
                f"data.split_seed: {self.split_seed} is no seed; "
                "give an integer from 0 to 2**32 - 1"
            )

    def modality_list(self) -> tuple[str, ...] | None:
        """The chosen modalities in order, or None for all of them.

        Raises InputError for an empty or doubled name.
        """
        if self.modalities is None:
            return None
        given = self.modalities
        parts = given.split(",") if isinstance(given, str) else given
        names = tuple(str(name).strip() for name in parts)
        if not names or "" in names:
            raise InputError(
                f"data.modalities: {self.modalities!r} holds an empty name; "
                "give names joined by commas, such as audio,visual"
            )
        doubled = [name for name in names if names.count(name) > 1]
        if doubled:
            raise InputError(
                f"data.modalities: {doubled[0]!r} is named twice; name each modality once"
            )
        return names


@dataclass
class ModelConfig:
    """The built-in encoders."""

    embedding_dim: int = 128
    """Size of each modality's embedding."""
    width: int = 64
    """Scale of the encoders' hidden channels."""
    dropout: float = 0.2
    """Dropout inside the encoders."""

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "width"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}", value, "at least 1")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a number in [0, 1)")


@dataclass
class ObjectiveConfig:
    """Weights of the training objective; see ``iibalance.IIBalanceLoss``."""

    fused_weight: float = 1.0
    """Weight of the cross-entropy of the modalities' summed logits."""
    alpha: float = 1.0
    """Weight of the prototype contrastive loss."""
    beta: float = 1.0
    """Weight of the budget-conditioned relative alignment."""
    temperature: float = 0.2
    """Temperature of the prototype softmax."""
    warmup: float = 0.02
    """Share of training before the prototype terms begin."""
    ramp: float = 0.1
    """Share of training over which they rise linearly to full weight."""
    momentum: float = 0.9
    """Momentum of the prototypes' moving average."""

    def __post_init__(self) -> None:
        for name in ("fused_weight", "alpha", "beta"):
            value = getattr(self, name)
            _require(0 <= value < INFINITY, f"objective.{name}", value, "a number >= 0")
        _require(
            self.temperature > 0, "objective.temperature", self.temperature, "a number above 0"
        )
        for name in ("warmup", "ramp"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"objective.{name}", value, "a number in [0, 1]")
        _require(0 <= self.momentum < 1, "objective.momentum", self.momentum, "a number in [0, 1)")


@dataclass
class TrainingConfig:
    """The training loop, the same for every method."""

    batch_size: int | None = None
    """Samples a step and process; by default 32 for fewer than 1,000 training samples (else an
    epoch is a handful of steps), 64 from there on."""
    learning_rate: float = 3e-3
    """Peak learning rate (AdamW; linear warm-up over the first tenth, then cosine to 0)."""
    weight_decay: float = 1e-2
    """Weight decay (AdamW)."""
    patience: int = 15
    """Epochs without a better validation NLL before stopping early."""
    gradient_accumulation: int = 1
    """Batches whose gradients are summed before a step."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm; 0 = never."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Automatic mixed precision."""
    modality_dropout: float = 0.0
    """Probability with which each modality of a training sample is hidden (a sample always keeps
    one)."""
    alone: bool = True
    """Also train each modality's encoder alone, with the same budget of epochs: the reference for
    ``utilisation``."""
    checkpoint_seconds: float = 10.0
    """At most this much training time is lost by a kill (checkpoints are written at the end of an
    epoch). 0 = every epoch."""
    progress: bool = True
    """Show progress bars (only on a terminal)."""

    def __post_init__(self) -> None:
        size = self.batch_size
        _require(size is None or size >= 2, "training.batch_size", size, "at least 2")
        rate = self.learning_rate
        _require(0 < rate < INFINITY, "training.learning_rate", rate, "a number above 0")
        decay = self.weight_decay
        _require(0 <= decay < INFINITY, "training.weight_decay", decay, "a number >= 0")
        for name in ("max_gradient_norm", "checkpoint_seconds"):
            value = getattr(self, name)
            _require(value >= 0, f"training.{name}", value, "a number >= 0")
        for name in ("gradient_accumulation", "patience"):
            value = getattr(self, name)
            _require(value >= 1, f"training.{name}", value, "at least 1")
        dropout = self.modality_dropout
        _require(0 <= dropout < 1, "training.modality_dropout", dropout, "a number in [0, 1)")


@dataclass
class BudgetConfig:
    """Where the Intrinsic Information Budgets come from."""

    source: Literal["unimodal", "probe", "online"] = "unimodal"
    """``unimodal``: cross-fitted unimodal trainings; ``probe``: linear probes on the inputs as
    given; ``online``: the heads' own held-out loss, refreshed every epoch."""
    folds: int = 3
    """Folds of the training split (disjoint by ``data.groups``)."""
    epochs: int | None = None
    """Epochs of the unimodal trainings; half of ``epochs`` by default."""
    path: str | None = None
    """Take the budgets from this JSON file instead of estimating them."""

    def __post_init__(self) -> None:
        epochs = self.epochs
        _require(epochs is None or epochs >= 1, "budgets.epochs", epochs, "at least 1")
        _require(self.folds >= 2, "budgets.folds", self.folds, "at least 2")

    def epochs_of(self, epochs: int) -> int:
        """Epochs of the unimodal trainings beside a joint training of ``epochs``.

        >>> BudgetConfig().epochs_of(30), BudgetConfig(epochs=4).epochs_of(30)
        (15, 4)
        """
        return self.epochs or max(1, epochs // 2)


@dataclass
class CalibrationConfig:
    """Stage 3: the gate is fitted by MAP on held-out samples and corrupted copies of them."""

    source: Literal["out_of_fold", "validation", "both"] = "both"
    """``out_of_fold``: the held-out folds of the unimodal budget stage; ``validation``: the joint
    model's validation split; ``both``: all of them together. Without folds (other budget sources),
    the validation split."""
    copies: int = 4
    """Corrupted copies of each held-out sample."""
    corrupted_weight: float = 0.5
    """Weight of all corrupted copies of a sample together, beside 1 for the clean sample."""
    max_strength: float = 4.0
    """Strongest noise among the corruptions, in standard deviations of the (standardised) input."""
    prior_scale: float = 1.0
    """Width of the MAP prior around the neutral gate; small = stay neutral."""

    def __post_init__(self) -> None:
        _require(self.copies >= 1, "calibration.copies", self.copies, "at least 1")
        for name in ("corrupted_weight", "max_strength"):
            value = getattr(self, name)
            _require(0 <= value < INFINITY, f"calibration.{name}", value, "a number >= 0")
        scale = self.prior_scale
        _require(scale > 0, "calibration.prior_scale", scale, "a number above 0")


@dataclass
class RunConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    budgets: BudgetConfig = field(default_factory=BudgetConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    method: str = "iibalance"
    """A method's name (``iibalance.methods.METHODS``: iibalance, concat, sum, ensemble, ogm_ge,
    ...), or your own: ``my_file.py:MyMethod`` or ``my.module:MyMethod``."""
    method_options: dict[str, float] = field(default_factory=dict)
    """The method's own parameters, such as ``{alpha: 0.5}`` for ogm_ge; what it has and their
    defaults stand in its class's docstring."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Implementation of the iib_kernels operations."""
    seed: int = 0
    """Seed of everything random in training (the data's split has its own,
    ``data.split_seed``)."""
    epochs: int = 30
    """Epochs of the joint training."""
    output: str | None = None
    """The run's folder; by default runs/<data>-<method>-seed<seed>, numbered if that is there."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")


@dataclass
class CompareData(DataConfig):
    """A data set of a comparison."""

    epochs: int | None = None
    """Epochs of every method on this set, instead of the comparison's."""
    folds: int | None = None
    """Folds of the budgets on this set, instead of ``budgets.folds``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.epochs is None or self.epochs >= 1, "data: epochs", self.epochs, "at least 1")
        _require(self.folds is None or self.folds >= 2, "data: folds", self.folds, "at least 2")


@dataclass
class CompareConfig:
    """One comparison."""

    data: dict[str, CompareData] = field(default_factory=lambda: {"digits": CompareData()})
    """Data sets by name: ``{avletters: {name: npz, path: avletters.npz, groups: speaker}, ...}``;
    the options are those of ``train --data.*``."""
    methods: str | list[str] = "all"
    """``all``, or a list of names (joined by commas on the command line); ``my_file.py:MyMethod``
    is a name too. The encoders alone are always there."""
    focus: str = "iibalance"
    """The method that is compared with the best of the others (its ablations apart) by a paired
    bootstrap."""
    seeds: int = 5
    """Training seeds, from 0."""
    trials: int = 3
    """Settings of learning rate, weight decay and the method's own main parameter that every method
    tries on each data set. The defaults are the first, and the parameter's values come in turn; the
    lowest validation NLL wins."""
    tuning_seeds: int = 1
    """Seeds, from 0, that every setting is tried with; their mean validation NLL counts. Where
    validation samples are few, one seed chooses by chance."""
    epochs: int = 20
    """Epochs of every training."""
    workers: int | None = None
    """Processes, one thread each; by default as many as there are cores."""
    fraction: float = 0.5
    """Share of the test samples that a condition degrades."""
    strength: float = 3.0
    """Noise of the noisy conditions, in standard deviations of the training inputs."""
    low_data: float = 0.25
    """Share of the training samples in the low-data condition, for which every method is trained
    once more; 0 = leave it out. They are drawn with the data's ``split_seed`` and are the same for
    every seed and method: errors over seeds do not cover which ones they are."""
    low_data_seeds: int | None = None
    """Seeds of the low-data condition; all of them by default."""
    bootstrap: int = 2000
    """Resamples of the paired bootstrap."""
    timing_steps: int = 30
    """Training steps that are timed of every method, one after the other at the end, in one thread
    with nothing else running; 0 = none."""
    timing_batch: int = 64
    """Samples a timed step."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(width=32))
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(progress=False, alone=False)
    )
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    budgets: BudgetConfig = field(default_factory=BudgetConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    output: str = "runs/comparison"
    """The comparison's folder. One that is there is gone on with, if its options are the same."""

    def __post_init__(self) -> None:
        _require(bool(self.data), "data", self.data, "at least one data set")
        for name in self.data:
            if not name or any(not (letter.isalnum() or letter in "_+.") for letter in name):
                raise InputError(
                    f"data: {name!r} is no name for a data set; use letters, digits, _, + and ."
                )
        for name, least in (
            ("seeds", 1),
            ("trials", 1),
            ("epochs", 1),
            ("bootstrap", 1),
            ("timing_batch", 2),
        ):
            value = getattr(self, name)
            _require(value >= least, name, value, f"at least {least}")
        tuning, seeds = self.tuning_seeds, self.seeds
        _require(1 <= tuning <= seeds, "tuning_seeds", tuning, f"1 to seeds, {seeds}")
        workers = self.workers
        _require(workers is None or workers >= 1, "workers", workers, "at least 1")
        _require(0 <= self.fraction <= 1, "fraction", self.fraction, "0 to 1")
        _require(0 <= self.strength < INFINITY, "strength", self.strength, "a number >= 0")
        _require(0 <= self.low_data < 1, "low_data", self.low_data, "0 to below 1")
        _require(self.timing_steps >= 0, "timing_steps", self.timing_steps, "0 or more")
        _require(self.budgets.path is None, "budgets.path", self.budgets.path, "none")


def config_parser(skip: set[str] | None = None):
    """A jsonargparse parser of the options of :class:`RunConfig`, ``--data.name`` and so on.

    ``skip``: options to leave out.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, skip=skip)
    return parser


def save_config(path: str | Path, config: RunConfig) -> None:
    """Write every option as YAML, whole or not at all."""
    write_text(path, yaml.safe_dump(asdict(config), sort_keys=False))


def load_config(path: str | Path) -> RunConfig:
    """Read what :func:`save_config` wrote, or any YAML file with some of the options.

    Raises InputError naming the option that is wrong.

    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_config(os.path.join(folder, "config.yaml"), RunConfig(epochs=3))
    ...     load_config(os.path.join(folder, "config.yaml")).epochs
    3
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: is not a readable YAML file ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected options by name")
    parser = config_parser()
    try:
        return RunConfig(**vars(parser.instantiate(parser.parse_object(content))))
    except (ArgumentError, InputError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
