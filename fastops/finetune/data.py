"""Images and labels in memory or on disk, and how batches are drawn from them.

Images stay uint8 in NCHW until a batch is made. No network is known here, only what it takes in.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
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
    """A task: named classes, images to train on, to choose the best weights by, and to test on.

    Without `validation` a part of the test images is looked at during training.
    `skipped` lists the files that could not be read, each with its reason, `notes` what else was
    not taken as it lies in the folder.
    """

    name: str
    classes: list[str]
    train: InMemory | OnDisk
    test: InMemory | OnDisk
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    validation: InMemory | OnDisk | None = None


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


def draw_batches(
    count: int, batch_size: int, steps: int, seed: int, weights: torch.Tensor | None = None
) -> list[list[int]]:
    """Indices of `steps` batches: one shuffle after another, cut into equal batches.

    Every batch is full, so that BatchNorm never meets a leftover of one image; a data set smaller
    than `batch_size` gives batches of all its images.

    Args:
        weights: draw the images in these proportions instead, with replacement.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, count)
    if weights is not None:
        stream = torch.multinomial(weights, steps * batch_size, True, generator=generator)
    else:
        shuffles = -(-steps * batch_size // count)
        stream = torch.cat([torch.randperm(count, generator=generator) for _ in range(shuffles)])
    return [batch.tolist() for batch in stream.split(batch_size)[:steps]]


def balancing_weights(labels: torch.Tensor) -> torch.Tensor:
    """For each class, what makes all classes equal: 1 in the mean over the images, float32."""
    counts = torch.bincount(labels)
    return len(labels) / (counts.count_nonzero() * counts.clamp(min=1)).float()


def iterate(
    images: Dataset, batches: Sequence[Sequence[Any]], workers: int | None = None
) -> DataLoader:
    """A loader of (images, labels) for these batches.

    Args:
        workers: processes that make them; None for some where files are decoded.
    """
    if workers is None:
        workers = min(8, count_cores()) if isinstance(images, OnDisk) else 0
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=unchanged,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Else every loader takes a number from torch's default generator.
        generator=torch.Generator(),
    )


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unchanged(batch: Any) -> Any:
    """The data sets above answer whole batches, so there is nothing left to collate."""
    return batch
