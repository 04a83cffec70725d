"""torch.export with a batch of any size: the exported program gives what the module gives."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from iib_kernels import _chunks, alignment_loss, class_sums, nearest_prototype
from iibalance.nn.gate import Gate
from iibalance.nn.head import HeadOutput, IIBalanceHead
from iibalance.nn.model import MultimodalClassifier

ROOT = Path(__file__).resolve().parents[2]
DIMS, CLASSES = {"audio": 6, "visual": 4}, 3
BATCH = torch.export.Dim("batch", min=1, max=2**20)
SIZES = (1, 3, 17, 250, 1000)


@pytest.fixture
def chunks_of_100(monkeypatch):
    """Eager code splits a batch of more than 100 rows."""
    row = CLASSES * 4 * 4  # bytes of the search's work arrays
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 100 * row)
    assert len(_chunks.spans(250, _chunks.rows_per_chunk(CLASSES, torch.float32, 4))) == 3


def embeddings(size):
    generator = torch.Generator().manual_seed(size)
    return {name: torch.randn(size, dim, generator=generator) for name, dim in DIMS.items()}


def some_missing(size):
    """[B, M], in every third row one modality or the other."""
    mask = torch.ones(size, len(DIMS), dtype=torch.bool)
    mask[::6, 0] = mask[3::6, 1] = False
    return mask


def make_head(impl="auto"):
    """A head that has seen all classes, with a gate that is anything but neutral."""
    torch.manual_seed(0)
    head = IIBalanceHead(DIMS, CLASSES, budgets=(0.8, 0.3), impl=impl)
    head(embeddings(30), torch.arange(30) % CLASSES)
    head.gate.log_temperature.copy_(torch.tensor([0.3, -0.4]))
    head.gate.trust_offset.copy_(torch.tensor([1.0, 2.5]))
    head.gate.surprise_weight.copy_(torch.tensor([2.0, 3.0]))
    head.gate.log_scale.fill_(0.3)
    head.gate.own_temperature.copy_(torch.tensor([2.0, 0.8]))
    head.prototypes.set_usual(head.prototypes.novelty(embeddings(40)).detach())
    return head.eval()


def assert_same(found, expected):
    assert type(found) is type(expected) is HeadOutput
    for name in ("logits", "trust", "uncertainty", "loss"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(found.modality_logits, expected.modality_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind, masked, strict, traced",
    [
        (dict, True, False, 7),
        pytest.param(dict, True, True, 7, marks=pytest.mark.slow),
        pytest.param(dict, False, True, 250, marks=pytest.mark.slow),
        pytest.param(list, False, False, 7, marks=pytest.mark.slow),
        pytest.param(list, True, False, 250, marks=pytest.mark.slow),
        pytest.param(list, True, True, 250, marks=pytest.mark.slow),
    ],
)
def test_a_head_of_any_batch(kind, masked, strict, traced, chunks_of_100):
    """Traced with a batch of one chunk or of three, run with less and with more."""
    head = make_head()
    given = lambda size: embeddings(size) if kind is dict else list(embeddings(size).values())
    shapes = {"embeddings": kind(dict.fromkeys(DIMS, {0: BATCH}))}
    if kind is list:
        shapes = {"embeddings": [{0: BATCH}] * 2}
    options = {"mask": some_missing(traced)} if masked else {}
    shapes |= {"mask": {0: BATCH}} if masked else {}
    program = torch.export.export(
        head, (given(traced),), options, dynamic_shapes=shapes, strict=strict
    )
    surprised = False
    for size in SIZES:
        values, mask = given(size), some_missing(size) if masked else None
        if masked:  # what is missing may hold anything
            first = values["audio"] if kind is dict else values[0]
            first[~mask[:, 0]] = math.nan
        found = program.module()(values, **({"mask": mask} if masked else {}))
        expected = head(values, mask=mask)
        assert_same(found, expected)
        plain = head.gate(head.heads(values, mask), None, mask)
        surprised |= not torch.allclose(plain.trust, expected.trust)
    assert surprised  # or the search for the nearest prototype would not be tested


class Targets(nn.Module):
    """A head called with targets."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, audio, visual, targets):
        return self.head([audio, visual], targets)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_any_batch(training, strict, chunks_of_100):
    """Evaluated, and in training mode, where the prototypes move as well."""
    model = Targets(make_head()).train(training)
    shapes = {"audio": {0: BATCH}, "visual": {0: BATCH}, "targets": {0: BATCH}}
    given = lambda size: (*embeddings(size).values(), torch.arange(size) % CLASSES)
    with torch.no_grad():
        program = torch.export.export(model, given(7), dynamic_shapes=shapes, strict=strict)
        for size in SIZES:
            module, other = program.module(), copy.deepcopy(model)
            before = other.head.prototypes.prototypes[0].clone()
            assert_same(module(*given(size)), other(*given(size)))
            assert torch.equal(other.head.prototypes.prototypes[0], before) == (not training)
            state = dict(other.named_buffers())
            exported = dict(module.named_buffers())  # those that are used
            assert {f"head.prototypes.prototypes_{index}" for index in (0, 1)} <= {*exported}
            for name, value in exported.items():
                torch.testing.assert_close(value, state[name])


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_classifier_of_any_batch(strict, chunks_of_100):
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, DIMS["visual"]))
    encoders = {"audio": nn.Linear(5, DIMS["audio"]), "visual": image}
    model = MultimodalClassifier(encoders, head=make_head()).eval()

    def given(size):
        generator = torch.Generator().manual_seed(size)
        sizes = {"audio": (size, 5), "visual": (size, 1, 4, 4)}
        return {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}

    shapes = {"inputs": dict.fromkeys(DIMS, {0: BATCH}), "mask": {0: BATCH}}
    options = {"mask": some_missing(7)}
    program = torch.export.export(model, (given(7),), options, dynamic_shapes=shapes, strict=strict)
    for size in SIZES:
        mask = some_missing(size)
        assert_same(program.module()(given(size), mask=mask), model(given(size), mask=mask))


