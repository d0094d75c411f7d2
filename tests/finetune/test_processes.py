"""Fine-tuning by two processes of torchrun: equal to one process, whatever happens to either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastops.__main__ import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SAME = ["--quiet", "--seeds=1", "--steps=6", "--shots=4", "--threads=1"]
RECIPES = {
    "features": ["--modes=features"],
    "full": ["--modes=full"],
    "frozen-norm": ["--modes=full", "--freeze-norm", "--schedule=gradual", "--max-grad-norm=1"],
    "uneven": ["--modes=last", "--freeze-norm", "--shots=3"],
    "random": ["--modes=full", "--augment", "--mixup=0.2", "--dropout=0.2", "--ema=0.9",
               "--accumulate=2", "--save-every=2"],
}  # fmt: skip

SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
import fastops.finetune.experiment as experiment
import fastops.finetune.plan as plan
import fastops.finetune.progress as progress
import fastops.finetune.storage as storage
import fastops.finetune.trainer as train
from fastops.__main__ import main
from fastops.finetune import DataError
from fastops.finetune.data import take

folder, same, recipes = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
rank = int(os.environ["RANK"])
load = plan.load_shipped

def few(format):
    images = load(format)
    images.test = take(images.test, torch.arange(0, len(images.test), 7))
    return images

plan.load_shipped = few
if rank:  # whatever is written goes through here
    def refuse(*arguments):
        raise AssertionError("this process is not to write")
    experiment.complete_file = progress.complete_file = experiment.write_report = experiment.write_text = refuse
    experiment.save_classifier = experiment.make_run_folder = refuse

def command(name, *more):
    return main(["finetune", *same, *recipes.get(name, []), *more])

codes = {name: command(name, "--batch-size=" + ("50" if name == "uneven" else "5"), "--out", str(folder / name)) for name in recipes}

step, count = train.Trainer.step, 0
def interrupted(self, *batch):
    global count
    count += 1
    if count == 4 and rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *batch)
train.Trainer.step = interrupted
codes["interrupted"] = command("random", "--batch-size=5", "--out", str(folder / "stopped"))
codes["steps"] = count
if not rank:
    shutil.copytree(folder / "stopped", folder / "half")
codes["resumed"] = main(["finetune", "--quiet", "--threads=1", "--resume", str(folder / "stopped")])
codes["more steps"] = count
train.Trainer.step = step

save = torch.save
def full(*arguments):
    raise OSError(28, "No space left on device")
torch.save = full
codes["disk full"] = command("random", "--batch-size=5", "--out", str(folder / "disk"))
torch.save = save

def broken(format):
    raise DataError("a picture that only this process has")
plan.load_shipped = broken if rank else few
codes["bad data"] = command("features", "--out", str(folder / "bad"))
plan.load_shipped = few
(folder / f"codes{rank}.json").write_text(json.dumps(codes))
"""


def losses(folder):
    return json.loads((folder / "metrics.json").read_text())["runs"][0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes left, and what the first one printed to its errors."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         script, folder, json.dumps(SAME), json.dumps(RECIPES)],
        capture_output=True, text=True, cwd=ROOT, timeout=540,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stderr


@pytest.mark.parametrize("name", ["features", "full", "frozen-norm", "uneven"])
def test_two_processes_are_one_with_the_batch_of_both(two, name, tmp_path):
    """Without frozen norms one that computes its batch in two parts, each normalized by itself."""
    both = losses(two[0] / name)
    more = ["--accumulate=2"] if name == "full" else []
    if name == "uneven":  # seven images for one process, eight for the other
        assert "15 training images" in (two[0] / name / "report.html").read_text()
    options = [
        *SAME,
        *RECIPES[name],
        *more,
        "--batch-size=" + ("100" if name == "uneven" else "10"),
    ]
    assert main(["finetune", *options, "--out", str(tmp_path / "run")]) == 0
    alone = losses(tmp_path / "run")
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert len(both["predictions"]) == 286


def test_a_run_stopped_in_one_process_resumes_in_both(two):
    folder, _ = two
    codes = [json.loads((folder / f"codes{rank}.json").read_text()) for rank in (0, 1)]
    for found in codes:
        assert found["interrupted"] == 130 and found["resumed"] == 0
        assert found["steps"] == 4 and found["more steps"] == 6
    whole, stopped = losses(folder / "random"), losses(folder / "stopped")
    assert whole["losses"] == stopped["losses"] and whole["predictions"] == stopped["predictions"]
    a, b = (
        torch.load(folder / name / "checkpoints" / "full.pt", weights_only=True)["model"]
        for name in ("random", "stopped")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_both_processes_end_when_one_cannot_go_on(two, tmp_path):
    folder, errors = two
    for rank in (0, 1):
        codes = json.loads((folder / f"codes{rank}.json").read_text())
        assert [codes[name] for name in RECIPES] == [0] * len(RECIPES)
        assert codes["disk full"] == codes["bad data"] == 2
    assert errors.count("error: process 1: a picture that only this process has") == 1
    assert errors.count("No space left on device") == 1
    assert not (folder / "bad").exists()


def test_resuming_with_another_number_of_processes(two, tmp_path, capsys):
    assert main(["finetune", "--resume", str(two[0] / "half")]) == 2
    message = (
        "was begun by 2 processes, this is one of 1: resume it with torchrun --nproc-per-node=2"
    )
    assert message in capsys.readouterr().err
