"""Checkpoints that are cut off, of another model, or made to harm: refused in one clear error, nothing of them is run,
and nothing is changed."""

import copy
import os
import pickle
from dataclasses import asdict

import pytest
import torch
from torch import nn

import fastops
from fastops.__main__ import main
from fastops.finetune import ConfigError, FineTuneConfig, WeightsError, load_classifier, resume
from fastops.finetune.checkpoints import find_weights, load_weights
from fastops.finetune.networks import build, input_format


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def good_classifier():
    return {
        "arch": "small", "classes": list("abcde"), "dropout": 0.0, "format": asdict(input_format("small")),
        "model": build("small", 5).state_dict(),
    }  # fmt: skip


def progress():
    return {"runs": [], "state": None}


def refuse(path, error, read, message):
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        read(path)
    assert path.read_bytes() == before


def resume_from(path):
    """Of a folder with a good config.json."""
    config = FineTuneConfig(modes=("last",), seeds=1, steps=1)
    (path.parent / "config.json").write_text(config.to_json())
    return resume(path.parent)


READERS = {
    "weights": (good_classifier, lambda path: find_weights("small", str(path)), WeightsError, "weights.pt"),
    "predict": (good_classifier, load_classifier, WeightsError, "classifier.pt"),
    "resume": (progress, resume_from, ConfigError, "progress.pt"),
}  # fmt: skip
READER = pytest.mark.parametrize("reader", READERS)


@READER
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(reader, share, tmp_path):
    make, read, error, name = READERS[reader]
    path = tmp_path / name
    torch.save(make(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refuse(path, error, read, f"{name} is damaged")


@READER
@pytest.mark.parametrize("part", ["directory", "tensor"])
def test_flipped_bits(reader, part, tmp_path):
    """Of the archive's directory, or of a tensor, which torch.load does not notice."""
    make, read, error, name = READERS[reader]
    path = tmp_path / name
    torch.save({**make(), "extra": torch.arange(1000)}, path)
    whole = bytearray(path.read_bytes())
    if part == "directory":
        whole[-30] ^= 0xFF
        whole[0] ^= 0xFF
    else:
        whole[whole.index(torch.arange(1000).numpy().tobytes()) + 70] ^= 0x10
    path.write_bytes(whole)
    refuse(path, error, read, f"{name} is damaged")


@READER
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "nested"])
def test_malicious_pickle_is_not_run(reader, form, tmp_path):
    make, read, error, name = READERS[reader]
    path, harm = tmp_path / name, tmp_path / "harm"
    content = make()
    content["runs" if reader == "resume" else "model"] = Harm(harm)
    if form == "nested":
        content = {**make(), "extra": [{"deep": (Harm(harm),)}]}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    refuse(path, error, read, f"{name} is damaged")
    assert not harm.exists()
    pickle.loads(pickle.dumps(Harm(harm)))  # it would have
    assert harm.exists()


@pytest.mark.parametrize(
    "content", [3, None, [1, 2], {"model": {}}, {"model": 3}, {"a": "text"}, {}], ids=str
)
def test_weights_that_hold_none(content, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    refuse(path, WeightsError, lambda p: find_weights("small", str(p)), "weights.pt holds")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format"), "was not written by finetune: KeyError.*format"),
        (lambda c: c.pop("classes"), "was not written by finetune: KeyError.*classes"),
        (lambda c: c["format"].update(colour=1), "was not written by finetune: TypeError"),
        (lambda c: c.update(arch="vgg"), "was not written by finetune.*unknown arch 'vgg'"),
        (lambda c: c.update(classes=3), "was not written by finetune: TypeError"),
        (lambda c: c.update(model=3), "was not written by finetune"),
        (lambda c: c["model"].pop("conv1.weight"), "missing: conv1.weight"),
        (lambda c: c["model"].update(more=torch.ones(1)), "unknown: more"),
        (lambda c: c["model"].update({"fc.weight": torch.ones(5, 3)}), r"fc.weight \(5, 3\) instead of \(5, 64\)"),
        (lambda c: c["model"].update({"fc.weight": 3}), "fc.weight|was not written by finetune"),
    ],
)  # fmt: skip
def test_classifiers_of_wrong_content(change, message, tmp_path):
    content = good_classifier()
    change(content)
    path = tmp_path / "classifier.pt"
    torch.save(content, path)
    refuse(path, WeightsError, load_classifier, message)


