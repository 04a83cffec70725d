"""Generated classification sets of which it is known what each modality can tell.

    python -m benchmarks.generated --output DIR            writes DIR/unique.npz, ...
    python -m benchmarks.generated --truth                 prints the table below

| set | K | H(Y) | I(1; Y) | I(2; Y) | I(X; Y) | more | acc. 1 | acc. 2 | both | s.e. |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| unique | 9 | 2.197 | 0.801 | 0.658 | 1.459 | 0.000 | 0.295 | 0.274 | 0.729 | 0.0010 |
| redundant | 6 | 1.792 | 1.232 | 1.036 | 1.491 | -0.777 | 0.771 | 0.686 | 0.881 | 0.0007 |
| copies | 6 | 1.792 | 1.232 | 1.232 | 1.232 | -1.232 | 0.771 | 0.771 | 0.771 | 0.0006 |
| synergy | 2 | 0.693 | 0.000 | 0.000 | 0.448 | 0.448 | 0.500 | 0.500 | 0.896 | 0.0005 |
| mixed | 8 | 2.079 | 0.948 | 0.422 | 1.553 | 0.182 | 0.413 | 0.221 | 0.799 | 0.0008 |
| mixed: unique | 2 | 0.693 | 0.527 | 0.000 | 0.527 | 0.000 | 0.933 | 0.500 | 0.933 | 0.0005 |
| mixed: redundant | 2 | 0.693 | 0.423 | 0.421 | 0.578 | -0.266 | 0.885 | 0.884 | 0.955 | 0.0005 |
| mixed: synergy | 2 | 0.693 | 0.000 | 0.000 | 0.448 | 0.448 | 0.500 | 0.500 | 0.896 | 0.0005 |
| unbalanced | 6 | 1.244 | 0.862 | 0.724 | 1.038 | -0.548 | 0.851 | 0.799 | 0.921 | 0.0018 |
| useless | 6 | 1.792 | 1.390 | 0.000 | 1.390 | 0.000 | 0.838 | 0.167 | 0.838 | 0.0006 |
| dominant | 6 | 1.792 | 1.747 | 0.404 | 1.752 | -0.398 | 0.984 | 0.419 | 0.986 | 0.0006 |

Each set has two modalities, vectors of 32, called ``first`` and ``second``, ``good`` and
``useless``, or ``strong`` and ``weak``; the table has them in this order. Its figures are in nats:
H(Y) exact, the others means over 200,000 draws of the known densities; s.e. is the largest standard
error in the row. "More" is I(X; Y) less those of the two alone: above 0 where they tell more
together (synergy), below 0 where they tell the same (redundancy). "acc." is the accuracy of the
best guess from one modality, "both" that from the two. ``mixed: ...`` are the parts of that set;
they are independent, so what they tell adds up.

Behind the modalities stand *states*: the class, and what else the set is made of. A state gives
every modality a mean; standard normal errors are added, which makes the modality's *signal*. The
signal and two numbers that tell nothing then go through a map that is one-to-one, random and fixed
for each set and modality (:class:`View`). So an encoder has something to undo and no information is
lost: I(X_m; Y) is that of the signal, whose density is known.

How hard it is to undo, on the good modality of ``useless`` (best guess 84 %): logistic regression
has 61 %, scikit-learn's MLP (256, 128) 75 %. No method of this package was looked at.
"""

from __future__ import annotations

import argparse
import io
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import softmax, xlogy

from iibalance.errors import InputError
from iibalance.files import write_bytes

SIZE, NUISANCES = 32, 2  # features of a modality, and how many of its inner numbers tell nothing
SHEARS, BENT = 2, 2.0  # how often a view bends its numbers, and how far
DRAWS = 200_000
COUNTS = {"train": 1000, "validation": 300, "test": 1500}


