"""The sanitizer of tests/interpreter.py.

Kernels broken on purpose, one for each check, and a clean one whose bytes are known.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import pytest
import torch

triton = pytest.importorskip("triton")
import interpreter  # noqa: E402, needs triton
import triton.language as tl  # noqa: E402
from interpreter import MemoryAccessError, sanitized  # noqa: E402

if not interpreter.interpreted():
    pytest.skip(
        "triton was imported without TRITON_INTERPRET=1, so kernels are compiled here",
        allow_module_level=True,
    )

BUILDER = interpreter.internals.interpreter_builder


@triton.jit
def copy(x, out, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * stride, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def combine(features, weights, weights_stride, out, columns, BLOCK: tl.constexpr):
    """out[row] = sum of weights[m] * features[m][row]: one program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for m in tl.static_range(len(features)):
        total += tl.load(weights + m * weights_stride) * tl.load(
            features[m] + row * columns + i, mask=i < columns, other=0.0
        ).to(tl.float32)
    tl.store(out + row * columns + i, total, mask=i < columns)


@triton.jit
def load_one(x, at):
    return tl.load(x + at)


@triton.jit
def move(x, out, source, target):
    tl.store(out + target, load_one(x, source))


@triton.jit
def move_between_programs(x, out, reader):
    """One program loads x[0], the other stores to it."""
    if tl.program_id(0) == reader:
        tl.store(out, tl.load(x))
    else:
        tl.store(x, 1.0)


@triton.jit
def one_place(out, stride, BLOCK: tl.constexpr):
    tl.store(out + tl.program_id(0) * stride + tl.arange(0, BLOCK) // 2, 1.0)


@triton.jit
def twice(out):
    tl.store(out, 1.0)
    tl.store(out, 2.0)


@triton.jit
def increment_own(out):
    """Each program loads, stores and loads again its own element."""
    own = out + tl.program_id(0)
    tl.store(own, tl.load(own) + 1.0)
    tl.device_assert(tl.load(own) > 0)


@triton.jit
def load_all_store_last(x):
    first = tl.load(x)
    if tl.program_id(0) == 2:
        tl.store(x, first)


@triton.jit
def load_all_store_own(x):
    i = tl.arange(0, 4)
    tl.store(x + tl.program_id(0), tl.sum(tl.load(x + i)))


@triton.jit
def add_atomically(out):
    tl.atomic_add(out, 1.0)


@triton.jit
def exchange_atomically(out):
    tl.atomic_cas(out, 0, 1)


@triton.jit
def last_adds_all(parts, out, tickets, COUNT: tl.constexpr, EARLY: tl.constexpr):
    """Each program stores its part; who draws the last ticket adds them. EARLY: adds before."""
    i = tl.arange(0, COUNT)
    tl.store(parts + tl.program_id(0), 1.0)
    if EARLY:
        total = tl.sum(tl.load(parts + i))
    ticket = tl.atomic_add(tickets, 1, sem="acq_rel")
    if ticket == COUNT - 1:
        if not EARLY:
            total = tl.sum(tl.load(parts + i))
        tl.store(out, total)


@triton.jit
def multiply(out, a, b):
    tl.store(out, a * b)


@triton.jit
def as_bytes(x, out):
    tl.store(out, tl.load(x.to(tl.pointer_type(tl.uint8))))


@triton.jit
def between_elements(x, out):
    tl.store(out, tl.load((x.to(tl.pointer_type(tl.uint8)) + 2).to(tl.pointer_type(tl.float32))))


@triton.jit
def through_address(addresses, out):
    tl.store(out, tl.load(tl.load(addresses).to(tl.pointer_type(tl.float32))))


@triton.jit
def described(x, out, n):
    tile = tl.make_tensor_descriptor(x, [n, 4], [4, 1], [2, 4]).load([n - 1, 0])
    tl.store(out + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :], tile)


