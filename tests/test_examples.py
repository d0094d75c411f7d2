"""The scripts under docs/examples run, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run(name: str) -> str:
    root = EXAMPLES.parents[1]
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pytorch_primer():
    pytest.importorskip("torchvision")
    out = run("pytorch_primer.py")
    losses = dict(re.findall(r"^(MSE|MAE|BCE|cross-entropy of [\w -]+?) ([\d.]+)$", out, re.M))
    assert float(losses["MSE"]) == pytest.approx((0.04 + 0.01 + 0.16) / 3)
    assert float(losses["MAE"]) == pytest.approx(0.7 / 3)
    assert (
        losses["cross-entropy of class indices"][:6] == losses["cross-entropy of one-hot rows"][:6]
    )
    zeros = dict(re.findall(r"^(\S.*?) +loss .*exactly 0: (\d+) of 20$", out, re.M))
    assert zeros["SGD"] == "0" and int(zeros["SGD, L1 (proximal)"]) == 17
    first, last = (float(v) for v in re.findall(r"(?:extraction|rate): loss ([\d.]+)", out))
    assert 0 < last < first < 2.3
