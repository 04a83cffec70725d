"""Training with the Triton kernels on real data.

The same losses, prototypes and predictions as with plain PyTorch.
"""

import contextlib

import pytest
import torch
from accelerate import Accelerator

from iibalance.config import DataConfig, TrainingConfig
from iibalance.data import load_data
from iibalance.methods import Method
from iibalance.nn.encoders import build_encoder
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.loss import IIBalanceLoss
from iibalance.nn.model import MultimodalClassifier
from iibalance.training.loop import fit, predict_split

pytest.importorskip("triton")
import interpreter

STEPS = 20


class Enough(Exception):
    """Raised after the last step that is compared."""


class Recorder(Method):
    """Leaves the model's loss as it is, keeps its parts, and ends the training after ``STEPS``."""

    name = "recorder"

    def __init__(self):
        super().__init__()
        self.losses = []

    def loss(self, output, model, batch, progress):
        parts = output.parts
        self.losses.append(
            torch.stack(
                [parts.total, parts.fused, *parts.unimodal, *parts.contrastive, *parts.alignment]
            ).detach()
        )
        return output.loss

    def after_backward(self, model, batch, output):
        if len(self.losses) == STEPS:
            raise Enough


def begun(impl, dropout):
    """(losses of each step, prototypes, predictions) of a run's first steps on the digits' views.

    ``dropout`` hides modalities at random.
    """
    data = load_data(DataConfig())
    torch.manual_seed(0)
    encoders = {
        name: build_encoder(values.shape[1:], embedding_dim=24, width=8)
        for name, values in data.train.inputs.items()
    }
    objective = IIBalanceLoss(warmup=0.0, ramp=0.01, impl=impl)
    head = IIBalanceHead(
        {name: 24 for name in encoders},
        data.num_classes,
        objective=objective,
        budgets=[0.9, 0.7, 0.5],
        impl=impl,
    )
    model, recorder = MultimodalClassifier(encoders, head=head), Recorder()
    training = TrainingConfig(batch_size=64, modality_dropout=dropout, progress=False)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with pytest.raises(Enough):
        fit(
            model,
            data.train,
            None,
            epochs=30,
            training=training,
            seed=0,
            accelerator=accelerator,
            method=recorder,
        )
    predictions = predict_split(model, data.validation.subset(torch.arange(40)), accelerator)
    return (
        torch.stack(recorder.losses),
        torch.cat([table.flatten() for table in head.prototypes.prototypes]),
        predictions.logits,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_twenty_steps_on_digits_give_the_losses_of_plain_pytorch(dropout):
    expected = begun("reference", dropout)
    with (
        interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext() as report
    ):
        found = begun("triton", dropout)
    assert len(found[0]) == STEPS and found[0][-1, 1] < found[0][0, 1]
    assert found[0][STEPS // 2 :, -2:].amin() > 1e-3, "the alignment term never acted"
    for actual, right in zip(found, expected):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)
    if report is not None:
        # A step is three launches: the objective, the scaling of its gradients, the prototypes
        names = [launch.name for launch in report.launches]
        three = ["objective_small", "move_prototypes", "scale_all"]
        assert [name for name in names if name in three] == three * STEPS
        assert set(names) - set(three) <= {"nearest_forward", "trusted_rows"}, "of prediction"
