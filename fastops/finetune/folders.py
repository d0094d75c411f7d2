"""Folders of pictures, one sub-folder a class, as torchvision's ImageFolder lays them out."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from .data import Collection, InMemory, OnDisk, count_cores, sample_per_class, take
from .errors import DataError
from .pictures import InputFormat, read_picture
from .text import printable

IN_MEMORY_LIMIT = 2 << 30
"""Decoded pictures are kept when they take fewer bytes than this, else decoded again per batch."""

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What the folders of a collection's parts are called, in capitals or not."""

Progress = Callable[[Iterable, str, int], Iterable]
"""Gets an iterable, a title and the number of items; gives the items back."""


def without_progress(items: Iterable, title: str, total: int) -> Iterable:
    """A Progress that shows nothing."""
    return items


@dataclass
class Listing:
    """Picture files by class.

    Attributes:
        classes: names in order.
        paths, labels: of each picture.
        notes: what was passed over, in sentences.
    """

    classes: list[str]
    paths: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sub_folders(folder: Path) -> list[Path]:
    """The folders in `folder`, links to folders too, without hidden ones.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sorted(
            entry
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
        )
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from error


def walk(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that is not hidden, through links to folders as well.

    A link to a folder that has been walked, or to one around `folder`, is not followed.
    """
    seen = {os.path.realpath(f) for f in folder.absolute().parents}
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def list_pictures(folder: Path) -> Listing:
    """The classes (sub-folders, by name) of a folder and their pictures.

    Names that differ only in their Unicode form (an accent as a letter's part or as a sign of its
    own) are one class.

    Raises:
        DataError: the folder is missing, has no sub-folders, or one has no pictures.
    """
    by_name: dict[str, list[Path]] = {}
    for entry in sub_folders(folder):
        by_name.setdefault(unicodedata.normalize("NFC", entry.name), []).append(entry)
    if not by_name:
        raise DataError(f"{folder} has no sub-folders: expected one of pictures for each class")
    names = sorted(by_name)
    listing = Listing([printable(name) for name in names])
    others: Counter[str] = Counter()
    for label, name in enumerate(names):
        files = [path for entry in by_name[name] for path in walk(entry)]
        found = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
        others.update(path.suffix.lower() or "no suffix" for path in files)
        if not found:
            kinds = ", ".join(sorted({path.suffix or path.name for path in files})[:5])
            raise DataError(
                f"{by_name[name][0]} has no pictures (looked for {', '.join(IMG_EXTENSIONS)}"
                + (f"; there are {kinds})" if kinds else ")")
            )
        if len(by_name[name]) > 1:
            listing.notes.append(
                f"{printable(folder)} has {len(by_name[name])} folders {printable(name)} whose names "
                "differ in their Unicode form only: they are one class"
            )
        listing.paths += found
        listing.labels += [label] * len(found)
    passed = {kind: n for kind, n in sorted(others.items()) if kind not in IMG_EXTENSIONS}
    if passed:
        kinds = ", ".join(f"{n} of {printable(kind)}" for kind, n in passed.items())
        listing.notes.append(
            f"{printable(folder)}: passed over files that are no pictures: {kinds}"
        )
    return listing


def find_pictures(places: Sequence[str | os.PathLike]) -> list[Path]:
    """The files among `places` as they are, and the pictures in the folders among them.

    Raises:
        DataError: a folder without pictures.
    """
    found: list[Path] = []
    for place in map(Path, places):
        inside = [p for p in walk(place) if p.suffix.lower() in IMG_EXTENSIONS]
        if place.is_dir() and not inside:
            raise DataError(f"{place} has no pictures (looked for {', '.join(IMG_EXTENSIONS)})")
        found += inside if place.is_dir() else [place]
    return found


