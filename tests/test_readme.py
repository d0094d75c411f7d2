"""The commands that the README shows under Fine-tuning are commands that run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastops.__main__ import main, make_parser

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = re.search(r"^## Fine-tuning\n(.*?)^## ", README, re.M | re.S)[1]
COMMANDS = re.findall(r"^    (?:torchrun \S+ -m|python -m) fastops (.*?)(?: +#.*)?$", SECTION, re.M)


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


def test_there_are_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(place, command, capsys):
    words = shlex.split(command)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            main(words)
        printed = capsys.readouterr().out
        options = {o for a in make_parser()._actions if a.choices for o in a.choices}
        assert {"finetune", "predict", "doctor"} <= options
        assert "examples:" in printed and "--resume" in printed
        return
    if "--resume" in words:
        assert main(words) == 2 and "name the folder of a run" in capsys.readouterr().err
        return
    if words[0] == "predict":
        assert (
            main(["finetune", "--modes=features", "--steps=2", "--seeds=1", "--quiet", "--out=RUN"])
            == 0
        )
        words = [re.sub("IMAGE.*", "IMAGE.png", word) for word in words]
        words = ["RUN" if "runs/" in word else word for word in words]
        assert main(words) == 0 and "IMAGE.png: " in capsys.readouterr().out
        return
    assert words[0] == "finetune"
    assert main([*words, "--dry-run"]) == 0
    assert "steps of" in capsys.readouterr().out
