"""Pictures and folders as people have them: what is read is right, what is not read is named."""

import os
import struct
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from finetuning import draw_pictures
from PIL import Image, ImageOps

from fastops.__main__ import main
from fastops.finetune import DataError
from fastops.finetune.folders import find_pictures, load_folder
from fastops.finetune.networks import SHIPPED_FORMAT, input_format
from fastops.finetune.pictures import read_picture

RAMP = np.linspace(0, 1, 256).repeat(256).reshape(256, 256).T  # brighter to the right


def count(collection):
    """Pictures of each class in all parts."""
    parts = (collection.train, collection.validation, collection.test)
    labels = [label for part in parts if part is not None for label in part.labels.tolist()]
    return [labels.count(c) for c in range(len(collection.classes))]


def save_16_bits(path: Path, mode: str) -> None:
    values = (RAMP * 65535).round()
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 256 256 65535\n" + values.astype(">u2").tobytes())
    else:
        kind = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32}[mode]
        picture = Image.frombytes(mode, (256, 256), values.astype(kind).tobytes())
        picture.save(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B"), ("tif", "I"), ("tif", "F"),
     ("pgm", "I")],
)  # fmt: skip
def test_16_bits_are_scaled_to_8(tmp_path, suffix, mode, channels):
    path = tmp_path / f"ramp.{suffix}"
    save_16_bits(path, mode)
    pixels = read_picture(path, input_format("small" if channels == 1 else "resnet18")).float()
    assert pixels.shape[0] == channels and pixels.mean() == pytest.approx(127.5, abs=1)
    assert pixels.min() < 6 and pixels.max() > 249


@pytest.mark.parametrize(("top", "kind"), [(1, "F"), (255, "F"), (255, "I")])
def test_32_bits_are_scaled_by_their_range(tmp_path, top, kind):
    values = (RAMP * top).astype(np.float32 if kind == "F" else np.int32)
    Image.fromarray(values, mode=kind).save(tmp_path / "ramp.tif")
    pixels = read_picture(tmp_path / "ramp.tif", SHIPPED_FORMAT).float()
    assert pixels.mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("values", [[-5.0, 5.0], [0.0, 1e6], [0.0, float("nan")]])
def test_values_of_no_known_range_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(DataError, match="its values go from .* save it with 8 or 16 bits"):
        read_picture(tmp_path / "odd.tif", SHIPPED_FORMAT)


