"""``inforeg``: scores, leads, the window by Fisher traces, and the regulation; by hand."""

import math

import pytest
import torch
from test_formulas import arrays, draw, mean_nll, ready, run, slices, softmax

from iibalance.methods.inforeg import InfoReg


def scores_by_hand(model, batch):
    """s_m, sample by sample; None where no sample has the modality."""
    found, count = [], len(model.encoders)
    (bias,) = arrays([model.head.classifier.bias])
    for m, (weight, inputs) in enumerate(zip(arrays(slices(model.head)), batch.inputs.values())):
        (z,) = arrays([model.encoders[m](inputs)])
        own = [
            math.log(softmax(weight @ z[i] + bias / count)[y])
            for i, y in enumerate(batch.targets.tolist())
            if y != -100 and (batch.mask is None or batch.mask[i, m])
        ]
        found.append(sum(own) / len(own) if own else None)
    return found


def lead_by_hand(scores, m):
    """The mean lead of m over the modalities behind it."""
    behind = [s for s in scores if s is not None and scores[m] is not None and s < scores[m]]
    return sum(scores[m] - s for s in behind) / len(behind) if behind else 0.0


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("count", [2, 3])
def test_scores_and_leads(count, missing):
    method, model = ready("inforeg", count)
    split = draw(count, missing=missing)
    split.targets[3] = -100
    batch = split.batch()
    found = method.scores(model.head, batch, run(model, batch))
    expected = scores_by_hand(model, batch)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    leads = [lead_by_hand(expected, m) for m in range(count)]
    assert method.leads(found).tolist() == pytest.approx(leads, abs=1e-5)
    assert min(leads) == 0 < max(leads)


def test_a_modality_that_a_batch_has_not_takes_no_part():
    method, model = ready("inforeg", 3)
    split = draw(3)
    split.mask[:, 1] = False
    scores = method.scores(model.head, split.batch(), run(model, split.batch()))
    assert scores.isnan().tolist() == [False, True, False]
    expected = scores_by_hand(model, split.batch())
    assert method.leads(scores).tolist() == pytest.approx(
        [lead_by_hand(expected, m) for m in range(3)], abs=1e-5
    )


def test_the_window_of_single_epochs_is_that_of_equation_11():
    traces = torch.tensor([[9.0, 9.0, 9.0], [1.0, 1.0, 1.0], [1.05, 1.03, 0.5]]).double()
    expected = [(b - a) / b > 0.04 for a, b in zip([1, 1, 1], [1.05, 1.03, 0.5])]
    assert InfoReg.in_window(traces, 0.04, 1) == expected == [True, False, False]


def test_the_window_of_averages_is_wide_at_first_and_closes():
    trace = [1.0, 2.0, 1.5, 1.2, 1.1, 1.0, 1.0, 0.9]
    for count in range(2, 9):
        seen = [0.0] * 4 + trace[:count]
        last, before = sum(seen[-3:]) / 3, sum(seen[-4:-1]) / 3
        traces = torch.tensor(trace[:count]).double()[-4:, None]  # no more are kept
        assert InfoReg.in_window(traces, 0.04, 3) == [(last - before) / last > 0.04]
    assert InfoReg.in_window(torch.tensor(trace[:3])[:, None], 0.04, 3) == [True]


def losses_by_hand(model, batch, unimodal):
    """CE + unimodal sum_m CE_m."""
    logits = (
        sum(
            torch.from_numpy(weight @ z.T).T
            for weight, z in zip(
                arrays(slices(model.head)),
                arrays(encoder(x) for encoder, x in zip(model.encoders, batch.inputs.values())),
            )
        )
        + model.head.classifier.bias.detach().double()
    )
    return mean_nll(logits.numpy(), batch.targets.tolist()) - unimodal * sum(
        scores_by_hand(model, batch)
    )


@pytest.mark.parametrize("unimodal", [0.0, 0.6])
def test_the_loss(unimodal):
    method, model = ready("inforeg", 3, unimodal=unimodal)
    batch = draw(3).batch()
    loss = method.loss(run(model, batch), model, batch, 0.5)
    assert loss.item() == pytest.approx(losses_by_hand(model, batch, unimodal), rel=1e-5)


