"""Fashion-MNIST: the subset that is shipped, or its raw files."""

import gzip
import json
import socket
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.transforms import functional as transforms

from .data import Collection, InMemory
from .errors import DataError
from .pictures import InputFormat

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
    """Gray images as the network takes them: channels repeated, resized with antialiasing."""
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
