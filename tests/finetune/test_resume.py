"""Resuming: an experiment that was killed at any moment ends as one that was not, bit for bit."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from finetuning import draw_pictures, interrupt, quick

import fastops.finetune.trainer as trainer
from fastops.__main__ import main
from fastops.finetune import ConfigError, OutputError, finetune, resume
from fastops.finetune.storage import make_run_folder

pytestmark = pytest.mark.slow

RECIPE = {
    "modes": ("full", "last"), "seeds": 1, "steps": 40, "shots": 4, "batch_size": 8, "ema": 0.9, "mixup": 0.2,
    "dropout": 0.2, "augment": True, "schedule": "gradual", "l1": 1e-4, "max_grad_norm": 1.0, "accumulate": 2,
}  # fmt: skip


def figures(folder: Path):
    runs = json.loads((folder / "metrics.json").read_text())["runs"]
    return [(r["mode"], r["losses"], r["curve"], r["accuracy"]) for r in runs]


def weights(folder: Path):
    files = sorted((folder / "checkpoints").glob("*.pt"))
    return {path.name: torch.load(path, weights_only=True) for path in files}


def assert_same(a: Path, b: Path):
    assert figures(a) == figures(b)
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        for key, value in ours[name]["model"].items():
            assert torch.equal(value, theirs[name]["model"][key]), (name, key)


KILLER = '''
import os, random, shutil, signal, sys
import torch
torch.set_num_threads(1)
import fastops.finetune.plan as plan
import fastops.finetune.trainer as trainer
from fastops.finetune import FineTuneConfig, finetune, resume

load = plan.load_shipped
def few(format):
    images = load(format)
    images.test = experiment_take(images.test)
    return images
from fastops.finetune.data import take
def experiment_take(part):
    return take(part, torch.arange(0, len(part), 20))
plan.load_shipped = few

folder, options = sys.argv[1], eval(sys.argv[2])
random.seed(0)
at_first_step = None
step = trainer.Trainer.step
def first_step(self, *batch):
    global at_first_step
    if at_first_step:
        sys.setprofile(at_first_step)
        at_first_step = None
    return step(self, *batch)
trainer.Trainer.step = first_step

def attempt(limit=None, early=False):
    """Runs in a process of its own, which kills itself after so many calls of functions, Python's or C's, counted
    from its start (early) or from its first step; whether it was killed."""
    global at_first_step
    child = os.fork()
    if child == 0:
        calls = 0
        def count(*_):
            nonlocal calls
            calls += 1
            if calls >= limit:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            if early:
                sys.setprofile(count)
            elif limit is not None:
                at_first_step = count
            if os.path.exists(folder + "/progress.pt"):
                resume(folder)
            else:
                finetune(FineTuneConfig(out=folder, save_every=1, **options))
            sys.setprofile(None)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.path.exists(folder) and not os.path.exists(folder + "/progress.pt") and os.WIFSIGNALED(status):
        shutil.rmtree(folder)  # killed before there was anything to go on from
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

kills = 0
while kills < 20:
    # Every fifth moment is before the first step (300,000 calls), the others in the first four steps (110,000 each).
    early = kills % 5 == 0
    kills += attempt(random.randrange(300_000 if early else 440_000), early)
assert os.path.exists(folder + "/progress.pt")
attempt()
print(kills)
'''


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    def run(script, folder, timeout):
        command = [sys.executable, "-c", script, str(folder), repr(RECIPE)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=Path(__file__).parents[2],
        )

    once = (
        textwrap.dedent(KILLER.split("random.seed(0)")[0])
        + "finetune(FineTuneConfig(out=folder, **options))\n"
    )
    plain = run(once, tmp_path / "plain", 600)
    assert plain.returncode == 0, plain.stderr[-2000:]
    killed = run(KILLER, tmp_path / "killed", 1200)
    assert killed.returncode == 0, killed.stderr[-2000:]
    assert killed.stdout.split()[-1] == "20"
    assert_same(tmp_path / "plain", tmp_path / "killed")
    assert not (tmp_path / "killed" / "progress.pt").exists()


def test_ctrl_c_saves_and_exits_130(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastops", "finetune", "--modes=full", "--seeds=1", "--steps=100000",
               "--shots=4", "--batch-size=8", "--threads=1", "--quiet", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        steps = out / "metrics.jsonl"
        while not (steps.exists() and steps.stat().st_size):  # until a step has been taken
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    finally:
        process.kill()
    assert "--resume FOLDER goes on" in process.stderr.read()
    saved = torch.load(out / "progress.pt", weights_only=True)
    lines = [json.loads(line) for line in steps.open()]
    assert saved["state"]["run"]["losses"] == [line["loss"] for line in lines]


def test_stopped_and_resumed(tmp_path, small_test, monkeypatch):
    whole = finetune(quick(tmp_path, **RECIPE))
    config = quick(tmp_path / "run", **RECIPE)
    steps = interrupt(monkeypatch, at=23)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    folder = Path(config.out)
    assert (folder / "progress.pt").exists()
    again = resume(folder)
    assert steps.count == 2 * RECIPE["steps"]  # nothing was computed twice
    assert [r.losses for r in again.runs] == [r.losses for r in whole.runs]
    assert_same(whole.folder, folder)
    with pytest.raises(ConfigError, match="is finished: there is nothing to resume"):
        resume(folder)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, small_test, monkeypatch):
    config = quick(tmp_path, **{**RECIPE, "modes": ("full",), "save_every": 5})
    save, count = torch.save, 0

    def full(value, path, *rest):
        nonlocal count
        count += 1
        if count == 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(value, path, *rest)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"progress.pt.*No space left"):
        finetune(config)
    saved = torch.load(Path(config.out) / "progress.pt", weights_only=True)
    assert len(saved["state"]["run"]["losses"]) == 10
    monkeypatch.setattr(torch, "save", save)
    left = Path(config.out) / "checkpoints" / ".unfinished.1.full.pt"  # as by a kill
    left.write_bytes(b"half")
    assert len(resume(config.out).runs[0].losses) == RECIPE["steps"]
    assert not left.exists()


def in_child(action) -> str:
    """What `action` raises, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os.write(writing, b"nothing was raised")
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as file:
        return file.read()


