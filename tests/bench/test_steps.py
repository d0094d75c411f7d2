"""The benchmark of steps: what it compares, names and writes. No time is asserted."""

import json

import pytest
import torch
from torch import nn

import bench.__main__ as command
from bench.steps import command as steps
from bench.steps import models, run
from bench.steps.models import MODELS, Model

PNG = b"\x89PNG"


def tiny(small, dropout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    if not dropout:
        models._without_dropout(model)
    return model, torch.randn(6, 8), torch.randint(0, 4, (6,))


@pytest.fixture
def answers(monkeypatch):
    """Workers without processes: what they answer is in this dict, by peer and dtype."""
    told = {}

    class Worker:
        def __init__(self, model, dtype, peer, threads, check):
            self.told = told.get((peer, dtype), {})
            self.peer = peer

        def ask(self, what):
            if self.told.get("fails"):
                raise run.Failed(f"{self.peer}: out of luck")
            if what == "measure":
                return {"peak_rss": 3 << 30, "rest": 0.25, "regions": 12, "ops": [["add", 0.1, 7]]}
            return {"seconds": self.told.get("seconds", 0.2), "loss": self.told.get("loss", 1.0)}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(run, "Process", Worker)
    monkeypatch.setattr(steps, "tcmalloc", lambda: None)
    return told


def rows_from(path):
    return {row["peer"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_a_run_writes_rows_a_table_and_a_chart(answers, tmp_path, capsys):
    answers["fastops", "float32"] = {"seconds": 0.1}
    code = command.main(
        ["steps", "--models", "resnet18", "--dtypes", "float32", "--steps", "4", "--warmup", "1",
         "--json", str(tmp_path / "rows"), "--chart", str(tmp_path / "chart.png")]
    )  # fmt: skip
    assert code == 0
    rows = rows_from(tmp_path / "rows")
    assert list(rows) == list(run.PEERS)
    assert rows["fastops"]["ratio"] == 2 and len(rows["fastops"]["seconds"]) == 4
    assert rows["torch"]["ratio"] == 1
    assert rows["fastops"]["measured"]["regions"] == 12
    assert rows["torch + tcmalloc"]["status"] == "skipped"
    out = capsys.readouterr().out
    assert "2.00" in out and "3072" in out and "7 x add" in out
    assert "skipped: no tcmalloc library" in out
    assert (tmp_path / "chart.png").read_bytes().startswith(PNG)


def test_a_wrong_loss_is_not_timed_and_fails_the_run(answers, tmp_path):
    answers["fastops", "float32"] = {"loss": 1.001}
    answers["torch.compile", "float32"] = {"fails": True}
    assert steps.main(["--models", "resnet18", "--dtypes", "float32", "--json", str(tmp_path / "rows")]) == 1  # fmt: skip
    rows = rows_from(tmp_path / "rows")
    assert rows["fastops"]["status"] == "WRONG" and not rows["fastops"]["seconds"]
    assert "from float64's" in rows["fastops"]["note"]
    assert rows["torch.compile"]["status"] == "ERROR"
    assert "out of luck" in rows["torch.compile"]["note"]


def test_a_loss_that_is_not_a_number_is_wrong(answers):
    answers["fastops", "float32"] = {"loss": float("nan")}
    rows = steps.rows_of("resnet18", "float32", ["fastops"])
    run.compare_losses(rows, 1)
    assert [row.status for row in rows] == ["ok", "WRONG"]


def test_a_missing_package_is_named(answers, monkeypatch, capsys):
    absent = Model("absent", "1x1", "no_such_package", tiny, models._class_loss)
    monkeypatch.setitem(MODELS, "resnet18", absent)
    assert steps.main(["--models", "resnet18", "--dtypes", "float32"]) == 0
    assert capsys.readouterr().out.count("skipped: no_such_package is not installed") == 4


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--steps", "0"], "must be 1 or more, got 0"),
        (["--models", "vgg"], "invalid choice: 'vgg'"),
        (["--json", "/no/such/folder/file"], "no such folder"),
    ],
)
def test_bad_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        steps.main(arguments)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_a_process_that_ends_says_why():
    with (
        run.Process("no such model", "float32", "torch", 1, check=True) as process,
        pytest.raises(run.Failed, match="torch: KeyError: 'no such model'"),
    ):
        process.ask("step")


def test_workers_train_alike(monkeypatch):
    """torch's and fastops' steps of a small model have the same losses, by the rule of every row."""
    from bench.steps import worker

    monkeypatch.setitem(MODELS, "resnet18", Model("tiny", "6x8", "torch", tiny, models._class_loss))
    import fastops

    found = {}
    for peer, dtype in (("torch", "float64"), ("torch", "float32"), ("fastops", "float32")):
        try:
            trainer = worker.Trainer("resnet18", dtype, peer, True)
            found[peer, dtype] = [trainer.step() for _ in range(3)]
            seen = worker.profiled(trainer)
        finally:
            fastops.memory.stop_serving()
        assert seen["rest"] > 0 and any("adam" in name.lower() for name, *_ in seen["ops"])
    exact, torchs, ours = found.values()
    error, off = (max(abs(a - b) for a, b in zip(x, exact, strict=True)) for x in (torchs, ours))
    assert off <= 2 * error + 4 * run.EPS["float32"] * max(exact)
