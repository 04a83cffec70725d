"""``iibalance.load``: a run's folder back to a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from iibalance.config import RunConfig
from iibalance.config_files import load_config
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError
from iibalance.files import read_model, write_model
from iibalance.methods import make_method
from iibalance.nn.encoders import builtin
from iibalance.nn.model import MultimodalClassifier
from iibalance.nn.own_encoders import Encoder, as_factories
from iibalance.training.folder import RunFolder
from iibalance.training.header import description, own_encoders


def save_model(
    path: str | Path,
    model: MultimodalClassifier,
    *,
    own: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the weights as safetensors, and in the header what is needed to build the model again.

    ``own``: the modalities whose encoders are the user's. ``metadata``: more for the header.
    """
    standardizer = model.standardizer
    about = {
        "modalities": model.modalities,
        "shapes": standardizer.shapes,
        "layouts": standardizer.layouts,
        "off": standardizer.off,
        "vocabularies": standardizer.vocabularies,
        "kinds": standardizer.kinds,
        "columns": standardizer.columns,
        "classes": model.class_names,
        "embedding_dims": model.head.embedding_dims,
        "own_encoders": list(own),
        "format": 2,
    }
    header = {"iibalance": json.dumps(about), **(metadata or {})}
    write_model(path, model.state_dict(), header)


def load(
    run: str | Path,
    *,
    encoders: Mapping[str, Encoder] | None = None,
    device: str = "cpu",
) -> MultimodalClassifier:
    """The trained model of a run's folder, in evaluation mode.

    It is found from any working directory; a run with a method of your own needs that method's file
    where it was.

    Args:
        run: the folder that ``iibalance train --output`` wrote.
        encoders: modality name -> module, or function that makes one, for runs that were trained
            with the user's own encoders.
        device: where to put it.

    Raises :class:`~iibalance.errors.InputError` for a folder without a finished run and for a
    damaged file.

    >>> import tempfile
    >>> from iibalance import RunConfig, train
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
    ...     result = train(RunConfig(epochs=1, output=folder + "/run"))
    ...     model = load(folder + "/run")
    """
    folder = RunFolder(run)
    model, _ = read_saved(folder.model_path(), load_config(folder.config_path), encoders)
    return model.to(device).eval()


def read_saved(
    file: Path, config: RunConfig, encoders: Mapping[str, Encoder] | None = None
) -> tuple[MultimodalClassifier, dict[str, str]]:
    """The model that :func:`save_model` wrote, trained by ``config``, and the file's metadata."""
    weights, metadata = read_model(file)
    about = description(file, metadata)
    names = about["modalities"]
    own = own_encoders(about)
    made = as_factories(encoders, names)
    for name in own:
        if name not in made and "own_encoders" in about or own and not made:
            raise InputError(
                f"{file}: was trained with encoders of your own ({', '.join(own)}); "
                "give encoders={name: module, or function that makes it}"
            )
    standardizer = Standardizer(
        {name: about["shapes"][name] for name in names},
        about["layouts"],
        off=about.get("off", ()),
        vocabularies=about.get("vocabularies"),
        kinds=about.get("kinds"),
        columns=about.get("columns"),
    )
    model = MultimodalClassifier(
        {name: (made.get(name) or builtin(name, config.model, standardizer))() for name in names},
        head=make_method(config.method, config).head(
            {name: about["embedding_dims"][name] for name in names}, len(about["classes"])
        ),
        standardizer=standardizer,
        class_names=about["classes"],
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        if "base_rate" not in weights:
            raise InputError(
                f"{file}: was written by an earlier version of iibalance, whose gate was another; "
                "train it again"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: does not fit its configuration ({reason})") from None
    return model, metadata
