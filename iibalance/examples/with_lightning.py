"""PyTorch Lightning: a LightningModule around a MultimodalClassifier.

Three views of scikit-learn's digits. The module trains as any other does: ``training_step`` gives
the loss, ``validation_step`` logs, and at the end of training the gate is calibrated on what the
validation split predicts.

It prints the test accuracy and NLL that the Trainer reports, and then pickles the module and
compares what the copy predicts: ``Trainer(strategy="ddp_spawn")`` sends it to its processes in that
way.

    python iibalance/examples/with_lightning.py
"""

import logging
import pickle
import warnings

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import iibalance


class Digits(lightning.LightningModule):
    """Built-in encoders, head, and the calibration of its temperatures and gate."""

    def __init__(self, shapes, num_classes, epochs):
        super().__init__()
        self.names, self.epochs, self.held_out = list(shapes), epochs, []
        encoders = {
            name: iibalance.build_encoder(shape, embedding_dim=32, width=16)
            for name, shape in shapes.items()
        }
        self.model = iibalance.MultimodalClassifier(encoders, num_classes)

    def forward(self, *views, targets=None):
        progress = self.current_epoch / self.epochs if self.training else 1.0
        return self.model(dict(zip(self.names, views)), targets, progress=progress)

    def training_step(self, batch, _):
        *views, targets = batch
        return self(*views, targets=targets).loss

    def on_validation_epoch_start(self):
        self.held_out = []

    def validation_step(self, batch, _):
        *views, targets = batch
        embeddings = self.model.embed(dict(zip(self.names, views)))
        self.held_out.append((torch.stack(self.model.head.heads(embeddings)), targets))
        self.log("val_loss", self.model.head(embeddings, targets).loss, prog_bar=True)

    def on_train_end(self):
        # Of the last validation epoch. On several processes, self.all_gather them first.
        logits, targets = zip(*self.held_out)
        self.model.head.gate.fit(list(torch.cat(logits, dim=1)), torch.cat(targets))
        self.held_out = []

    def test_step(self, batch, _):
        *views, targets = batch
        logits = self(*views).logits
        self.log("accuracy", (logits.argmax(1) == targets).float().mean())
        self.log("nll", F.cross_entropy(logits, targets))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # hints on workers
    lightning.seed_everything(0, verbose=False)
    torch.set_num_threads(1)  # models this small gain nothing from a second one
    data = iibalance.load_data()  # the digits, split and standardised
    train, validation, test = (
        DataLoader(TensorDataset(*split.inputs.values(), split.targets), 64, split is data.train)
        for split in (data.train, data.validation, data.test)
    )
    module = Digits(data.shapes, data.num_classes, epochs=12)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(max_epochs=module.epochs, accelerator="cpu", **quiet)
    trainer.fit(module, train, validation)
    scores = trainer.test(module, test, verbose=False)[0]
    print(f"test accuracy {scores['accuracy']:.3f}, NLL {scores['nll']:.3f}")

    module.eval()
    copy = pickle.loads(pickle.dumps(module))  # what ddp_spawn does
    views = list(data.test.inputs.values())
    with torch.no_grad():
        same = torch.equal(copy(*views).logits, module(*views).logits)
    print(f"after pickling: same predictions: {same}")


if __name__ == "__main__":
    main()