def epochs(method, model, split, count, scale=1.0):
    """``count`` epochs of two steps each; [epoch][step][m]: what was added to the gradients.

    And the squared lengths of the gradients before that. ``scale``: of mixed precision.
    """
    added, squares = [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for epoch in range(count):
        method.before_epoch(model, split, epoch / count)
        added.append([])
        squares.append([])
        for _ in range(2):
            batch = split.batch()
            out = run(model, batch)
            loss = method.loss(out, model, batch, 0.5)
            method.backward(loss, model, batch, out, lambda part: (scale * part).backward())
            plain = [arrays(v.grad for v in encoder.parameters()) for encoder in model.encoders]
            squares[-1].append([sum((g**2).sum() for g in grads) / scale**2 for grads in plain])
            method.after_backward(model, batch, out)
            after = [arrays(v.grad for v in encoder.parameters()) for encoder in model.encoders]
            added[-1].append(
                [[(b - a) / scale for a, b in zip(*pair)] for pair in zip(plain, after)]
            )
            for value in model.parameters():
                if value.grad is not None:  # a probe has none
                    value.grad /= scale
            optimizer.step()
            optimizer.zero_grad()
    return added, squares


@pytest.mark.parametrize("scale", [1.0, 256.0])
@pytest.mark.parametrize("average", [1, 2])
def test_who_is_ahead_in_its_window_is_drawn_to_its_weights_of_the_epoch_before(
    average, scale, monkeypatch
):
    method, model = ready("inforeg", 3, beta=0.8, average=average)
    method.options.window = -0.05  # no lower bound of an option: traces may fall a little
    split, steps = draw(3), []
    original = InfoReg.after_backward

    def noted(self, model, batch, output):
        scores = scores_by_hand(model, batch)
        start = [arrays(values) for values in self._start]
        now = [arrays(encoder.parameters()) for encoder in model.encoders]
        steps.append((scores, start, now))
        original(self, model, batch, output)

    monkeypatch.setattr(InfoReg, "after_backward", noted)
    added, squares = epochs(method, model, split, 6, scale)
    traces = [[sum(step[m] for step in epoch) / 2 for m in range(3)] for epoch in squares]
    regulated = 0
    for epoch in range(6):
        for step in range(2):
            scores, start, now = steps[2 * epoch + step]
            for m in range(3):
                seen = [0.0] * average + [row[m] for row in traces[:epoch]]
                last = sum(seen[-average:]) / average
                before = sum(seen[-average - 1 : -1]) / average
                factor, lead = 0.0, lead_by_hand(scores, m)
                if epoch >= 2 and (last - before) / last > -0.05 and lead > 0:
                    factor = math.exp(0.8 * math.tanh(lead))
                    regulated += step
                for found, a, b in zip(added[epoch][step][m], start[m], now[m]):
                    assert found == pytest.approx(factor * (b - a), abs=2e-5 / max(1, 1 / scale))
    assert 0 < regulated < 8  # some are, and some are not


@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_the_traces_are_mean_squares_and_no_more_are_kept_than_are_needed(scale):
    method, model = ready("inforeg", 2, average=3)
    _, squares = epochs(method, model, draw(), 7, scale)
    method.before_epoch(model, draw(), 1.0)
    expected = [[sum(step[m] for step in epoch) / 2 for m in range(2)] for epoch in squares]
    assert method.state["traces"].shape == (4, 2)
    torch.testing.assert_close(
        method.state["traces"], torch.tensor(expected[-4:]).double(), rtol=1e-5, atol=1e-9
    )
    assert method.state["steps"] == 0 and not method.state["squares"].any()


def test_it_says_that_before_epoch_is_missing():
    method, model = ready("inforeg")
    batch = draw().batch()
    out = run(model, batch)
    method.backward(method.loss(out, model, batch, 0.5), model, batch, out)
    with pytest.raises(ValueError, match="call before_epoch"):
        method.after_backward(model, batch, out)