class Model(NamedTuple):
    """Classes, and the signal of each modality: a mean that the state gives, and errors.

    The errors are ``normal @ errors[m]``, of q independent standard normal numbers that all
    modalities have in common.
    """

    prior: np.ndarray  #: [S] probability of each state
    labels: np.ndarray  #: [S] its class
    means: dict[str, np.ndarray]  #: modality -> [S, d_m]
    errors: dict[str, np.ndarray]  #: modality -> [q, d_m]

    @property
    def classes(self) -> np.ndarray:
        """[K] probability of each class."""
        return np.bincount(self.labels, self.prior)

    def draw(self, states: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Signals [N, d_m] of samples in these ``states`` [N]."""
        normal = rng.standard_normal((len(states), len(next(iter(self.errors.values())))))
        return {name: self.means[name][states] + normal @ self.errors[name] for name in self.means}

    def posterior(self, signals: Mapping[str, np.ndarray]) -> np.ndarray:
        """p(class | signals) [N, K], of the modalities that ``signals`` names, by Bayes' rule.

        All states have one covariance, so what is quadratic in the signals is no matter.
        """
        means = np.concatenate([self.means[name] for name in signals], 1)
        errors = np.concatenate([self.errors[name] for name in signals], 1)
        given = np.concatenate(list(signals.values()), 1)
        # Errors in common make the covariance singular; means differ only where it is not.
        slopes = means @ np.linalg.pinv(errors.T @ errors, 1e-9, hermitian=True)  # [S, d]
        scores = np.log(self.prior) - 0.5 * (slopes * means).sum(1) + given @ slopes.T
        return softmax(scores, 1) @ np.eye(len(self.classes))[self.labels]


class Figure(NamedTuple):
    """A mean over draws and its standard error."""

    value: float
    error: float


class Truth(NamedTuple):
    """What can be known of the label: from each modality, and from ``all``."""

    entropy: float  #: H(Y) in nats
    information: dict[str, Figure]  #: I(X; Y) in nats
    accuracy: dict[str, Figure]  #: of the best guess


class Set(NamedTuple):
    """A data set: what it is, and the parts whose labels together are its classes."""

    about: str
    parts: dict[str, Model]

    @property
    def model(self) -> Model:
        """The parts as one."""
        return product(*self.parts.values())


def told(prior: Sequence[float], distances: Mapping[str, float], *, copies: bool = False) -> Model:
    """Classes that every modality tells by itself, given the class each with errors of its own.

    The means of the K classes are the corners of a regular polygon in two dimensions, neighbours
    ``distances[m]`` standard errors apart; distance 0 tells nothing. With ``copies`` the modalities
    have their errors in common.

    Raises InputError for copies at several distances: their difference would tell all.

    >>> told([0.5, 0.5], {"a": 2.0}).means["a"].round(3).tolist()
    [[1.0, 0.0], [-1.0, 0.0]]
    """
    if copies and len(set(distances.values())) > 1:
        raise InputError("distances: those of copies differ; give all modalities the same")
    angles = 2 * np.pi * np.arange(len(prior)) / len(prior)
    corners = np.stack([np.cos(angles), np.sin(angles)], 1) / (2 * np.sin(np.pi / len(prior)))
    own = np.eye(2 if copies else 2 * len(distances))
    errors = {
        name: own if copies else own[:, 2 * index : 2 * index + 2]
        for index, name in enumerate(distances)
    }
    means = {name: distance * corners for name, distance in distances.items()}
    return Model(np.array(prior, float), np.arange(len(prior)), means, errors)


def xor(distances: Mapping[str, float]) -> Model:
    """Two classes: whether the bits, one a modality, are odd in number. Alone each tells nothing.

    The two means of a modality are ``distances[m]`` standard errors apart.
    """
    bits = (np.arange(2 ** len(distances))[:, None] >> np.arange(len(distances))) & 1  # [S, M]
    means = {n: d * (bits[:, [i]] - 0.5) for i, (n, d) in enumerate(distances.items())}
    errors = {n: np.eye(len(distances))[:, [i]] for i, n in enumerate(distances)}
    return Model(np.full(len(bits), 1 / len(bits)), bits.sum(1) % 2, means, errors)


def product(*models: Model) -> Model:
    """Independent parts side by side: a class for each combination of theirs.

    >>> product(told([0.5, 0.5], {"a": 1.0}), told([0.9, 0.1], {"a": 1.0})).classes.tolist()
    [0.45, 0.05, 0.45, 0.05]
    """
    first, *rest = models
    if not rest:
        return first
    other = product(*rest)
    names = list(dict.fromkeys([*first.means, *other.means]))
    here, there = (index.ravel() for index in np.indices((len(first.prior), len(other.prior))))

    def beside(name: str) -> tuple[np.ndarray, np.ndarray]:
        """Means and errors of both parts: a part may leave a modality out."""
        parts = [(part, states) for part, states in ((first, here), (other, there))]
        means = [part.means[name][states] for part, states in parts if name in part.means]
        rows = [len(next(iter(part.errors.values()))) for part, _ in parts]
        own = [part.errors.get(name, np.zeros((q, 0))) for (part, _), q in zip(parts, rows)]
        above = np.concatenate([own[0], np.zeros((rows[0], own[1].shape[1]))], 1)
        below = np.concatenate([np.zeros((rows[1], own[0].shape[1])), own[1]], 1)
        return np.concatenate(means, 1), np.concatenate([above, below])

    pairs = {name: beside(name) for name in names}
    return Model(
        first.prior[here] * other.prior[there],
        first.labels[here] * len(other.classes) + other.labels[there],
        {name: means for name, (means, _) in pairs.items()},
        {name: errors for name, (_, errors) in pairs.items()},
    )


def even(count: int) -> list[float]:
    """The probabilities of ``count`` classes that are as frequent."""
    return [1 / count] * count


RARE = (0.60, 0.16, 0.10, 0.07, 0.05, 0.02)
SETS = {
    "unique": Set(
        "each modality tells another part of the label: classes are pairs (a, b)",
        {"a": told(even(3), {"first": 3.0}), "b": told(even(3), {"second": 2.5})},
    ),
    "redundant": Set(
        "both modalities tell the class, each with errors of its own",
        {"class": told(even(6), {"first": 2.4, "second": 2.0})},
    ),
    "copies": Set(
        "both modalities tell the class with the same errors: the second adds nothing",
        {"class": told(even(6), {"first": 2.4, "second": 2.4}, copies=True)},
    ),
    "synergy": Set(
        "the class is a XOR b, a bit a modality: each alone tells nothing",
        {"class": xor({"first": 3.2, "second": 3.2})},
    ),
    "mixed": Set(
        "classes are triples of bits: one that the first tells, one that both tell, and a XOR",
        {
            "unique": told(even(2), {"first": 3.0}),
            "redundant": told(even(2), {"first": 2.4, "second": 2.4}),
            "synergy": xor({"first": 3.2, "second": 3.2}),
        },
    ),
    "unbalanced": Set(
        "one class has 60 %, the rarest 2 %; both modalities tell it",
        {"class": told(RARE, {"first": 2.4, "second": 2.0})},
    ),
    "useless": Set(
        "a modality of pure noise beside a good one",
        {"class": told(even(6), {"good": 2.8, "useless": 0.0})},
    ),
    "dominant": Set(
        "a strong modality that is right on nearly everything beside a weak one",
        {"class": told(even(6), {"strong": 4.8, "weak": 1.0})},
    ),
}


def truth(model: Model, draws: int = DRAWS, seed: int = 0) -> Truth:
    """H(Y), I(X_m; Y), I(X; Y) and the accuracies of the best guesses.

    I(X; Y) is the mean over draws of the divergence KL(p(y | x) || p(y)), and the accuracy that of
    the largest p(y | x): what is known exactly is not drawn.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"truth")])
    signals = model.draw(rng.choice(len(model.prior), draws, p=model.prior), rng)
    classes = model.classes
    asked = {**{name: {name: signals[name]} for name in signals}, "all": signals}
    information, accuracy = {}, {}
    for name, part in asked.items():
        found = model.posterior(part)
        divergence = (xlogy(found, found) - xlogy(found, classes)).sum(1).clip(0)
        information[name], accuracy[name] = _figure(divergence), _figure(found.max(1))
    return Truth(float(-xlogy(classes, classes).sum()), information, accuracy)


