"""A plain training loop: patch, a fastops loss and optimizer, a scheduler of torch's, and a checkpoint to go on from.

    python docs/examples/plain_loop.py

The same loop is run with torch's own classes, for comparison.
"""

import tempfile
from pathlib import Path

import torch

import fastops

STEPS = 20


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
        torch.nn.Linear(64, 4),
    )  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


class Run:
    """A model with all that its training needs: by fastops, or by torch."""

    def __init__(self, fast: bool):
        self.model = make_model()
        if fast:
            print(fastops.patch(self.model))  # what was replaced; parameters and names stay
        self.criterion = fastops.nn.CrossEntropyLoss() if fast else torch.nn.CrossEntropyLoss()
        optim = fastops.optim if fast else torch.optim
        self.optimizer = optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=1e-2, total_steps=STEPS
        )

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            x, y = batch(step)
            loss = self.criterion(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        parts = (self.model, self.optimizer, self.scheduler)
        torch.save([part.state_dict() for part in parts], path)

    def load(self, path: Path) -> None:
        parts = (self.model, self.optimizer, self.scheduler)
        for part, state in zip(parts, torch.load(path), strict=True):
            part.load_state_dict(state)


def main() -> None:
    run = Run(fast=True)
    losses = run.train(0, STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder, "checkpoint.pt"))
        losses += run.train(STEPS // 2, STEPS)
        resumed = Run(fast=True)
        resumed.load(Path(folder, "checkpoint.pt"))
    again = resumed.train(STEPS // 2, STEPS)
    print("fastops", *(f"{value:.6f}" for value in losses))
    print("resumed", *(f"{value:.6f}" for value in again))
    print("torch", *(f"{value:.6f}" for value in Run(fast=False).train(0, STEPS)))


if __name__ == "__main__":
    main()