def test_weights_of_another_network_leave_the_model_as_it_was():
    model = build("small", 5)
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in model.state_dict().items()}
    state["layer3.0.conv1.weight"] = torch.ones(2, 2)
    with pytest.raises(WeightsError, match=r"layer3.0.conv1.weight \(2, 2\) instead of"):
        load_weights(model, state, head=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "content", [3, [], {}, {"runs": 3, "state": None}, {"runs": [{"mode": "full"}], "state": None}, {"runs": []}], ids=str
)  # fmt: skip
def test_progress_of_wrong_content(content, tmp_path):
    path = tmp_path / "progress.pt"
    torch.save(content, path)
    refuse(path, ConfigError, resume_from, "progress.pt is damaged")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ('{"steps": 1', "is damaged"),
        ("[1, 2]", "unknown options|is damaged"),
        ('{"surprise": 1}', "unknown options: surprise"),
        ('{"steps": -1}', "steps must be an integer of 1 or more, got -1"),
        ('{"modes": ["half"]}', "unknown mode 'half'"),
        ('{"lr": "fast"}', "is damaged|lr must be"),
    ],
)
def test_configurations(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    torch.save(progress(), tmp_path / "progress.pt")
    with pytest.raises(ConfigError, match=message):
        resume(tmp_path)


def test_the_command_says_so_in_one_line(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.save({"model": Harm(tmp_path / "harm")}, path)
    for command in (
        ["predict", str(path), "x.png"],
        ["finetune", "--weights", str(path), "--out", str(tmp_path / "run")],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "weights.pt is damaged or holds more than weights" in said
    assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ optimizers


def trained(name="Adam", **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 3)) for n in (2, 4)]
    optimizer = getattr(fastops.optim, name)(params, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def changed(saved, change):
    saved = copy.deepcopy(saved)
    result = change(saved)
    return saved if result is None else result


STATES = [
    ("no groups", lambda s: s.pop("param_groups") and None, KeyError, "param_groups"),
    ("no state", lambda s: s.pop("state") and None, KeyError, "state"),
    ("a list", lambda s: [s], (TypeError, AttributeError), "list"),
    ("fewer groups", lambda s: s.update(param_groups=[]), ValueError, "different number of parameter groups"),
    ("other groups", lambda s: s["param_groups"][0].update(params=[0]), ValueError, "doesn't match the size"),
    ("a state of another shape", lambda s: s["state"][1].update(exp_avg=torch.ones(2, 2)), ValueError,
     r"exp_avg of parameter 1 is \(2, 2\); the parameter has shape \(4, 3\)"),
    ("a state that is text", lambda s: s["state"][1].update(exp_avg_sq="1"), ValueError, "exp_avg_sq of parameter 1 is str"),
    ("states that are a list", lambda s: s["state"].update({1: [1, 2]}), (ValueError, TypeError), "list"),
    ("an average of another shape", lambda s: s["state"][0].update(ema=torch.ones(5)), ValueError, "ema of parameter 0 is"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "message"), STATES, ids=[s[0] for s in STATES])
def test_optimizer_states(name, change, error, message):
    optimizer, twin = trained(ema_decay=0.9), trained(ema_decay=0.9)
    bad = changed(optimizer.state_dict(), change)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(bad)
    for o in (optimizer, twin):
        for p in (p for g in o.param_groups for p in g["params"]):
            p.grad = torch.full_like(p, 0.5)
        o.step()
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, twin)), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == twin.state[q].keys()
        assert all(torch.equal(optimizer.state[p][k], twin.state[q][k]) for k in twin.state[q])


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "AdamW"])
def test_optimizer_states_of_another_optimizer(name):
    """Adam's states mean nothing to them: the next step says so, or, as torch's, starts anew; nothing is half done."""
    optimizer = trained(name)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    state = trained("Adam").state_dict()
    state["state"] = {k: {"exp_avg": v["exp_avg"]} for k, v in state["state"].items()}
    state["param_groups"] = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict(state)
        optimizer.step()
    except KeyError:
        for p, b in zip(optimizer.param_groups[0]["params"], before, strict=True):
            assert torch.equal(p, b)
    else:
        assert name == "SGD"