def _figure(values: np.ndarray) -> Figure:
    return Figure(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


class View:
    """The map of one modality: [N, d] -> [N, ``SIZE``], one-to-one and the same for every seed.

    Twice the numbers are turned and a half of them is shifted by what the other half says, along a
    cosine: as that half is still there, the shift can be taken back. Then they are turned into
    ``SIZE`` dimensions.
    """

    def __init__(self, name: str, modality: str, inner: int):
        rng = np.random.default_rng(zlib.crc32(f"{name} {modality}".encode()))
        self.half = inner // 2
        self.shears = [
            (_turn(inner, rng), *self._wave(inner - self.half, rng)) for _ in range(SHEARS)
        ]
        self.lift = _turn(SIZE, rng)[:inner]

    def _wave(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """[half, size] and [size]: what the cosine is of, as it comes from the other half."""
        return _turn(size, rng)[: self.half], rng.uniform(-np.pi, np.pi, size)

    def __call__(self, inner: np.ndarray) -> np.ndarray:
        for turn, weight, phase in self.shears:
            inner = inner @ turn
            kept, moved = inner[:, : self.half], inner[:, self.half :]
            inner = np.concatenate([kept, moved + BENT * np.cos(kept @ weight + phase)], 1)
        return inner @ self.lift


def _turn(size: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def generate(
    name: str, counts: Mapping[str, int] = COUNTS, seed: int = 0, draws: int = DRAWS
) -> dict[str, np.ndarray]:
    """The arrays of set ``name``: ``x_<modality>`` [N, 32], ``y``, ``split`` and ``about``.

    Each split has draws of its own, so that one keeps its samples when another's number changes.

    Raises InputError for an unknown set, and where a class has no training sample.

    >>> {key: array.shape for key, array in generate("synergy", draws=1000).items()}
    {'x_first': (2800, 32), 'x_second': (2800, 32), 'y': (2800,), 'split': (2800,), 'about': (8,)}
    """
    model = find(name).model
    views = {m: View(name, m, means.shape[1] + NUISANCES) for m, means in model.means.items()}
    parts: dict[str, list[np.ndarray]] = {}
    for code, count in enumerate(counts.values()):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), code])
        states = rng.choice(len(model.prior), count, p=model.prior)
        arrays = {"y": model.labels[states], "split": np.full(count, code)}
        if code == 0:
            _check_training(name, arrays["y"], len(model.classes), seed)
        for modality, signal in model.draw(states, rng).items():
            inner = np.concatenate([signal, rng.standard_normal((count, NUISANCES))], 1)
            arrays[f"x_{modality}"] = views[modality](inner).astype(np.float32)
        for key, array in arrays.items():
            parts.setdefault(key, []).append(array)
    keys = sorted(parts, key=lambda key: not key.startswith("x_"))
    found = {key: np.concatenate(parts[key]) for key in keys}
    return found | {"about": np.array(_about(name, seed, truth(model, draws)))}


