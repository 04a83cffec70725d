"""The prototype bank against a loop written for a reader, in one process and in two."""

import socket

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from iibalance.nn.head import IIBalanceHead
from iibalance.nn.prototypes import PrototypeBank

DIMS = {"audio": 5, "visual": 3}


def batches(count=4, size=12, classes=4, seed=0):
    """Random batches whose first ones lack classes 2 and 3, with masked and ignored rows."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for number in range(count):
        embeddings = {
            name: torch.randn(size, dim, generator=generator) * 3 for name, dim in DIMS.items()
        }
        # The last class never occurs
        targets = torch.randint(
            0, 2 if number < count // 2 else classes - 1, (size,), generator=generator
        )
        targets[torch.rand(size, generator=generator) < 0.2] = -100
        result.append((embeddings, targets, torch.rand(size, 2, generator=generator) < 0.7))
    return result


def by_loop(steps, classes=4, momentum=0.9, cosine=True):
    """Prototypes and counts in float64, a class and a row at a time: method page, section 2."""
    unit = (lambda v: v / v.norm()) if cosine else (lambda v: v)
    prototypes = {name: [None] * classes for name in DIMS}
    counts = {name: [0] * classes for name in DIMS}
    for embeddings, targets, mask in steps:
        for column, name in enumerate(DIMS):
            for k in range(classes):
                rows = [
                    unit(embeddings[name][i].double())
                    for i in range(len(targets))
                    if targets[i] == k and mask[i, column]
                ]
                if not rows:
                    continue
                mean = sum(rows) / len(rows)
                old = prototypes[name][k]
                prototypes[name][k] = unit(
                    mean if old is None else momentum * old + (1 - momentum) * mean
                )
                counts[name][k] += len(rows)
    return prototypes, counts


def assert_same(bank, prototypes, counts):
    for index, name in enumerate(DIMS):
        assert bank.counts[index].tolist() == counts[name]
        assert bank.seen[index].tolist() == [count > 0 for count in counts[name]]
        for k, expected in enumerate(prototypes[name]):
            expected = (
                torch.zeros(DIMS[name], dtype=torch.float64) if expected is None else expected
            )
            # A mean near 0 magnifies float32's rounding
            torch.testing.assert_close(
                bank.prototypes[index][k].double(), expected, atol=2e-5, rtol=1e-5
            )


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_moving_average_against_a_loop(metric, momentum):
    bank = PrototypeBank(DIMS, 4, momentum=momentum, metric=metric)
    steps = batches()
    for done, step in enumerate(steps, 1):
        bank.update(*step)
        assert_same(bank, *by_loop(steps[:done], momentum=momentum, cosine=metric == "cosine"))
    assert not bank.seen[:, 3].any() and bank.seen[:, :3].all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.99]))
def test_moving_average_of_any_batch(seed, size, momentum):
    bank, steps = PrototypeBank(DIMS, 4, momentum=momentum), batches(3, size, seed=seed)
    for step in steps:
        bank.update(*step)
    assert_same(bank, *by_loop(steps, momentum=momentum))


def test_rows_that_do_not_count_may_hold_anything():
    embeddings, targets, mask = batches(1)[0]
    clean, dirty = PrototypeBank(DIMS, 4), PrototypeBank(DIMS, 4)
    clean.update(embeddings, targets, mask)
    for column, name in enumerate(DIMS):
        out = (targets == -100) | ~mask[:, column]
        assert out.any()
        embeddings[name] = embeddings[name].masked_fill(out[:, None], torch.nan)
    dirty.update(embeddings, targets, mask)
    for before, after in zip(clean.prototypes, dirty.prototypes):
        assert torch.equal(before, after)


def test_a_mask_of_ones_is_no_mask_and_a_list_is_a_dict():
    embeddings, targets, _ = batches(1)[0]
    one, two = PrototypeBank(DIMS, 4), PrototypeBank(DIMS, 4)
    one.update(embeddings, targets)
    two.update(list(embeddings.values()), targets, torch.ones(len(targets), 2, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(one.prototypes, two.prototypes)) and torch.equal(
        one.counts, two.counts
    )


def test_another_ignore_index():
    bank = PrototypeBank({"only": 2}, 3)
    bank.update([torch.eye(2)], torch.tensor([1, 0]), ignore_index=0)
    assert bank.counts.tolist() == [[0, 1, 0]]


def test_nearest_is_the_distance_to_the_closest_class_seen():
    bank = PrototypeBank(DIMS, 4)
    step = batches(1)[0]
    bank.update(*step)
    embeddings = batches(1, seed=9)[0][0]
    for index, name in enumerate(DIMS):
        for row, value in enumerate(embeddings[name]):
            cosines = [
                torch.cosine_similarity(value, p, 0)
                for p, seen in zip(bank.prototypes[index], bank.seen[index])
                if seen
            ]
            assert bank.nearest(embeddings)[row, index] == pytest.approx(
                2 - 2 * max(map(float, cosines)), abs=1e-5
            )


def test_nearest_of_a_bank_that_has_seen_nothing_is_no_surprise():
    assert PrototypeBank(DIMS, 4).nearest(batches(1)[0][0]).tolist() == [[0.0, 0.0]] * 12


def test_the_bank_is_saved_and_loaded_with_the_model():
    bank = PrototypeBank(DIMS, 4)
    for step in batches():
        bank.update(*step)
    other = PrototypeBank(DIMS, 4)
    other.load_state_dict(bank.state_dict())
    assert not list(bank.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(bank.prototypes, other.prototypes)
    ) and torch.equal(bank.counts, other.counts)
    step = batches(1, seed=5)[0]
    bank.update(*step)
    other.update(*step)  # goes on as the first would have
    assert all(torch.equal(a, b) for a, b in zip(bank.prototypes, other.prototypes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prototypes_stay_float32_under_half_precision(dtype):
    embeddings, targets, mask = batches(1)[0]
    bank, expected = PrototypeBank(DIMS, 4), PrototypeBank(DIMS, 4)
    half = {name: values.to(dtype) for name, values in embeddings.items()}
    bank.update(half, targets, mask)
    expected.update({name: values.float() for name, values in half.items()}, targets, mask)
    for a, b in zip(bank.prototypes, expected.prototypes):
        assert a.dtype == torch.float32
        # The sums are not taken in half precision
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_update_takes_no_part_in_the_gradient():
    embeddings = {name: torch.randn(6, dim, requires_grad=True) for name, dim in DIMS.items()}
    bank = PrototypeBank(DIMS, 4)
    bank.update(embeddings, torch.arange(6) % 4)
    assert not any(p.requires_grad for p in bank.prototypes)


def test_a_head_moves_them_in_training_only():
    head = IIBalanceHead(DIMS, 4)
    (first, targets, mask), (second, *_) = batches(2, seed=2)
    mask[~mask.any(1)] = True
    head(first, targets, mask=mask)
    assert head.prototypes.counts.sum() == (mask & (targets != -100)[:, None]).sum()
    before = {key: value.clone() for key, value in head.prototypes.state_dict().items()}
    head(second)  # no targets
    head.fuse(second)
    head.eval()
    head(second, targets)
    assert all(
        torch.equal(value, before[key]) for key, value in head.prototypes.state_dict().items()
    )
    head.train()
    head(second, targets)
    assert not torch.equal(head.prototypes.prototypes_0, before["prototypes_0"])


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="momentum: expected a number in"):
        PrototypeBank(DIMS, 4, momentum=momentum)


def test_embeddings_under_the_wrong_names():
    with pytest.raises(
        ValueError, match="embeddings: expected the modalities audio, visual, got audio, text"
    ):
        PrototypeBank(DIMS, 4).update(
            {"audio": torch.zeros(1, 5), "text": torch.zeros(1, 3)}, torch.tensor([0])
        )


def _rank(rank, world, port, path):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        bank = PrototypeBank(DIMS, 4)
        for embeddings, targets, mask in batches():
            share = slice(0, 4) if rank == 0 else slice(4, None)  # unequal halves
            bank.update(
                {name: values[share] for name, values in embeddings.items()},
                targets[share],
                mask[share],
            )
        torch.save(bank.state_dict(), f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_what_one_would_hold(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (2, port, str(tmp_path)), nprocs=2)
    whole = PrototypeBank(DIMS, 4)
    for step in batches():
        whole.update(*step)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, expected in whole.state_dict().items():
        assert torch.equal(first[key], second[key])  # bit for bit: the ranks must not drift apart
        torch.testing.assert_close(first[key], expected, atol=1e-6, rtol=1e-5)
