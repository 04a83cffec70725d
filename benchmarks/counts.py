"""What an operator asks of a GPU, without one: its launches, their bytes and their products.

An operator runs on CPU tensors whose launches are only recorded, with the grids and block sizes
that a GPU of 132 multiprocessors (H100, H200) would get. What a launch moves and multiplies follows
from them: every argument is taken once by all programs together, but for what RULES says of a
kernel. All rows count and all modalities are as wide as one another, as in the benchmark.

tests/kernels/test_predicted_counts.py holds the rules to what the interpreter counts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iib_kernels import _checks, _runtime, _tuning, fusion, update
from iib_kernels.ops import arguments
from iib_kernels.ops.distance import launch as distance
from iib_kernels.ops.fusion import launch as fused
from iib_kernels.ops.objective import launch as objective

PROCESSORS = 132  # multiprocessors of an H100 SXM and of an H200
FEW = 32  # numbers of a small argument, which every program reads out of the nearest cache


@dataclass
class Launch:
    """A kernel's launch, or an operator of PyTorch, which is one on a GPU."""

    name: str
    arguments: dict = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    library: bool = False

    def __getitem__(self, name: str):
        """An argument; of a plan's or another named tuple's fields by its dotted name."""
        first, *rest = name.split(".")
        value = self.arguments[first]
        for part in rest:
            value = _plain(getattr(value, part))
        return value

    @property
    def programs(self) -> int:
        """How many programs it has; enough for the whole GPU where PyTorch decides."""
        count = 1
        for size in self.grid:
            count *= size
        return PROCESSORS if self.library else count

    def tensors(self) -> dict[str, list[Tensor]]:
        """Its tensors by the names of the arguments; the entries of a tuple share one."""
        found: dict[str, list[Tensor]] = {}
        for name, value in self.arguments.items():
            for where, tensor in _tensors(name, value):
                found.setdefault(where, []).append(tensor)
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of each argument, each element once; small ones left out."""
        every = self.tensors()
        count = lambda tensors: sum(value.numel() for value in tensors)
        return {
            name: sum(value.numel() * value.element_size() for value in tensors)
            for name, tensors in every.items()
            if count(tensors) > FEW or self.library
        }


class Rule(NamedTuple):
    """What a kernel does to its arguments: how often all programs together load and store their
    elements. Once, where neither table names an argument.
    """

    #: rows that programs go through
    passes: dict[str, float] = {}
    #: what all programs read and caches serve, as the prototypes: the README of the kernels counts
    #: it apart
    shared: dict[str, float] = {}
    #: how often memory must move an argument at least, where that is not once: loaded and stored
    memory: dict[str, float] = {}
    #: multiplications of its products, in the type of the features
    products: float = 0
    #: and those with a float32 gradient, in TF32 where the features are of half precision
    slopes: float = 0


class Counts(NamedTuple):
    """Of one launch. Bytes are counted in three ways."""

    memory: float  #: what memory must move: every argument that it touches once
    moved: float  #: what programs ask for, but shared arguments once
    asked: float  #: all that programs ask for, out of memory or of a cache
    products: float  #: multiplications
    slopes: float


def counts(launch: Launch) -> Counts:
    """The counts of a launch by its kernel's rule."""
    rule, sizes, asked = rule_of(launch), launch.sizes(), by_argument(launch)
    memory = moved = 0.0
    for name, size in sizes.items():
        at_least = min(size * rule.memory.get(name, 1.0), asked[name])
        memory += at_least
        moved += at_least if name in rule.shared else asked[name]
    return Counts(memory, moved, sum(asked.values()), rule.products, rule.slopes)


def by_argument(launch: Launch) -> dict[str, float]:
    """Bytes that programs ask for, by argument."""
    rule = rule_of(launch)
    passes = {**rule.passes, **rule.shared}
    return {name: size * passes.get(name, 1.0) for name, size in launch.sizes().items()}


