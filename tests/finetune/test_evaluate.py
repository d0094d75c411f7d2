"""evaluate and export: figures by their definitions, files that answer as the network does."""

import json
import re

import numpy as np
import pytest
import torch
import torchvision
from finetuning import draw_pictures, quick

from fastops.__main__ import main
from fastops.finetune import ConfigError, DataError, evaluate, finetune, load_classifier
from fastops.finetune.export import export_network
from fastops.finetune.metrics import compute_metrics, most_wrong


def test_metrics_by_their_definitions():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 6, generator=generator).mul(2).softmax(1)
    labels = torch.randint(0, 5, (500,), generator=generator)  # none of class f
    found = compute_metrics(probabilities, labels, list("abcdef"))
    p, y = probabilities.double().numpy(), labels.numpy()
    said = p.argmax(1)
    assert found.accuracy == pytest.approx((said == y).mean())
    recalls = [(said[y == c] == c).mean() for c in range(5)]
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert found.loss == pytest.approx(-np.log(p[np.arange(500), y]).mean())
    top5 = [y[i] in np.argsort(-p[i])[:5] for i in range(500)]
    assert found.top[5] == pytest.approx(np.mean(top5)) and found.top[1] == found.accuracy
    bins = np.minimum((p.max(1) * 15).astype(int), 14)
    gaps = [
        abs((said == y)[bins == b].mean() - p.max(1)[bins == b].mean()) * (bins == b).mean()
        for b in range(15)
        if (bins == b).any()
    ]
    assert found.calibration_error == pytest.approx(sum(gaps))
    for c, row in enumerate(found.per_class[:5]):
        precision = (y[said == c] == c).mean()
        assert row["precision"] == pytest.approx(precision) and row["recall"] == recalls[c]
        assert row["f1"] == pytest.approx(2 * precision * recalls[c] / (precision + recalls[c]))
    assert found.per_class[5]["recall"] is None and found.per_class[5]["precision"] == 0
    assert sum(map(sum, found.confusion)) == 500
    true, taken, count = found.confused[0]
    assert count == ((y == "abcdef".index(true)) & (said == "abcdef".index(taken))).sum()
    worst = most_wrong(probabilities, labels, 3)
    own = p[np.arange(500), y]
    assert own[worst[0]] == own[said != y].min() and all(said[i] != y[i] for i in worst)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    draw_pictures(folder / "data", count=8)
    return finetune(quick(folder, data=folder / "data", modes=("features",), dropout=0.2, steps=10))


def test_a_run_is_evaluated_on_the_images_it_kept_apart(run, capsys):
    assert main(["evaluate", str(run.folder)]) == 0
    printed = capsys.readouterr().out
    values = json.loads((run.folder / "evaluation.json").read_text())
    assert values["accuracy"] == pytest.approx(run.runs[0].accuracy)
    assert values["images"] == 6 and f"accuracy {run.runs[0].accuracy:.3f}" in printed
    page = (run.folder / "evaluation.html").read_text()
    assert "balanced accuracy" in page and "precision" in page
    assert not re.search(r"(?:src|href)=.(?!data:)|@import|url\(", page)
    assert run.runs[0].metrics["accuracy"] == pytest.approx(run.runs[0].accuracy)


def test_a_run_is_evaluated_on_other_pictures(run, tmp_path, capsys):
    draw_pictures(tmp_path / "some", ("dog", "owl"), count=3)
    (tmp_path / "some" / "owl" / "bad.png").write_bytes(b"no picture")
    found = evaluate(run.folder, tmp_path / "some")
    assert found.metrics.images == 6 and len(found.skipped) == 1
    assert [row["images"] for row in found.metrics.per_class] == [0, 3, 3]
    command = [
        "evaluate",
        str(run.folder),
        str(tmp_path / "some"),
        "--json",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert (tmp_path / "evaluation.html").exists()
    draw_pictures(tmp_path / "other", ("dog", "emu"), count=1)
    with pytest.raises(DataError, match="no classes of the run: emu"):
        evaluate(run.folder, tmp_path / "other")
    assert main(["evaluate", str(tmp_path)]) == 2
    assert main(["evaluate", str(run.folder), str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("format", ["pt2", "torch", "safetensors"])
def test_exported_files_answer_as_the_network(run, format, tmp_path, capsys):
    out = tmp_path / "network"
    assert main(["export", str(run.folder), "--format", format, "--out", str(out)]) == 0
    assert re.search(r"read again: probabilities at most \S+ apart", capsys.readouterr().out)
    if format == "torch":
        content = torch.load(out, weights_only=True)
        assert content["classes"] == ["cat", "dog", "owl"] and "fc.weight" in content["state_dict"]


def test_a_file_that_answers_otherwise_is_refused(run, monkeypatch, tmp_path):
    classifier = load_classifier(run.folder)
    other = torch.full((5, 3), 1 / 3)
    monkeypatch.setattr("fastops.finetune.export.answer_of", lambda *arguments: other + 0.5)
    with pytest.raises(OSError, match="apart from the network: do not use it"):
        export_network(classifier, tmp_path / "network.pth", "torch")


def test_formats_that_cannot_be(run, monkeypatch, tmp_path, capsys):
    assert main(["export", str(run.folder), "--format", "tar"]) == 2
    assert "unknown format 'tar': choose from pt2, torch" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ConfigError, match="pip install safetensors"):
        export_network(load_classifier(run.folder), tmp_path / "x", "safetensors")
    assert main(["export", str(run.folder), "--out", str(tmp_path / "none" / "x.pt2")]) == 2


def test_best_pt_loads_into_plain_torchvision(tmp_path):
    draw_pictures(tmp_path / "data", count=5)
    result = finetune(quick(
        tmp_path, data=tmp_path / "data", arch="resnet18", weights="none", modes=("scratch",),
        image_size=32, steps=1,
    ))  # fmt: skip
    content = torch.load(result.folder / "checkpoints" / "best.pt", weights_only=True)
    model = torchvision.models.resnet18(num_classes=len(content["classes"]))
    model.load_state_dict(content["model"])
