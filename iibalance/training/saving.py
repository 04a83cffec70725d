"""``iibalance.load``: a run's folder back to a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from iibalance.config import load_config
from iibalance.data.dataset import MultimodalData
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError
from iibalance.files import read_model, write_model
from iibalance.methods import make_method
from iibalance.nn.encoders import build_encoder
from iibalance.nn.model import MultimodalClassifier


def save_model(
    path: str | Path,
    model: MultimodalClassifier,
    data: MultimodalData,
    *,
    custom: bool = False,
) -> None:
    """Write the weights as safetensors, and in the header what is needed to build the model again.

    ``custom``: whether its encoders are the user's own.
    """
    description = {
        "modalities": model.modalities,
        "shapes": data.shapes,
        "layouts": data.layouts,
        "classes": model.class_names,
        "embedding_dims": model.head.embedding_dims,
        "custom_encoders": custom,
        "format": 1,
    }
    write_model(path, model.state_dict(), {"iibalance": json.dumps(description)})


def load(
    run: str | Path,
    *,
    encoders: Mapping[str, Callable[[], nn.Module]] | None = None,
    device: str = "cpu",
) -> MultimodalClassifier:
    """The trained model of a run's folder, in evaluation mode.

    It is found from any working directory; a run with a method of your own needs that method's file
    where it was.

    Args:
        run: the folder that ``iibalance train --output`` wrote.
        encoders: modality name -> function that makes the encoder, for runs that were trained with
            the user's own encoders.
        device: where to put it.

    Raises :class:`~iibalance.errors.InputError` for a folder without a finished run and for a
    damaged file.

    >>> import tempfile
    >>> from iibalance import RunConfig, train
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
    ...     metrics = train(RunConfig(epochs=1, output=folder + "/run"))
    ...     model = load(folder + "/run")
    """
    run = Path(run).expanduser()
    file = run / "model.safetensors"
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    if not file.exists():
        started = (run / "config.yaml").exists()
        hint = "resume it with --resume" if started else "give the folder that train --output wrote"
        raise InputError(f"{run}: holds no trained model (model.safetensors); {hint}")
    config = load_config(run / "config.yaml")
    weights, metadata = read_model(file)
    try:
        about = json.loads(metadata["iibalance"])
        names, shapes, layouts = about["modalities"], about["shapes"], about["layouts"]
    except (KeyError, ValueError):
        raise InputError(
            f"{file}: was not written by iibalance (no description in its header)"
        ) from None
    if about["custom_encoders"] and encoders is None:
        raise InputError(
            f"{run}: was trained with encoders of your own; "
            "give load(..., encoders={name: function that makes it})"
        )
    parts = {}
    for name in names:
        if encoders and name in encoders:
            parts[name] = encoders[name]()
        else:
            parts[name] = build_encoder(
                shapes[name],
                embedding_dim=config.model.embedding_dim,
                width=config.model.width,
                dropout=config.model.dropout,
                layout=layouts[name],
            )
    sizes = {name: about["embedding_dims"][name] for name in names}
    model = MultimodalClassifier(
        parts,
        head=make_method(config.method, config).head(sizes, len(about["classes"])),
        standardizer=Standardizer({name: shapes[name] for name in names}, layouts),
        class_names=about["classes"],
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: does not fit its configuration ({reason})") from None
    return model.to(device).eval()
