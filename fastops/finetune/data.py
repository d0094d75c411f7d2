"""Images and labels in memory or on disk, and how batches are drawn from them.

Images stay uint8 in NCHW until a batch is made. No network is known here, only what it takes in.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from .pictures import InputFormat, read_picture


class InMemory(Dataset):
    """Images (or anything computed from them) that are one tensor, with int64 labels (N,)."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]


class OnDisk(Dataset):
    """Picture files, decoded when asked for; labels are int64 (N,)."""

    def __init__(self, paths: Sequence[Path], labels: torch.Tensor, format: InputFormat):
        self.paths = list(paths)
        self.labels = labels
        self.format = format

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return read_picture(self.paths[index], self.format), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = [read_picture(self.paths[i], self.format) for i in indices]
        return torch.stack(pictures), self.labels[torch.as_tensor(indices)]


@dataclass
class Collection:
    """A task: named classes, images to train on and images to test on.

    `skipped` lists the files that could not be read, each with its reason, `notes` what else was
    not taken as it lies in the folder.
    """

    name: str
    classes: list[str]
    train: InMemory | OnDisk
    test: InMemory | OnDisk
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@overload
def take(images: InMemory, indices: torch.Tensor) -> InMemory: ...
@overload
def take(images: OnDisk, indices: torch.Tensor) -> OnDisk: ...
def take(images, indices):
    """The images at `indices` (int64, 1-D), in that order."""
    if isinstance(images, InMemory):
        return InMemory(images.images[indices], images.labels[indices])
    return OnDisk([images.paths[i] for i in indices], images.labels[indices], images.format)


def sample_per_class(
    labels: torch.Tensor, amount: int | float, classes: int, seed: int = 0
) -> torch.Tensor:
    """Sorted indices of `amount` random images of every class: a number, or a share below 1.

    A class keeps one image at least on either side where it has two; fewer images than asked for
    are all taken.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in range(classes):
        members = (labels == c).nonzero()[:, 0]
        count = amount
        if isinstance(amount, float):
            count = min(max(1, round(amount * len(members))), len(members) - 1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def draw_batches(count: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of `steps` batches: one shuffle after another, cut into equal batches.

    Every batch is full, so that BatchNorm never meets a leftover of one image; a data set smaller
    than `batch_size` gives batches of all its images.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, count)
    shuffles = -(-steps * batch_size // count)
    stream = torch.cat([torch.randperm(count, generator=generator) for _ in range(shuffles)])
    return [batch.tolist() for batch in stream.split(batch_size)[:steps]]


def iterate(images: InMemory | OnDisk, batches: list[list[int]]) -> DataLoader:
    """A loader of (images, labels) for these batches; files are decoded in worker processes."""
    workers = min(8, count_cores()) if isinstance(images, OnDisk) else 0
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=unchanged,
        num_workers=workers,
        # Else every loader takes a number from torch's default generator.
        generator=torch.Generator(),
    )


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unchanged(batch: Any) -> Any:
    """The data sets above answer whole batches, so there is nothing left to collate."""
    return batch


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random crop (75 to 100 % of each side), scaled back, and a flip, for each image alone.

    Args:
        images: floating point (N, C, H, W), already normalised.
        generator: CPU generator that all of it is drawn from.
    """
    n = len(images)
    scale = 0.75 + 0.25 * torch.rand(n, generator=generator)
    shift = (1 - scale).unsqueeze(1) * (2 * torch.rand(n, 2, generator=generator) - 1)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    across = torch.stack((scale * flip, zero, shift[:, 0]), 1)
    down = torch.stack((zero, scale, shift[:, 1]), 1)
    theta = torch.stack((across, down), 1).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return crops.contiguous(memory_format=torch.channels_last)