def find_parts(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of a collection's parts by "train", "val" and "test", and notes on what is not used.

    Empty for a folder whose sub-folders are the classes themselves: without one that is called
    train, or where that one has pictures and no sub-folders, as a class has.

    Raises:
        DataError: two folders for one part, or nothing to test on beside train.
    """
    entries = sub_folders(folder)
    parts: dict[str, Path] = {}
    for part, names in PARTS.items():
        found = [entry for entry in entries if entry.name.casefold() in names]
        if len(found) > 1:
            both = " and ".join(f"{entry.name}/" for entry in found)
            raise DataError(f"{folder} has {both}: which one is it? Move the other away")
        if found:
            parts[part] = found[0]
    if "train" not in parts or not sub_folders(parts["train"]):
        return {}, []
    notes = []
    known = set(parts.values())
    for part in ("val", "test"):
        if part in parts and not sub_folders(parts[part]):
            notes.append(f"{printable(parts.pop(part))} is not used: it has no folders of classes")
    if len(parts) == 1:
        raise DataError(
            f"{folder} has {parts['train'].name}/ but neither val/ nor test/ with a folder for each class"
        )
    if unused := [f"{printable(entry.name)}/" for entry in entries if entry not in known]:
        notes.append(f"{printable(folder)}: not used beside the parts: {', '.join(unused)}")
    return parts, notes


def load_folder(
    folder: Path,
    format: InputFormat,
    *,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.15,
    strict: bool = False,
    progress: Progress = without_progress,
) -> Collection:
    """A folder of pictures as torchvision's ImageFolder lays it: one sub-folder a class.

    With sub-folders train/, val/ and test/ (see PARTS) these are taken; where one of the last two
    is missing, the other is tested on, and the validation images are a share of train/. Else
    every class is split, the same way each time. Every file is decoded once before training: what
    cannot be read is listed in `skipped`, so that it does not end a run halfway.

    Args:
        test_fraction: the share of each class kept for testing when the folder is split.
        validation_fraction: the share of each class of the rest kept for validation.
        strict: refuse the folder when a picture cannot be read, instead of skipping it.
        progress: shows how far the reading is.

    Raises:
        DataError: a folder is missing or empty, the parts have different classes, fewer than
            two classes, or a class is left without pictures to train or to test on.
    """
    if not folder.exists():
        raise DataError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: expected a folder with one sub-folder for each class")
    found, notes = find_parts(folder)
    if found:
        testing = found.get("test") or found["val"]
        folders = [found["train"], testing]
        if "test" in found and "val" in found:
            folders.append(found["val"])
        listings = [list_pictures(part) for part in folders]
        classes = listings[0].classes
        for part, listing in zip(folders, listings, strict=True):
            if differ := sorted(set(classes) ^ set(listing.classes)):
                raise DataError(
                    f"{found['train']} and {part} have different classes: {', '.join(differ)}"
                )
    else:
        listings = [list_pictures(folder)]
        classes = listings[0].classes
    if len(classes) < 2:
        inner = sub_folders(sub_folders(folder)[0])
        hint = f"; are the classes in {sub_folders(folder)[0]}?" if inner else ""
        raise DataError(f"{folder} has one class ({classes[0]}): expected two or more{hint}")

    skipped: list[str] = []
    loaded = [
        decode(listing.paths, listing.labels, format, skipped, progress) for listing in listings
    ]
    if skipped and strict:
        raise DataError(f"{len(skipped)} of the pictures cannot be read; {skipped[0]}")
    if len(loaded) == 1:
        loaded = list(divide(loaded[0], test_fraction, len(classes)))
    if len(loaded) == 2:
        train, validation = divide(loaded[0], validation_fraction, len(classes))
        loaded = [train, loaded[1], validation]
    train, test, validation = loaded
    for images, what in ((train, "train"), (test, "test")):
        counts = torch.bincount(images.labels, minlength=len(classes))
        if (counts == 0).any():
            name = classes[int(counts.argmin())]
            raise DataError(f"{folder}: no readable pictures of class {name} to {what} on")
    for listing in listings:
        notes += listing.notes
    if not len(validation):
        notes.append("too few pictures for validation images: the last weights are kept")
    return Collection(
        printable(folder),
        classes,
        train,
        test,
        skipped,
        notes,
        validation if len(validation) else None,
    )


def divide(
    images: InMemory | OnDisk, fraction: float, classes: int
) -> tuple[InMemory | OnDisk, InMemory | OnDisk]:
    """The images without, and only with, a share of each class."""
    chosen = sample_per_class(images.labels, fraction, classes)
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[chosen] = False
    return take(images, rest.nonzero()[:, 0]), take(images, chosen)


def decode(
    paths: Sequence[Path],
    labels: Sequence[int],
    format: InputFormat,
    skipped: list[str],
    progress: Progress,
) -> InMemory | OnDisk:
    """Decode every file once; keep the pictures if they fit into memory, else their paths."""
    keep = len(paths) * format.channels * format.stored**2 <= IN_MEMORY_LIMIT

    def attempt(path: Path) -> torch.Tensor | bool | DataError:
        try:
            picture = read_picture(path, format)
        except DataError as error:
            return error
        return picture if keep else True

    with ThreadPoolExecutor(count_cores()) as pool:
        outcomes = list(progress(pool.map(attempt, paths), "reading pictures", len(paths)))
    readable = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, DataError)]
    skipped += [printable(str(o)) for o in outcomes if isinstance(o, DataError)]
    if not readable:
        raise DataError(f"none of the pictures can be read; {skipped[0]}")
    kept_labels = torch.tensor([labels[i] for i in readable])
    if keep:
        return InMemory(torch.stack([outcomes[i] for i in readable]), kept_labels)
    return OnDisk([paths[i] for i in readable], kept_labels, format)
