"""The fine-tuning reference: its modes on the shipped images, folders of pictures, bad input."""

import errno
import gzip
import json
import re
import struct
import subprocess
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from finetuning import draw_pictures, quick
from matplotlib import font_manager
from PIL import Image

from fastops.__main__ import main
from fastops.finetune import (
    ConfigError,
    DataError,
    FineTuneConfig,
    FineTuneError,
    OutputError,
    Run,
    WeightsError,
    cutting,
    fashion_mnist,
    finetune,
    folders,
    load_classifier,
    recipe,
    trainer,
)
from fastops.finetune.checkpoints import find_weights, load_weights
from fastops.finetune.config import parse_mode
from fastops.finetune.data import InMemory, OnDisk, draw_batches, sample_per_class, take
from fastops.finetune.fashion_mnist import (
    NEW_CLASSES,
    PRETRAINING_CLASSES,
    keep_classes,
    load_shipped,
    read_idx,
    read_sheet,
)
from fastops.finetune.figures import (
    count_confusions,
    draw_curves,
    draw_predictions,
    find_fonts,
    letters,
)
from fastops.finetune.folders import load_folder
from fastops.finetune.freezing import split, stages_of
from fastops.finetune.networks import SHIPPED_FORMAT, SmallResNet, build, input_format
from fastops.finetune.pictures import read_picture
from fastops.finetune.recipe import make_optimizer, ops_for, warmup_cosine
from fastops.finetune.storage import complete_file, make_run_folder
from fastops.finetune.summary import compare_backends, curve_distances
from fastops.finetune.trainer import fit
from tools.pretrain import TURNS, distort, measure, write_sheet

# ------------------------------------------------------------------ the shipped images and weights


def test_shipped_images():
    train, test, old = (read_sheet(part) for part in ("train", "test", "pretraining-test"))
    assert train.images.shape == (2500, 1, 28, 28) and train.images.dtype == torch.uint8
    assert torch.bincount(train.labels).tolist() == [500 * (c in NEW_CLASSES) for c in range(10)]
    assert torch.bincount(test.labels).tolist() == [400 * (c in NEW_CLASSES) for c in range(10)]
    assert old.labels.unique().tolist() == list(PRETRAINING_CLASSES)
    assert not set(NEW_CLASSES) & set(PRETRAINING_CLASSES)


def test_shipped_weights_know_their_own_classes():
    images = keep_classes(read_sheet("pretraining-test"), PRETRAINING_CLASSES)
    model = SmallResNet(len(PRETRAINING_CLASSES) * TURNS)
    load_weights(model, find_weights("small", "DEFAULT").state, head=True)
    assert measure(model.eval(), images) > 0.75


def test_assets_stay_small():
    assets = Path(fashion_mnist.__file__).with_name("assets")
    assert sum(file.stat().st_size for file in assets.iterdir()) < 3_000_000


def test_sheet_returns_what_was_packed(tmp_path, monkeypatch):
    images = torch.arange(130 * 784, dtype=torch.int64).remainder(251).to(torch.uint8)
    labels = torch.arange(130) % 3
    part = InMemory(images.view(130, 1, 28, 28), labels)
    (tmp_path / "assets").mkdir()
    write_sheet(tmp_path / "assets", {"a": part, "b": part})
    monkeypatch.setattr(fashion_mnist.resources, "files", lambda package: tmp_path)
    order = labels.argsort(stable=True)
    for name in ("a", "b"):
        read = read_sheet(name)
        assert torch.equal(read.images, part.images[order])
        assert torch.equal(read.labels, labels[order])


def test_distort_turns_by_what_it_says():
    image = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    image[:, :, 8:11, 12:16] = 255
    pixels, turns = distort(image, torch.Generator().manual_seed(0))
    assert pixels.shape == image.shape and turns.unique().tolist() == [0, 1, 2, 3]
    for turned, k in zip(pixels, turns, strict=True):
        upright = turned.rot90(-int(k), (1, 2))
        assert upright.sum() == image[0].sum()
        assert upright[0, 6:13, 9:19].sum() == upright.sum()


# --------------------------------------------------------------------------------------- the modes


