"""Checkpoints as people have them: the weights are found, the architecture is told, refusals give the real reason."""

import pytest
import torch
import torchvision
from finetuning import quick
from torch.optim.swa_utils import AveragedModel

from fastops.__main__ import main
from fastops.finetune import WeightsError, finetune
from fastops.finetune.checkpoints import find_weights, load_weights
from fastops.finetune.networks import build


def small_state(classes=7):
    torch.manual_seed(0)
    return build("small", classes).state_dict()


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def averaged(state):
    return {
        name: value + 1 if value.is_floating_point() else value for name, value in state.items()
    }


def optimizer_state(state):
    moments = {i: {"exp_avg": torch.zeros_like(v)} for i, v in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 0.1}]}


WRAPPINGS = {
    "bare": lambda s: s,
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": optimizer_state(s)},
    "state_dict": lambda s: {"state_dict": s, "optimizer": optimizer_state(s), "best_acc1": torch.tensor(0.5)},
    "model": lambda s: {"model": s, "args": None},
    "net": lambda s: {"net": s, "acc": 91.2},
    "two deep": lambda s: {"checkpoint": {"weights": s}},
    "lightning": lambda s: {"state_dict": {**prefixed(s, "model."), "criterion.weight": torch.ones(7)},
                            "optimizer_states": [optimizer_state(s)], "hparams_name": "kwargs"},
    "DataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "compiled, then DataParallel": lambda s: {"state_dict": prefixed(s, "module._orig_mod.")},
    "a compiled stage": lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    "backbone": lambda s: {**prefixed(s, "backbone."), "head.weight": torch.ones(9, 64)},
    "encoder": lambda s: {"state_dict": {**prefixed(s, "encoder."), "projector.0.weight": torch.ones(9, 64)}},
    "MoCo": lambda s: {"state_dict": {**prefixed(s, "module.encoder_q."), **prefixed(averaged(s), "module.encoder_k."),
                                      "module.queue": torch.ones(64, 8)}},
    "no head": lambda s: {k: v for k, v in s.items() if not k.startswith("fc.")},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "parameters": lambda s: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("arch", ["small", None])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found(tmp_path, wrapping, arch):
    state = small_state()
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "weights.pth")
    found = find_weights(arch, str(tmp_path / "weights.pth"))
    assert found.arch == "small"
    model = build("small", 5)
    load_weights(model, found.state, head=False)
    for name, value in model.state_dict().items():
        if not name.startswith("fc."):
            expected = state[name].half().to(value.dtype) if wrapping == "half" else state[name]
            assert torch.equal(value, expected), name
    if wrapping in ("lightning", "backbone", "encoder", "MoCo"):
        assert "not used" in found.found
    if wrapping in ("model_state_dict", "encoder"):
        assert wrapping in found.found


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "state_dict_ema": averaged(s)},
        lambda s: {"model": s, "model_ema": {**prefixed(averaged(s), "module."), "n_averaged": torch.tensor(3)}},
        lambda s: {"model": s, "ema": {"decay": 0.99, "shadow": averaged(s)}},
        lambda s: {"state_dict": {**prefixed(s, "model."), **prefixed(averaged(s), "ema_model.")}},
        lambda s: {"ema_state_dict": averaged(s)},
    ],
    ids=["timm", "torchvision", "shadow", "prefix", "alone"],
)  # fmt: skip
def test_averaged_weights_are_taken_and_named(tmp_path, wrap):
    state = small_state()
    torch.save(wrap(state), tmp_path / "weights.pth")
    found = find_weights("small", str(tmp_path / "weights.pth"))
    assert torch.equal(found.state["conv1.weight"], state["conv1.weight"] + 1)
    assert "ema" in found.found


def test_an_averaged_model(tmp_path):
    model = build("small", 3)
    torch.save(AveragedModel(model).state_dict(), tmp_path / "weights.pth")
    found = find_weights("small", str(tmp_path / "weights.pth"))
    assert torch.equal(found.state["conv1.weight"], model.conv1.weight)
    assert "under the prefix 'module.'; not used: n_averaged" in found.found


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet34", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"]
)
@pytest.mark.parametrize("classes", [1000, 3])
def test_the_architecture_is_told_from_shapes(tmp_path, arch, classes):
    state = torchvision.models.get_model(arch, weights=None, num_classes=classes).state_dict()
    torch.save({"state_dict": prefixed(state, "module.")}, tmp_path / "weights.pth")
    assert find_weights(None, str(tmp_path / "weights.pth")).arch == arch


def test_weights_alone_choose_the_network_and_say_where_they_were(tmp_path, small_test, capsys):
    torch.save({"model_state_dict": small_state()}, tmp_path / "weights.pth")
    command = ["finetune", "--weights", str(tmp_path / "weights.pth"), "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "ResNet-14" in said and "model_state_dict" in said
    result = finetune(quick(tmp_path, weights=str(tmp_path / "weights.pth"), modes=("features",)))
    assert result.config.arch == "small"


def reason(path, arch=None):
    with pytest.raises(WeightsError) as caught:
        find_weights(arch, str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_give_the_real_reason(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "Git LFS pointer" in reason(path)
    path.write_text("<!DOCTYPE html><html>404</html>")
    assert "a web page" in reason(path)
    path.touch()
    path.write_bytes(b"")
    assert "it is empty" in reason(path)
    torch.save(torchvision.models.resnet18(), path)
    assert "a whole model was saved, not its weights alone" in reason(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in reason(path)
    torch.save({"state_dict": {"layer.weight": torch.ones(3, 3)}}, path)
    assert "of none of torchvision's architectures (1 tensors: layer.weight" in reason(path)
    assert "another architecture" in reason_of_loading(path)
    state = small_state()
    state["layer1.0.bn1.weight"][0] = float("nan")
    torch.save(state, path)
    assert "layer1.0.bn1.weight is not finite" in reason(path, "small")
    state = small_state()
    state["conv1.weight"] = state["conv1.weight"].to(torch.int8)
    torch.save(state, path)
    assert "dtype: conv1.weight torch.int8" in reason_of_loading(path)


def reason_of_loading(path):
    with pytest.raises(WeightsError) as caught:
        load_weights(build("small", 2), find_weights("small", str(path)).state, head=False)
    return str(caught.value)
