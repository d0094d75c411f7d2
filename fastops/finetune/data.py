"""Images and labels: the shipped subset of Fashion-MNIST, its raw files, or a folder of pictures.

Images stay uint8 in NCHW until a batch is made. No network is known here, only what it takes in.
"""

import gzip
import json
import os
import socket
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from .errors import DataError

FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PRETRAINING_CLASSES = (0, 2, 3, 4, 6)
NEW_CLASSES = (1, 5, 7, 8, 9)

RAW_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files."""

IN_MEMORY_LIMIT = 2 << 30
"""Decoded pictures are kept when they take fewer bytes than this, else decoded again per batch."""


@dataclass(frozen=True)
class InputFormat:
    """What a network takes: images (channels, size, size), normalised by `mean` and `std`."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W) to float32, zero mean and unit variance over the data set."""
        mean = images.new_tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = images.new_tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std


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

    `skipped` lists the files that could not be read, each with its reason.
    """

    name: str
    classes: list[str]
    train: InMemory | OnDisk
    test: InMemory | OnDisk
    skipped: list[str] = field(default_factory=list)


def read_idx(path: Path) -> torch.Tensor:
    """Read one gzipped file of the MNIST family (big-endian header, then uint8 data).

    Raises:
        DataError: the file is missing, truncated or not of this format.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != int(np.prod(shape)):
        raise DataError(f"{path} is truncated: its header promises {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def read_raw_fashion_mnist(part: str, folder: Path = RAW_FASHION_MNIST) -> InMemory:
    """Images uint8 (N, 1, 28, 28) and labels 0..9 of Fashion-MNIST's "train" or "t10k" files.

    Raises:
        DataError: the folder lacks the files, or they are damaged.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return InMemory(images.unsqueeze(1), labels.long())


def keep_classes(images: InMemory, classes: Sequence[int]) -> InMemory:
    """The images of `classes` only, labelled by position in it."""
    position = torch.full((int(images.labels.max()) + 1,), -1)
    position[list(classes)] = torch.arange(len(classes))
    labels = position[images.labels]
    return InMemory(images.images[labels >= 0], labels[labels >= 0])


def write_sheet(folder: Path, parts: dict[str, InMemory]) -> None:
    """Pack 28 x 28 grey images into one contact sheet, 100 a row, sorted by part and class.

    Args:
        folder: gets fashion-mnist.png, which any viewer shows, and fashion-mnist.json, which
            counts the images of each class of each part in the order they lie on the sheet.
        parts: images by the name of the part; labels are Fashion-MNIST's own 0..9.
    """
    tiles, counts = [], {}
    for name, part in parts.items():
        order = torch.argsort(part.labels, stable=True)
        tiles.append(part.images[order, 0])
        per_class = torch.bincount(part.labels, minlength=len(FASHION_MNIST))
        counts[name] = {FASHION_MNIST[c]: int(n) for c, n in enumerate(per_class) if n}
    images = torch.cat(tiles)
    rows = -(-len(images) // 100)
    images = torch.cat([images, images.new_zeros(rows * 100 - len(images), 28, 28)])
    sheet = images.view(rows, 100, 28, 28).transpose(1, 2).reshape(rows * 28, 2800)
    Image.fromarray(sheet.numpy()).save(folder / "fashion-mnist.png", optimize=True)
    (folder / "fashion-mnist.json").write_text(json.dumps(counts, indent=2) + "\n")


def read_sheet(part: str) -> InMemory:
    """Read one part of the shipped sheet: uint8 (N, 1, 28, 28), labels 0..9 of Fashion-MNIST."""
    assets = resources.files(__package__) / "assets"
    counts = json.loads((assets / "fashion-mnist.json").read_text())
    with (assets / "fashion-mnist.png").open("rb") as file:
        sheet = torch.from_numpy(np.array(Image.open(file)))
    images = sheet.view(-1, 28, 100, 28).transpose(1, 2).reshape(-1, 1, 28, 28)
    start = 0
    for name, per_class in counts.items():
        labels = torch.cat([torch.full((n,), FASHION_MNIST.index(c)) for c, n in per_class.items()])
        if name == part:
            return InMemory(images[start : start + len(labels)].clone(), labels)
        start += len(labels)
    raise KeyError(part)


def fit_format(images: InMemory, format: InputFormat) -> InMemory:
    """Grey images as the network takes them: channels repeated, resized with antialiasing."""
    pixels = images.images
    if format.size != pixels.shape[-1]:
        size = [format.size, format.size]
        pixels = transforms.resize(pixels, size, antialias=True)
    return InMemory(pixels.repeat(1, format.channels, 1, 1), images.labels)


def load_shipped(format: InputFormat) -> Collection:
    """Five classes of Fashion-MNIST that the shipped checkpoint has not seen."""
    return Collection(
        "Fashion-MNIST, five classes new to the network (shipped subset)",
        [FASHION_MNIST[c] for c in NEW_CLASSES],
        fit_format(keep_classes(read_sheet("train"), NEW_CLASSES), format),
        fit_format(keep_classes(read_sheet("test"), NEW_CLASSES), format),
    )


def find_raw() -> Path:
    """The folder of Fashion-MNIST's raw files: Debian's, or torchvision's download (kept in torch's
    cache).

    Raises:
        DataError: the files are not installed and cannot be downloaded.
    """
    if RAW_FASHION_MNIST.is_dir():
        return RAW_FASHION_MNIST
    cache = Path(torch.hub.get_dir()) / "datasets"
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(patience or 20)
    try:
        FashionMNIST(cache, download=True)
    except Exception as error:
        raise DataError(
            f"cannot download Fashion-MNIST ({error}): install Debian's package dataset-fashion-mnist "
            "(apt-get install dataset-fashion-mnist), or leave out --data for the shipped part of it"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return cache / "FashionMNIST" / "raw"


def load_raw(format: InputFormat, folder: Path | None = None) -> Collection:
    """The same five classes with all 30,000 training and 5,000 test images.

    Raises:
        DataError: the raw files are missing, cannot be downloaded, or damaged.
    """
    folder = folder or find_raw()
    return Collection(
        "Fashion-MNIST, five classes new to the network (all images)",
        [FASHION_MNIST[c] for c in NEW_CLASSES],
        fit_format(keep_classes(read_raw_fashion_mnist("train", folder), NEW_CLASSES), format),
        fit_format(keep_classes(read_raw_fashion_mnist("t10k", folder), NEW_CLASSES), format),
    )


def read_picture(path: Path, format: InputFormat) -> torch.Tensor:
    """Decode a picture file to uint8 (C, size, size): upright, short side resized, centre kept.

    Grey, palette, CMYK and transparent pictures are converted.

    Raises:
        DataError: the file cannot be decoded, is truncated or too large to be a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture)
                colours = upright.convert("L" if format.channels == 1 else "RGB")
        # Of a picture longer than 8 : 1 only the middle is taken: scaling 1 x 30000 pixels up to
        # the network's size would need gigabytes.
        sides = [min(side, 8 * min(colours.size)) for side in reversed(colours.size)]
        pixels = transforms.center_crop(transforms.pil_to_tensor(colours), sides)
        pixels = transforms.resize(pixels, format.size, antialias=True)
        return transforms.center_crop(pixels, [format.size, format.size])
    # Pillow's decoders raise whatever their format's parser meets, SyntaxError included.
    except Exception as error:
        raise DataError(f"cannot read picture {path}: {error}") from error