def exif(orientation: int, *odd: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of an orientation and other tags: (tag, type, count, value)."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *odd])
    packed = [struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries]
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(packed) + bytes(4)


@pytest.mark.parametrize(
    "odd",
    [(0x011A, 2, 3, b"ab"), (0x0103, 2, 3, b"ab"), (0x0101, 9, 1, b"\xff" * 4), (0x0102, 10, 1, b"")],
    ids=["resolution of letters", "compression of letters", "negative length", "no fraction"],
)  # fmt: skip
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_orientations_with_an_odd_tag_beside_them(tmp_path, orientation, odd, suffix):
    """Pillow's own exif_transpose writes the odd tag again, and fails."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[:8, :16] = 255
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif(orientation))
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    Image.fromarray(pixels).save(path, exif=exif(orientation, odd))
    with Image.open(path) as picture:
        if orientation != 1:
            with pytest.raises((TypeError, struct.error)):
                ImageOps.exif_transpose(picture)
    assert np.array_equal(read_picture(path, SHIPPED_FORMAT)[0].numpy(), expected)


def test_pictures_too_large_leave_the_filters_of_warnings_alone(tmp_path, monkeypatch):
    draw_pictures(tmp_path / "data", count=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 - 1)
    before = list(warnings.filters)
    with pytest.raises(DataError, match="40 x 30 pixels could be a decompression bomb"):
        load_folder(tmp_path / "data", SHIPPED_FORMAT)
    assert warnings.filters == before


def test_linked_folders_are_followed_and_cycles_end(tmp_path):
    draw_pictures(tmp_path / "data", count=3)
    draw_pictures(tmp_path / "more", ("winter",), count=2)
    (tmp_path / "data" / "cat" / "winter").symlink_to(tmp_path / "more" / "winter")
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "more" / "winter")
    (tmp_path / "data" / "dog" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "owl" / "self").symlink_to(tmp_path / "data" / "owl")
    (tmp_path / "more" / "winter" / "back").symlink_to(tmp_path / "data" / "cat")
    collection = load_folder(tmp_path / "data", SHIPPED_FORMAT)
    assert count(collection) == [5, 3, 3]


def test_a_folder_with_the_name_of_a_picture_is_none(tmp_path):
    draw_pictures(tmp_path / "data", count=4)
    (tmp_path / "data" / "cat" / "IMG_0001.jpg").mkdir()
    (tmp_path / "data" / "cat" / "0.png").rename(tmp_path / "data/cat/IMG_0001.jpg/0.png")
    collection = load_folder(tmp_path / "data", SHIPPED_FORMAT, strict=True)
    assert count(collection) == [4, 4, 4] and not collection.skipped


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    draw_pictures(tmp_path / "data", count=4)
    os.mkfifo(tmp_path / "data" / "cat" / "pipe.png")
    (tmp_path / "data" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "dog" / "photo.heic").touch()
    (tmp_path / "data" / "dog" / "._0.png").write_text("macOS leaves these")
    collection = load_folder(tmp_path / "data", SHIPPED_FORMAT)
    pipe, gone = collection.skipped
    assert "pipe.png: it is not a regular file" in pipe
    assert "gone.png: No such file or directory" in gone
    assert any("1 of .heic" in note for note in collection.notes)


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("training", "validation"), ("train", "valid"), ("Train", "Val"),
     ("TRAIN", "TEST"), ("training", "testing")],
)  # fmt: skip
def test_parts_of_many_names(tmp_path, train, val):
    draw_pictures(tmp_path / train, count=3)
    draw_pictures(tmp_path / val, count=2)
    collection = load_folder(tmp_path, SHIPPED_FORMAT)
    assert collection.classes == ["cat", "dog", "owl"]
    assert (len(collection.train), len(collection.validation), len(collection.test)) == (6, 3, 6)


def test_test_beside_val(tmp_path):
    draw_pictures(tmp_path / "train", count=3)
    draw_pictures(tmp_path / "val", count=1)
    draw_pictures(tmp_path / "test", count=2)
    (tmp_path / "extra").mkdir()
    collection = load_folder(tmp_path, SHIPPED_FORMAT)
    parts = collection.train, collection.validation, collection.test
    assert [len(part) for part in parts] == [9, 3, 6]
    assert any("extra/" in note for note in collection.notes)
    for picture in (tmp_path / "test").rglob("*.png"):  # as Kaggle's: pictures without classes
        picture.rename(tmp_path / "test" / f"{picture.parent.name}{picture.name}")
    for folder in (tmp_path / "test").iterdir():
        if folder.is_dir():
            folder.rmdir()
    collection = load_folder(tmp_path, SHIPPED_FORMAT)
    assert len(collection.test) == 3
    assert any("test is not used: it has no folders of classes" in n for n in collection.notes)


def test_parts_that_are_not_clear(tmp_path):
    for name in ("train", "valid", "validation"):
        draw_pictures(tmp_path / name, count=2)
    with pytest.raises(DataError, match="valid/ and validation/: which one is it"):
        load_folder(tmp_path, SHIPPED_FORMAT)


def test_train_can_be_a_class(tmp_path):
    draw_pictures(tmp_path, ("bus", "train"), count=4)
    assert load_folder(tmp_path, SHIPPED_FORMAT).classes == ["bus", "train"]


def test_a_folder_around_the_folder_is_pointed_out(tmp_path):
    draw_pictures(tmp_path / "data" / "photos", count=2)
    with pytest.raises(DataError, match="are the classes in .*photos"):
        load_folder(tmp_path / "data", SHIPPED_FORMAT)


def test_names_that_differ_in_their_unicode_form_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    draw_pictures(tmp_path / "a", (composed, "tea"), count=3)
    draw_pictures(tmp_path / "a", (decomposed,), count=2)
    collection = load_folder(tmp_path / "a", SHIPPED_FORMAT)
    assert collection.classes == [composed, "tea"]
    assert count(collection) == [5, 3]
    assert any("differ in their Unicode form" in note for note in collection.notes)
    draw_pictures(tmp_path / "b" / "train", (composed, "tea"), count=3)
    draw_pictures(tmp_path / "b" / "val", (decomposed, "tea"), count=3)
    assert load_folder(tmp_path / "b", SHIPPED_FORMAT).classes == [composed, "tea"]


def test_notes_are_said_before_training(tmp_path, capsys):
    draw_pictures(tmp_path / "data", count=4)
    (tmp_path / "data" / "cat" / "photo.heic").touch()
    assert main(["finetune", "--data", str(tmp_path / "data"), "--dry-run", "--arch=small"]) == 0
    assert "passed over files that are no pictures: 1 of .heic" in capsys.readouterr().out


def test_pictures_of_folders_are_found(tmp_path):
    draw_pictures(tmp_path / "data", ("cat", "dog"), count=2)
    (tmp_path / "empty").mkdir()
    found = find_pictures([tmp_path / "data", tmp_path / "other.jpg"])
    assert [path.name for path in found] == ["0.png", "1.png"] * 2 + ["other.jpg"]
    with pytest.raises(DataError, match="empty has no pictures"):
        find_pictures([tmp_path / "empty"])


@pytest.mark.parametrize("seed", range(8))
def test_a_png_that_is_damaged_in_the_middle_is_not_read(seed, tmp_path):
    """Pillow raises once, and then hands out what it had decoded until then."""
    path, random = tmp_path / "a.png", np.random.default_rng(seed)
    Image.fromarray(random.integers(100, 200, (100, 100, 3), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[int(len(data) * random.uniform(0.1, 0.9))] ^= 1 << int(random.integers(8))
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot read picture"):
        read_picture(path, SHIPPED_FORMAT)
