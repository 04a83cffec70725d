"""Hugging Face Accelerate: the same loop on one process or several, on CPUs, GPUs, in bf16.

Three views of scikit-learn's digits (pixels, Fourier magnitudes, a few numbers about the shape) and
built-in encoders, in a MultimodalClassifier. In training a view is missing now and then, told by
the mask, so that the model learns to do without.

It prints the training loss now and then, and the accuracy on test samples with all views and with
each view missing. Prototypes are the same on every process: the model sums over processes itself.

    python iibalance/examples/with_accelerate.py
    accelerate launch --num_processes 2 iibalance/examples/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import iibalance

EPOCHS = 12


def make_loader(split, shuffle):
    """Batches of one tensor a modality, the mask [B, M] and the targets [B]."""
    tensors = TensorDataset(*split.inputs.values(), split.mask, split.targets)
    return DataLoader(tensors, batch_size=64, shuffle=shuffle)


def hide_views(mask, probability=0.2):
    """``mask`` with each view hidden now and then; a sample that would lose all keeps all."""
    kept = mask & (torch.rand(mask.shape, device=mask.device) > probability)
    return torch.where(kept.any(1, keepdim=True), kept, mask)


@torch.no_grad()
def accuracy(accelerator, model, loader, names, without=None):
    """The accuracy over all processes, with one view missing in every sample."""
    model.eval()
    right = []
    for *views, mask, targets in loader:
        if without is not None:
            mask = mask.clone()
            mask[:, names.index(without)] = False
        answer = model(dict(zip(names, views)), mask=mask).logits.argmax(1)
        # Where samples do not share out evenly some are doubled; this leaves them out again.
        right.append(accelerator.gather_for_metrics(answer == targets))
    return torch.cat(right).float().mean().item()


def main():
    accelerator = Accelerator()
    set_seed(0)
    torch.set_num_threads(1)  # models this small gain nothing from a second one
    data = iibalance.load_data()  # the digits, split and standardised
    names = list(data.modalities)
    encoders = {
        name: iibalance.build_encoder(data.shapes[name], embedding_dim=32, width=16)
        for name in names
    }
    budgets = iibalance.estimate_budgets(data.train.inputs, data.train.targets, source="probe")
    model = iibalance.MultimodalClassifier(encoders, data.num_classes, budgets=budgets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train_loader, test_loader = make_loader(data.train, True), make_loader(data.test, False)
    model, optimizer, train_loader, test_loader = accelerator.prepare(
        model, optimizer, train_loader, test_loader
    )

    for epoch in range(EPOCHS):
        model.train()
        total = 0.0
        for *views, mask, targets in train_loader:
            out = model(
                dict(zip(names, views)), targets, mask=hide_views(mask), progress=epoch / EPOCHS
            )
            optimizer.zero_grad()
            accelerator.backward(out.loss)
            optimizer.step()
            total += out.loss.item() / len(train_loader)
        if epoch % 4 == 3:
            accelerator.print(f"epoch {epoch + 1}: loss {total:.3f}")

    accelerator.print(f"all views: {accuracy(accelerator, model, test_loader, names):.3f}")
    for name in names:
        score = accuracy(accelerator, model, test_loader, names, without=name)
        accelerator.print(f"without {name}: {score:.3f}")


if __name__ == "__main__":
    main()
