"""The scripts under docs/examples run, and print what they promise."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run(name: str, *launcher: str) -> str:
    root = EXAMPLES.parents[1]
    done = subprocess.run(
        [sys.executable, *launcher, EXAMPLES / name], capture_output=True, text=True, timeout=300, cwd=root,
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


def test_fsdp2_in_two_processes_is_one_process():
    """Parameters in shards: losses, weights, averages and the clipped norm are those of one process."""
    outputs = [
        run("fsdp2.py"),
        run("fsdp2.py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    ]
    alone, both = (
        {name: rest.split() for name, _, rest in (line.partition(" ") for line in out.splitlines())}
        for out in outputs
    )
    for name in ("losses", "weights", "averages"):
        values = [float(v) for v in alone[name]]
        assert [float(v) for v in both[name]] == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert alone["weights"] != alone["averages"] and float(alone["losses"][-1]) < 0.1
    *shards, _, every = both["shards"]
    assert len(shards) == 2 and sum(map(int, shards)) == int(every) and max(map(int, shards)) < 4000