def find_pictures(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Class names (the sub-folders, sorted), picture files and their labels.

    Raises:
        DataError: the folder is missing, has no sub-folders, or one has no pictures.
    """
    try:
        classes = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from error
    if not classes:
        raise DataError(f"{folder} has no sub-folders: expected one of pictures for each class")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS
        )
        if not found:
            raise DataError(
                f"{folder / name} has no pictures (looked for {', '.join(IMG_EXTENSIONS)})"
            )
        paths += found
        labels += [label] * len(found)
    return classes, paths, labels


def load_folder(
    folder: Path,
    format: InputFormat,
    *,
    test_fraction: float = 0.2,
    strict: bool = False,
    progress: Callable[[Iterable, str, int], Iterable] = lambda items, title, total: items,
) -> Collection:
    """A folder of pictures as torchvision's ImageFolder lays it: one sub-folder a class.

    With sub-folders train/ and val/ (or test/) these are taken; else every class is split, the
    same way each time. Every file is decoded once before training: what cannot be read is listed
    in `skipped`, so that it does not end a run halfway.

    Args:
        test_fraction: the share of each class kept for testing when the folder is split.
        strict: refuse the folder when a picture cannot be read, instead of skipping it.
        progress: gets an iterable, a title and the number of items; gives the items back.

    Raises:
        DataError: a folder is missing or empty, the two parts have different classes, fewer than
            two classes, or a class is left without pictures to train or to test on.
    """
    if not folder.exists():
        raise DataError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: expected a folder with one sub-folder for each class")
    training = folder / "train"
    testing = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), folder / "val")
    if training.is_dir():
        if not testing.is_dir():
            raise DataError(f"{folder} has train/ but neither val/ nor test/")
        classes, train_paths, train_labels = find_pictures(training)
        test_classes, test_paths, test_labels = find_pictures(testing)
        if classes != test_classes:
            differ = sorted(set(classes) ^ set(test_classes))
            raise DataError(f"{training} and {testing} have different classes: {', '.join(differ)}")
        parts = [(train_paths, train_labels), (test_paths, test_labels)]
    else:
        classes, paths, labels = find_pictures(folder)
        parts = [(paths, labels)]
    if len(classes) < 2:
        raise DataError(f"{folder} has one class ({classes[0]}): expected two or more")

    skipped: list[str] = []
    loaded = [decode(paths, labels, format, skipped, progress) for paths, labels in parts]
    if skipped and strict:
        raise DataError(f"{len(skipped)} of the pictures cannot be read; {skipped[0]}")
    if len(loaded) == 1:
        testing_indices = sample_per_class(loaded[0].labels, test_fraction, len(classes))
        rest = torch.ones(len(loaded[0]), dtype=torch.bool)
        rest[testing_indices] = False
        loaded = [take(loaded[0], rest.nonzero()[:, 0]), take(loaded[0], testing_indices)]
    for part, what in zip(loaded, ("train", "test"), strict=True):
        counts = torch.bincount(part.labels, minlength=len(classes))
        if (counts == 0).any():
            name = classes[int(counts.argmin())]
            raise DataError(f"{folder}: no readable pictures of class {name} to {what} on")
    train, test = loaded
    return Collection(str(folder), classes, train, test, skipped)


def decode(
    paths: Sequence[Path],
    labels: Sequence[int],
    format: InputFormat,
    skipped: list[str],
    progress: Callable[[Iterable, str, int], Iterable],
) -> InMemory | OnDisk:
    """Decode every file once; keep the pictures if they fit into memory, else their paths."""
    keep = len(paths) * format.channels * format.size**2 <= IN_MEMORY_LIMIT

    def attempt(path: Path) -> torch.Tensor | bool | DataError:
        try:
            picture = read_picture(path, format)
        except DataError as error:
            return error
        return picture if keep else True

    with ThreadPoolExecutor(count_cores()) as pool:
        outcomes = list(progress(pool.map(attempt, paths), "reading pictures", len(paths)))
    readable = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, DataError)]
    skipped += [str(outcome) for outcome in outcomes if isinstance(outcome, DataError)]
    if not readable:
        raise DataError(f"none of the pictures can be read; {skipped[0]}")
    kept_labels = torch.tensor([labels[i] for i in readable])
    if keep:
        return InMemory(torch.stack([outcomes[i] for i in readable]), kept_labels)
    return OnDisk([paths[i] for i in readable], kept_labels, format)


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
