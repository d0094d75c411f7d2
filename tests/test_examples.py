"""The scripts under docs/examples run, and print what they promise."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
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


@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
def test_keras_primer():
    out = run("keras_primer.py")
    assert len(re.findall(r"^\w+: \[", out, re.M)) == 9
    assert len(re.findall(r"^\w+ [\d.]+, Keras [\d.]+$", out, re.M)) == 5
    fits = re.findall(r"^(\S.*): loss ([\d.]+) -> ([\d.]+), accuracy ([\d.]+)$", out, re.M)
    assert len(fits) == 4
    for name, first, last, accuracy in fits:
        assert float(last) < 0.5 * float(first) and float(accuracy) > 0.9, name
    assert "the step that Keras's regularizers give" in out
    first, last = map(float, re.search(r"extraction: loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert last < first
    again, moved = re.search(r"low rate: loss ([\d.]+), (\d+) of", out).groups()
    assert float(again) < first and int(moved) > 0
