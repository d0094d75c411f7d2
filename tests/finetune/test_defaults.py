"""What is done where nothing is said: by the data, with the reason; and options from wherever they come."""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torchvision
from finetuning import draw_pictures, quick

from fastops.__main__ import main, make_parser
from fastops.finetune import ConfigError, FineTuneConfig, devices, finetune, plan
from fastops.finetune.options import flag, table


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return str(path)


def said(capsys, *options):
    assert main(["finetune", "--dry-run", *options]) == 0
    return capsys.readouterr().out


def test_a_folder_without_weights_or_network(tmp_path, capsys, no_network):
    draw_pictures(tmp_path / "photos", count=12)
    text = said(capsys, "--data", str(tmp_path / "photos"))
    assert (
        "24 training images, 6 validation images, 6 test images, 224 x 224 pixels, 1 seed" in text
    )
    assert "resnet18 (11,178,051 parameters) from random weights" in text
    (line,) = [line for line in text.splitlines() if "cannot download" in line]
    assert "Network is unreachable" in line and "from random weights instead" in line
    assert "--weights FILE" in line and "mode scratch: there are no pretrained weights" in text
    assert "random crops and flips; the best weights on the validation images are tested" in text
    folder = ["--data", str(tmp_path / "photos")]
    for named in (["--weights=DEFAULT"], ["--compare"], ["--modes=full"]):
        assert main(["finetune", "--dry-run", *folder, *named]) == 2


@pytest.mark.parametrize(("count", "mode"), [(14, "full"), (6, "features")])
def test_the_number_of_pictures_chooses_the_mode(tmp_path, capsys, weights, count, mode):
    draw_pictures(tmp_path / "photos", count=count)
    text = said(capsys, "--data", str(tmp_path / "photos"), "--weights", weights)
    assert f"mode {mode}, " in text and "training images of the smallest class" in text
    assert ("the head alone for the first 24 steps" in text) == (mode == "full")


def test_compare(tmp_path, weights):
    draw_pictures(tmp_path / "photos", count=6)
    options = {"data": tmp_path / "photos", "weights": weights, "arch": None, "seeds": None}
    config = plan.make_plan(quick(tmp_path, compare=True, **options)).config
    assert config.arch == "resnet18" and config.chosen_seeds == 3
    assert config.modes == ("features", "last", "full", "scratch")
    assert plan.make_plan(quick(tmp_path, **options)).config.modes == ("features",)
    with pytest.raises(ConfigError, match="compare names the modes itself"):
        finetune(quick(tmp_path, compare=True, modes=("full",), **options))


def test_the_shipped_data_are_compared_as_before():
    config = plan.make_plan(FineTuneConfig()).config
    assert config.modes == ("features", "last", "full", "scratch") and config.chosen_seeds == 3
    assert config.chosen_augment == "none" and config.chosen_schedule == "together"
    assert (config.arch, config.weights, config.amp) == ("small", "DEFAULT", "off")
    assert not config.keeps_best and config.chosen_batch_size == 50


def test_a_resolved_configuration_resolves_to_itself(tmp_path):
    draw_pictures(tmp_path / "photos", count=6)
    once = plan.make_plan(quick(tmp_path, data=tmp_path / "photos", modes=None)).config
    assert plan.make_plan(once).config == once


@pytest.mark.parametrize(
    ("amx", "bf16", "expected"),
    [(True, True, "AMX"), (False, True, "AVX512-BF16"), (False, False, "neither")],
)
def test_automatic_bfloat16(monkeypatch, amx, bf16, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    value, why = devices.choose_amp("auto", torch.device("cpu"))
    assert value == ("bf16" if amx or bf16 else "off") and expected in why
    assert devices.choose_amp("off", torch.device("cpu")) == ("off", "")


def test_automatic_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "granted_cores", lambda: 8)
    seconds = {1: 3.0, 4: 1.0, 8: 2.0}
    monkeypatch.setattr(devices, "time_convolution", seconds.get)
    assert devices.choose_threads("auto")[0] == 4
    assert devices.choose_threads(3) == (3, "") and devices.choose_threads(None) == (None, "")
    monkeypatch.setattr(devices, "granted_cores", lambda: 1)
    assert devices.choose_threads("auto")[0] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert devices.choose_threads("auto") == (None, "")


def test_threads_are_put_back(tmp_path, small_test):
    before = torch.get_num_threads()
    result = finetune(quick(tmp_path, modes=("features",), threads=before + 1))
    assert torch.get_num_threads() == before
    assert json.loads((result.folder / "metrics.json").read_text())["threads"] == before + 1


# ----------------------------------------------------------------------------------------- options


def test_every_option_is_a_field_and_every_field_an_option():
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    text = commands.choices["finetune"].format_help()
    for entry in fields(FineTuneConfig):
        assert flag(entry.name) in text and entry.metadata["help"], entry.name
        if not isinstance(entry.default, bool | None):
            assert f"(default: {entry.default})" in " ".join(text.split()), entry.name


def test_options_of_a_file(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"modes": ["features"], "batch-size": 20, "seeds": 2}))
    text = said(capsys, "--config", str(path), "--seeds=1")
    assert "steps of 20 images" in text and "1 seed" in text
    for content, message in (
        ('{"surprise": 1}', "unknown options: surprise"),
        ("[1]", "expected options by name"),
        ("{", "is damaged"),
        ('{"lr": "fast"}', "lr must be above 0, got 'fast'"),
    ):
        path.write_text(content)
        assert main(["finetune", "--dry-run", "--config", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["finetune", "--config", str(tmp_path / "none.json")]) == 2


def test_options_of_a_yaml_file(tmp_path, capsys):
    pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text("modes: features, last\nbatch_size: 20\n")
    assert "steps of 20 images" in said(capsys, "--config", str(tmp_path / "run.yaml"))


def test_values_that_cannot_be():
    for options, message in (
        ({"augment": "much"}, "unknown augment 'much'"),
        ({"balance": "equal"}, "unknown balance"),
        ({"cutmix": -1.0}, "cutmix must be 0 or more"),
        ({"workers": -1}, "workers must be an integer of 0 or more"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"validation_fraction": 0.0}, r"validation_fraction must be between 0 and 1 \(0 and 1 excluded\)"),
        ({"layer_decay": 0.0}, r"layer_decay must be between 0 and 1 \(0 excluded\)"),
        ({"steps": True}, "steps must be an integer"),
        ({"keep": "first"}, "unknown keep"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            replace(FineTuneConfig(), **options).check()


def test_the_guide_has_the_options():
    guide = Path(__file__).parents[2] / "docs" / "finetuning.md"
    assert table() in guide.read_text(), "write fastops.finetune.options.table() into it"