def test_files_that_the_system_refuses(tmp_path, small_test):
    """A limit on a file's size stands in for a full disk: here the system refuses, not a mock."""
    config = quick(tmp_path, **{**RECIPE, "modes": ("full",), "save_every": 5})

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        finetune(config)

    assert re.match(r"OutputError: cannot write .*progress\.pt", in_child(limited))
    folder = Path(config.out)
    saved = torch.load(folder / "progress.pt", weights_only=True)
    assert saved["state"] is None and not list(folder.rglob(".*"))
    assert len(resume(folder).runs[0].losses) == RECIPE["steps"]


def test_a_folder_that_may_not_be_written():
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)

        def write():
            if os.getuid() == 0:  # whom nothing is forbidden
                os.setuid(65534)
            make_run_folder(Path(name) / "run")

        assert in_child(write) == f"OutputError: cannot write into {name}/run: Permission denied"


def test_bad_folders(tmp_path, small_test, capsys):
    with pytest.raises(ConfigError, match="there is no"):
        resume(tmp_path / "nothing")
    config = quick(tmp_path, **{**RECIPE, "modes": ("features",), "steps": 2, "augment": False})
    finetune(config)
    folder = Path(config.out)
    for content in (b"", b"junk", torch.zeros(3).numpy().tobytes()):
        (folder / "progress.pt").write_bytes(content)
        with pytest.raises(ConfigError, match=r"progress.pt is damaged"):
            resume(folder)
    torch.save({"other": 1}, folder / "progress.pt")
    with pytest.raises(ConfigError, match=r"progress.pt is damaged"):
        resume(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        resume(folder)
    (folder / "config.json").write_text('{"surprise": 1}')
    with pytest.raises(ConfigError, match="unknown options: surprise"):
        resume(folder)
    assert main(["finetune", "--resume", str(folder), "--steps=3"]) == 2
    assert "leave out --steps" in capsys.readouterr().err


def test_other_pictures_or_options_cannot_be_gone_on_with(tmp_path, monkeypatch):
    draw_pictures(tmp_path / "data", count=5)
    config = quick(tmp_path, data=tmp_path / "data", modes=("full",), save_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, at=1)
        finetune(config)
    folder = Path(config.out)
    shutil.move(tmp_path / "data" / "owl", tmp_path / "owl")
    with pytest.raises(
        ConfigError,
        match="9 and 3 images of the classes cat, dog, owl, now there are 6 and 2 images",
    ):
        resume(folder)
    shutil.move(tmp_path / "owl", tmp_path / "data" / "owl")
    good = (folder / "config.json").read_text()
    network = {"arch": "resnet18", "weights": "none", "image_size": 32}
    for other in (network, {"optimizer": "sgd"}, {"steps": 4}, {"mixup": 0.5}):
        (folder / "config.json").write_text(json.dumps({**json.loads(good), **other}))
        name, value = next(iter(other.items()))
        with pytest.raises(ConfigError, match=f"begun with {name}=.*json now says {value!r}"):
            resume(folder)
    (folder / "config.json").write_text(good)
    progress = torch.load(folder / "progress.pt", weights_only=True)
    lacking = {**progress["state"], "optimizer": {}}
    torch.save({**progress, "state": lacking}, folder / "progress.pt")
    with pytest.raises(ConfigError, match="is not one of this network and recipe"):
        resume(folder)
    torch.save(progress, folder / "progress.pt")
    assert len(resume(folder).runs[0].losses) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "gradual"}, {"layer_decay": 0.5}, {"freeze_norm": True}, {"l1": 1e-3}, {"mixup": 0.4}, {"ema": 0.8},
        {"accumulate": 4}, {"early_stop": 1, "steps": 16}, {"optimizer": "sgd"}, {"optimizer": "rmsprop"},
        {"optimizer": "adam"}, {"amp": "bf16"}, {"max_grad_norm": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_every_recipe_runs_on_both_back_ends(tmp_path, small_test, options):
    config = quick(
        tmp_path, **{"modes": ("full",), "seeds": 1, "steps": 3, "backend": "both", **options}
    )
    native, ours = finetune(config).runs
    assert ours.losses[0] == pytest.approx(native.losses[0], rel=2e-2 if "amp" in options else 1e-6)
    tolerance = 0.1 if "amp" in options else 2e-2
    assert ours.losses == pytest.approx(native.losses, rel=tolerance)


def test_gradual_unfreezing_starts_with_the_head(tmp_path, small_test, monkeypatch):
    seen = []
    step = trainer.Trainer.step

    def watched(self, *batch):
        seen.append(
            [
                n
                for n, piece in self.network.pieces.items()
                if any(p.requires_grad for p in piece.parameters())
            ]
        )
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    finetune(quick(tmp_path, modes=("full",), seeds=1, steps=16, schedule="gradual"))
    assert seen[0] == ["head"]
    assert all(set(a) <= set(b) for a, b in zip(seen, seen[1:], strict=False))
    assert len(seen[-1]) > 3


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, small_test):
    options = {"modes": ("full",), "seeds": 1, "steps": 3, "freeze_norm": True, "dropout": 0.0}
    whole = finetune(quick(tmp_path, **options)).runs[0]
    parts = finetune(quick(tmp_path / "run", **options, accumulate=4)).runs[0]
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
