"""A sanitizer and byte counter for interpreted Triton kernels.

It tells without a GPU what compute-sanitizer and a profiler tell on one::

    with interpreter.sanitized() as report:
        launch_the_kernels()
    assert report.loaded_by("features") == features.nbytes

Inside, every pointer carries the number of the argument it was made from in its 16 high bits, which
no address uses. So each access is known to belong to one argument, even where arguments overlap in
memory, and straying from one tensor into its neighbour shows.

Triton's interpreter is private: it was checked with 3.6.0 and 3.7.1, and nothing else in the tests
touches it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter as internals
from triton.tools.tensor_descriptor import TensorDescriptor

_TAG_SHIFT = np.uint64(48)
_ADDRESS = np.uint64((1 << 48) - 1)
_SEVERAL = -1  # in _Memory.reader: more than one program has loaded the element


class MemoryAccessError(AssertionError):
    """A kernel did what a GPU would not forgive.

    The message names the kernel, the program, the argument and the byte offset in it.
    """


@dataclasses.dataclass
class Launch:
    """One launch: the bytes of unmasked lanes loaded and stored, by argument.

    The entries of a tuple are ``name[0]``, ``name[1]``, ...; those of a named tuple ``name.field``.
    """

    name: str
    loaded: Counter[str] = dataclasses.field(default_factory=Counter)
    stored: Counter[str] = dataclasses.field(default_factory=Counter)
    programs: int = 0


@dataclasses.dataclass
class Report:
    """All launches of a ``sanitized`` block, in their order."""

    launches: list[Launch] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.launches)

    @property
    def loaded(self) -> int:
        return sum(launch.loaded.total() for launch in self.launches)

    @property
    def stored(self) -> int:
        return sum(launch.stored.total() for launch in self.launches)

    def loaded_by(self, *names: str) -> int:
        """Bytes loaded through these arguments; the name of a tuple stands for all its entries."""
        return sum(_of(launch.loaded, names) for launch in self.launches)

    def stored_by(self, *names: str) -> int:
        """Bytes stored through these arguments; the name of a tuple stands for all its entries."""
        return sum(_of(launch.stored, names) for launch in self.launches)


def _of(counts: Counter[str], names: tuple[str, ...]) -> int:
    return sum(
        count for name, count in counts.items() if name in names or name.split("[")[0] in names
    )


class _Memory:
    """Who touched each unit of one storage.

    0: nobody yet; else the number of the program, counted from 1.
    """

    def __init__(self, storage: torch.UntypedStorage, unit: int) -> None:
        self.unit = unit  # bytes: the smallest element of the arguments in this storage
        self.writer, self.reader = np.zeros((2, storage.nbytes() // unit), dtype=np.int32)


class _Argument:
    """A tensor as the kernel sees it.

    Where its elements are, and the memory it shares with other arguments.
    """

    def __init__(self, name: str, tensor: torch.Tensor, memory: _Memory) -> None:
        self.name, self.memory, self.width = name, memory, tensor.element_size()
        self.layout = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
        self.address, self.start = tensor.data_ptr(), tensor.storage_offset() * self.width
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            if tensor.numel()
            else 0
        )
        self.elements = np.zeros(span, dtype=bool)  # False: a hole of a view
        torch.from_numpy(self.elements).as_strided(tensor.shape, tensor.stride()).fill_(True)

    def outside(self, offsets: np.ndarray) -> np.ndarray:
        """The byte offsets that are not the start of an element."""
        index, rest = np.divmod(offsets, self.width)
        valid = (rest == 0) & (index >= 0) & (index < self.elements.size)
        valid[valid] = self.elements[index[valid]]
        return offsets[~valid]

    def units(self, offsets: np.ndarray) -> np.ndarray:
        """The units of memory that elements at these byte offsets cover."""
        first = (self.start + offsets) // self.memory.unit
        return (first[:, None] + np.arange(self.width // self.memory.unit)).ravel()

    def offset(self, unit: int) -> int:
        return int(unit) * self.memory.unit - self.start


class _Running:
    """The launch that runs now: its arguments, its programs, and the checks of each access."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.arguments, self.tags, self.programs = launch, [], {}, []
        self.released: set[int] = set()  # programs that have drawn a ticket
        self.acquired: set[int] = set()  # those whose stores the running program may load

    def take(self, named: list[tuple[str, object]]) -> None:
        """Learn the arguments: the host tensors whose addresses the kernel gets.

        They are copies where the caller's are on a device.
        """
        self.keep = named = [
            entry for name, value in named for entry in _tensors(name, value)
        ]  # kept: tags go by identity
        shared: dict[int, list[torch.Tensor]] = {}
        for _, value in named:
            shared.setdefault(_plain(value).untyped_storage().data_ptr(), []).append(_plain(value))
        memories = {
            key: _Memory(tensors[0].untyped_storage(), min(t.element_size() for t in tensors))
            for key, tensors in shared.items()
        }
        for name, value in named:
            self.arguments.append(
                _Argument(name, _plain(value), memories[_plain(value).untyped_storage().data_ptr()])
            )
            self.tags[id(value)] = np.uint64(len(self.arguments)) << _TAG_SHIFT

    def enter(self, *program: int) -> None:
        self.programs.append(program)
        self.launch.programs += 1
        self.acquired = set()

    def fail(self, what: str) -> None:
        raise MemoryAccessError(f"{self.launch.name}, program {self.programs[-1]}: {what}")

    def by(self, number: int) -> str:
        return "other programs" if number == _SEVERAL else f"program {self.programs[number - 1]}"

    def access(
        self, pointers: internals.TensorHandle, mask: internals.TensorHandle, store: bool
    ) -> internals.TensorHandle:
        """Check and count an access by the running program; the pointers without their tags."""
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        width = internals._get_np_dtype(pointers.get_element_ty()).itemsize
        tags, verb = lanes >> _TAG_SHIFT, "store to" if store else "load from"
        for tag in np.unique(tags).tolist():
            addresses = (lanes[tags == tag] & _ADDRESS).astype(np.int64)
            if not 1 <= tag <= len(self.arguments):
                self.fail(f"{verb} address {addresses[0]:#x}, outside every argument")
            argument = self.arguments[tag - 1]
            offsets = addresses - argument.address
            where = f"{verb} {argument.name} at byte offset"
            if width != argument.width:
                self.fail(
                    f"{where} {offsets[0]}: {width} bytes, but its elements have "
                    f"{argument.width} ({argument.layout})"
                )
            if (outside := argument.outside(offsets)).size:
                self.fail(f"{where} {outside[0]}: not an element of it ({argument.layout})")
            (self.store if store else self.load)(argument, argument.units(offsets), where)
            (self.launch.stored if store else self.launch.loaded)[argument.name] += (
                offsets.size * width
            )
        return internals.TensorHandle(pointers.data & _ADDRESS, pointers.dtype)

    def ticket(self, pointers: internals.TensorHandle) -> internals.TensorHandle:
        """An atomic addition of integers, by which programs find out who comes last.

        Its order does not show in the sum. What a program stored before it drew a ticket may be
        loaded by those that draw theirs later.
        """
        self.acquired = set(self.released)
        self.released.add(len(self.programs))
        return internals.TensorHandle(pointers.data & _ADDRESS, pointers.dtype)

    def load(self, argument: _Argument, units: np.ndarray, where: str) -> None:
        memory, number = argument.memory, len(self.programs)
        writers, readers = memory.writer[units], memory.reader[units]
        known = np.array([0, number, *self.acquired])
        if (raced := ~np.isin(writers, known)).any():
            place, other = argument.offset(units[raced][0]), self.by(writers[raced][0])
            self.fail(f"{where} {place}: stored by {other} in the same launch")
        memory.reader[units] = np.where((readers == 0) | (readers == number), number, _SEVERAL)

    def store(self, argument: _Argument, units: np.ndarray, where: str) -> None:
        memory, number = argument.memory, len(self.programs)
        writers, readers = memory.writer[units], memory.reader[units]
        if (again := writers != 0).any():
            place, other = argument.offset(units[again][0]), self.by(writers[again][0])
            self.fail(f"{where} {place}: stored twice, first by {other}")
        if (raced := (readers != 0) & (readers != number)).any():
            place, other = argument.offset(units[raced][0]), self.by(readers[raced][0])
            self.fail(f"{where} {place}: loaded by {other} in the same launch")
        unique, counts = np.unique(units, return_counts=True)
        if unique.size < units.size:
            place = argument.offset(unique[counts > 1][0])
            self.fail(f"{where} {place}: stored twice, by two lanes of one store")
        memory.writer[units] = number


