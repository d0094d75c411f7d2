"""Hugging Face Accelerate: prepare() takes fastops's optimizer as it takes torch's; clipping, accumulation, a schedule,
and a state that is saved, loaded and gone on from.

    python docs/examples/accelerate_loop.py     (or accelerate launch)

The same loop is run with torch's own classes, for comparison.
"""

import sys
import tempfile

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastops

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    print(f"accelerate_loop.py needs accelerate ({error}): pip install accelerate", file=sys.stderr)
    sys.exit(2)

EPOCHS = 4


def make_data() -> TensorDataset:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :4].argmax(1))


class Run:
    """What prepare() gives, by fastops or by torch."""

    def __init__(self, fast: bool):
        self.accelerator = Accelerator(gradient_accumulation_steps=2)
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)
        )
        if fast:
            fastops.patch(model)
        self.criterion = fastops.nn.CrossEntropyLoss() if fast else torch.nn.CrossEntropyLoss()
        optim = fastops.optim if fast else torch.optim
        optimizer = optim.AdamW(model.parameters(), lr=2e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * EPOCHS)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, DataLoader(make_data(), batch_size=16), scheduler
        )

    def train(self, epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = self.criterion(self.model(x), y)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                losses.append(loss.item())
        return losses


def main() -> None:
    run = Run(fast=True)
    losses = run.train(EPOCHS // 2)
    with tempfile.TemporaryDirectory() as folder:
        run.accelerator.save_state(folder)
        losses += run.train(EPOCHS // 2)
        resumed = Run(fast=True)
        resumed.accelerator.load_state(folder)
    again = resumed.train(EPOCHS // 2)
    native = Run(fast=False).train(EPOCHS)
    if run.accelerator.is_main_process:
        print("fastops", *(f"{value:.6f}" for value in losses))
        print("resumed", *(f"{value:.6f}" for value in again))
        print("torch", *(f"{value:.6f}" for value in native))


if __name__ == "__main__":
    main()