def test_every_mode_runs_and_leaves_its_report(tmp_path, small_test, capsys):
    modes = ("features", "last", "last:2", "full", "scratch")
    result = finetune(quick(tmp_path, modes=modes, seeds=2), show=True)
    assert [(run.mode, run.seed) for run in result.runs] == [(m, s) for m in modes for s in (0, 1)]
    assert all(len(run.losses) == 3 and run.seconds > 0 for run in result.runs)
    trained = [row["parameters"] for row in result.summary]
    assert trained[0] == 64 * 5 + 5 and trained == sorted(trained)
    assert [row["epoch_speedup"] is not None for row in result.summary] == [True] * 3 + [False] * 2

    metrics = json.loads((result.folder / "metrics.json").read_text())
    assert len(metrics["runs"]) == 10 and metrics["config"]["shots"] == 4
    assert metrics["summary"][0]["accuracy"] == pytest.approx(
        np.mean([run["accuracy"] for run in metrics["runs"][:2]])
    )
    for name in ("curves", "predictions", "confusion"):
        with Image.open(result.folder / f"{name}.png") as picture:
            assert min(picture.size) > 300
            picture.load()
    page = (result.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "last:2" in page
    assert not re.search(r"(?:src|href)=.(?!data:)|@import|url\(", page)  # needs no other file
    files = sorted(file.name for file in (result.folder / "checkpoints").iterdir())
    assert files == ["best.pt", "features.pt", "full.pt", "last-2.pt", "last.pt", "scratch.pt"]
    assert not list(result.folder.rglob(".*"))
    lines = [json.loads(text) for text in (result.folder / "metrics.jsonl").open()]
    assert [(line["mode"], line["seed"], line["step"]) for line in lines] == [
        (mode, seed, step) for mode in modes for seed in (0, 1) for step in (1, 2, 3)
    ]
    assert [line["loss"] for line in lines] == sum((run.losses for run in result.runs), [])
    assert [line["accuracy"] for line in lines[:3]] == [a for _, a in result.runs[0].curve]
    assert [line["rate"] for line in lines[:3]] == pytest.approx([0.01, 0.01, 0.005])
    printed = capsys.readouterr()
    assert "features, seed 0" in printed.out and not printed.err  # no bars: this is no terminal
    assert str(result).count("\n") >= 6


@pytest.mark.parametrize("mode", ["features", "last", "last:2", "full"])
@pytest.mark.parametrize("augmented", [False, True])
def test_frozen_stages_do_not_move(tmp_path, small_test, mode, augmented):
    config = quick(tmp_path, augment=augmented, lr=0.1)
    weights = find_weights("small", "DEFAULT")
    _, model = fit(
        config,
        load_shipped(SHIPPED_FORMAT),
        SHIPPED_FORMAT,
        weights,
        mode=mode,
        seed=0,
        backend="fastops",
        chosen=torch.arange(0, 2500, 100),
    )
    _, count = parse_mode(mode)
    chain = list(stages_of(model))
    first_trained = {0: "head", 1: "layer3", 2: "layer2", -1: "stem"}[count]
    for name, value in model.state_dict().items():
        piece = {"conv1": "stem", "bn1": "stem", "fc": "head"}.get(name.split(".")[0])
        piece = piece or name.split(".")[0]
        if piece == "head":
            continue
        frozen = chain.index(piece) < chain.index(first_trained)
        assert torch.equal(value, weights.state[name]) == frozen, name


def test_kept_outputs_change_nothing_but_the_time(tmp_path, small_test, monkeypatch):
    config = quick(tmp_path, modes=("features", "last"))
    kept = finetune(config)
    monkeypatch.setattr(cutting, "CACHE_LIMIT", 0)
    plain = finetune(quick(tmp_path / "run", modes=("features", "last")))
    for a, b in zip(kept.runs, plain.runs, strict=True):
        assert a.epoch_speedup is not None and b.epoch_speedup is None
        assert a.losses == pytest.approx(b.losses, rel=1e-4)


def test_every_shown_picture_is_drawn():
    collection = load_shipped(SHIPPED_FORMAT)
    collection.test = take(collection.test, torch.arange(0, 2000, 10))
    predictions = collection.test.labels.clone()
    predictions[:3] = (predictions[:3] + 1) % 5
    run = Run("full", 0, "fastops", predictions=predictions, confidence=torch.full((200,), 0.5))
    figure = draw_predictions(run, collection)
    assert [len(axes.images) for axes in figure.axes] == [1] * 24
    wrong = [axes.get_title() for axes in figure.axes if "\nis " in axes.get_title()]
    assert len(wrong) == 3 and wrong[0].endswith("is Trouser")
    assert "3 of 200 test images wrong; 3 of them among these 24" in figure.get_suptitle()
    assert count_confusions([run, run], collection).sum() == 400


def synthetic_runs(*curves, times=(1.0, 1.0)):
    """Runs of one mode, two seeds on each back end, with these losses."""
    arms = [("torch", 0), ("torch", 1), ("fastops", 0), ("fastops", 1)]
    return [
        Run("full", seed, backend, losses=list(losses), times=list(times), curve=[(1, 0.5)])
        for (backend, seed), losses in zip(arms, curves, strict=True)
    ]


def test_back_ends_are_compared_by_the_loss_of_every_step():
    runs = synthetic_runs((2.0, 1.0), (2.0, 1.5), (2.0, 1.1), (2.0, 1.6, 9.0))
    between, noise = curve_distances(runs[:2], runs[2:])
    assert between == pytest.approx(0.05) and noise == pytest.approx(0.25)
    (sentence,) = compare_backends(runs)
    assert "first losses 0e+00 apart" in sentence
    assert "loss curves 0.05 (mean of the steps; those of two seeds on torch 0.25)" in sentence
    assert "two seeds" not in compare_backends([runs[0], runs[2]])[0]
    assert not compare_backends(runs[:2])


@pytest.mark.parametrize(("steps", "points"), [(1, 1), (2, 2), (4, 4), (120, 116)])
def test_curves_of_short_runs_are_drawn(steps, points):
    curve = torch.linspace(2, 1, steps).tolist()
    losses, accuracies = draw_curves(synthetic_runs(*[curve] * 4)).axes
    assert [len(line.get_xdata()) for line in losses.lines] == [points] * 2
    names = [text.get_text() for text in accuracies.get_legend().get_texts()]
    assert names == ["each of them (torch)", "full (fastops)"]


def test_same_seed_same_run(tmp_path, small_test):
    first = finetune(quick(tmp_path, modes=("full",)))
    state = torch.random.get_rng_state()
    second = finetune(quick(tmp_path / "run", modes=("full",)))
    assert first.runs[0].losses == second.runs[0].losses
    assert torch.equal(torch.random.get_rng_state(), state)


def test_backends_start_from_the_same_loss(tmp_path, small_test):
    result = finetune(quick(tmp_path, backend="both", modes=("full", "scratch"), steps=5))
    for row in ("full", "scratch"):
        ours, native = (
            next(run for run in result.runs if run.mode == row and run.backend == backend)
            for backend in ("fastops", "torch")
        )
        assert ours.losses[0] == pytest.approx(native.losses[0], rel=1e-6)
        # AdamW divides by the size of the gradient, so that rounding grows with each step.
        assert ours.losses[:2] == pytest.approx(native.losses[:2], rel=1e-2)
        assert ours.losses == pytest.approx(native.losses, rel=1e-1)
    assert [row["name"] for row in result.summary][:2] == ["full (torch)", "full (fastops)"]
    text = str(result)
    for column in ("accuracy", "first loss", "ms/step", "images/s", "peak MB"):
        assert column in text.splitlines()[0]
    assert "full: first losses" in text and "scratch: first losses" in text
    assert text.count("loss curves ") == 2
    if sys.platform == "linux":
        assert all(run.peak_memory > 1_000_000 for run in result.runs)


def test_fastops_modules_are_patched_in():
    model = build("small", 5, dropout=0.5)
    report = str(ops_for("fastops").patch(model))
    assert "ReLU" in report and "Dropout" in report
    with torch.profiler.profile() as profiler:
        model.train()(torch.rand(2, 1, 28, 28))
    ops = {event.key for event in profiler.key_averages()}
    assert "fastops::batch_norm_act" in ops and "aten::relu_" not in ops
    assert any(name.startswith("fastops::") and "dropout" in name for name in ops)
    assert ops_for("torch").patch(model) is None


def test_cut_network_computes_the_same():
    for arch in ("small", "resnet18", "resnet50"):
        model = build(arch, 3, dropout=0.3).eval()
        images = torch.randn(2, input_format(arch).channels, 40, 40)
        expected = model(images)
        for mode in ("features", "last", "last:3", "full"):
            cut = split(model, mode)
            model.eval()
            between = images if cut.frozen is None else cut.frozen(images)
            assert torch.equal(cut.trained(between), expected)


def test_learning_rates_and_decay(tmp_path):
    config = FineTuneConfig(lr=1.0, backbone_rate=0.25, weight_decay=0.5)
    model = build("small", 5)
    optimizer = make_optimizer(config, ops_for("torch"), "last", split(model, "last").pieces)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in named.values()} == set(found)
    assert found[id(named["fc.weight"])] == (1.0, 0.5)
    assert found[id(named["fc.bias"])] == (1.0, 0.0)
    assert found[id(named["layer3.0.conv1.weight"])] == (0.25, 0.5)
    assert found[id(named["layer3.0.bn1.weight"])] == (0.25, 0.0)


