"""The generated sets: their truths by integrals on a grid, and that files hold what they say."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from benchmarks import generated
from benchmarks.generated import (
    NUISANCES,
    RARE,
    SETS,
    Model,
    View,
    generate,
    product,
    told,
    truth,
    xor,
)
from iibalance.config import DataConfig
from iibalance.data.load import load_data
from iibalance.data.sources import read_samples
from iibalance.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
GRID = np.arange(-14, 14, 0.04)


def polygon(prior, distance: float) -> tuple[float, float]:
    """(I(X; Y), accuracy of the best guess) of classes at a polygon's corners: sums over a grid."""
    count = len(prior)
    radius = distance / (2 * math.sin(math.pi / count))
    density = []
    for k, share in enumerate(prior):
        angle = 2 * math.pi * k / count
        across = norm.pdf(GRID, radius * math.cos(angle))[:, None]
        density.append(share * across * norm.pdf(GRID, radius * math.sin(angle))[None])
    return integrals(density, 0.04**2)


def odd(first: float, second: float) -> tuple[float, float]:
    """The same of a XOR of two bits: sums over a grid of both signals."""
    density = [0.0, 0.0]
    for a in (0, 1):
        for b in (0, 1):
            along = norm.pdf(GRID, first * (a - 0.5))[:, None]
            density[a ^ b] = density[a ^ b] + along * norm.pdf(GRID, second * (b - 0.5)) / 4
    return integrals(density, 0.04**2)


def integrals(density: list, cell: float) -> tuple[float, float]:
    """From the densities p(x, y) of each class on a grid with cells of that size."""
    joint = np.stack(density)
    total = joint.sum(0)
    information = 0.0
    for part in joint:
        share = part.sum() * cell
        ratio = np.where(part > 0, part / np.where(total > 0, total, 1) / share, 1)
        information += float((part * np.log(ratio)).sum() * cell)
    assert abs(total.sum() * cell - 1) < 1e-6
    return information, float(joint.max(0).sum() * cell)


SIXTHS, THIRDS, HALVES = [1 / 6] * 6, [1 / 3] * 3, [1 / 2] * 2


def known() -> dict[str, list[tuple[float, float]]]:
    """set -> (information, accuracy) of the first modality, of the second and of both.

    Two looks at one class with independent errors are one from farther apart: distances add as
    sides of a right angle. Independent parts: information adds, chances multiply.
    """
    a, b = polygon(THIRDS, 3.0), polygon(THIRDS, 2.5)
    one, two, both = (
        polygon(HALVES, 3.0),
        polygon(HALVES, 2.4),
        polygon(HALVES, math.hypot(2.4, 2.4)),
    )
    xored = odd(3.2, 3.2)
    strong, weak = polygon(SIXTHS, 4.8), polygon(SIXTHS, 1.0)
    first, second = polygon(SIXTHS, 2.4), polygon(SIXTHS, 2.0)
    good = polygon(SIXTHS, 2.8)
    return {
        "unique": [(a[0], a[1] / 3), (b[0], b[1] / 3), (a[0] + b[0], a[1] * b[1])],
        "redundant": [first, second, polygon(SIXTHS, math.hypot(2.4, 2.0))],
        "copies": [first, first, first],
        "synergy": [(0.0, 0.5), (0.0, 0.5), xored],
        "mixed": [
            (one[0] + two[0], one[1] * two[1] / 2),
            (two[0], two[1] / 4),
            (one[0] + both[0] + xored[0], one[1] * both[1] * xored[1]),
        ],
        "mixed: unique": [one, (0.0, 0.5), one],
        "mixed: redundant": [two, two, both],
        "mixed: synergy": [(0.0, 0.5), (0.0, 0.5), xored],
        "unbalanced": [polygon(RARE, d) for d in (2.4, 2.0, math.hypot(2.4, 2.0))],
        "useless": [good, (0.0, 1 / 6), good],
        "dominant": [strong, weak, polygon(SIXTHS, math.hypot(4.8, 1.0))],
    }


@pytest.fixture(scope="module")
def integrated():
    return known()


