"""patch, unpatch, patched: what is replaced, what is left, and that nothing else of a model changes."""

import copy
import io

import pytest
import torch
from torch import nn

import fastops


class Own(nn.ReLU):
    def forward(self, x):
        return x


def model():
    shared = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 1), shared, nn.Flatten(), nn.Dropout(0.0),
        nn.LazyLinear(5), nn.GELU(), nn.Softmax(1), Own(),
    )  # fmt: skip


def test_patch_and_unpatch():
    m = model()
    x = torch.randn(2, 3, 8, 8)
    y = m(x)
    modules, names = list(m.modules()), [n for n, _ in m.named_modules()]
    keys = list(m.state_dict())
    report = fastops.patch(m)
    assert [type(k).__module__.split(".")[0] for k in m].count("fastops") == 5
    assert len(report.replaced) == 4  # the shared ReLU is one module
    assert [left[1] for left in report.left] == ["Own"]
    assert "torch.nn.ReLU -> fastops.nn.ReLU: 1" in str(report)
    torch.testing.assert_close(m(x), y)
    assert list(m.state_dict()) == keys and [n for n, _ in m.named_modules()] == names
    assert all(a is b for a, b in zip(modules, m.modules(), strict=True))
    assert not fastops.patch(m).replaced  # again changes nothing
    fastops.unpatch(m)
    assert all(type(k).__module__.startswith(("torch", __name__)) for k in m.modules())
    assert m[1] is m[3]


def test_dry_run_and_root():
    m = nn.ReLU()
    assert fastops.patch(m, dry_run=True).replaced and type(m) is nn.ReLU
    fastops.patch(m)
    assert type(m) is fastops.nn.ReLU and isinstance(m, nn.ReLU)


def test_context_manager_leaves_the_model_as_found():
    m = nn.Sequential(nn.ReLU(), fastops.nn.GELU())
    with fastops.patched(m):
        assert type(m[0]) is fastops.nn.ReLU
    assert type(m[0]) is nn.ReLU and type(m[1]) is fastops.nn.GELU
    with pytest.raises(ZeroDivisionError), fastops.patched(m):
        raise ZeroDivisionError
    assert type(m[0]) is nn.ReLU


def test_hooks_flags_copies_and_pickles():
    m = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.ReLU())
    seen = []
    m[2].register_forward_hook(lambda *a: seen.append("hook"))
    m.eval()
    fastops.patch(m)
    assert not m[1].training
    m(torch.randn(2, 3))
    assert seen == ["hook"]
    m[2]._forward_hooks.clear()
    twin = copy.deepcopy(m)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 3)
    for other in (twin, loaded):
        torch.testing.assert_close(other(x), m(x))
        assert type(other[2]) is fastops.nn.ReLU


def test_torchvision_resnet():
    torchvision = pytest.importorskip(
        "torchvision", reason="torchvision does not import beside this torch"
    )
    torch.manual_seed(0)
    m = torchvision.models.resnet18(num_classes=7).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    t = torch.tensor([1, 4])

    def run(loss):
        m.zero_grad()
        value = loss(m(x), t)
        value.backward()
        return value, [p.grad.clone() for p in m.parameters()]

    plain, plain_grads = run(nn.functional.cross_entropy)
    assert len(fastops.patch(m).replaced) == 9
    # BatchNorm's running statistics moved, the batch's own did not: a training step is the same again
    ours, our_grads = run(fastops.functional.cross_entropy)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", list(fastops.nn.MODULES.values()), ids=lambda c: c.__name__)
def test_modules_are_torchs(cls):
    base = cls.__base__
    args = (
        {"dim": 1} if "Softmax" in cls.__name__ else {"p": 0.0} if "ropout" in cls.__name__ else {}
    )
    ours, theirs = cls(**args), base(**args)
    assert repr(ours) == repr(theirs)
    x = torch.randn(3, 5)
    extra: tuple = ()
    if cls.__name__ in ("CrossEntropyLoss", "NLLLoss"):
        extra = (torch.tensor([1, 4, 0]),)
    elif "Loss" in cls.__name__:
        x, extra = x.sigmoid(), (torch.rand(3, 5),)
    elif cls.__name__ in ("Dropout2d", "Dropout3d"):
        x = torch.randn(2, 3, 4, 2, *[2] * (cls.__name__ == "Dropout3d"))
    torch.testing.assert_close(ours(x, *extra), theirs(x, *extra))
