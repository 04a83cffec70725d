"""Every option of a run and of a comparison, once: typed dataclasses, the one place for defaults.

The command line and YAML files are made from these classes; the modules that take an option as an
argument take its default from here. A value out of range is refused when its object is made.

What may come in: errors, checks and method_names. Nothing here reads data or trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from iibalance.checks import check_types, require
from iibalance.errors import InputError
from iibalance.method_names import METHOD_NAMES


@dataclass
class DataConfig:
    """Which data to train on.

    On the command line ``--data.path clips.npz`` and so on.

    >>> DataConfig(name="npz", path="clips.npz", modalities="audio,video").modality_list()
    ('audio', 'video')
    """

    name: str | None = None
    """Source: ``digits`` (three views of scikit-learn's handwritten digits, nothing to download),
    ``npz``, ``folder`` (of ``.npy`` files), ``csv`` or ``parquet``. By default what the path's
    ending says, and digits without a path."""
    path: str | None = None
    """Your file or folder. An npz or folder holds arrays ``x_<modality>`` [N, ...] and ``y`` [N];
    optional are ``split``, ``mask_<modality>``, ``classes``, ``ids`` and group columns. A table
    has a row a sample; ``columns`` says which belong to which modality."""
    modalities: str | list[str] | None = None
    """Modalities to use, in this order: a list, or names joined by commas. All of them by
    default."""
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    """Tables: modality -> names of its columns, or patterns: ``{audio: "a_*", video: [v1, v2]}``.
    """
    target: str = "y"
    """Column (or array) of the classes: integers or strings."""
    groups: str | None = None
    """Column of the speaker, subject or video: splits and folds made here never share one of its
    values; a split column is taken as it is."""
    split: str = "split"
    """Column with 0 = train, 1 = validation, 2 = test (or these words). Where there is no
    ``split``, a stratified 70/10/20 split is made."""
    ids: str = "ids"
    """Column of names for the samples, which predictions repeat."""
    layouts: dict[str, str] = field(default_factory=dict)
    """Modality -> vector, sequence, image, video, tokens (integers from 0, 0 = padding) or raw (for
    an encoder of your own, as it is), where the shape alone does not tell (see ``infer_layout``).
    """
    standardize: bool | list[str] = True
    """Bring numbers to zero mean and unit variance: all modalities, none, or these. Token ids and
    raw inputs never are."""
    train_fraction: float = 1.0
    """Share of the training samples to keep, stratified by class: for low-data experiments."""
    split_seed: int = 0
    """Seed of every split made here, apart from the training seed: runs over seeds share their test
    samples."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        if self.name is None:
            self.name = "digits" if self.path is None else _source_of(self.path)
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
    """The built-in encoders.

    On the command line ``--model.width 32`` and so on.

    >>> ModelConfig(width=32).embedding_dim
    128
    """

    embedding_dim: int = 128
    """Size of each modality's embedding."""
    width: int = 64
    """Scale of the encoders' hidden channels."""
    dropout: float = 0.2
    """Dropout inside the encoders."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        for name in ("embedding_dim", "width"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}", value, "at least 1")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a number in [0, 1)")


@dataclass
class ObjectiveConfig:
    """Weights of the training objective; see ``iibalance.IIBalanceLoss``.

    >>> ObjectiveConfig(alpha=0).temperature
    0.2
    """

    fused_weight: float = 1.0
    """Weight of the cross-entropy of the modalities' summed logits."""
    alpha: float = 1.0
    """Weight of the prototype contrastive loss."""
    beta: float = 0.0
    """Weight of the budget-conditioned relative alignment. Out by default: it was never seen to
    help (method page, section 3)."""
    temperature: float = 0.2
    """Temperature of the prototype softmax."""
    warmup: float = 0.02
    """Share of training before the prototype terms begin."""
    ramp: float = 0.1
    """Share of training over which they rise linearly to full weight."""
    momentum: float = 0.9
    """Momentum of the prototypes' moving average."""

    def __post_init__(self) -> None:
        check_types(self, "objective.")
        for name in ("fused_weight", "alpha", "beta"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"objective.{name}", value, "a number >= 0")
        temperature = self.temperature
        right = 0 < temperature < math.inf
        require(right, "objective.temperature", temperature, "a number above 0")
        for name in ("warmup", "ramp"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name}", value, "a number in [0, 1]")
        require(0 <= self.momentum < 1, "objective.momentum", self.momentum, "a number in [0, 1)")


@dataclass
class TrainingConfig:
    """The training loop, the same for every method.

    >>> TrainingConfig(class_weight="balanced", alone=False).patience
    15
    >>> TrainingConfig(batch_size=1)
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: training.batch_size: 1 cannot be used; give at least 2
    """

    batch_size: int | None = None
    """Samples a step and process; by default 32 for fewer than 1,000 training samples (else an
    epoch is a handful of steps), 64 from there on."""
    learning_rate: float = 3e-3
    """Peak learning rate (AdamW; linear warm-up over the first tenth, then cosine to 0)."""
    weight_decay: float = 1e-2
    """Weight decay (AdamW)."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Peak learning rate of a modality's own encoder and classifier: ``{audio: 1e-3}``.
    ``learning_rate`` where not named, and of what modalities share."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """Weight decay of a modality's own encoder and classifier. ``weight_decay`` where not named,
    and of what modalities share."""
    patience: int = 15
    """Epochs without a better validation NLL before stopping early."""
    gradient_accumulation: int = 1
    """Batches whose gradients are summed before a step."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm; 0 = never."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Automatic mixed precision."""
    class_weight: Literal["balanced"] | dict[str, float] | None = None
    """How often a training draws samples of each class: ``balanced`` (all classes alike), or class
    name -> weight (1 where not named). By default every sample is taken once an epoch. The
    validation NLL that stops a training is weighted alike; calibration and every reported number
    keep the data's own frequencies. Predicted probabilities lean towards the classes that are drawn
    more often than they occur, and calibration does not undo that: a temperature is the same for
    every class."""
    workers: int = 0
    """Processes that read batches ahead, for data that stay on the disk; 0 = none."""
    modality_dropout: float = 0.0
    """Probability with which each modality of a training sample is hidden (a sample always keeps
    one)."""
    alone: bool = True
    """Also train each modality's encoder alone where the method does not (``iibalance`` starts from
    them, unless its ``warm_start`` is 0), with the same budget of epochs: the reference for
    ``utilisation``."""
    checkpoint_seconds: float = 10.0
    """At most this much training time is lost by a kill (checkpoints are written at the end of an
    epoch). 0 = every epoch."""
    progress: bool = True
    """Show progress: bars on a terminal; elsewhere a line an epoch, which the command line writes
    to standard error and Python gives to the logger ``iibalance``."""

    def __post_init__(self) -> None:
        check_types(self, "training.")
        size = self.batch_size
        require(size is None or size >= 2, "training.batch_size", size, "at least 2")
        rate = self.learning_rate
        require(0 < rate < math.inf, "training.learning_rate", rate, "a number above 0")
        decay = self.weight_decay
        require(0 <= decay < math.inf, "training.weight_decay", decay, "a number >= 0")
        for name, rate in self.learning_rates.items():
            key = f"training.learning_rates: {name}"
            require(0 < rate < math.inf, key, rate, "a number above 0")
        for name, decay in self.weight_decays.items():
            key = f"training.weight_decays: {name}"
            require(0 <= decay < math.inf, key, decay, "a number >= 0")
        for name in ("max_gradient_norm", "checkpoint_seconds"):
            value = getattr(self, name)
            require(value >= 0, f"training.{name}", value, "a number >= 0")
        for name in ("gradient_accumulation", "patience"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name}", value, "at least 1")
        workers = self.workers
        require(workers >= 0, "training.workers", workers, "0 or more")
        if isinstance(self.class_weight, dict):
            for name, value in self.class_weight.items():
                require(
                    0 < value < math.inf,
                    f"training.class_weight: {name}",
                    value,
                    "a number above 0",
                )
        dropout = self.modality_dropout
        require(0 <= dropout < 1, "training.modality_dropout", dropout, "a number in [0, 1)")


@dataclass
class BudgetConfig:
    """Where the Intrinsic Information Budgets come from.

    >>> BudgetConfig(source="probe").folds
    3
    """

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
        check_types(self, "budgets.")
        epochs = self.epochs
        require(epochs is None or epochs >= 1, "budgets.epochs", epochs, "at least 1")
        require(self.folds >= 2, "budgets.folds", self.folds, "at least 2")

    def check_estimable(self) -> None:
        """InputError where ``iibalance budgets`` cannot estimate them by themselves."""
        if self.path is not None:
            raise InputError(
                f"budgets.path: {self.path} holds budgets already; leave it out to estimate them"
            )
        if self.source == "online":
            raise InputError(
                "budgets.source: online budgets are estimated while training; "
                "use train --budgets.source online"
            )

    def epochs_of(self, epochs: int) -> int:
        """Epochs of the unimodal trainings beside a joint training of ``epochs``.

        >>> BudgetConfig().epochs_of(30), BudgetConfig(epochs=4).epochs_of(30)
        (15, 4)
        """
        return self.epochs or max(1, epochs // 2)


@dataclass
class CalibrationConfig:
    """Stage 3: the gate is fitted by MAP on held-out samples and corrupted copies of them.

    >>> CalibrationConfig(source="validation", copies=2).corrupted_weight
    0.5
    """

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
    """Width of the MAP prior around a trust of 0.98 in everybody; small = stay there."""
    tolerance: float | None = 0.03
    """What guarding against corruption may cost on clean samples: this share of the clean NLL plus
    a sixth of it in nats. The copies' weight is lowered until it costs no more; none = never."""

    def __post_init__(self) -> None:
        check_types(self, "calibration.")
        require(self.copies >= 1, "calibration.copies", self.copies, "at least 1")
        for name in ("corrupted_weight", "max_strength"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"calibration.{name}", value, "a number >= 0")
        scale, tolerance = self.prior_scale, self.tolerance
        require(scale > 0, "calibration.prior_scale", scale, "a number above 0")
        known = tolerance is None or 0 <= tolerance < math.inf
        require(known, "calibration.tolerance", tolerance, "a number >= 0, or none")


