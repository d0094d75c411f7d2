"""The scripts under docs/examples run, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


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
    shown = dict(re.findall(r"^(\w+)\(.*\) +\[(.*)\]$", out, re.M))
    assert shown["ReLU"] == "0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0" and len(shown) == 5
    assert float(re.search(r"^Softmax of a row +([\d.]+)$", out, re.M)[1]) == pytest.approx(1)
    zeros = re.search(
        r"^Dropout\(p=0.5.*\) in training: ([\d.]+) are 0, the others 2.0$", out, re.M
    )[1]
    assert abs(float(zeros) - 0.5) < 0.03 and "in eval: nothing changes, True" in out
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


@pytest.mark.integration("keras")
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
        run("fsdp2.py", *TORCHRUN),
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


# ------------------------------------------------------------------------------------------------ training loops


def numbers(out: str, name: str) -> list[float]:
    """Of the one line that starts with `name`."""
    (line,) = re.findall(rf"^{name} ([-\d. ]+)$", out, re.M)
    return [float(value) for value in line.split()]


def assert_trains(out: str, steps: int, last: float, prefix: str = "") -> list[float]:
    """The losses that were printed: as many as steps, falling below `last` of the first, and those of torch's classes."""
    losses = numbers(out, prefix + "fastops")
    assert len(losses) == steps and losses[-1] < last * losses[0]
    assert losses == pytest.approx(numbers(out, prefix + "torch"), rel=1e-4)
    return losses


def test_plain_loop():
    out = run("plain_loop.py")
    assert out.count("torch.nn.GELU -> fastops.nn.GELU: 1") == 2  # the run, and the resumed one
    losses = assert_trains(out, 20, last=0.7)
    assert numbers(out, "resumed") == losses[10:]


@pytest.mark.integration("accelerate")
def test_accelerate_loop():
    out = run("accelerate_loop.py")
    losses = assert_trains(out, 16, last=0.7)
    assert numbers(out, "resumed") == losses[8:]


@pytest.mark.integration("transformers", "accelerate")
def test_hf_trainer():
    out = run("hf_trainer.py")
    assert re.search(r"GELU\w* -> fastops", out, re.I)
    assert_trains(out, 12, last=0.7)


@pytest.mark.integration("timm")
def test_timm_model():
    out = run("timm_model.py")
    assert "torch.nn.Dropout -> fastops.nn.Dropout" in out
    assert re.search(r"add \+ \w+ -> fastops.functional.(add_relu|batch_norm_act)", out)
    for name in ("test_vit", "test_resnet"):
        assert_trains(out, 6, last=0.7, prefix=name + " ")


@pytest.mark.integration("lightning")
def test_lightning_module():
    out = run("lightning_module.py")
    losses = assert_trains(out, 4, last=0.95)
    assert numbers(out, "resumed") == losses


def test_ddp_in_two_processes_is_one_process():
    """Losses and weights of a DDP loop do not depend on the number of processes, which all hold the same weights."""
    alone, both = run("torchrun_ddp.py"), run("torchrun_ddp.py", *TORCHRUN)
    for out, processes in ((alone, 1), (both, 2)):
        assert numbers(out, "processes") == [processes] and "same in all True" in out
    for name in ("losses", "weights"):
        values = numbers(alone, name)
        assert numbers(both, name) == pytest.approx(values, rel=1e-4, abs=1e-5)
    losses = numbers(alone, "losses")
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "name, package",
    [
        ("hf_trainer.py", "transformers"),
        ("accelerate_loop.py", "accelerate"),
        ("timm_model.py", "timm"),
        ("lightning_module.py", "lightning"),
    ],
)
def test_a_missing_package_is_one_clear_line(name, package):
    hide = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"
    root = EXAMPLES.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", hide], capture_output=True, text=True, timeout=300, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name} needs {package}") and "pip install" in line