def _tensors(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The tensors in an argument, with their names."""
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        for i, entry in enumerate(value):
            yield from _tensors(f"{name}.{fields[i]}" if fields else f"{name}[{i}]", entry)
    elif isinstance(value, TensorDescriptor):
        yield name, value.base
    elif hasattr(value, "data_ptr"):
        yield name, value


def _plain(value: object) -> torch.Tensor:
    return internals._unwrap_tensor(value)


def interpreted() -> bool:
    """Whether triton was imported with TRITON_INTERPRET=1: later is too late."""
    return isinstance(tl.sum, internals.InterpretedFunction)


def quicken() -> None:
    """Spare the interpreter what it does again and again, most of its time; results are the same.

    It patches ``triton.language`` anew at each call of a device function, though the launch has
    patched it: now once a launch for each module. And a type's numpy dtype, a block's shape and its
    name are made once.
    """
    _patch_once()
    _keep_types()


def _patch_once() -> None:
    executor = internals.GridExecutor
    call, patch = executor.__call__, internals._patch_lang
    patched: set[int] = set()  # the globals of kernels' modules: those of the launch that runs

    def launched(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    def patch_once(function):
        if id(function.__globals__) in patched:
            return None  # only a launch, the first to ask, restores what was patched
        patched.add(id(function.__globals__))
        return patch(function)

    executor.__call__, internals._patch_lang = launched, patch_once


def _keep_types() -> None:
    look_up, dtypes = internals._get_np_dtype, {}
    block, blocks = tl.core.block_type.__init__, {}
    tensor, shapes = tl.core.tensor.__init__, {}

    def np_dtype(kind):
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(kind)
        return dtypes[name]

    def block_type(self, element_ty, shape):
        sizes = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        if (kept := blocks.get((element_ty.name, sizes))) is None:
            block(self, element_ty, shape)
            blocks[element_ty.name, sizes] = dict(vars(self))
        else:
            vars(self).update(kept, element_ty=element_ty)

    def tensor_of(self, handle, type):
        sizes = tuple(type.shape) if type.is_block() else ()
        if (kept := shapes.get(sizes)) is None:
            tensor(self, handle, type)
            shapes[sizes] = {name: getattr(self, name) for name in ("shape", "numel")}
        else:
            vars(self).update(kept, handle=handle, type=type, dtype=type.scalar)

    internals._get_np_dtype = np_dtype
    tl.core.block_type.__init__, tl.core.tensor.__init__ = block_type, tensor_of


@contextlib.contextmanager
def sanitized() -> Iterator[Report]:
    """Check and count every access of the kernels launched inside; int32 overflow raises.

    Does not nest.
    """
    builder, executor, report = internals.interpreter_builder, internals.GridExecutor, Report()
    if not interpreted():
        raise RuntimeError(
            "triton was imported without TRITON_INTERPRET=1: there is no interpreter to watch"
        )
    if "create_masked_load" in vars(builder):
        raise RuntimeError("sanitized() is already on: it does not nest")
    call, take, convert = executor.__call__, executor._init_args_hst, internals._implicit_cvt
    load, store, enter = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.set_grid_idx,
    )
    rmw = builder.create_atomic_rmw
    running: _Running

    def checked_call(self, *args, **kwargs):
        nonlocal running
        report.launches.append(Launch(self.fn.__name__))
        running = _Running(report.launches[-1])
        try:
            return call(self, *args, **kwargs)
        except (
            internals.InterpreterError
        ) as error:  # one more around the cause for each function of the kernel it went through
            cause = error
            while cause is not None and not isinstance(cause, MemoryAccessError):
                cause = cause.__cause__
            if cause is None:
                raise
        raise cause

    def checked_take(self, args, kwargs):
        hosts, named = take(self, args, kwargs)
        running.take([*zip(self.arg_names, hosts), *named.items()])
        return hosts, named

    def tagged(value):
        result = convert(value)
        if (tag := running.tags.get(id(value))) is not None:
            result.handle.data = result.handle.data | tag
        return result

    def checked_load(pointers, mask, *rest, **named):
        return load(running.access(pointers, mask, store=False), mask, *rest, **named)

    def checked_store(pointers, value, mask, *rest, **named):
        return store(running.access(pointers, mask, store=True), value, mask, *rest, **named)

    def checked_enter(*program):
        running.enter(*program)
        return enter(*program)

    def ticket(kind, pointers, value, mask, sem, scope):
        if kind != internals._ir.ATOMIC_OP.ADD or "ACQUIRE_RELEASE" not in str(sem):
            refused()
        return rmw(kind, running.ticket(pointers), value, mask, sem, scope)

    def refused(*_, **__):
        running.fail("atomic operation: its order, and so its sum, differs from run to run")

    with (
        mock.patch.multiple(executor, __call__=checked_call, _init_args_hst=checked_take),
        mock.patch.object(internals, "_implicit_cvt", tagged),
        mock.patch.multiple(
            builder,
            create_masked_load=checked_load,
            create_masked_store=checked_store,
            set_grid_idx=checked_enter,
            create_atomic_rmw=ticket,
            create_atomic_cas=refused,
            options=dataclasses.replace(builder.options, debug=True),
        ),
    ):
        yield report
