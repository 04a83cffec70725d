"""``IIBalanceClassifier``: the method behind scikit-learn's interface.

What may come in: everything but comparison and the command line.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from iibalance.budgets import Budgets
from iibalance.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from iibalance.config_files import config_from
from iibalance.data.dataset import MultimodalData
from iibalance.data.labels import check_labels
from iibalance.data.samples import Samples, as_array
from iibalance.errors import InputError
from iibalance.estimator_inputs import Form, check_kind, table_kind
from iibalance.files import read_model
from iibalance.methods import make_method
from iibalance.metrics import MAX_PLAYERS
from iibalance.nn.model import Prediction
from iibalance.nn.own_encoders import Encoder, GroupMaker
from iibalance.training.budget_stage import check_folds
from iibalance.training.run import prepare
from iibalance.training.run_checks import check_groups
from iibalance.training.saving import read_saved, save_model
from iibalance.training.stages import Run
from iibalance.training.surroundings import surroundings
from iibalance.training.trainer import make_accelerator


class IIBalanceClassifier(ClassifierMixin, BaseEstimator):
    """Calibrated classification from several modalities, each trained to its budget.

    ``X`` may be a dict of arrays or tensors by modality, :class:`iibalance.Samples`, or a DataFrame
    or array whose columns ``modalities`` shares out. Samples may lack modalities: a row of NaN,
    None in a list, or False in ``sample_mask``. For ``cross_val_score`` and its like, which must
    take rows of ``X``, wrap a dict: ``Samples({"audio": ..., "video": ...})``.

    A fifth of the training samples, stratified and disjoint by ``groups``, is held out to stop the
    training and to calibrate.

    Args:
        modalities: for tables: modality name -> its columns (names, patterns such as "audio_*";
            positions for an array).
        encoders: modality name -> torch module, or function that makes one; built-in ones by shape
            by default.
        method: a method's name (``iibalance.METHODS``).
        epochs, batch_size, learning_rate, weight_decay: of the training.
        embedding_dim, width, dropout: of the built-in encoders.
        layouts: modality name -> how to read it, where the shape does not tell.
        standardize: bring numbers to zero mean and unit variance: True, False or names.
        class_weight: "balanced", or label -> weight; see ``TrainingConfig``.
        budgets: "unimodal", "probe" or "online": how they are estimated; or budgets by name.
        folds: of the budgets' cross-fitting.
        options: further options by dotted name, such as ``{"objective.alpha": 0.5}``.
        parameter_groups: modality name -> function of its encoder that gives groups for the
            optimiser; see :func:`iibalance.train`.
        random_state: seed of everything random.
        verbose: show progress: bars on a terminal, else a line an epoch to the logger.

    Attributes:
        classes_: [K] labels.
        budgets_: the :class:`iibalance.Budgets`; None for a method that needs none.
        model_: the trained :class:`iibalance.MultimodalClassifier`.
        history_: one dict an epoch.
        modalities_: names of the modalities, in order.

    The fit is the same for the same data, options and seed on a CPU.

    >>> random = np.random.default_rng(0)
    >>> y = np.array(["no", "yes"] * 40)
    >>> X = {"audio": random.normal(size=(80, 3)) + (y == "yes")[:, None] * 3,
    ...      "noise": random.normal(size=(80, 2))}
    >>> classifier = IIBalanceClassifier(epochs=10, embedding_dim=8, width=4).fit(X, y)
    >>> classifier.score(X, y) > 0.8, classifier.budgets_.anchor, classifier.classes_.tolist()
    (True, 'audio', ['no', 'yes'])
    """

    def __init__(
        self,
        modalities: Mapping[str, Any] | None = None,
        *,
        encoders: Mapping[str, Encoder] | None = None,
        method: str = RunConfig.method,
        epochs: int = RunConfig.epochs,
        batch_size: int | None = None,
        learning_rate: float = TrainingConfig.learning_rate,
        weight_decay: float = TrainingConfig.weight_decay,
        embedding_dim: int = ModelConfig.embedding_dim,
        width: int = ModelConfig.width,
        dropout: float = ModelConfig.dropout,
        layouts: Mapping[str, str] | None = None,
        standardize: bool | Sequence[str] = True,
        class_weight: str | Mapping[Any, float] | None = None,
        budgets: str | Mapping[str, float] | Budgets = "unimodal",
        folds: int = 3,
        options: Mapping[str, Any] | None = None,
        parameter_groups: Mapping[str, GroupMaker] | None = None,
        random_state: Any = 0,
        verbose: bool = False,
    ):
        self.modalities = modalities
        self.encoders = encoders
        self.method = method
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.embedding_dim = embedding_dim
        self.width = width
        self.dropout = dropout
        self.layouts = layouts
        self.standardize = standardize
        self.class_weight = class_weight
        self.budgets = budgets
        self.folds = folds
        self.options = options
        self.parameter_groups = parameter_groups
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self, X: Any, y: Any, groups: Any = None, sample_mask: Any = None
    ) -> IIBalanceClassifier:
        """Estimate budgets, train and calibrate.

        Args:
            X: N samples; see the class.
            y: [N] labels: integers, strings, booleans or whole floats.
            groups: [N] of anything (speakers, subjects): no fold and no held-out sample shares one
                with the samples it is judged against.
            sample_mask: [N, M] bool, True = present, columns in the order of the modalities.

        Raises InputError (a ValueError) in one line for input that cannot be used.
        """
        self._form, samples = self._first(X, sample_mask)
        if y is None:
            raise InputError(
                "y: is None; IIBalanceClassifier requires y to be passed, but the target y is None"
            )
        labels = self._labels(y, len(samples))
        self.classes_, targets = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(
                f"y: holds one class alone, {str(self.classes_[0])!r}: classifier can't train when "
                "only one class is present; give samples of at least two"
            )
        whole = Samples(
            samples.inputs,
            targets,
            mask=samples.mask,
            groups=samples.groups if groups is None else groups,
            classes=[str(label) for label in self.classes_.tolist()],
            key="X: {}".format,
        )
        config = self._config()
        data, factories = prepare(config, whole, self.encoders, parts=("train", "validation"))
        check_groups(self.parameter_groups, factories)
        config = self._with_folds(config, data)
        method = make_method(config.method, config)
        method.check(data.modalities)
        given = self._given_budgets(data.modalities)
        folds = Run.folds_of(method, config, data, given)
        check_folds(data.train, folds or [])
        accelerator = make_accelerator(config.training)
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with surroundings(data.layouts, accelerator.device), torch.random.fork_rng(devices):
            run = Run(
                config,
                data,
                method,
                None,
                accelerator,
                factories,
                given,
                folds,
                parameter_groups=self.parameter_groups,
            )
            model, history, budgets, _ = run.fit()
        self.model_, self.history_, self.budgets_ = model.eval(), history, budgets
        self.modalities_ = data.modalities
        self._trained_by = asdict(config)
        return self

    def predict(self, X: Any, sample_mask: Any = None) -> np.ndarray:
        """[N] the most probable label of each sample; arguments as :meth:`fit`."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X, sample_mask).argmax(1)]

    def predict_proba(self, X: Any, sample_mask: Any = None) -> np.ndarray:
        """[N, K] float64: calibrated probabilities, columns in the order of ``classes_``."""
        check_is_fitted(self)
        found = self._predict(X, sample_mask).probabilities.double().numpy()
        return found / found.sum(1, keepdims=True)

    def score(self, X: Any, y: Any, sample_weight: Any = None, sample_mask: Any = None) -> float:
        """The accuracy of :meth:`predict` against the labels ``y`` [N]."""
        found = self.predict(X, sample_mask)
        return float(accuracy_score(as_array(y), found, sample_weight=sample_weight))

    def trust(self, X: Any, sample_mask: Any = None) -> np.ndarray:
        """[N, M] float64 in [0, 1]: how far each modality of each sample is trusted.

        It falls where an input is unusual and where it contradicts the others; 0 where missing, 1
        for a method that trusts everybody. Raises InputError for a method that knows no trust.
        """
        check_is_fitted(self)
        found = self._predict(X, sample_mask).trust
        if found is None:
            raise InputError(f"method: {self.method} has no gate, and so trusts nobody less")
        return found.double().numpy()

    def contributions(self, X: Any, sample_mask: Any = None) -> np.ndarray:
        """[N, M] float64 nats: what each modality adds to the log-odds of the prediction.

        Exact Shapley values over all subsets of the modalities: a row's sum is the log-odds of the
        predicted class minus those of its share of the training samples. Missing ones add 0.
        Raises InputError for more than six modalities.
        """
        check_is_fitted(self)
        found = self._predict(X, sample_mask).contributions
        if found is None:
            count = len(self.modalities_)
            raise InputError(
                f"X: {count} modalities have {2**count} subsets; "
                f"contributions are computed for at most {MAX_PLAYERS}"
            )
        return found.double().numpy()

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier into one safetensors file, whole or not at all.

        Encoders of your own and ``parameter_groups`` are not written; :meth:`load` takes them.
        """
        check_is_fitted(self)
        params = self.get_params(deep=False)
        own = tuple(params.pop("encoders") or ())
        params.pop("parameter_groups")
        if self._form.table == "array" and self.modalities is not None:
            params["modalities"] = self._form.columns  # a slice or range as positions
        given = self.budgets if isinstance(self.budgets, Budgets) else None
        if isinstance(self.class_weight, Mapping):  # JSON knows no key but a string
            params["class_weight"] = [*self.class_weight.items()]
        about = {
            "params": params | ({"budgets": None} if given else {}),
            "given_budgets": given and given.to_dict(),
            "classes": self.classes_.tolist(),
            "dtype": self.classes_.dtype.str,
            "budgets": None if self.budgets_ is None else self.budgets_.to_dict(),
            "history": self.history_,
            "trained_by": self._trained_by,
            "features": getattr(self, "n_features_in_", None),
            "names": list(map(str, getattr(self, "feature_names_in_", []))),
            "form": vars(self._form),
        }
        try:
            text = json.dumps(about, default=_plain)
        except TypeError as error:
            raise InputError(
                f"save: a parameter cannot be written ({error}); give plain numbers, strings, "
                "lists and dicts"
            ) from None
        save_model(Path(path).expanduser(), self.model_, own=own, metadata={"estimator": text})

    @classmethod
    def load(
        cls, path: str | Path, *, encoders: Mapping[str, Encoder] | None = None
    ) -> IIBalanceClassifier:
        """The classifier that :meth:`save` wrote; ``encoders`` of your own as they were given.

        Raises InputError for a file that is damaged or holds something else.
        """
        path = Path(path).expanduser()
        _, metadata = read_model(path)
        if "estimator" not in metadata:
            raise InputError(
                f"{path}: holds no IIBalanceClassifier; give the file that save wrote "
                "(iibalance.load reads the folder of a run)"
            )
        about = json.loads(metadata["estimator"])
        config = config_from(about["trained_by"])
        params = about["params"]
        if about["given_budgets"]:
            params["budgets"] = Budgets.from_dict(about["given_budgets"])
        if isinstance(params["class_weight"], list):
            params["class_weight"] = dict(params["class_weight"])
        found = cls(**params, encoders=encoders)
        found.model_, _ = read_saved(path, config, encoders)
        found.model_.eval()
        found.classes_ = np.array(about["classes"], dtype=about["dtype"])
        found._form = Form(**about["form"])
        found.budgets_ = None if about["budgets"] is None else Budgets.from_dict(about["budgets"])
        found.history_, found._trained_by = about["history"], about["trained_by"]
        found.modalities_ = found.model_.modalities
        if about["features"] is not None:
            found.n_features_in_ = about["features"]
        if about["names"]:
            found.feature_names_in_ = np.array(about["names"], dtype=object)
        return found

    # What comes in.

    def _first(self, X: Any, sample_mask: Any) -> tuple[Form, Samples]:
        """The form of the X to fit, and its samples."""
        check_kind(X)
        kind, columns = table_kind(X), self.modalities
        if kind == "frame":
            validate_data(self, X, skip_check_array=True)
            if columns is None:
                warnings.warn(
                    "modalities: not given, so all columns are one modality; "
                    'give modalities={"audio": ["a1", "a2"], ...}',
                    UserWarning,
                    stacklevel=3,
                )
        elif kind == "array":
            X = validate_data(self, X, dtype="numeric", ensure_all_finite="allow-nan")
        return Form.of(X, columns, sample_mask)

    def _read(self, X: Any, sample_mask: Any) -> Samples:
        """X as it was in fit, checked."""
        check_kind(X)
        kind, first = table_kind(X), self._form.table
        if kind == "frame" and first and self.modalities is None:
            validate_data(self, X, reset=False, skip_check_array=True)
        elif kind == "array" and (first == "array" or first and self.modalities is None):
            X = validate_data(self, X, reset=False, dtype="numeric", ensure_all_finite="allow-nan")
        return self._form.read(X, sample_mask)

    def _labels(self, y: Any, count: int) -> np.ndarray:
        y = as_array(y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        checked = check_labels(y, count, InputError)
        check_classification_targets(checked)
        return checked if y.dtype.kind in "OS" else y

    # How it is trained.

    def _config(self) -> RunConfig:
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = check_random_state(seed).randint(2**31)
        weight = self.class_weight
        if isinstance(weight, Mapping):  # by the names that the classes have within
            own = {label: str(label) for label in self.classes_.tolist()}
            weight = {own.get(label, str(label)): value for label, value in weight.items()}
        sections = {
            "data": DataConfig(
                layouts=dict(self.layouts or {}),
                standardize=self.standardize,
                split_seed=int(seed) % 2**32,
            ),
            "model": ModelConfig(self.embedding_dim, self.width, self.dropout),
            "training": TrainingConfig(
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                class_weight=weight,
                alone=False,
                progress=bool(self.verbose),
            ),
        }
        config = RunConfig(**sections, method=self.method, seed=int(seed), epochs=self.epochs)
        source = self.budgets if isinstance(self.budgets, str) else "unimodal"
        config = replace(config, budgets=replace(config.budgets, source=source, folds=self.folds))
        for name, value in (self.options or {}).items():
            section, dot, option = str(name).partition(".")
            part = getattr(config, section, None)
            if not dot or part is None or not hasattr(part, option) or section == "data":
                raise InputError(
                    f"options: {name!r} is no option here; give dotted names of the sections "
                    "model, objective, training, budgets and calibration, such as objective.alpha"
                )
            config = replace(config, **{section: replace(part, **{option: value})})
        return config

    def _with_folds(self, config: RunConfig, data: MultimodalData) -> RunConfig:
        """No more folds than the rarest class (or the number of groups) allows, but two."""
        train = data.train
        there = int(train.targets.bincount().min())
        if train.groups is not None:
            there = len(train.groups.unique())
        folds = max(2, min(config.budgets.folds, there))
        return replace(config, budgets=replace(config.budgets, folds=folds))

    def _given_budgets(self, modalities: Sequence[str]) -> Budgets | None:
        if isinstance(self.budgets, str):
            return None
        given = self.budgets
        if not isinstance(given, Budgets):
            given = Budgets.given(given)
        if set(given.modalities) != set(modalities):
            raise InputError(
                f"budgets: are of {', '.join(given.modalities)}, X has {', '.join(modalities)}; "
                "give one for each of these"
            )
        return given

    # How it predicts.

    def _predict(self, X: Any, sample_mask: Any) -> Prediction:
        return self.model_.predict(self._read(X, sample_mask))


def _plain(value: Any) -> Any:
    """What JSON does not know of a parameter: a number of numpy, a range."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (range, tuple, np.ndarray)):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")