def test_each_stage_has_its_rate():
    config = FineTuneConfig(lr=1.0, backbone_rate=0.25, layer_decay=0.5)
    model = build("small", 5)
    optimizer = make_optimizer(config, ops_for("fastops"), "full", split(model, "full").pieces)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name.split(".")[0]: rates[id(p)] for name, p in model.named_parameters()}
    assert found == {
        "fc": 1.0, "layer3": 0.25, "layer2": 0.125, "layer1": 0.0625, "bn1": 0.03125, "conv1": 0.03125,
    }  # fmt: skip


def test_early_stop_keeps_the_best_weights(tmp_path, small_test):
    """At a rate that changes nothing, the first of eight evaluations is the best, the second no better."""
    config = quick(tmp_path, modes=("full",), steps=16, early_stop=1, lr=1e-12)
    (run,) = finetune(config).runs
    assert run.stopped and [step for step, _ in run.curve] == [2, 4] and len(run.losses) == 4
    pretrained = find_weights("small", "DEFAULT").state["bn1.num_batches_tracked"]
    saved = load_classifier(config.out).model.bn1.num_batches_tracked
    assert saved - pretrained == 2
    test = load_shipped(SHIPPED_FORMAT).test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    others = order[len(test) // 2 :]  # that no evaluation has seen
    right = (run.predictions == test.labels)[others].float().mean().item()
    assert run.accuracy == right


def test_warmup_then_cosine():
    factor = warmup_cosine(100, 0.1)
    values = [factor(step) for step in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0 and max(values) == 1.0
    assert values[9:] == sorted(values[9:], reverse=True) and 0 < values[-1] < 0.01


def test_bfloat16_and_clipping(tmp_path, small_test):
    result = finetune(quick(tmp_path, amp="bf16", max_grad_norm=0.5, modes=("features", "full")))
    assert all(np.isfinite(run.losses).all() for run in result.runs)


# ------------------------------------------------------------------------------------- checkpoints


def test_saved_network_repeats_its_predictions(tmp_path, small_test):
    result = finetune(quick(tmp_path, modes=("last",), dropout=0.2))
    classifier = load_classifier(result.folder)
    test = load_shipped(SHIPPED_FORMAT).test
    confidence, predictions = classifier.probabilities(test.images).max(1)
    assert torch.equal(predictions, result.runs[0].predictions)
    assert torch.allclose(confidence, result.runs[0].confidence, atol=1e-5)
    assert classifier.classes == result.classes


def test_predict_command(tmp_path, small_test, capsys):
    result = finetune(quick(tmp_path, modes=("features",)))
    picture = tmp_path / "boot.png"
    Image.fromarray(read_sheet("test").images[-1, 0].numpy()).save(picture)
    checkpoint = str(result.folder / "checkpoints" / "features.pt")
    for run in (checkpoint, str(result.folder)):
        assert main(["predict", run, str(picture)]) == 0
        assert capsys.readouterr().out.startswith(f"{picture}: ")
    assert main(["predict", str(tmp_path), str(picture)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert main(["predict", checkpoint, str(tmp_path / "none.png")]) == 2
    assert main(["predict", str(tmp_path / "none.pt"), str(picture)]) == 2


def test_exported_program_needs_torch_only(tmp_path, small_test):
    file = tmp_path / "out.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = finetune(quick(tmp_path, modes=("full",), dropout=0.2, export=file))
    images = load_shipped(SHIPPED_FORMAT).test.images
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch; names = {'classes.json': ''}\n"
        "program = torch.export.load('out.pt2', extra_files=names).module()\n"
        "torch.save([program(part) for part in torch.load('images.pt').split(99)], 'answers.pt')\n"
        "assert 'fastops' not in sys.modules; print(names['classes.json'])"
    )
    command = [sys.executable, "-I", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == result.classes
    confidence, predictions = torch.cat(torch.load(tmp_path / "answers.pt")).max(1)
    assert torch.equal(predictions, result.runs[0].predictions)
    assert torch.allclose(confidence, result.runs[0].confidence, atol=1e-5)
    with pytest.raises(OutputError, match="there is no such folder"):
        finetune(quick(tmp_path / "run", export=tmp_path / "none" / "out.pt2"))
    with pytest.raises(OutputError, match="it is a folder"):
        finetune(quick(tmp_path / "run", export=tmp_path))


def test_profile_accounts_for_a_step(tmp_path, small_test, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["finetune", "--profile", "--modes=features,full", "--backend=both", "--seeds=1"]
    assert main([*command, "--shots=2", "--batch-size=4", "--optimizer=rmsprop"]) == 0
    _, features, full = capsys.readouterr().out.split(": a step takes ")
    assert "aten::convolution_backward" in full and "aten::convolution" not in features
    assert "fastops::batch_norm" in full and "torch's time over fastops's" in full
    table = [
        line.split() for line in full.splitlines() if line.startswith(("aten", "fastops", "("))
    ]
    *_, total = (line.split() for line in full.splitlines() if line.startswith("sum"))
    assert sum(float(row[-4]) for row in table) <= 1.01 * float(total[1])
    assert total[3:] == ["100", "100"] and not list(tmp_path.iterdir())


def test_tensorboard(tmp_path, small_test, monkeypatch, capsys):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.name = Path(folder).relative_to(tmp_path / "logs").as_posix()
            self.close = lambda: None

        def add_scalar(self, tag, value, step):
            written.append((self.name, tag, step))

    command = [
        "finetune",
        "--modes=features,full",
        "--seeds=1",
        "--steps=2",
        "--shots=2",
        "--quiet",
    ]
    command += ["--logdir", str(tmp_path / "logs"), "--out", str(tmp_path / "run")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(command) == 2
    assert (
        "--logdir needs TensorBoard" in capsys.readouterr().err and not (tmp_path / "run").exists()
    )
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert main(command) == 0
    arms = ("run/features-fastops-0", "run/full-fastops-0")
    tags = ("loss", "rate", "accuracy")
    assert written == [(arm, tag, step) for arm in arms for step in (1, 2) for tag in tags]


@pytest.mark.parametrize("freeze", [False, True])
def test_averages_in_the_optimizers_sweep_are_those_beside_it(
    tmp_path, small_test, freeze, monkeypatch
):
    options = {"modes": ("full",), "ema": 0.8, "steps": 6, "freeze_norm": freeze}
    ours = finetune(quick(tmp_path, **options))
    saved = load_classifier(ours.folder).model.state_dict()
    for module in (recipe, trainer):
        monkeypatch.setattr(module, "averages_in_step", lambda config, ops: False)
    beside = finetune(quick(tmp_path / "run", **options))
    assert ours.runs[0].losses == beside.runs[0].losses
    for name, value in load_classifier(beside.folder).model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(saved[name], value, rtol=1e-5, atol=1e-6), name


def test_fine_tuned_network_can_be_fine_tuned_again(tmp_path, small_test):
    first = finetune(quick(tmp_path, modes=("full",)))
    weights = str(first.folder / "checkpoints" / "full.pt")
    second = finetune(quick(tmp_path / "run", modes=("features",), weights=weights))
    old = torch.load(weights, weights_only=True)["model"]
    new = torch.load(second.folder / "checkpoints" / "features.pt", weights_only=True)["model"]
    moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"fc"}  # the rest is what the first run left


def test_unfinished_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OutputError, match="No space left"):
        with complete_file(path) as unfinished:
            unfinished.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    """torch.save's own error tells of positions in the file."""

    def write(free):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=free))
        with pytest.raises(OutputError) as caught:
            with complete_file(tmp_path / "a.pt"):
                raise RuntimeError("unexpected pos 640 vs 520")
        return str(caught.value)

    assert "No space left on device" in write(free=0)
    assert "unexpected pos 640 vs 520" in write(free=1 << 30)


def test_interrupted_experiment_reports_what_it_has(tmp_path, small_test, monkeypatch, capsys):
    def fit_two(*arguments, seed, **options):
        if seed == 2:
            raise KeyboardInterrupt
        return fit(*arguments, seed=seed, **options)

    monkeypatch.setattr("fastops.finetune.plan.fit", fit_two)
    out = str(tmp_path / "run")
    command = ["finetune", "--modes=features", "--steps=2", "--shots=2", "--out", out, "--quiet"]
    assert main(command) == 130
    assert len(json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]) == 2


# -------------------------------------------------------------------------------- own pictures


def test_folder_with_resnet18(tmp_path, capsys):
    draw_pictures(tmp_path / "data" / "train")
    draw_pictures(tmp_path / "data" / "val", count=2)
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    command = ["finetune", "--data", str(tmp_path / "data"), "--arch=resnet18", "--image-size=32"]
    command += ["--weights", str(weights), "--modes=features,last:2,full", "--seeds=1"]
    command += ["--steps=2", "--batch-size=4", "--augment", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "9 training images, 3 validation images, 6 test images, 32 x 32" in printed
        and "last:2" in printed
    )
    classifier = load_classifier(tmp_path / "run" / "checkpoints" / "full.pt")
    assert classifier.classes == ["cat", "dog", "owl"] and classifier.format.size == 32


def test_classes_of_any_name(tmp_path, monkeypatch):
    """Formulas, HTML, letters that no font here has, names longer than their place."""
    names = ["$", "$\\frac$", "a < b & c", "x" * 80, "고양이"]
    draw_pictures(tmp_path / "data", names, count=3)
    fonts = font_manager.fontManager.ttflist
    own = [font for font in fonts if font.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing letter
        result = finetune(quick(tmp_path, data=tmp_path / "data", modes=("features",)))
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert (
        "고양이" in page and "have the numbers of the list" in page and "a &lt; b &amp; c" in page
    )
    assert load_classifier(result.folder).classes == names


def test_fonts_are_found_by_their_letters():
    own, missing = find_fonts("Trouser")
    assert len(own) == 1 and not missing
    default = font_manager.findfont(font_manager.FontProperties())
    letter = min(letters(font_manager.findfont("STIXNonUnicode")) - letters(default))
    families, missing = find_fonts("a" + letter)
    assert len(families) == 2 and families[0] == own[0] and not missing


def test_folder_is_split_the_same_way_each_time(tmp_path):
    draw_pictures(tmp_path / "data", count=5)
    first, second = (load_folder(tmp_path / "data", SHIPPED_FORMAT) for _ in range(2))
    assert (len(first.train), len(first.validation), len(first.test)) == (9, 3, 3)
    assert torch.equal(first.test.images, second.test.images)


def test_pictures_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    draw_pictures(tmp_path / "data", count=5)
    kept = load_folder(tmp_path / "data", SHIPPED_FORMAT)
    monkeypatch.setattr(folders, "IN_MEMORY_LIMIT", 0)
    streamed = load_folder(tmp_path / "data", SHIPPED_FORMAT)
    assert isinstance(streamed.test, OnDisk)
    assert torch.equal(streamed.test.__getitems__([0, 2])[0], kept.test.images[[0, 2]])
    result = finetune(quick(tmp_path, data=tmp_path / "data", modes=("features",)))
    assert len(result.runs[0].predictions) == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (300, 1), (5, 90), (28, 28)])
