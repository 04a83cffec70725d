"""``update_prototypes_``: the tables of all modalities move in place, in one launch.

Values by the rule of test_triton_values.py; what is touched, and how often, by the sanitizer.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

pytest.importorskip("triton")
import interpreter
from test_triton_values import (
    DEVICE,
    LAYOUTS,
    TOLERANCE,
    bits,
    close,
    embeddings,
    labels,
    laid_out,
    start,
)

from iib_kernels import class_sums, snapshot, update_prototypes, update_prototypes_
from iib_kernels._runtime import compute_dtype
from iib_kernels.ops.update import launch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
F32 = torch.float32


@pytest.fixture(autouse=True)
def watched():
    """Every kernel of this file runs in the sanitizer."""
    watch = interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext()
    with watch as report:
        yield report


class Batch:
    """Tables, counts and a batch of M modalities, laid out as asked."""

    def __init__(
        self,
        seed=0,
        batch=19,
        classes=5,
        widths=(13, 8),
        dtype=F32,
        table_dtype=F32,
        layout="plain",
        table_layout="plain",
        kind=torch.int64,
        ignored=-100,
        masked=False,
    ):
        g = start(seed)
        table_layout = "plain" if table_layout == "expanded" else table_layout
        flat = "plain" if layout == "expanded" else layout
        targets = labels(g, (batch,), classes, kind, ignored)
        mask = torch.rand(batch, len(widths), generator=g) < 0.7
        self.targets, self.ignored, self.classes = laid_out(targets, flat), ignored, classes
        self.mask = laid_out(mask, flat) if masked else None
        self.features, self.tables, self.counts = [], [], []
        for m, width in enumerate(widths):
            rows, table = embeddings(g, batch, classes, width, hard=True)
            lost = targets == ignored if not masked else (targets == ignored) | ~mask[:, m]
            if layout != "expanded":
                rows[lost] = torch.nan  # what stands there must not matter
            counts = torch.randint(3, (classes,), generator=g)
            table[counts == 0] = torch.nan
            self.features.append(laid_out(rows, layout, dtype))
            self.tables.append(laid_out(table, table_layout, table_dtype))
            self.counts.append(laid_out(counts, table_layout))

    def moved(self, impl, *, wide=False, metric="cosine", momentum=0.9):
        """Tables and counts after the batch; ``wide``: of float64 copies."""
        raised = lambda values: values.double() if wide else values
        like = lambda v: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
        copies = lambda values: [raised(like(v).copy_(v)) for v in values]
        tables, counts = copies(self.tables), [number.clone() for number in self.counts]
        update_prototypes_(
            tables,
            counts,
            [raised(rows) for rows in self.features],
            self.targets,
            momentum=momentum,
            metric=metric,
            mask=self.mask,
            ignore_index=self.ignored,
            impl=impl,
        )
        return tables, counts

    def check(self, **options):
        """The rule of test_triton_values.py."""
        before = [values.clone() for values in (*self.features, self.targets)]
        (found, counts), (eager, _), (truth, numbers) = (
            self.moved("triton", **options),
            self.moved("reference", **options),
            self.moved("reference", wide=True, **options),
        )
        assert all(map(torch.equal, counts, numbers))
        dtype = compute_dtype(*self.features, *self.tables)
        for m, (a, b, c) in enumerate(zip(found, eager, truth)):
            tolerance = max(TOLERANCE[a.dtype], TOLERANCE[dtype])
            close(f"prototypes[{m}]", a.double(), b.double(), c, tolerance, 1.0)
        assert all(map(bits, before, (*self.features, self.targets)))
        return found, counts


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_of_every_dtype_with_float32_tables(dtype, masked, metric):
    Batch(dtype=dtype, masked=masked).check(metric=metric)


@pytest.mark.parametrize("count", range(1, 7))
def test_one_launch_moves_every_number_of_modalities(count, watched):
    batch = Batch(count, widths=(3, 16, 40, 1, 70, 16)[:count], masked=count % 2 == 0)
    batch.check()
    assert watched is None or [one.name for one in watched.launches] == ["move_prototypes"]


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16])
def test_tables_keep_their_dtype(table_dtype):
    Batch(dtype=table_dtype, table_dtype=table_dtype).check()
    Batch(dtype=F32, table_dtype=table_dtype).check()


@pytest.mark.parametrize("layout, table_layout", list(itertools.product(LAYOUTS, LAYOUTS[:3])))
def test_any_strides_of_rows_and_of_tables(layout, table_layout):
    """Sliced tables have holes, which the sanitizer guards."""
    Batch(7, layout=layout, table_layout=table_layout, masked=True).check(momentum=0.0)


@pytest.mark.parametrize("kind, ignored", [(torch.int32, 0), (torch.int16, -100), (torch.uint8, 3)])
def test_targets_of_other_types(kind, ignored):
    Batch(3, kind=kind, ignored=ignored).check()


@pytest.mark.parametrize("classes", [1, 2, 31, pytest.param(130, marks=pytest.mark.slow)])
def test_few_and_many_classes(classes):
    Batch(5, batch=37, classes=classes, masked=True).check()


@pytest.mark.parametrize(
    "dtype, metric",
    [
        (F32, "cosine"),
        pytest.param(F32, "sqeuclidean", marks=pytest.mark.slow),
        pytest.param(torch.float64, "cosine", marks=pytest.mark.slow),
        (torch.float64, "sqeuclidean"),
    ],
)
def test_rows_wider_than_registers_are_streamed(monkeypatch, watched, dtype, metric):
    monkeypatch.setattr(launch, "COMPONENTS", 32)
    monkeypatch.setattr(launch, "STREAMED", 16)
    batch = Batch(11, widths=(70, 5, 33), dtype=dtype, table_dtype=dtype, masked=True)
    batch.check(metric=metric)
    rows = torch.where(batch.targets == batch.ignored, 0.0, 1.0)[:, None].to(dtype)
    given = torch.ones(rows.shape[0], 70, dtype=dtype, device=DEVICE) * rows, batch.targets, 5
    for found, expected in zip(
        *(class_sums(*given, metric=metric, impl=impl) for impl in ("triton", "reference"))
    ):
        torch.testing.assert_close(found, expected)
    if watched is not None:
        names = [one.name for one in watched.launches]
        assert names == ["move_prototypes_streamed", "class_sums_streamed"]


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_more_targets_than_are_looked_at_at_once_and_many_classes_a_program(monkeypatch, streamed):
    """The same bits as with one look and a class a program: rows are added in the same order."""
    batch = Batch(13, batch=75, classes=11, masked=True)
    if streamed:
        monkeypatch.setattr(launch, "COMPONENTS", 4)
    expected = batch.check()
    monkeypatch.setattr(launch, "SEARCH", (8, 16, 32))
    monkeypatch.setattr(launch, "PROGRAMS", 5)
    assert launch.search(75, 11, 2)["GROUP"] == 8
    for found, other in zip(batch.check(), expected):
        assert all(map(bits, found, other))


def test_repeats_bit_for_bit_and_agrees_with_the_pure_function():
    batch = Batch(17, batch=64, classes=3)
    once, again = batch.moved("triton"), batch.moved("triton")
    for m in range(2):
        pure = update_prototypes(
            batch.tables[m], batch.counts[m], batch.features[m], batch.targets, impl="triton"
        )
        for found in (again, pure):
            table, count = (found[0][m], found[1][m]) if found is again else found
            assert bits(table, once[0][m]) and torch.equal(count, once[1][m])


@pytest.mark.parametrize("why", ["empty batch", "all ignored", "all absent"])
def test_nothing_is_written_where_nothing_counts(why, watched):
    batch = Batch(19, batch=0 if why == "empty batch" else 9, masked=why == "all absent")
    if why == "all ignored":
        batch.targets.fill_(batch.ignored)
    elif why == "all absent":
        batch.mask.zero_()
    tables, counts = batch.check()
    assert all(map(bits, tables, batch.tables)) and all(map(torch.equal, counts, batch.counts))
    if watched is not None:
        assert watched.stored == 0 and watched.loaded_by("prototypes", "features", "counts") == 0
        assert watched.count == (why != "empty batch")


def test_only_classes_of_the_batch_are_read_and_written(watched):
    """Each row once; each moved prototype and count once in and once out."""
    if watched is None:
        pytest.skip("bytes are counted in the interpreter")
    classes, widths = 40, (24, 7)
    tables = [torch.randn(classes, width) for width in widths]
    counts = [torch.ones(classes, dtype=torch.int64) for _ in widths]
    features = [torch.randn(12, width, dtype=torch.float16) for width in widths]
    targets = torch.tensor([3, 3, 39, 3, 0, 39, 7, 7, 7, -100, 3, 0])  # four classes, eleven rows
    before = [table.clone() for table in tables]
    update_prototypes_(tables, counts, features, targets, impl="triton")
    named = lambda read, name: sum(
        count
        for one in watched.launches
        for key, count in (one.loaded if read else one.stored).items()
        if key.startswith(name)
    )
    assert named(True, "features[") == 11 * sum(widths) * 2
    for read in (True, False):
        assert named(read, "prototypes[") == 4 * sum(widths) * 4
        assert named(read, "counts[") == 4 * 2 * 8
        assert named(read, "rows.lists_ptr") == 11 * 2 * 4
    moved = torch.zeros(classes, dtype=torch.bool).index_fill_(0, targets[targets >= 0], True)
    for table, old in zip(tables, before):
        assert bits(table[~moved], old[~moved]) and (table[moved] != old[moved]).any(1).all()


@pytest.mark.parametrize("shape, most", [((4096, 1000, 3), 25e6), ((64, 1000, 3), 4e5)])
def test_searching_the_targets_stays_small(shape, most):
    """Bytes of targets that all programs look at; one class a program would take 98 MB."""
    batch, classes, count = shape
    how = launch.search(batch, classes, count)
    programs = -(-classes // how["GROUP"]) * count
    assert how["ONE_BLOCK"] and programs * batch * 8 <= most and programs >= 132


def test_an_odd_last_batch_adds_rows_in_the_same_blocks():
    """Block sizes do not follow the batch, but for the search: three variants of a kernel."""
    variants = {tuple(launch.search(batch, 1000, 3).items()) for batch in range(1, 4097)}
    assert len(variants) == 3
    assert "batch" not in launch.sizes.__annotations__


def test_backward_through_a_table_that_moved_raises():
    batch = Batch(23, widths=(6,))
    table, rows = torch.randn(5, 6, device=DEVICE), batch.features[0].nan_to_num().requires_grad_()
    safe = (rows @ snapshot(table).T).sum()
    unsafe = (rows @ table.T).sum()
    update_prototypes_([table], [batch.counts[0]], [rows], batch.targets, impl="triton")
    safe.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        unsafe.backward()


class Moving(torch.nn.Module):
    """A layer and the tables that follow it; a loss reads a snapshot of them."""

    def __init__(self, impl, pure=False):
        super().__init__()
        torch.manual_seed(0)
        self.impl, self.pure = impl, pure
        self.layer = torch.nn.Linear(5, 6)
        for m in range(2):
            self.register_buffer(f"table_{m}", torch.randn(3, 6))
            self.register_buffer(f"count_{m}", torch.ones(3, dtype=torch.int64))
        self.to(DEVICE)

    def forward(self, inputs, targets):
        rows = self.layer(inputs)
        tables, counts = [self.table_0, self.table_1], [self.count_0, self.count_1]
        loss = (rows @ snapshot(tables[0]).T).square().mean()
        if self.pure:
            moved, count = update_prototypes(tables[0], counts[0], rows, targets, impl=self.impl)
            tables[0].copy_(moved)
            counts[0].copy_(count)
        else:
            update_prototypes_(tables, counts, [rows, 2 * rows], targets, impl=self.impl)
        return loss


@pytest.mark.parametrize(
    "impl, backend, pure",
    [
        ("triton", "aot_eager", False),
        ("reference", "aot_eager", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("triton", "aot_eager", True),
                ("reference", "aot_eager", False),
                *itertools.product(("triton", "reference"), ("inductor",), (False, True)),
            ]
        ),
    ],
)
def test_fullgraph_compile_moves_buffers_as_eager_code_does(impl, backend, pure):
    torch._dynamo.reset()
    eager, model = Moving(impl, pure), Moving(impl, pure)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in range(2):
        inputs = torch.randn(7, 5, generator=start(seed)).to(DEVICE)
        targets = torch.arange(7, device=DEVICE) % 3
        for module, call in ((eager, eager), (model, compiled)):
            module.zero_grad()
            call(inputs, targets).backward()
    for found, expected in zip(model.state_dict().values(), eager.state_dict().values()):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.layer.weight.grad, eager.layer.weight.grad)
    assert (model.count_0 > 1).all()


TABLE, NUMBER = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
ROWS, TARGETS = torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        (([TABLE], [NUMBER], ROWS, TARGETS), {}, TypeError, "features: expected a sequence"),
        (([TABLE], NUMBER, [ROWS], TARGETS), {}, TypeError, "counts: expected a sequence"),
        (([TABLE], [], [ROWS], TARGETS), {}, ValueError, "counts: expected 1 tensors"),
        (([TABLE], [NUMBER.float()], [ROWS], TARGETS), {}, TypeError, r"counts\[0\]: expected"),
        (([TABLE], [NUMBER], [ROWS[:, :2]], TARGETS), {}, ValueError, r"features\[0\]: expected"),
        (([TABLE], [NUMBER], [ROWS], TARGETS[:1]), {}, ValueError, "targets: expected shape"),
        (([TABLE], [NUMBER], [ROWS], TARGETS + 3), {}, ValueError, "targets: row 1 holds 4"),
        (
            ([TABLE, TABLE], [NUMBER, NUMBER.clone()], [ROWS] * 2, TARGETS),
            {},
            ValueError,
            r"prototypes\[1\]: is given twice",
        ),
        (
            ([TABLE, TABLE.clone()], [NUMBER] * 2, [ROWS] * 2, TARGETS),
            {},
            ValueError,
            r"counts\[1\]: is given twice",
        ),
        (
            ([TABLE.clone().requires_grad_()], [NUMBER], [ROWS], TARGETS),
            {},
            ValueError,
            "prototypes: requires grad",
        ),
        (([TABLE], [NUMBER], [ROWS], TARGETS), {"momentum": 1.0}, ValueError, "momentum"),
        (([TABLE], [NUMBER], [ROWS], TARGETS), {"metric": "dot"}, ValueError, "metric: 'dot'"),
        (
            ([TABLE], [NUMBER], [ROWS], TARGETS),
            {"mask": torch.ones(2, 2, dtype=torch.bool)},
            ValueError,
            "mask: expected shape",
        ),
    ],
)
def test_wrong_input_is_named_and_moves_nothing(arguments, options, error, words, impl):
    if DEVICE != "cpu" and "row 1" in words:
        pytest.skip("values are not looked at on a GPU")
    on_device = lambda value: (
        [on_device(one) for one in value] if isinstance(value, list) else value.to(DEVICE)
    )
    if DEVICE != "cpu":
        arguments = tuple(on_device(value) for value in arguments)
    with pytest.raises(error, match=words):
        update_prototypes_(*arguments, impl=impl, **options)
    assert not TABLE.any() and not NUMBER.any()