def rule_of(launch: Launch) -> Rule:
    """What the launch's kernel does; an operator of PyTorch takes each argument once."""
    if launch.library:
        return Rule(products=_library_products(launch))
    if launch.name not in RULES:
        raise KeyError(f"kernel {launch.name}: benchmarks/counts.py has no rule for it")
    return RULES[launch.name](launch)


# ----- What kernels do

RULES: dict[str, Callable[[Launch], Rule]] = {}

# Sums of programs, which the last of them adds up
_SUMS = {"means.sums_ptr": 2, "outputs.sums": 2}


def _rule(*names: str):
    def add(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _cover(size: int, block: int) -> int:
    """The size in whole blocks."""
    return -(-size // block) * block


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


@_rule("fusion_rows", "fusion_rows_backward", "lay_out", "scale_all", "prepare", "conclude")
def _each_once(launch: Launch) -> Rule:
    return Rule()


@_rule("cross_entropy_rows", "cross_entropy_rows_backward", "objective_rows")
def _fusion(launch: Launch) -> Rule:
    """Of many classes the target's logit is loaded once more; sums are stored and added up."""
    classes = launch["plan.K"]
    again = 1 / classes if classes > 64 else 0
    return Rule({"logits.ptrs": 1 + again, "means.sums_ptr": 2}, memory=_SUMS)


@_rule("objective_small")
def _objective_small(launch: Launch) -> Rule:
    """The anchor's posterior comes first, and once more in its turn. The cosine's gradient takes
    the features once more. Every program counts the rows of the whole batch.
    """
    modalities, rows = launch["plan.M"], launch["plan.BLOCK_B"]
    passes, shared = {"outputs.sums": 2.0}, {"targets.ptr": launch.programs + 1.0}
    if launch["PROTOTYPES"] is None:
        return Rule(passes, shared, _SUMS)
    batch, columns = launch["batch"], launch["plan.BLOCK_K"]
    widths, step = launch["PROTOTYPES.widths"], launch["PROTOTYPES.block_d"]
    slopes = modalities if launch["outputs.grad_features"] is not None else 0
    scores, blocks = modalities + 1, _blocks(batch, rows)
    cosine = launch["PROTOTYPES.cosine"]
    passes["tables.features"] = (scores + (slopes if cosine else 0)) / modalities
    shared["tables.prototypes"] = blocks * (scores + slopes) / modalities
    tile = blocks * rows * columns * _cover(max(widths), step)
    return Rule(passes, shared, _SUMS, tile * (scores + slopes))


@_rule("alignment_forward")
def _alignment_block(launch: Launch) -> Rule:
    tile = launch.grid[0] * launch["BLOCK_B"] * launch["BLOCK_K"]
    products = tile * sum(_cover(width, launch["BLOCK_D"]) for width in launch["widths"])
    passes, shared = {"means.sums_ptr": 2.5}, {"prototypes.ptr": launch.grid[0]}
    return Rule(passes, shared, _SUMS, products)


@_rule("alignment_backward")
def _alignment_block_backward(launch: Launch) -> Rule:
    """Scores are computed again; the cosine's gradient takes the features once more."""
    products, modalities = _alignment_block(launch).products, launch["M"]
    passes = {
        "features.ptr": 2 if launch["COSINE"] else 1,
        "rows.targets": 2,
        "upstream.alignment.ptr": (modalities - 1) / modalities,
    }
    shared = {"prototypes.ptr": 2 * launch.grid[0]}
    return Rule(passes, shared, products=products, slopes=products)


@_rule("attend_resident")
def _attend_resident(launch: Launch) -> Rule:
    """Rows stay in shared memory, and a block of prototypes serves scores and sums. Across, the
    anchor's rows and prototypes are for the scores, the other's for the sums, and its rows for its
    length and its mean score.
    """
    modalities, splits, across = launch["M"], launch["splits"], launch["ACROSS"]
    classes, width = launch["given.tables.classes"], launch["given.tables.width"]
    blocks, rows = launch.grid[0], launch["BLOCK_B"]
    share = _with_others(launch)
    passes = {
        "given.features.ptr": share * splits * (3 if across else 1),
        "given.rows.targets": share * splits * 2 * modalities,
    }
    both, labels = blocks * (2 if across else 1), splits / classes  # and rows' own classes
    shared = {
        "given.tables.ptr": share * (both + labels * launch["batch"]),
        "given.tables.scales": share * (both + labels * launch["STEPS"] * blocks * rows),
    }
    tile = blocks * rows * classes * width
    return Rule(passes, shared, products=2 * share * modalities * tile)


@_rule("attend_streamed")
def _attend_streamed(launch: Launch) -> Rule:
    """Each of the programs that share the components computes all scores, for which it reads its
    rows once a block of classes, and once before for their lengths.
    """
    modalities, splits, across = launch["M"], launch["splits"], launch["ACROSS"]
    classes, width = launch["given.tables.classes"], launch["given.tables.width"]
    blocks, rows, chunks = launch.grid[0], launch["BLOCK_B"], launch["CHUNKS"]
    share, covered = _with_others(launch), _covered(launch)
    reads = chunks * (splits + classes // launch["BLOCK_K"])
    passes = {
        "given.features.ptr": share * (reads + (splits * (chunks + 1) if across else 0)),
        "given.rows.targets": share * splits * chunks * modalities,
    }
    scales, labels = blocks * chunks * (2 if across else 1), splits / classes
    shared = {
        "given.tables.ptr": share * (blocks * (chunks * covered + 1) + labels * launch["batch"]),
        "given.tables.scales": share * (scales + labels * chunks * blocks * rows),
    }
    tile = blocks * rows * classes * width
    return Rule(passes, shared, products=share * modalities * tile * (chunks * covered + 1))


def _with_others(launch: Launch) -> float:
    """The share of the modalities that an attention is about: across, all but the anchor."""
    return (launch["M"] - 1) / launch["M"] if launch["ACROSS"] else 1.0


def _covered(launch: Launch) -> float:
    """The share of the tables' padded components that scores go through."""
    steps = [_cover(width, launch["BLOCK_D"]) for width in launch["given.widths"]]
    return sum(steps) / len(steps) / launch["given.tables.width"]


@_rule("evidence")
def _evidence(launch: Launch) -> Rule:
    """Scores of all modalities: rows are read for their lengths and once a block of classes."""
    modalities, splits = launch["M"], launch["splits"]
    classes, width = launch["given.tables.classes"], launch["given.tables.width"]
    blocks, covered = launch.grid[0], _covered(launch)
    passes = {
        "given.features.ptr": splits + classes // launch["BLOCK_K"],
        "given.rows.targets": splits * (modalities + 1),
    }
    shared = {"given.tables.ptr": blocks * covered, "given.tables.scales": blocks}
    products = blocks * launch["BLOCK_B"] * classes * modalities * width * covered
    return Rule(passes, shared, products=products)


@_rule("losses")
def _losses(launch: Launch) -> Rule:
    """Maxima of the parts are read once more than their sums; the anchor has nothing across."""
    modalities = launch["M"]
    share = (modalities - 1) / modalities
    passes = {"own_ptr": 4 / 3, "across_ptr": share, "means.sums_ptr": 2.5}
    return Rule(passes, memory=_SUMS)


@_rule("merge")
def _merge(launch: Launch) -> Rule:
    """Three of the numbers of a row and part, for each block of components."""
    return Rule({"sums_ptr": 3 * launch.grid[2] / launch["ROW"]})


@_rule("gradients")
def _gradients(launch: Launch) -> Rule:
    """Means across are read where a row deviates; all rows are taken to."""
    modalities = launch["M"]
    share = (modalities - 1) / modalities
    anchor = 1 + 1 / modalities  # the anchor's entry is read beside
    filled = sum(launch["widths"]) / modalities / launch["outcome.width"]  # without padding
    passes = {
        "features.ptr": 1 if launch["COSINE"] else 0,
        "rows.targets": 0,
        "outcome.pulls": filled * ((1 + share) / 2 if modalities > 1 else 1),
        "outcome.counts": anchor,
        "outcome.confidence": anchor,
        "upstream.alignment.ptr": share,
    }
    return Rule(passes)


@_rule("nearest_forward")
def _nearest(launch: Launch) -> Rule:
    """Features are read once a block of classes, and once for their lengths where the prototypes'
    are given.
    """
    classes, rows, columns = launch["CLASSES"], launch["BLOCK_B"], launch["BLOCK_K"]
    blocks, given = launch.grid[0], launch["squares_ptrs"] is not None
    passes = {"features.ptr": _blocks(classes, columns) + (1 if given else 0)}
    shared = {"prototypes.ptr": blocks, "squares_ptrs": blocks}
    width = sum(_cover(entry, launch["BLOCK_D"]) for entry in launch["WIDTHS"])
    return Rule(passes, shared, products=blocks * rows * _cover(classes, columns) * width)


@_rule("nearest_backward")
def _nearest_backward(launch: Launch) -> Rule:
    """One prototype a row, wherever it stands."""
    flow = launch["flow"]
    rows, found = flow.features[0].ptr, flow.prototypes[0].ptr
    return Rule(shared={"flow.prototypes.ptr": len(rows) / len(found)})


@_rule("distance_forward", "distance_forward_large", "distance_from_products")
def _distance(launch: Launch) -> Rule:
    """A tile of rows and classes a program; the library's products are changed in place."""
    blocks, parts = launch.grid
    lengths = {"squares.rows_ptr": parts, "squares.prototypes_ptr": blocks}
    if launch.name == "distance_from_products":
        return Rule({"distance_ptr": 2}, lengths, {"distance_ptr": 2})
    shared = {"prototypes.ptr": blocks}
    if launch.name == "distance_forward_large":
        shared |= lengths
    tile = blocks * launch["BLOCK_B"] * parts * launch["BLOCK_K"]
    products = tile * _cover(launch["WIDTH"], launch["BLOCK_D"])
    return Rule({"features.ptr": parts}, shared, products=products)


@_rule("measure_rows")
def _measure(launch: Launch) -> Rule:
    """Rows that are copied are read once more."""
    matrices, copies = launch["matrices"], launch["copies"]
    sizes = [matrix.ptr.numel() * matrix.ptr.element_size() for matrix in matrices]
    again = sum(size for size, copy in zip(sizes, copies) if copy is not None)
    return Rule({"matrices.ptr": 1 + again / sum(sizes)})


@_rule("distance_backward")
def _distance_backward(launch: Launch) -> Rule:
    """The features' gradient alone. The upstream one stays in registers if a block holds it."""
    if launch["prototypes.grad_ptr"] is not None:
        raise ValueError("distance_backward: the prototypes' gradient is not counted")
    rows, chunk, width = launch["row_programs"], launch["CHUNK"], launch["WIDTH"]
    parts = launch.grid[1]
    again = 0 if launch["ONE_CLASS_BLOCK"] else _blocks(width, chunk)
    passes = {
        "grad.ptr": parts + again,
        "distance_ptr": parts if launch["COSINE"] else 0,
    }
    tile = rows * launch["BLOCK_B"] * _cover(launch["classes"], launch["BLOCK_K"])
    return Rule(passes, {"prototypes.ptr": rows}, slopes=tile * _cover(width, chunk))


@_rule("gradient_from_pull")
def _gradient_from_pull(launch: Launch) -> Rule:
    """The cosine takes its part along the rows first."""
    times = 2 if launch["along_ptr"] is None else 1
    return Rule({"x.ptr": times, "pulled_ptr": times})


@_rule("move_prototypes")
def _move(launch: Launch) -> Rule:
    """Rows of classes that are in the batch are read and written; every few classes search."""
    if not launch["HOW.ONE_BLOCK"]:
        raise ValueError("move_prototypes: a batch of several blocks of targets is not counted")
    targets = launch["rows.targets_ptr"]
    touched = 2 * len(targets.unique()) / launch["classes"]
    both = {"prototypes.ptr": touched, "counts.ptr": touched, "rows.lists_ptr": 2}
    return Rule(both, {"rows.targets_ptr": launch.programs}, both)


def _library_products(launch: Launch) -> float:
    """Multiplications of a matrix product of PyTorch's."""
    matrices = launch.arguments.get("matrices")
    if not matrices:
        return 0
    a, b = matrices
    return a.shape[0] * a.shape[1] * b.shape[1]


# ----- Recording


def _plain(value):
    """A constant's value."""
    return value.value if type(value).__name__ == "constexpr" else value


def _tensors(name: str, value) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument, named as the interpreter's sanitizer names them, without [i]."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        for place, entry in enumerate(value):
            yield from _tensors(f"{name}.{names[place]}" if names else name, entry)
    elif isinstance(value, Tensor):
        yield name, value


def argument_name(name: str) -> str:
    """The sanitizer's name without the places in tuples."""
    return re.sub(r"\[\d+\]", "", name)


_FREE = ("empty", "detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh")


class _Operators(TorchDispatchMode):
    """Adds PyTorch's operators to the launches; views and allocations launch nothing."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "iib":
            kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:  # what it calls counts too
                return function.redispatch(kernel, *args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if not function.is_view and not any(free in name for free in _FREE):
            found: dict[int, Tensor] = {}
            torch.utils._pytree.tree_map_only(
                Tensor, lambda value: found.setdefault(id(value), value), (args, kwargs, result)
            )
            if any(value.numel() for value in found.values()):
                arguments = {str(place): value for place, value in enumerate(found.values())}
                if name.startswith("mm"):
                    arguments["matrices"] = args[:2]
                self.launches.append(Launch(name, arguments, library=True))
        return result


def _product(launches: list[Launch]) -> Callable:
    """In the place of the distances' library product: one launch on a GPU, of any types."""

    def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        result = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
        launches.append(Launch("mm", {"matrices": (a, b), "result": result}, library=True))
        return result

    return multiply


@contextlib.contextmanager
def recorded(run: bool = False) -> Iterator[list[Launch]]:
    """The launches inside, in their order, as on a GPU of PROCESSORS multiprocessors.

    Kernels do not run, unless ``run`` asks for it of an interpreted Triton. What they would have
    filled holds anything.
    """
    import triton.runtime.interpreter as interpreter
    import triton.runtime.jit as jit

    launches: list[Launch] = []

    def recorder(original):
        def record(self, *arguments, grid, warmup, **options):
            names = self.arg_names
            named = dict(zip(names, arguments))
            named |= {name: value for name, value in options.items() if name in names}
            named = {name: _plain(value) for name, value in named.items()}
            launches.append(Launch(self.__name__, named, tuple(grid)))
            if run:
                with torch.utils._python_dispatch._disable_current_modes():
                    return original(self, *arguments, grid=grid, warmup=warmup, **options)

        return record

    programs, device = fused.programs_of, torch.device("cuda")
    change = lambda where, name, value: stack.enter_context(mock.patch.object(where, name, value))
    with contextlib.ExitStack() as stack:
        for kind in (jit.JITFunction, interpreter.InterpretedFunction):
            change(kind, "run", recorder(kind.run))
        change(_tuning, "processors", lambda device: PROCESSORS)
        kept = torch.zeros(1, dtype=torch.int32)  # the default stream of a GPU has one
        for where in (arguments, objective):
            change(where, "tickets", lambda device: kept)
        if not run:
            change(fused, "programs_of", lambda config, batch, _: programs(config, batch, device))
            change(_runtime, "interpreting", lambda: True)
            change(distance, "multiply", _product(launches))
        for where in (_runtime, _checks, fusion, update):
            change(where, "eager_on_cpu", lambda tensor: False)
        stack.enter_context(_Operators(launches))
        yield launches
