"""A LightningModule with fastops: its loss in training_step, its optimizer in configure_optimizers; two steps, a
checkpoint, and a second Trainer that goes on from it.

    python docs/examples/lightning_module.py

The same training is run with torch's own classes, for comparison.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastops

try:
    import lightning
except ModuleNotFoundError as error:
    print(f"lightning_module.py needs lightning ({error}): pip install lightning", file=sys.stderr)
    sys.exit(2)


class Classifier(lightning.LightningModule):
    def __init__(self, fast: bool):
        super().__init__()
        torch.manual_seed(0)
        self.fast = fast
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.SiLU(), torch.nn.Linear(64, 4)
        )
        if fast:
            fastops.patch(self.net)
        self.criterion = fastops.nn.CrossEntropyLoss() if fast else torch.nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, given, _):
        x, y = given
        loss = self.criterion(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optim = fastops.optim if self.fast else torch.optim
        optimizer = optim.AdamW(self.parameters(), lr=2e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def make_loader() -> DataLoader:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)  # two steps an epoch


def make_trainer(epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    first, resumed, whole = (Classifier(fast=True) for _ in range(3))
    native = Classifier(fast=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "two_steps.ckpt")
        trainer = make_trainer(1)
        trainer.fit(first, make_loader())
        trainer.save_checkpoint(path)
        make_trainer(2).fit(resumed, make_loader(), ckpt_path=path)
    make_trainer(2).fit(whole, make_loader())
    make_trainer(2).fit(native, make_loader())
    print("resumed", *(f"{value:.6f}" for value in first.losses + resumed.losses))
    print("fastops", *(f"{value:.6f}" for value in whole.losses))
    print("torch", *(f"{value:.6f}" for value in native.losses))


if __name__ == "__main__":
    main()
