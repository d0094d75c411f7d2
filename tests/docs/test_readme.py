"""The commands that the README and docs/finetuning.md show are commands that run: each is, for two steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from finetuning import interrupt, one_thread, small_test  # noqa: F401  fixtures
from PIL import Image

from fastops.__main__ import main, make_parser

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SECTION = re.search(r"^## Fine-tuning\n(.*?)^## ", README, re.M | re.S)[1]
TEXTS = SECTION + (ROOT / "docs" / "finetuning.md").read_text()
COMMAND = re.compile(r"^    ((?:torchrun \S+ -m|python -m) fastops .*?)(?: +#.*)?$", re.M)
COMMANDS = list(dict.fromkeys(COMMAND.findall(TEXTS)))
FEW = ["--seeds=1", "--steps=2", "--quiet", "--threads=1"]
"""Given after a command's own options, for the time they take."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what stands for the README's capital letters: pictures, weights, a finished run."""
    for name in ("cat", "dog"):
        (tmp_path / "FOLDER" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "FOLDER" / name / f"{i}.png")
    (tmp_path / "IMAGE").write_bytes((tmp_path / "FOLDER" / "cat" / "0.png").read_bytes())
    (tmp_path / "IMAGE").rename(tmp_path / "IMAGE.png")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "FILE")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interrupted_run(monkeypatch):
    """RUN, which Ctrl-C ended at its second step."""
    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        assert main(["finetune", "--modes=features", *FEW, "--steps=4", "--out=RUN"]) == 130


def test_there_are_commands():
    assert COMMAND.findall(SECTION)
    words = " ".join(COMMANDS)
    shown = (
        "torchrun",
        "--data",
        "--schedule",
        "--resume",
        "--profile",
        "predict",
        "evaluate",
        "export",
        "--help",
    )
    assert all(word in words for word in shown)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(place, command, capsys, small_test, monkeypatch):  # noqa: F811
    launcher, _, rest = command.partition(" fastops ")
    words = [re.sub(r"^runs/\S+$", "RUN", word) for word in shlex.split(rest)]
    words = [re.sub(r"^IMAGE(\.\.\.)?$", "IMAGE.png", word) for word in words]
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            main(words)
        printed = capsys.readouterr().out
        options = {o for a in make_parser()._actions if a.choices for o in a.choices}
        assert {"finetune", "predict", "doctor"} <= options
        assert "examples:" in printed and "--resume" in printed
        return
    if launcher.startswith("torchrun"):
        script = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*script, *shlex.split(launcher)[1:], "fastops", *words, *FEW, "--modes=features", "--out=RUN"],
            capture_output=True, text=True, timeout=540, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert "2 processes of 50" in (place / "RUN" / "report.html").read_text()
        return
    if "--resume" in words:
        interrupted_run(monkeypatch)
        assert main(words) == 0 and (place / "RUN" / "report.html").exists()
        return
    if words[0] != "finetune":
        train = ["finetune", "--data=FOLDER", "--arch=small", "--modes=features"]
        assert main([*train, *FEW, "--out=RUN"]) == 0
        capsys.readouterr()
        assert main(words) == 0
        said = {"predict": "IMAGE.png: ", "evaluate": "balanced", "export": "read again"}[words[0]]
        assert said in capsys.readouterr().out
        return
    assert words[0] == "finetune"
    if "--data" in words:
        words.append("--image-size=32")
    if "--profile" in words:
        assert main([*words, *FEW, "--modes=features"]) == 0
        assert "torch's time over fastops's" in capsys.readouterr().out
        return
    assert main([*words, *FEW, "--out=RUN"]) == 0
    printed = capsys.readouterr().out
    assert (place / "RUN" / "report.html").exists() and "See RUN/report.html" in printed


def examples():
    """The commands that finetune --help ends with."""
    (commands,) = (action for action in make_parser()._actions if action.choices)
    lines = commands.choices["finetune"].epilog.splitlines()[1:]
    return [line.split(" fastops ")[1] for line in lines]


@pytest.mark.parametrize("command", examples(), ids=str)
def test_example_of_the_help(place, command, capsys):
    (place / "FOLDER").rename(place / "photos")
    (place / "FILE").rename(place / "resnet18.pth")
    assert main([*shlex.split(command), "--dry-run"]) == 0
    assert "steps of" in capsys.readouterr().out