def test_odd_pictures(tmp_path, mode, size):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, size).save(path)
    for arch in ("small", "resnet18"):
        format = input_format(arch)
        pixels = read_picture(path, format)
        assert pixels.shape == (format.channels, format.stored, format.stored)
        assert pixels.dtype == torch.uint8


def test_pictures_lie_as_their_cameras_say(tmp_path):
    pixels = np.zeros((28, 28, 3), np.uint8)
    pixels[:8] = 255
    for orientation, bright in (
        (1, (0, slice(None))),
        (3, (-1, slice(None))),
        (6, (slice(None), -1)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(pixels).save(path, exif=exif)
        shown = read_picture(path, SHIPPED_FORMAT)[0]
        assert (shown[bright] == 255).all() and (shown == 255).sum() == 8 * 28


def test_a_picture_of_gigabytes_is_not_decoded(tmp_path):
    """A few hundred bytes whose header promises 60000 x 60000 pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    draw_pictures(tmp_path / "data", count=3)
    bomb = tmp_path / "data" / "cat" / "bomb.png"
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    (tmp_path / "data" / "dog" / "empty.jpg").touch()
    cut = tmp_path / "data" / "owl" / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    skipped = load_folder(tmp_path / "data", SHIPPED_FORMAT).skipped
    assert len(skipped) == 3 and str(bomb) in skipped[0] and "decompression bomb" in skipped[0]
    assert str(cut) in skipped[2] and "truncated" in skipped[2]


def test_unreadable_pictures_are_named_and_skipped(tmp_path, monkeypatch, capsys):
    draw_pictures(tmp_path / "data", count=5)
    broken = tmp_path / "data" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "data" / "dog" / "text.jpg").write_text("not a picture")
    collection = load_folder(tmp_path / "data", SHIPPED_FORMAT)
    parts = collection.train, collection.validation, collection.test
    assert sum(map(len, parts)) == 14
    assert len(collection.skipped) == 2 and str(broken) in collection.skipped[0]
    assert main(["finetune", "--data", str(tmp_path / "data"), "--dry-run", "--arch=small"]) == 0
    assert f"cannot read picture {broken}" in capsys.readouterr().out
    with pytest.raises(DataError, match="text.jpg|0.png"):
        load_folder(tmp_path / "data", SHIPPED_FORMAT, strict=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="none of the pictures"):
        load_folder(tmp_path / "data", SHIPPED_FORMAT)


def test_sampling():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    assert torch.bincount(labels[sample_per_class(labels, 4, 3)]).tolist() == [4, 3, 1]
    assert torch.bincount(labels[sample_per_class(labels, 0.2, 3)], minlength=3).tolist() == [
        2,
        1,
        0,
    ]
    batches = draw_batches(7, 3, 5, seed=1)
    assert [len(batch) for batch in batches] == [3] * 5
    assert sorted(sum(batches, [])[:7]) == list(range(7))
    assert batches == draw_batches(7, 3, 5, seed=1) != draw_batches(7, 3, 5, seed=2)
    assert [len(batch) for batch in draw_batches(4, 10, 2, seed=0)] == [4, 4]


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ("half",)}, "unknown mode 'half'"),
        ({"modes": ("last:0",)}, "unknown mode 'last:0'"),
        ({"modes": ("last:9",)}, "the network has 3 stages"),
        ({"modes": ()}, "at least one mode"),
        ({"modes": ("full", "full")}, "named twice"),
        ({"arch": "resnet9"}, "unknown arch 'resnet9'"),
        ({"backend": "jax"}, "unknown backend"),
        ({"optimizer": "lamb"}, "unknown optimizer"),
        ({"amp": "fp8"}, "unknown amp"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1"),
        ({"dropout": -0.1}, "dropout must be between 0 and 1"),
        ({"batch_size": 1}, "batch_size must be an integer of 2 or more"),
        ({"seeds": 0}, "seeds must be an integer of 1 or more"),
        ({"steps": 0}, "steps must be an integer of 1 or more"),
        ({"shots": -1}, "shots must be an integer of 0 or more"),
        ({"test_fraction": 1.0}, "test_fraction must be between 0 and 1"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        finetune(quick(tmp_path, **options))
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "run").exists()


def test_command_says_errors_in_one_line(tmp_path, capsys):
    assert main(["finetune", "--data", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"there is no folder {tmp_path / 'nowhere'}" in error
    assert main(["finetune", "--label-smoothing", "1.5"]) == 2
    assert main(["finetune", "--threads", "0"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--lr", "fast"])


def test_bad_folders(tmp_path):
    def reason(folder):
        with pytest.raises(DataError) as caught:
            load_folder(folder, SHIPPED_FORMAT)
        return str(caught.value)

    assert "there is no folder" in reason(tmp_path / "nowhere")
    assert "has no sub-folders" in reason(tmp_path)
    (tmp_path / "data" / "cat").mkdir(parents=True)
    assert "has no pictures" in reason(tmp_path / "data")
    draw_pictures(tmp_path / "one", classes=("cat",))
    assert "has one class (cat)" in reason(tmp_path / "one")
    assert "is a file" in reason(tmp_path / "one" / "cat" / "0.png")
    draw_pictures(tmp_path / "single", count=1)
    assert "no readable pictures of class cat to test on" in reason(tmp_path / "single")
    draw_pictures(tmp_path / "parts" / "train")
    assert "neither val/ nor test/" in reason(tmp_path / "parts")
    draw_pictures(tmp_path / "parts" / "val", classes=("cat", "emu", "owl"))
    assert "different classes: dog, emu" in reason(tmp_path / "parts")


def test_bad_raw_files(tmp_path):
    path = tmp_path / "images.gz"
    with pytest.raises(DataError, match="cannot read"):
        read_idx(path)
    path.write_bytes(b"\x1f\x8b\x08 cut off")
    with pytest.raises(DataError, match="cannot read"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09123"))
    with pytest.raises(DataError, match="truncated"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(DataError, match="not an IDX file"):
        read_idx(path)


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "weights.pt"

    def reason(arch=None):
        with pytest.raises(WeightsError) as caught:
            finetune(quick(tmp_path, weights=str(path), arch=arch))
        assert not (tmp_path / "run").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no checkpoint" in reason()
    path.mkdir()
    assert "is a folder: name a checkpoint in it" in reason()
    path.rmdir()
    path.write_bytes(b"not a checkpoint")
    assert "damaged" in reason() and "weights_only" not in reason()
    state = build("small", 5).state_dict()
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "damaged" in reason()
    torch.save({"model": Path("x")}, path)
    assert re.search(r"more than weights: Unsupported global: GLOBAL pathlib\S*Path;", reason())
    torch.save([1, 2], path)
    assert "holds a list" in reason()
    torch.save({"epoch": 3}, path)
    assert "holds no weights" in reason()
    torch.save({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, path)
    assert "missing: layer1.0.conv1.weight" in reason()
    torch.save({**state, "extra": torch.zeros(1)}, path)
    assert "unknown: extra" in reason()
    torch.save({**state, "conv1.weight": torch.zeros(16, 3, 3, 3)}, path)
    assert "conv1.weight (16, 3, 3, 3) instead of (16, 1, 3, 3)" in reason()
    torch.save(torchvision.models.resnet18().state_dict(), path)
    assert "another architecture" in reason("small")
    torch.save(state, path)
    with pytest.raises(WeightsError, match="not written by finetune"):
        load_classifier(path)


def test_weights_in_their_usual_wrappings(tmp_path):
    state = build("small", 7).state_dict()
    for content in (
        state,
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1},
    ):
        torch.save(content, tmp_path / "w.pth")
        model = build("small", 5)
        load_weights(model, find_weights("small", str(tmp_path / "w.pth")).state, head=False)
        assert torch.equal(model.conv1.weight, state["conv1.weight"])
    with pytest.raises(WeightsError, match="fc.weight"):
        load_weights(model, state, head=True)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    class Malice:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run by a pickle",)

    for name, content in (("bare.pt", Malice()), ("inside.pt", {"model": {"fc.weight": Malice()}})):
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match="damaged or holds more than weights"):
            find_weights("small", str(tmp_path / name))
        with pytest.raises(WeightsError, match="damaged or holds more than weights"):
            load_classifier(tmp_path / name)
    assert not (tmp_path / "run by a pickle").exists()


def test_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0 cut off")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(WeightsError, match="pip install safetensors"):
        find_weights("small", str(path))
    monkeypatch.undo()
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(WeightsError, match="is damaged or not a checkpoint"):
        find_weights("small", str(path))
    state = build("small", 7).state_dict()
    safetensors.save_file(state, path)
    model = build("small", 5)
    load_weights(model, find_weights("small", str(path)).state, head=False)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_fashion_mnist_without_files_or_network(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(fashion_mnist, "RAW_FASHION_MNIST", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "FashionMNIST", refuse)
    with pytest.raises(DataError, match="Network is unreachable.*dataset-fashion-mnist"):
        finetune(quick(tmp_path, data="fashion-mnist"))


@pytest.mark.parametrize("downloaded", [False, True])
def test_fashion_mnist_of_raw_files(tmp_path, monkeypatch, downloaded):
    """Debian's files where they are, else torchvision's download."""

    def write(folder):
        folder.mkdir(parents=True)
        for part, count in (("train", 40), ("t10k", 20)):
            labels = torch.arange(count) % 10
            images = (20 * labels).repeat_interleave(784)
            for kind, values, shape in (
                ("images-idx3", images, [count, 28, 28]),
                ("labels-idx1", labels, [count]),
            ):
                header = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
                with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                    file.write(header + bytes(values.tolist()))

    monkeypatch.setattr(fashion_mnist, "RAW_FASHION_MNIST", tmp_path / "debian")
    if downloaded:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
        download = lambda root, download: write(root / "FashionMNIST" / "raw")  # noqa: E731
        monkeypatch.setattr(fashion_mnist, "FashionMNIST", download)
    else:
        write(tmp_path / "debian")
    result = finetune(quick(tmp_path, data="fashion-mnist", modes=("features",)))
    assert result.classes == ["Trouser", "Sandal", "Sneaker", "Bag", "Ankle boot"]
    assert "20 training images (4 a class), 10 test images" in result.description[1]


def test_weights_by_default_are_torchvisions(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    asked = []

    def answer(url, *arguments, **options):
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", answer)
    model = build("resnet18", 5)
    load_weights(model, find_weights("resnet18", "DEFAULT").state, head=False)
    assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert len(asked) == 1 and "resnet18" in asked[0] and model.fc.out_features == 5


def test_download_without_a_network(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(
        WeightsError, match="cannot download resnet18 .*unreachable.*--weights FILE"
    ):
        find_weights("resnet18", "DEFAULT")


def test_bad_run_folders(tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        make_run_folder(tmp_path / "missing" / "run")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        make_run_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="is not empty"):
        make_run_folder(tmp_path)
    with pytest.raises(OutputError, match="cannot write into /proc/finetune"):
        make_run_folder("/proc/finetune")
    assert issubclass(OutputError, OSError) and issubclass(OutputError, FineTuneError)


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda format: "now")
    assert [make_run_folder(None).name for _ in range(2)] == ["finetune-now", "finetune-now-2"]


def test_infinite_loss_is_an_error(tmp_path, small_test):
    with pytest.raises(FineTuneError, match="the loss is (inf|nan) at step"):
        finetune(quick(tmp_path, modes=("scratch",), lr=1e30, steps=20))


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arch in ("small", "resnet18"):
        assert main(["finetune", "--dry-run", "--arch", arch, "--weights", "none"]) == 0
    printed = capsys.readouterr().out
    assert "from random weights" in printed and "64 x 64 pixels" in printed
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["finetune", "--dry-run", "--out", "full"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out