def test_the_grid_agrees_with_one_integral_along_a_line():
    """Two classes: the information by quad, the accuracy by the normal distribution."""
    distance = 2.4

    def divergence(x: float) -> float:
        here, there = norm.pdf(x, distance / 2), norm.pdf(x, -distance / 2)
        return here * math.log(2 * here / (here + there))

    information, accuracy = polygon(HALVES, distance)
    assert information == pytest.approx(quad(divergence, -12, 12)[0], abs=1e-6)
    assert accuracy == pytest.approx(norm.cdf(distance / 2), abs=1e-3)  # the grid's own cells
    right = norm.cdf(1.6)
    assert odd(3.2, 3.2)[1] == pytest.approx(right**2 + (1 - right) ** 2, abs=1e-3)


@pytest.mark.parametrize("name", SETS)
def test_the_truth_is_that_of_the_integrals(name, integrated):
    model = SETS[name].model
    found = truth(model, 60_000, seed=3)
    keys = [*model.means, "all"]
    assert list(found.information) == list(found.accuracy) == keys
    for key, (information, accuracy) in zip(keys, integrated[name]):
        for figure, exact in (
            (found.information[key], information),
            (found.accuracy[key], accuracy),
        ):
            assert figure.error < 0.0035
            assert abs(figure.value - exact) < 4 * figure.error + 1e-4
    entropy = -sum(share * math.log(share) for share in model.classes)
    assert found.entropy == pytest.approx(entropy, abs=1e-12)


def test_what_is_known_exactly_is_exact():
    for name, modality in (("synergy", "first"), ("synergy", "second"), ("useless", "useless")):
        model = SETS[name].model
        found = truth(model, 500)
        assert found.information[modality] == pytest.approx((0, 0), abs=1e-12)
        assert found.accuracy[modality] == pytest.approx((1 / len(model.classes), 0), abs=1e-12)
    copies = truth(SETS["copies"].model, 500)
    assert copies.information["all"] == pytest.approx(copies.information["first"], abs=1e-12)
    assert copies.information["all"] == pytest.approx(copies.information["second"], abs=1e-12)
    useless = truth(SETS["useless"].model, 500)
    assert useless.information["all"] == pytest.approx(useless.information["good"], abs=1e-12)


def test_the_standard_error_is_that_of_means_over_draws():
    model = SETS["redundant"].model
    means = [truth(model, 500, seed).information["first"] for seed in range(200)]
    spread = np.std([figure.value for figure in means], ddof=1)
    assert np.mean([figure.error for figure in means]) == pytest.approx(spread, rel=0.2)


def test_a_posterior_is_bayes_rule_on_one_sample_after_the_other():
    """Two parts, one with three modalities of which the other lacks one; errors in common."""
    parts = (
        told([0.5, 0.3, 0.2], {"a": 2.0, "b": 2.0}, copies=True),
        xor({"a": 1.5, "c": 1.0}),
    )
    model = product(*parts)
    assert np.allclose(model.classes, np.outer([0.5, 0.3, 0.2], [0.5, 0.5]).ravel())
    assert {name: means.shape for name, means in model.means.items()} == {
        "a": (12, 3),
        "b": (12, 2),
        "c": (12, 1),
    }
    rng = np.random.default_rng(0)
    signals = model.draw(rng.integers(0, 12, 20), rng)
    for names in (["a"], ["c"], ["a", "c"]):
        found = model.posterior({name: signals[name] for name in names})
        for row in range(20):
            weights = [0.0] * 6
            for state in range(12):
                density = model.prior[state]
                for name in names:  # these three have no errors in common
                    gaps = signals[name][row] - model.means[name][state]
                    density *= math.exp(-0.5 * float(gaps @ gaps))
                weights[model.labels[state]] += density
            np.testing.assert_allclose(found[row], np.array(weights) / sum(weights), atol=1e-10)
    # The errors of a and b are the same: both tell what one does.
    alone, both = (model.posterior({m: signals[m] for m in names}) for names in ("bc", "abc"))
    own = parts[1].posterior({"a": signals["a"][:, 2:], "c": signals["c"]})
    first = parts[0].posterior({"b": signals["b"]})
    np.testing.assert_allclose(both, np.einsum("nk,nj->nkj", first, own).reshape(20, 6), atol=1e-9)
    np.testing.assert_allclose(alone, np.repeat(first, 2, 1) / 2, atol=1e-9)  # b has no bit
    with pytest.raises(InputError, match="^distances: those of copies differ"):
        told([0.5, 0.5], {"a": 1.0, "b": 2.0}, copies=True)


