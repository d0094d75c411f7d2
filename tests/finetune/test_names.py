"""Names that are not UTF-8, and terminals that show ASCII only: no traceback, before training or after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finetuning import draw_pictures

from fastops.finetune.text import printable

ROOT = Path(__file__).parents[2]


def command(*arguments, encoding, **options):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "fastops", *arguments], env=environment, capture_output=True, timeout=300, **options
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_every_command_with_names_of_any_bytes(tmp_path, encoding):
    odd = os.fsdecode(b"caf\xe9")
    draw_pictures(tmp_path / odd / "pictures", (odd, "théière", "한국"), count=4)
    bad = tmp_path / odd / "pictures" / odd / os.fsdecode(b"bad \xff.png")
    bad.write_bytes(b"no picture")
    options = [
        "--data",
        os.fsencode(tmp_path / odd / "pictures"),
        "--modes=features",
        "--arch=small",
    ]
    options += [
        "--seeds=1",
        "--steps=2",
        "--threads=1",
        "--out",
        os.fsencode(tmp_path / odd / "run"),
    ]
    done = command("finetune", *options, encoding=encoding)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    printed = done.stdout.decode(encoding, "replace")
    assert "caf\\xe9" in printed and "bad \\xff.png" in printed
    assert ("+-" if encoding == "ascii" else "±") in printed
    page = (tmp_path / odd / "run" / "report.html").read_text(encoding="utf-8")
    assert "caf\\xe9" in page and "한국" in page
    pictures = tmp_path / odd / "pictures" / odd
    done = command(
        "predict", os.fsencode(tmp_path / odd / "run"), os.fsencode(pictures), encoding=encoding
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert os.fsencode(pictures / "0.png") in done.stdout  # the name as it is, for another command
    assert os.fsencode(bad) in done.stderr


def test_printable():
    assert printable(os.fsdecode(b"caf\xe9 a\nb \xc3\xa9")) == "caf\\xe9 a\\nb é"
    assert printable("\ud800") == "\\ud800"