def test_a_clean_launch_and_its_bytes():
    x, out = torch.randn(10, dtype=torch.float64), torch.empty(10, dtype=torch.float64)
    with sanitized() as report:
        copy[(3,)](x, out=out, n=10, stride=1, BLOCK=4)
    assert torch.equal(x, out)
    assert report.launches == [interpreter.Launch("copy", {"x": 80}, {"out": 80}, programs=3)]
    assert (report.count, report.loaded, report.stored) == (1, 80, 80)


def test_entries_of_a_tuple_are_counted_apart_also_where_they_share_memory():
    table, weights, out = torch.randn(4, 3), torch.randn(1).expand(3), torch.empty(2, 3)
    features = (table[:2], table[1:3], table[2:].to(torch.float16))
    with sanitized() as report:
        combine[(2,)](features, weights, 0, out, 3, BLOCK=4)
        combine[(2,)](features[:1], weights, 0, out, 3, BLOCK=4)
    torch.testing.assert_close(out, weights[0] * features[0])
    first, second = report.launches
    assert first.loaded == {"features[0]": 24, "features[1]": 24, "features[2]": 12, "weights": 24}
    assert second.loaded == {"features[0]": 24, "weights": 8} and first.stored == second.stored == {
        "out": 24
    }
    assert (
        report.loaded_by("features") == 84
        and report.loaded_by("features[0]", "weights") == 80
        and report.loaded_by("out", "feat") == 0
    )
    assert (report.count, report.loaded, report.stored, report.stored_by("out")) == (2, 116, 48, 48)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool]
)
def test_every_type_of_element(dtype):
    x = torch.ones(6).to(dtype)
    out = torch.zeros_like(x)
    with sanitized() as report:
        copy[(2,)](x, out, 6, 1, BLOCK=4)
    assert torch.equal(x, out) and report.loaded == report.stored == x.nbytes


def test_strided_and_expanded_inputs_and_outputs_in_place():
    wide, out = torch.randn(5, 3), torch.empty(5)
    with sanitized() as report:
        copy[(1,)](wide[:, 1], out, 5, 3, BLOCK=8)
        assert torch.equal(out, wide[:, 1])
        copy[(2,)](wide[0, :1].expand(5), out, 5, 0, BLOCK=4)
        assert torch.equal(out, wide[0, :1].expand(5))
        increment_own[(5,)](out.fill_(1.0))
        assert out.tolist() == [2.0] * 5
        copy[(1,)](out[:0], out[:0], 0, 1, BLOCK=4)
    assert [launch.loaded.total() for launch in report.launches] == [
        20,
        20,
        40,
        0,
    ] and report.stored == 60


def test_tensor_descriptors():
    x, out = torch.randn(3, 4), torch.empty(2, 4)
    with sanitized() as report:
        described[(1,)](x, out, 3)
    assert torch.equal(out, torch.cat([x[2:], torch.zeros(1, 4)])) and (
        report.loaded,
        report.stored,
    ) == (16, 32)
    with (
        sanitized(),
        pytest.raises(MemoryAccessError, match="load from x at byte offset 48: not an element"),
    ):
        described[(1,)](x, out, 4)


def test_a_launch_on_copies_of_the_storages_is_checked_just_so(monkeypatch):
    """What the interpreter does with tensors on a device.

    The kernel sees other addresses than the caller.
    """
    monkeypatch.setattr(torch.UntypedStorage, "cpu", lambda storage: storage.clone())
    x, out = torch.randn(12), torch.zeros(6)
    with sanitized() as report:
        copy[(2,)](x[1::2], out, 6, 2, BLOCK=4)
        with pytest.raises(MemoryAccessError, match="load from x at byte offset 4: not an element"):
            copy[(2,)](x[1::2], out, 6, 1, BLOCK=4)
    assert torch.equal(out, x[1::2]) and report.launches[0].loaded == {"x": 24}


