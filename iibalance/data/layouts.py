"""How to read one sample of a modality: as a vector, a sequence, an image or a video.

The layout decides which built-in encoder a modality gets, and over what the standardisation takes
its statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from iibalance.errors import InputError

Layout = Literal["vector", "sequence", "image", "video", "tokens", "raw"]

# How many dimensions a sample of each layout may have; None: any number (a vector is flattened).
LAYOUT_DIMENSIONS = {
    "vector": None,
    "sequence": (2, 3, 4),
    "image": (2, 3),
    "video": (3, 4),
    "tokens": (1,),  # token ids, 0 = padding
    "raw": None,  # as it is, for an encoder of the user's own
}

# An axis of 1 to 4 may be colour channels; a longer one is not taken for them.
MAX_CHANNELS = 4


def infer_layout(shape: Sequence[int], dtype: Any = None) -> Layout:
    """How to read one sample of ``shape``, which is without the batch dimension.

    ``dtype``, of numpy or torch, settles one doubt.

    =========================== =================================================================
    [D]                         vector
    [A, A]                      image (one channel)
    [T, C]                      sequence of T frames with C features
    [C, H, W], C in 1..4        image, channels first
    [A, B, C], C in 1..4        image, channels last, if ``dtype`` is an integer type or A = B;
                                else a sequence of A frames of B points with C coordinates
                                (skeletons)
    [T, H, W]                   video of one channel (no axis of 1..4 at either end)
    [T, C, H, W], [T, H, W, C]  video, C in 1..4
    =========================== =================================================================

    Raises InputError for anything else (0 or more than 4 dimensions, an empty one, channels at both
    ends or at neither): pass the layout yourself (``layouts={"name": "image"}``), or bring your own
    encoder.

    >>> infer_layout((40, 26)), infer_layout((28, 28)), infer_layout((16, 30, 40))
    ('sequence', 'image', 'video')
    >>> infer_layout((32, 20, 3)), infer_layout((32, 20, 3), "uint8")
    ('sequence', 'image')
    """
    shape = tuple(int(size) for size in shape)
    channels = [1 <= size <= MAX_CHANNELS for size in shape]
    if not shape or min(shape) < 1:
        raise InputError(
            f"a sample of shape {shape} holds nothing to encode; "
            "give every sample at least one feature"
        )
    if len(shape) == 1:
        return "vector"
    if len(shape) == 2:
        return "image" if shape[0] == shape[1] else "sequence"
    if len(shape) == 3:
        if channels[0] and (not channels[2] or shape[1] == shape[2]):
            return "image"
        if channels[2] and not channels[0]:
            return "image" if _is_integer(dtype) or shape[0] == shape[1] else "sequence"
        if not channels[2]:
            return "video"
    if len(shape) == 4 and channels[1] != channels[3]:
        return "video"
    raise InputError(
        f"a sample of shape {shape} can be read in more than one way; pass its layout "
        "(vector, sequence, image, video) or bring your own encoder"
    )


def check_layout(shape: Sequence[int], layout: str) -> None:
    """InputError unless ``layout`` exists and fits the number of dimensions of ``shape``.

    >>> check_layout((40, 26), "sequence")
    """
    if layout not in LAYOUT_DIMENSIONS:
        raise InputError(f"layout {layout!r} is none of {', '.join(LAYOUT_DIMENSIONS)}")
    allowed = LAYOUT_DIMENSIONS[layout]
    if allowed and len(shape) not in allowed:
        raise InputError(
            f"layout {layout!r} takes samples of {' or '.join(map(str, allowed))} dimensions, "
            f"not of shape {tuple(shape)}"
        )


def choose_layouts(
    inputs: Mapping[str, Any],
    given: Mapping[str, str],
    error: Callable[[str], InputError],
    key: Callable[[str], str],
    own: Collection[str] = (),
) -> dict[str, str]:
    """The layout of each modality of ``inputs``: the one the user gave, or else inferred.

    Args:
        inputs: modality name -> array [N, ...], or a dict of them.
        given: layouts that the user gave.
        error, key: make an InputError, and say how it calls a modality.
        own: modalities with an encoder of the user's own. Their integers (but bytes, which are
            pixels) are ids, and what cannot be told is taken as it is.
    """
    unknown = sorted(set(given) - set(inputs))
    if unknown:
        raise InputError(
            f"data.layouts: {unknown[0]!r} is no modality in use; there are {', '.join(inputs)}"
        )
    layouts: dict[str, str] = {}
    for name, array in inputs.items():
        try:
            layouts[name] = given.get(name) or _layout_of(array, name in own)
            if isinstance(array, Mapping):
                if layouts[name] != "raw" or name not in own:
                    raise InputError(
                        f"holds the fields {', '.join(array)}, which only an encoder of your own "
                        f"can read; give encoders={{{name!r}: ...}}"
                    )
            elif layouts[name] == "raw" and name not in own:
                raise InputError(
                    "layout 'raw' is read by an encoder of your own; "
                    f"give encoders={{{name!r}: ...}}, or another layout"
                )
            else:
                check_layout(array.shape[1:], layouts[name])
        except InputError as found:
            raise error(f"{key(name)}: {found}") from None
    return layouts


def _layout_of(array: Any, own: bool) -> str:
    if isinstance(array, Mapping):
        return "raw"
    if own and _is_integer(array.dtype) and array.dtype.itemsize > 1:
        return "raw"
    try:
        return infer_layout(array.shape[1:], array.dtype)
    except InputError:
        if own:
            return "raw"
        raise


def _is_integer(dtype: Any) -> bool:
    if dtype is None:
        return False
    if str(dtype).startswith("torch."):
        return "int" in str(dtype)
    return np.dtype(dtype).kind in "iu"