def test_a_gate_alone():
    gate = make_head().gate
    logits = lambda size: [torch.randn(size, 3, generator=torch.Generator().manual_seed(size))] * 2
    program = torch.export.export(
        gate, (logits(7),), dynamic_shapes={"logits": [{0: BATCH}, {0: BATCH}]}
    )
    assert isinstance(gate, Gate)
    for size in SIZES:
        for a, b in zip(program.module()(logits(size)), gate(logits(size)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiled_code_of_a_batch_that_varies_is_compiled_once(chunks_of_100):
    """A loop over chunks of the batch would bind it to one size."""
    tables = [torch.randn(CLASSES, dim) for dim in DIMS.values()]

    def step(audio, visual, targets):
        features = [audio, visual]
        out = alignment_loss(features, tables, targets, torch.tensor([0.9, 0.4]))
        near = nearest_prototype(features, tables).distance
        return out.contrastive.sum() + out.alignment.sum() + near.mean(), class_sums(
            audio, targets, CLASSES
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (7, 250, 31):
            leaves = [values.requires_grad_() for values in embeddings(size).values()]
            targets = torch.arange(size) % CLASSES
            (loss, sums), (expected, others) = (call(*leaves, targets) for call in (compiled, step))
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(sums, others)
            found = torch.autograd.grad(loss, leaves)
            for a, b in zip(found, torch.autograd.grad(expected, leaves), strict=True):
                torch.testing.assert_close(a, b)


# ----- Written to a file, and read by another process


class Tensors(nn.Module):
    """A head that gives tensors alone."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, audio, visual):
        out = self.head([audio, visual])
        return out.logits, out.trust


LOADED = """
import sys
import torch
{imports}
program, calls = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
assert not {absent!r} or {absent!r} not in sys.modules
for given, expected in calls:
    for a, b in zip(program.module()(*given), expected):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
print("the same", len(calls))
"""


def load_elsewhere(folder, program, calls, imports="", absent=""):
    """The program in a process of its own, where ``calls`` must give the same."""
    torch.export.save(program, folder / "program.pt2")
    torch.save(calls, folder / "calls.pt")
    code = LOADED.format(imports=imports, absent=absent)
    files = [str(folder / name) for name in ("program.pt2", "calls.pt")]
    done = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(len(calls))


@pytest.mark.slow
def test_a_saved_head_is_loaded_where_its_module_is_imported(tmp_path):
    """The output is a HeadOutput again, which torch.export.save writes by name alone."""
    head = make_head()
    shapes = {"embeddings": dict.fromkeys(DIMS, {0: BATCH})}
    program = torch.export.export(head, (embeddings(7),), dynamic_shapes=shapes)
    with torch.no_grad():
        tensors = lambda out: [v if isinstance(v, torch.Tensor) else None for v in out]
        calls = [((embeddings(size),), tensors(head(embeddings(size)))) for size in SIZES]
    assert sum(value is not None for value in calls[0][1]) == 3  # logits, uncertainty, trust
    load_elsewhere(tmp_path, program, calls, imports="import iibalance.nn.head")


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_program_of_tensors_needs_the_operators_it_holds_and_no_more(impl, tmp_path):
    """In plain PyTorch none; with the kernels those of iib_kernels."""
    if impl == "triton":
        interpreter = pytest.importorskip("interpreter")
        if not interpreter.interpreted():
            pytest.skip("no interpreter and no GPU to run the kernels on")
    model = Tensors(make_head(impl)).eval()
    given = lambda size: tuple(embeddings(size).values())
    shapes = {"audio": {0: BATCH}, "visual": {0: BATCH}}
    with torch.no_grad():
        program = torch.export.export(model, given(7), dynamic_shapes=shapes)
        calls = [(given(size), model(*given(size))) for size in (1, 3, 17)]
    operators = {str(node.target) for node in program.graph.nodes if "iib." in str(node.target)}
    expected = {"iib.nearest_prototype.default", "iib.trusted_fusion.default"}
    assert operators == (expected if impl == "triton" else set())
    imports = "import iib_kernels" if impl == "triton" else ""
    absent = "iibalance" if impl == "triton" else "iib_kernels"
    load_elsewhere(tmp_path, program, calls, imports=imports, absent=absent)
