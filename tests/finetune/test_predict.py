"""predict: everything that can be answered is, and the exit code says whether that was all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning import draw_pictures, quick

from fastops.__main__ import main
from fastops.finetune import finetune, load_classifier


@pytest.fixture
def run(tmp_path):
    draw_pictures(tmp_path / "data", count=5)
    options = {"data": tmp_path / "data", "modes": ("features",), "arch": "small"}
    return str(finetune(quick(tmp_path, **options)).folder)


def test_what_can_be_answered_is_answered(tmp_path, run, capsys):
    picture, missing = str(tmp_path / "data/cat/0.png"), str(tmp_path / "missing.jpg")
    assert main(["predict", run, picture, missing, picture]) == 1
    said = capsys.readouterr()
    assert said.out.count(f"{picture}: ") == 2
    assert f"cannot read picture {missing}: No such file" in said.err and said.err.count("\n") == 1
    assert main(["predict", run, missing]) == 2
    assert main(["predict", run, picture]) == 0


def test_folders(tmp_path, run, capsys):
    assert main(["predict", run, str(tmp_path / "data")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 15
    (tmp_path / "empty").mkdir()
    assert main(["predict", run, str(tmp_path / "empty")]) == 2
    assert "has no pictures" in capsys.readouterr().err


def test_the_likeliest_classes(tmp_path, run, capsys):
    picture = str(tmp_path / "data/cat/0.png")
    assert main(["predict", run, picture, "--top-k=2"]) == 0
    assert capsys.readouterr().out.count("%") == 2
    assert main(["predict", run, picture, "--top-k=9"]) == 0
    assert capsys.readouterr().out.count("%") == 3
    assert main(["predict", run, picture, "--top-k=0"]) == 2


def test_json(tmp_path, run, capsys):
    odd = tmp_path / os.fsdecode(b"\xff.png")
    (tmp_path / "data/cat/0.png").rename(odd)
    command = ["predict", run, str(odd), str(tmp_path / "none.png"), "--json", "--top-k=3"]
    assert main(command) == 1
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["path"] == str(odd) and bad["path"] == str(tmp_path / "none.png")
    assert {c["class"] for c in good["classes"]} == {"cat", "dog", "owl"} and "error" not in good
    assert sum(c["probability"] for c in good["classes"]) == pytest.approx(1)
    assert bad["classes"] == [] and "No such file" in bad["error"]


def test_a_reader_that_goes(tmp_path, run):
    """`predict ... | head` ends quietly."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastops", "predict", run, str(tmp_path / "data")]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_device(tmp_path, run, capsys):
    picture = str(tmp_path / "data/cat/0.png")
    assert main(["predict", run, picture, "--device=cpu"]) == 0
    assert main(["predict", run, picture, "--device=abacus"]) == 2
    assert "device 'abacus'" in capsys.readouterr().err


def test_answers_do_not_depend_on_what_is_asked_beside(tmp_path, run):
    classifier = load_classifier(run)
    paths = sorted((tmp_path / "data").rglob("*.png"))
    together = classifier.classify(paths * 3)
    for path, (name, share) in zip(paths, together, strict=False):
        ((alone, own),) = classifier.classify([path])
        assert alone == name and own == pytest.approx(share, rel=1e-5)


def test_pictures_can_be_classified_without_float32(tmp_path, run):
    paths = sorted((tmp_path / "data").rglob("*.png"))
    classifier = load_classifier(run)
    expected = classifier.classify(paths)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert classifier.classify(paths) == expected
    finally:
        torch.set_default_dtype(torch.float32)
