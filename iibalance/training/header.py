"""What the header of a saved model says of it: modalities, classes, whose encoders.

It is read without the weights and without torch, so that a command can check its data first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iibalance.errors import InputError
from iibalance.files import read_metadata

KEYS = ("modalities", "shapes", "layouts", "classes", "embedding_dims")


def read_description(file: Path) -> dict[str, Any]:
    """What ``save_model`` described in the header of ``file``.

    Raises InputError for a file that is missing, damaged or not ours.
    """
    return description(file, read_metadata(file))


def description(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description in the ``metadata`` of ``file``; InputError where it holds none.

    >>> description(Path("a.safetensors"), {"iibalance": "{}"})
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: a.safetensors: was not written by iibalance (no description in its
        header); give the folder that train --output wrote
    """
    try:
        about = json.loads(metadata["iibalance"])
    except (KeyError, ValueError):
        about = None
    if not isinstance(about, dict) or any(key not in about for key in KEYS):
        raise InputError(
            f"{file}: was not written by iibalance (no description in its header); "
            "give the folder that train --output wrote"
        )
    return about


def own_encoders(about: Mapping[str, Any]) -> list[str]:
    """The modalities whose encoders are the user's; the first format knew all or none.

    >>> own_encoders({"modalities": ["audio", "text"], "own_encoders": ["text"]})
    ['text']
    """
    everything = about["modalities"] if about.get("custom_encoders") else []
    return list(about.get("own_encoders", everything))
