"""``iibalance.load``: a run's folder back to a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from iibalance.config import RunConfig, load_config
from iibalance.data.dataset import MultimodalData, Standardizer
from iibalance.errors import InputError
from iibalance.files import read_model, write_model
from iibalance.methods import make_method
from iibalance.nn.encoders import build_encoder
from iibalance.nn.model import MultimodalClassifier


def save_model(
    path: str | Path,
    model: MultimodalClassifier,
    config: RunConfig,
    data: MultimodalData,
    *,
    custom: bool = False,
) -> None:
    """Write the weights as safetensors, with what is needed to build the model again in the header."""
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

    Args:
        run: the folder that ``iibalance train --output`` wrote.
        encoders: modality name -> function that makes the encoder, for runs that were trained with the user's own encoders.
        device: where to put it.

    Raises :class:`~iibalance.errors.InputError` for a folder without a finished run and for a damaged file.

    >>> import tempfile
    >>> from iibalance import RunConfig, train
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
    ...     metrics = train(RunConfig(epochs=1, output=folder + "/run"))
    ...     model = load(folder + "/run")
    """
    run = Path(run).expanduser()
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    if not (run / "model.safetensors").exists():
        hint = (
            "resume it with --resume"
            if (run / "config.yaml").exists()
            else "give the folder that train --output wrote"
        )
        raise InputError(f"{run}: holds no trained model (model.safetensors); {hint}")
    config = load_config(run / "config.yaml")
    weights, metadata = read_model(run / "model.safetensors")
    try:
        about = json.loads(metadata["iibalance"])
        names, shapes, layouts = tuple(about["modalities"]), about["shapes"], about["layouts"]
    except (KeyError, ValueError):
        raise InputError(
            f"{run / 'model.safetensors'}: was not written by iibalance (no description in its header)"
        ) from None
    if about["custom_encoders"] and encoders is None:
        raise InputError(
            f"{run}: was trained with encoders of your own; give load(..., encoders={{name: function that makes it}})"
        )
    m = config.model
    parts = {
        name: encoders[name]()
        if encoders and name in encoders
        else build_encoder(
            shapes[name],
            embedding_dim=m.embedding_dim,
            width=m.width,
            dropout=m.dropout,
            layout=layouts[name],
        )
        for name in names
    }
    head = make_method(config.method, config).head(
        {name: about["embedding_dims"][name] for name in names}, len(about["classes"])
    )
    model = MultimodalClassifier(
        parts,
        head=head,
        standardizer=Standardizer({name: shapes[name] for name in names}, layouts),
        class_names=about["classes"],
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{run / 'model.safetensors'}: does not fit its configuration ({' '.join(str(error).split())[:200]})"
        ) from None
    return model.to(device).eval()