def test_a_posterior_of_means_and_errors_of_any_size():
    """Three states of two classes on a line, errors of 2: where a mean lies counts as well."""
    line = Model(
        np.array([0.2, 0.3, 0.5]),
        np.array([0, 1, 0]),
        {"a": np.array([[0.0], [1.0], [5.0]])},
        {"a": np.array([[2.0]])},
    )
    found = line.posterior({"a": np.array([[-1.0], [2.5], [7.0]])})
    for row, at in enumerate((-1.0, 2.5, 7.0)):
        weights = [p * norm.pdf(at, mean, 2) for p, mean in zip((0.2, 0.3, 0.5), (0, 1, 5))]
        share = weights[1] / sum(weights)
        np.testing.assert_allclose(found[row], [1 - share, share], atol=1e-12)


def rows(lines: list[str]) -> dict[str, list[str]]:
    """name -> cells of the lines of a table."""
    cells = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in lines]
    return {first: rest for first, *rest in cells[2:]}


def test_the_table_of_the_docstring_is_true(integrated):
    printed = rows([line for line in generated.__doc__.splitlines() if line.startswith("|")])
    assert list(printed) == list(integrated) == list(rows(generated.table(draws=100)))
    for name, exact in integrated.items():
        count, entropy, *cells, error = printed[name]
        part = name.partition(": ")
        model = SETS[part[0]].parts[part[2]] if part[2] else SETS[name].model
        assert int(count) == len(model.classes)
        shares = model.classes
        assert float(entropy) == pytest.approx(-(shares * np.log(shares)).sum(), abs=6e-4)
        assert 0 < float(error) < 0.002
        for place, (information, accuracy) in enumerate(exact):
            near = 4 * float(error) + 6e-4
            assert float(cells[place]) == pytest.approx(information, abs=near)
            assert float(cells[place + 4]) == pytest.approx(accuracy, abs=near)
        more = exact[2][0] - exact[0][0] - exact[1][0]
        assert float(cells[3]) == pytest.approx(more, abs=12 * float(error) + 6e-4)


def test_printed_rows_are_the_truth():
    printed = rows(generated.table(["dominant"], draws=4000))["dominant"]
    found = truth(SETS["dominant"].model, 4000)
    values = [figure.value for figure in found.information.values()]
    values += [values[2] - values[0] - values[1]]
    values += [figure.value for figure in found.accuracy.values()]
    assert printed[1:-1] == [f"{value:.3f}" for value in [found.entropy, *values]]


def undo(view: View, given: np.ndarray) -> np.ndarray:
    """What went into a view, from what came out."""
    inner = given @ view.lift.T
    for turn, weight, phase in reversed(view.shears):
        kept = inner[:, : view.half]
        moved = inner[:, view.half :] - generated.BENT * np.cos(kept @ weight + phase)
        inner = np.concatenate([kept, moved], 1) @ turn.T
    return inner


@pytest.mark.parametrize("name", SETS)
def test_a_file_holds_what_the_truth_says(name, integrated):
    """Back through the maps, by the densities: as often right as the best guess is."""
    model, count = SETS[name].model, 6000
    arrays = generate(name, {"train": 500, "validation": 1, "test": count}, 1, draws=100)
    test, signals = arrays["split"] == 2, {}
    y = arrays["y"][test]
    assert np.bincount(y, minlength=len(model.classes)) / count == pytest.approx(
        model.classes, abs=4 * 0.5 / math.sqrt(count)
    )
    for modality, means in model.means.items():
        x = arrays[f"x_{modality}"]
        assert x.dtype == np.float32 and x.shape == (501 + count, 32)
        size = means.shape[1]
        view = View(name, modality, size + NUISANCES)
        inner = undo(view, x[test].astype(float))
        np.testing.assert_allclose(view(inner), x[test], atol=1e-5)
        signals[modality], nuisance = inner[:, :size], inner[:, size:]
        assert nuisance.shape == (count, 2)
        assert nuisance.mean(0) == pytest.approx([0, 0], abs=0.06)
        assert nuisance.std(0) == pytest.approx([1, 1], abs=0.05)
        for label in range(len(model.classes)):  # and tells nothing
            own = nuisance[y == label]
            assert np.abs(own.mean(0)).max() < 4.5 / math.sqrt(len(own))
    if name == "copies":
        np.testing.assert_allclose(signals["first"], signals["second"], atol=1e-4)
    for place, asked in enumerate([*([m] for m in signals), list(signals)]):
        guess = model.posterior({m: signals[m] for m in asked})
        guess = guess + 1e-9 * np.random.default_rng(0).random(guess.shape)  # ties, at random
        right = (guess.argmax(1) == y).mean()
        assert right == pytest.approx(integrated[name][place][1], abs=4 * 0.5 / math.sqrt(count))