OUTSIDE = {
    "load after the end": (
        move,
        (torch.zeros(4), torch.zeros(4), 4, 0),
        r"move, program \(0, 0, 0\): load from x at byte offset 16: not an element",
    ),
    "load before the start": (
        move,
        (torch.zeros(4)[1:], torch.zeros(4), -1, 0),
        r"load from x at byte offset -4: not an element",
    ),
    "store after the end": (
        move,
        (torch.zeros(4), torch.zeros(4), 0, 4),
        r"store to out at byte offset 16: not an element",
    ),
    "load of nothing": (
        move,
        (torch.zeros(0), torch.zeros(4), 0, 0),
        r"load from x at byte offset 0: not an element",
    ),
    "load far away": (
        move,
        (torch.zeros(4), torch.zeros(4), 2**46, 0),
        r"outside every argument|not an element",
    ),
    "load of a hole": (
        move,
        (torch.zeros(4, 3)[:, :2], torch.zeros(4), 2, 0),
        r"load from x at byte offset 8: not an element .*strides \(3, 1\)",
    ),
    "load of a hole of a transposed view": (
        move,
        (torch.zeros(4, 3)[:, :2].t(), torch.zeros(4), 5, 0),
        r"load from x at byte offset 20: not",
    ),
    "store to a hole": (
        move,
        (torch.zeros(4), torch.zeros(8)[::2], 0, 3),
        r"store to out at byte offset 12: not an element",
    ),
    "another type": (
        as_bytes,
        (torch.zeros(4), torch.zeros(4, dtype=torch.uint8)),
        r"load from x at byte offset 0: 1 bytes, but its elements have 4",
    ),
    "between two elements": (
        between_elements,
        (torch.zeros(4), torch.zeros(4)),
        r"load from x at byte offset 2: not an element",
    ),
    "no argument": (
        through_address,
        (torch.tensor([4096]), torch.zeros(4)),
        r"load from address 0x1000, outside every argument",
    ),
    "unmasked lanes": (
        copy,
        (torch.zeros(10), torch.zeros(12), 11, 1, 4),
        r"copy, program \(2, 0, 0\): load from x at byte offset 40: not an element",
    ),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_accesses_outside_the_argument(case):
    kernel, arguments, message = OUTSIDE[case]
    with sanitized(), pytest.raises(MemoryAccessError, match=message):
        kernel[(3,)](*arguments)


def test_straying_from_one_argument_into_another_is_outside():
    """The address belongs to an element of an argument, but not of the one it was computed from."""
    x = torch.arange(8.0)
    with (
        sanitized(),
        pytest.raises(MemoryAccessError, match="load from x at byte offset 16: not an element"),
    ):
        move[(1,)](x[:4], x[4:], 4, 0)


@pytest.mark.parametrize(
    "kernel, programs, arguments, message",
    [
        (
            one_place,
            1,
            (1, 2),
            r"one_place, program \(0, 0, 0\): store to out at byte offset 0: "
            r"stored twice, by two lanes of one store",
        ),
        (
            one_place,
            2,
            (0, 1),
            r"one_place, program \(1, 0, 0\): store to out at byte offset 0: "
            r"stored twice, first by program \(0, 0, 0\)",
        ),
        (
            twice,
            1,
            (),
            r"twice, program \(0, 0, 0\): store to out at byte offset 0: "
            r"stored twice, first by program \(0, 0, 0\)",
        ),
    ],
)
def test_two_stores_to_one_place(kernel, programs, arguments, message):
    with sanitized(), pytest.raises(MemoryAccessError, match=message):
        kernel[(programs,)](torch.zeros(4), *arguments)


def test_two_launches_may_store_to_one_place():
    out = torch.zeros(4)
    with sanitized() as report:
        for _ in range(2):
            one_place[(4,)](out, 1, BLOCK=1)
    assert report.stored == 32 and report.count == 2


def test_stored_by_one_program_and_loaded_by_another():
    x, out = torch.zeros(4), torch.zeros(1)
    with sanitized():
        with pytest.raises(
            MemoryAccessError,
            match=r"program \(1, 0, 0\): store to x at byte offset 0: "
            r"loaded by program \(0, 0, 0\)",
        ):
            move_between_programs[(2,)](x, out, 0)
        with pytest.raises(
            MemoryAccessError,
            match=r"program \(1, 0, 0\): load from x at byte offset 0: "
            r"stored by program \(0, 0, 0\)",
        ):
            move_between_programs[(2,)](x, out, 1)
        with pytest.raises(
            MemoryAccessError,
            match=r"program \(1, 0, 0\): load from x at byte offset 0: "
            r"stored by program \(0, 0, 0\)",
        ):
            load_all_store_own[(4,)](x)
        with pytest.raises(
            MemoryAccessError,
            match=r"program \(2, 0, 0\): store to x at byte offset 0: loaded by other programs",
        ):
            load_all_store_last[(3,)](x)


def test_races_show_through_views_of_one_storage():
    """Out is x moved by one element: program 0 stores what program 1 loads.

    Also where one views the other's memory as another type.
    """
    x = torch.zeros(9)
    with sanitized():
        with pytest.raises(
            MemoryAccessError,
            match=r"copy, program \(1, 0, 0\): load from x at byte offset 4: "
            r"stored by program \(0, 0, 0\)",
        ):
            copy[(8,)](x[:8], x[1:], 8, 1, BLOCK=1)
        with pytest.raises(
            MemoryAccessError,
            match=r"program \(1, 0, 0\): load from x at byte offset 4: "
            r"stored by program \(0, 0, 0\)",
        ):
            copy[(2,)](x[:8], x[:8].view(torch.float64), 2, 1, BLOCK=1)


@pytest.mark.parametrize(
    "kernel, dtype", [(add_atomically, torch.float32), (exchange_atomically, torch.int32)]
)
def test_atomic_operations(kernel, dtype):
    with (
        sanitized(),
        pytest.raises(
            MemoryAccessError, match=rf"{kernel.__name__}, program \(0, 0, 0\): atomic operation"
        ),
    ):
        kernel[(1,)](torch.zeros(1, dtype=dtype))


def test_who_draws_the_last_ticket_may_load_what_the_others_stored():
    tickets = lambda: torch.zeros(1, dtype=torch.int32)
    parts, out = torch.full((4,), torch.nan), torch.full((1,), torch.nan)
    with sanitized():
        last_adds_all[(4,)](parts, out, tickets(), COUNT=4, EARLY=False)
    assert out.item() == 4
    with (
        sanitized(),
        pytest.raises(MemoryAccessError, match="parts at byte offset 4: loaded by program"),
    ):
        last_adds_all[(4,)](torch.zeros(4), out, tickets(), COUNT=4, EARLY=True)


def test_int32_overflow():
    out = torch.zeros(1, dtype=torch.int64)
    multiply[(1,)](out, 2**16, 2**16)
    assert out.item() == 0  # what the interpreter does by itself
    with sanitized():
        multiply[(1,)](out, 2**15, 2**15)
        assert out.item() == 2**30
        with pytest.raises(
            interpreter.internals.InterpreterError,
            match="int32 overflow detected for operation mul",
        ):
            multiply[(1,)](out, 2**16, 2**16)


def test_everything_is_as_before_afterwards():
    def state():
        executor = interpreter.internals.GridExecutor
        return (
            {**vars(BUILDER), "grid_dim": 0, "grid_idx": 0},
            executor.__call__,
            executor._init_args_hst,
            interpreter.internals._implicit_cvt,
        )

    x, before = torch.zeros(4), state()
    with sanitized():
        move[(1,)](x, x, 0, 0)
    assert state() == before
    with pytest.raises(MemoryAccessError), sanitized():
        move[(1,)](x, x, 4, 0)
    assert state() == before
    with pytest.raises(RuntimeError, match="does not nest"), sanitized(), sanitized():
        pass
    assert state() == before
    add_atomically[(2,)](x)
    assert x[0] == 2