@dataclass
class RunConfig:
    """One training run.

    These are the options of ``iibalance train`` and :func:`iibalance.train`.

    >>> config = RunConfig(data=DataConfig(path="clips.npz"), epochs=10, method="concat")
    >>> config.data.name, config.method, config.training.learning_rate
    ('npz', 'concat', 0.003)
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    budgets: BudgetConfig = field(default_factory=BudgetConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    method: str = "iibalance"
    """A method's name, or your own: ``my_file.py:MyMethod`` or ``my.module:MyMethod``."""
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
        check_types(self)
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        require(self.output != "", "output", "''", "the name of a folder")
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")


@dataclass
class CompareData(DataConfig):
    """A data set of a comparison.

    It has the options of :class:`DataConfig`, and epochs and folds of its own.

    >>> CompareData(path="clips.npz", groups="speaker", epochs=40).name
    'npz'
    """

    epochs: int | None = None
    """Epochs of every method on this set, instead of the comparison's."""
    folds: int | None = None
    """Folds of the budgets on this set, instead of ``budgets.folds``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs is None or self.epochs >= 1, "data: epochs", self.epochs, "at least 1")
        require(self.folds is None or self.folds >= 2, "data: folds", self.folds, "at least 2")


#: What a comparison can degrade the test samples by (``CompareConfig.conditions``).
CONDITIONS = (
    "missing",
    "noise",
    "noise1",
    "noise6",
    "blur",
    "dropped",
    "gain",
    "shuffled",
    "mild",
)


@dataclass
class CompareConfig:
    """One comparison.

    These are the options of ``iibalance compare`` and :func:`iibalance.compare`.

    >>> data = {"clips": CompareData(path="clips.npz")}
    >>> CompareConfig(data=data, methods=["concat", "iibalance"], seeds=3).method_list()
    ['unimodal', 'concat', 'iibalance']
    """

    data: dict[str, CompareData] = field(default_factory=lambda: {"digits": CompareData()})
    """Data sets by name: ``{avletters: {name: npz, path: avletters.npz, groups: speaker}, ...}``;
    the options are those of ``train --data.*``. One set alone can be given as to ``train``:
    ``--data.name npz --data.path avletters.npz --data.groups speaker``."""
    methods: str | list[str] = "all"
    """``all``, or a list of names (joined by commas on the command line); ``my_file.py:MyMethod``
    is a name too. The encoders alone (``unimodal``) are always there."""
    focus: str | None = None
    """The method that is compared with the best of the others (its ablations apart) by a paired
    bootstrap. By default ``iibalance``, or the first of ``methods`` where it is not among them."""
    splits: int = 0
    """0: every data set's own split, with ``seeds`` training seeds. Above 0: the whole protocol is
    repeated on so many resampled splits. All samples of a data set, whatever its split column says,
    are divided anew into training, validation and test; stratified by class, and no value of
    ``data.groups`` is in two of them. Settings are tried and chosen within each split. Split r is
    drawn with seed r and trained with seed r, once: leave out ``seeds``, ``tuning_seeds`` and
    ``data.split_seed``; ``low_data_seeds`` says how many splits have the low-data condition."""
    test_fraction: float = 0.2
    """Share of all samples that a resampled split tests on (``splits``)."""
    validation_fraction: float = 0.15
    """Share of all samples that a resampled split validates on (``splits``): settings are chosen
    and models calibrated there. The rest is for training."""
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
    conditions: str | list[str] = "missing,noise"
    """What the test samples meet besides clean input: ``all``, or a list of names (joined by commas
    on the command line). One modality at a time: ``missing``, ``noise`` (of ``strength``),
    ``noise1`` and ``noise6`` (of strengths 1 and 6), and what no calibration sees, ``blur``,
    ``dropped`` (a segment), ``gain`` and ``shuffled`` (another sample's). ``mild``: noise of
    strength 1 on every modality of every sample. Ranks are of groups of them: the strengths of
    noise are averaged, and so is what is unseen."""
    fraction: float = 0.5
    """Share of the test samples that a condition degrades (``mild``: all of them)."""
    strength: float = 3.0
    """Strength of ``noise``, in standard deviations of the training inputs, and of ``blur``,
    ``dropped`` and ``gain``."""
    low_data: float = 0.25
    """Share of the training samples in the low-data condition, for which every method is trained
    once more; 0 = leave it out. They are drawn with the data's ``split_seed`` and are the same for
    every seed and method: errors over seeds do not cover which ones they are."""
    low_data_seeds: int | None = None
    """Seeds of the low-data condition; all of them by default."""
    bootstrap: int = 2000
    """Resamples of the paired bootstrap, and of that over data sets and splits."""
    region_accuracy: float = 0.5
    """Methods that differ by no more than this are called equal in practice, in points of accuracy
    (with ``splits`` or ``join``)."""
    region_nll: float = 0.01
    """The same for the NLL, in nats."""
    join: str | list[str] | None = None
    """Compare nothing: read the ``comparison.csv`` of comparisons that are done, by a pattern such
    as ``'parts/*.csv'`` or a list of files, and write ``comparison.csv``, ``comparison.md`` and
    ``comparison.png`` over all of them into ``output`` (a table that stands there is no part). Of
    the other options only ``focus``, ``bootstrap`` and the regions are used."""
    timing_steps: int = 30
    """Training steps that are timed of every method, one after the other at the end, in one thread
    with nothing else running; 0 = none."""
    timing_batch: int = 64
    """Samples a timed step."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(width=32))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(alone=False))
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    budgets: BudgetConfig = field(default_factory=BudgetConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    output: str = "runs/comparison"
    """The comparison's folder. One that is there is gone on with, if its options are the same."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.output != "", "output", "''", "the name of a folder")
        require(bool(self.data), "data", self.data, "at least one data set")
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
            require(value >= least, name, value, f"at least {least}")
        tuning, seeds = self.tuning_seeds, self.seeds
        require(1 <= tuning <= seeds, "tuning_seeds", tuning, f"1 to seeds, {seeds}")
        self._check_splits()
        self.condition_list()
        for name in ("region_accuracy", "region_nll"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "a number >= 0")
        if self.join is not None and not (self.join and all(self.join)):
            raise InputError("join: names no file; give a pattern such as 'parts/*.csv'")
        for option in ("learning_rates", "weight_decays"):
            if getattr(self.training, option):
                raise InputError(
                    f"training.{option}: compare chooses them by validation; leave them out"
                )
        workers = self.workers
        require(workers is None or workers >= 1, "workers", workers, "at least 1")
        require(0 <= self.fraction <= 1, "fraction", self.fraction, "0 to 1")
        require(0 <= self.strength < math.inf, "strength", self.strength, "a number >= 0")
        require(0 <= self.low_data < 1, "low_data", self.low_data, "0 to below 1")
        low = self.low_data_seeds
        require(low is None or low >= 0, "low_data_seeds", low, "0 or more")
        require(self.timing_steps >= 0, "timing_steps", self.timing_steps, "0 or more")
        require(self.budgets.path is None, "budgets.path", self.budgets.path, "none")

    def _check_splits(self) -> None:
        """InputError where the resampled splits cannot be made, or something contradicts them."""
        require(self.splits >= 0, "splits", self.splits, "0 or more")
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, name, value, "a share above 0 and below 1")
        held = self.test_fraction + self.validation_fraction
        if held >= 1:
            raise InputError(
                f"validation_fraction: with test_fraction it is {held:g} of the samples, which "
                "leaves none for training; give less"
            )
        if not self.splits:
            return
        for name in ("seeds", "tuning_seeds"):
            if getattr(self, name) != getattr(CompareConfig, name):
                raise InputError(
                    f"{name}: {getattr(self, name)} beside splits, each of which has one training "
                    f"seed, its number; leave {name} out"
                )
        for name, data in self.data.items():
            if data.split_seed != CompareData.split_seed:
                raise InputError(
                    f"data: split_seed of {name} is {data.split_seed}, and splits have seeds of "
                    "their own, their numbers; leave it out"
                )
        if self.join is not None:
            raise InputError("splits: the parts of join have theirs already; leave splits out")

    def condition_list(self) -> list[str]:
        """The names of the conditions besides clean input; InputError for one that is none.

        >>> CompareConfig(conditions="noise, blur,noise").condition_list()
        ['noise', 'blur']
        """
        given = self.conditions
        given = given.split(",") if isinstance(given, str) else given
        names: list[str] = []
        for name in filter(None, map(str.strip, given)):
            if name != "all" and name not in CONDITIONS:
                raise InputError(
                    f"conditions: {name!r} is none of {', '.join(CONDITIONS)}, and not all"
                )
            names += CONDITIONS if name == "all" else [name]
        return list(dict.fromkeys(names))

    def method_list(self) -> list[str]:
        """The methods in order, the encoders alone first.

        >>> CompareConfig(methods="sum, concat,sum").method_list()
        ['unimodal', 'sum', 'concat']
        """
        return list(dict.fromkeys([METHOD_NAMES[0], *self._named()]))

    def focus_method(self) -> str:
        """The method in focus: the one that is given, or the default.

        >>> CompareConfig().focus_method(), CompareConfig(methods="concat,sum").focus_method()
        ('iibalance', 'concat')
        """
        if self.focus is not None:
            return self.focus
        names = self._named() or self.method_list()
        return "iibalance" if "iibalance" in names else names[0]

    def check_focus(self) -> None:
        """InputError for a focus that is not compared, where that can be told without imports.

        What a method of your own is called is known only once its file is imported.

        >>> CompareConfig(methods=[], focus="qmf").check_focus()
        Traceback (most recent call last):
            ...
        iibalance.errors.InputError: focus: qmf is not compared; give --focus NAME, one of unimodal
        """
        names = self.method_list()
        if self.focus_method() not in names and not any(":" in name for name in names):
            raise self.focus_error(names)

    def focus_error(self, names: Sequence[str]) -> InputError:
        """To raise where the focus is none of ``names``, which are compared."""
        return InputError(
            f"focus: {self.focus_method()} is not compared; "
            f"give --focus NAME, one of {', '.join(names)}"
        )

    def _named(self) -> list[str]:
        """The methods as they are given, ``all`` written out."""
        given = self.methods.split(",") if isinstance(self.methods, str) else self.methods
        names: list[str] = []
        for name in map(str.strip, given):
            names += METHOD_NAMES if name == "all" else [name]
        return names


def _source_of(path: str) -> str:
    """The source that reads ``path``, by its ending."""
    if Path(path).expanduser().is_dir():
        return "folder"
    endings = {".npz": "npz", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}
    ending = Path(path).suffix.lower()
    if ending not in endings:
        raise InputError(
            f"data.path: what {path} holds cannot be told from its name; give an .npz, .csv or "
            ".parquet file or a folder of .npy files, or say data.name"
        )
    return endings[ending]