def find(name: str) -> Set:
    """The set of that name; InputError where there is none."""
    if name not in SETS:
        raise InputError(f"sets: {name!r} is none of {', '.join(SETS)}")
    return SETS[name]


def _check_training(name: str, labels: np.ndarray, classes: int, seed: int) -> None:
    lacking = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(lacking):
        raise InputError(
            f"train: class {lacking[0]} of {name} has none of {len(labels)} training samples "
            f"(seed {seed}); give more, or leave this set out with --sets"
        )


def _about(name: str, seed: int, found: Truth) -> list[str]:
    """What a file says of itself."""
    lines = [f"{name}: {SETS[name].about}", f"seed {seed}", f"H(Y) = {found.entropy:.4f} nats"]
    for part, figure in found.information.items():
        lines.append(f"I({part}; Y) = {figure.value:.4f} +- {figure.error:.4f} nats")
    best = ", ".join(f"{part} {figure.value:.4f}" for part, figure in found.accuracy.items())
    return [*lines, f"accuracy of the best guess: {best}", "made by benchmarks.generated"]


HEADER = (
    "set", "K", "H(Y)", "I(1; Y)", "I(2; Y)", "I(X; Y)", "more", "acc. 1", "acc. 2", "both", "s.e.",
)  # fmt: skip