def test_views_bend():
    """A line through the inside is none outside, and the two modalities' maps differ."""
    line = np.linspace(-3, 3, 200)[:, None] * np.eye(4)[:1]
    found = View("unique", "first", 4)(line)
    along = np.linalg.lstsq(np.c_[line[:, :1], np.ones(200)], found, rcond=None)[0]
    rest = found - np.c_[line[:, :1], np.ones(200)] @ along
    assert rest.std() > 0.2 * found.std()
    assert np.abs(found - View("unique", "second", 4)(line)).max() > 1


def test_a_file_is_read_and_the_same_again(tmp_path, capsys):
    assert generated.main(["--output", str(tmp_path / "a"), "--draws", "100"]) == 0
    files = sorted((tmp_path / "a").glob("*.npz"))
    assert [file.stem for file in files] == sorted(SETS)
    assert capsys.readouterr().out == ""
    options = ["--sets", "unbalanced", "--draws", "100"]
    generated.main([*options, "--output", str(tmp_path / "b")])
    path = tmp_path / "a" / "unbalanced.npz"
    assert path.read_bytes() == (tmp_path / "b" / "unbalanced.npz").read_bytes()
    for name, expected in SETS.items():
        config = DataConfig(name="npz", path=str(tmp_path / "a" / f"{name}.npz"))
        data = load_data(config)
        assert data.modalities == tuple(expected.model.means)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [1000, 300, 1500]
        assert data.num_classes == len(expected.model.classes)
        assert data.layouts == dict.fromkeys(data.modalities, "vector")
        with np.load(config.path) as held:
            about = held["about"].tolist()
        assert about[:2] == [f"{name}: {expected.about}", "seed 0"]
        entropy = truth(expected.model, 100).entropy
        assert about[2] == f"H(Y) = {entropy:.4f} nats" and about[5].startswith("I(all; Y) = ")


def test_seeds_and_counts(tmp_path):
    counts = {"train": 400, "validation": 20, "test": 30}
    first, again, other = (generate("mixed", counts, seed, draws=10) for seed in (0, 0, 1))
    more = generate("mixed", {**counts, "test": 90}, 0, draws=10)
    for key in ("x_first", "x_second", "y", "split"):
        assert np.array_equal(first[key], again[key])
        assert np.array_equal(first[key][:420], more[key][:420])  # training keeps its samples
    assert not np.array_equal(first["x_first"], other["x_first"])
    assert np.bincount(more["split"]).tolist() == [400, 20, 90]
    alike = generate("mixed", dict.fromkeys(counts, 200), 0, draws=10)
    assert len(np.unique(alike["x_first"], axis=0)) == 600  # no sample is in two splits
    # Another seed draws other samples of the same problem: the maps are those of the first.
    view = View("mixed", "first", 5 + NUISANCES)
    near = SETS["mixed"].model.means["first"]
    inner = undo(view, other["x_first"].astype(float))[:, :5]
    states = ((inner[:, None] - near) ** 2).sum(2).min(1)
    assert states.mean() < 5.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "output: no folder is given; give --output DIR, or --truth"),
        (["--truth", "--sets", "fog"], "sets: 'fog' is none of unique, redundant, copies"),
        (["--truth", "--draws", "1"], "draws: 1 is too small; give 2 or more"),
        (["--output", "DIR", "--test", "0"], "test: 0 is too small; give 1 or more"),
        (["--output", "DIR", "--seed", "-1"], "seed: -1 is too small; give 0 or more"),
        (["--output", "FILE"], "FILE cannot be made"),
        (
            ["--output", "DIR", "--sets", "unbalanced", "--train", "10"],
            "class 3 of unbalanced has none of 10 training samples (seed 0); give more",
        ),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert generated.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("generated: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("DIR/*.npz"))
    with pytest.raises(InputError):
        generate("fog")


def test_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.generated", "--truth", "--sets", "synergy"]
    command += ["--draws", "50", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and list(rows(done.stdout.splitlines())) == ["synergy"]
    samples = read_samples(DataConfig(name="npz", path=str(tmp_path / "synergy.npz")))
    assert samples.modalities == ("first", "second") and len(samples.targets) == 2800