def table(names: Sequence[str] = tuple(SETS), draws: int = DRAWS) -> list[str]:
    """The truth of these sets, and of a mixed set's parts, as lines of Markdown."""
    rows = []
    for name in names:
        models = {name: find(name).model}
        if name == "mixed":
            models |= {f"{name}: {part}": model for part, model in SETS[name].parts.items()}
        rows += [
            _row(key, model, tuple(models[name].means), draws) for key, model in models.items()
        ]
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _row(name: str, model: Model, modalities: Sequence[str], draws: int) -> list[str]:
    found = truth(model, draws)
    nothing = Figure(0.0, 0.0), Figure(float(model.classes.max()), 0.0)  # what a part leaves out
    tells, guesses = (
        [figures.get(key, default) for key in (*modalities, "all")]
        for figures, default in zip((found.information, found.accuracy), nothing)
    )
    more = tells[-1].value - sum(figure.value for figure in tells[:-1])
    values = [found.entropy, *(figure.value for figure in tells), more]
    error = max(figure.error for figure in (*tells, *guesses))
    return [
        name,
        str(len(model.classes)),
        *(_short(value) for value in values),
        *(_short(figure.value) for figure in guesses),
        f"{error:.4f}",
    ]


def _short(value: float) -> str:
    """Three decimals, and no zero with a sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def write(name: str, folder: Path, counts: Mapping[str, int], seed: int, draws: int) -> Path:
    """Write a set's file into ``folder``; the same bytes for the same arguments."""
    buffer, path = io.BytesIO(), folder / f"{name}.npz"
    np.savez_compressed(buffer, **generate(name, counts, seed, draws))
    write_bytes(path, buffer.getvalue())
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generated", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="write <set>.npz into this folder")
    add("--sets", nargs="+", default=list(SETS), metavar="SET", help=f"of {', '.join(SETS)}")
    for part, count in COUNTS.items():
        add(f"--{part}", type=int, default=count, help=f"{part} samples ({count})")
    add("--seed", type=int, default=0, help="draws other samples of the same sets (0)")
    add("--truth", action="store_true", help="print what each set's modalities can tell")
    add("--draws", type=int, default=DRAWS, help=f"draws that the truth is a mean of ({DRAWS})")
    return parser


def _run(options: argparse.Namespace) -> None:
    counts = {part: getattr(options, part) for part in COUNTS}
    least = {**dict.fromkeys(COUNTS, 1), "seed": 0, "draws": 2}
    for option, lowest in least.items():
        if getattr(options, option) < lowest:
            value = getattr(options, option)
            raise InputError(f"{option}: {value} is too small; give {lowest} or more")
    for name in options.sets:
        find(name)
    if not options.truth and options.output is None:
        raise InputError("output: no folder is given; give --output DIR, or --truth for the table")
    if options.truth:
        print("\n".join(table(options.sets, options.draws)))
    if options.output is not None:
        folder = options.output.expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"output: {folder} cannot be made ({error.strerror}); choose another folder"
            ) from None
        for name in options.sets:
            path = write(name, folder, counts, options.seed, options.draws)
            print(f"written to {path}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for what cannot be done, which is told in one line."""
    try:
        _run(_parser().parse_args(arguments))
    except InputError as error:
        print(f"generated: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
