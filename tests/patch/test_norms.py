"""patch() and batch norms: alone, with the activation after them, and at the end of residual blocks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_accurate
from models import Spy
from torch import nn

import fastops
from fastops.patching.modules import attached

pytestmark = pytest.mark.quick


def kernels(model, *args):
    """The ops of ours that run."""
    with Spy() as spy:
        model(*args)
    return [o.split(".")[1] for o in spy.ops if o.startswith("fastops")]


class Block(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, act=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.act(out)


class Functional(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return torch.relu(x + self.bn2(self.conv2(out)))


class Before(Block):
    """A block whose norms come first."""

    def forward(self, x):
        out = self.conv1(self.act(self.bn1(x)))
        out = self.conv2(self.bn2(out).relu())
        return out + x


X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
LAST = X.to(memory_format=torch.channels_last)


def seeded(make, *args, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs)


def step(model, x, target=None):
    """[loss, all gradients, all buffers] of a training step."""
    model = copy.deepcopy(model).train()
    y = model(x)
    loss = y.pow(3).mean() if target is None else F.cross_entropy(y, target)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    buffers = [b.double().flatten() for b in model.buffers()]
    return [loss, torch.cat([g.flatten() for g in grads]), torch.cat(buffers)]


def assert_same_steps(model, x, target=None):
    """A training step of the patched model is as near to float64 as one of the model itself; in float64 it is the same."""
    ours = seeded(copy.deepcopy, model)
    fastops.patch(ours)
    mine, theirs = step(ours, x, target), step(model, x, target)
    exact = step(copy.deepcopy(model).double(), x.double(), target)
    for m, t, e in zip(mine, theirs, exact, strict=True):
        assert_as_accurate(m, t, e, torch.float32)
    for m, e in zip(step(ours.double(), x.double(), target), exact, strict=True):
        torch.testing.assert_close(m, e)


BLOCKS = {
    "in place": (Block, (), ["BatchNorm2d + relu", "BatchNorm2d + add + relu"]),
    "out of place": (Block, (nn.ReLU(),), ["BatchNorm2d + relu", "BatchNorm2d + add + relu"]),
    "silu": (Block, (nn.SiLU(),), ["BatchNorm2d + silu", "BatchNorm2d + add + silu"]),
    "leaky": (Block, (nn.LeakyReLU(0.2),), ["BatchNorm2d + leaky_relu", "BatchNorm2d + add + leaky_relu"]),
    "functions": (Functional, (), ["BatchNorm2d + relu", "BatchNorm2d + add + relu"]),
    "norms first": (Before, (), ["BatchNorm2d + relu", "BatchNorm2d + relu"]),
}  # fmt: skip


@pytest.mark.parametrize("make, args, fused", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("x", [X, LAST], ids=["contiguous", "channels_last"])
def test_blocks(make, args, fused, x):
    model = seeded(make, *args)
    assert_same_steps(model, x)
    twin = copy.deepcopy(model)
    report = fastops.patch(model)
    words = [before for name, before, after in report.replaced if after == "fastops.functional.batch_norm_act"]  # fmt: skip
    assert words == [f"{make.__name__}: {w}" for w in fused] and not report.left
    assert kernels(model, x) == ["batch_norm_act"] * 2
    twin(x)
    for a, b in zip(model.eval()(x), twin.eval()(x), strict=True):
        torch.testing.assert_close(a, b)
    assert kernels(model, x) == ["batch_norm_act"] * 2
    again = fastops.unpatch(model)
    assert [w for _, _, w in again.replaced if "BatchNorm2d +" in w] == words
    assert not any(attached(m) or "forward" in vars(m) for m in model.modules())
    assert kernels(model, x) == []


def torchvision():
    return pytest.importorskip("torchvision", reason="torchvision does not import beside this torch")  # fmt: skip


def test_resnet18():
    model = seeded(torchvision().models.resnet18, num_classes=7)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([1, 4, 0, 6])
    assert_same_steps(model, x, target)
    keys = list(model.state_dict())
    report = str(fastops.patch(model))
    for line in (
        "ResNet: BatchNorm2d + relu -> fastops.functional.batch_norm_act: 1",
        "BasicBlock: BatchNorm2d + relu -> fastops.functional.batch_norm_act: 8",
        "BasicBlock: BatchNorm2d + add + relu -> fastops.functional.batch_norm_act: 8",
        "torch.nn.ReLU -> fastops.nn.ReLU: 9",
    ):
        assert line in report.splitlines()
    assert kernels(model, x) == ["batch_norm_act"] * 17  # and torch's of the downsampling
    assert list(model.state_dict()) == keys
    assert not fastops.patch(model).replaced
    fastops.unpatch(model)
    assert kernels(model, x) == []


def test_bottlenecks():
    models = torchvision().models
    model = seeded(models.resnet.ResNet, models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert_same_steps(model, x.to(memory_format=torch.channels_last), torch.tensor([1, 4, 0, 2]))
    report = str(fastops.patch(model)).splitlines()
    assert "Bottleneck: BatchNorm2d + relu -> fastops.functional.batch_norm_act: 8" in report
    assert "Bottleneck: BatchNorm2d + add + relu -> fastops.functional.batch_norm_act: 4" in report
    assert kernels(model, x) == ["batch_norm_act"] * 13


# ---------------------------------------------------------------------------------------------- sequences


def sequence(act):
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), act, nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip


ACTIVATIONS = [nn.ReLU(True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.SiLU(True), nn.GELU(), nn.Hardswish(), nn.Mish()]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_sequences(act):
    model = seeded(sequence, act)
    assert_same_steps(model, X)
    report = fastops.patch(model)
    words = f"Sequential: BatchNorm2d + {type(act).__name__}"
    assert ("", words, "fastops.functional.batch_norm_act") in report.replaced
    assert kernels(model, X) == ["batch_norm_act"]
    assert fastops.unpatch(model).replaced and kernels(model, X) == []


def test_what_does_not_follow_stays_apart():
    for act in (nn.Tanh(), nn.GELU("tanh"), nn.Sequential(nn.ReLU()), nn.ELU()):
        model = seeded(sequence, act)
        assert not any(name == "" for name, *_ in fastops.patch(model).replaced)
        assert attached(model) is None and "batch_norm_act" not in kernels(model, X)
    alone = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    fastops.patch(alone)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        alone(X)
    with pytest.raises(AttributeError, match="dim"):  # as torch's
        alone(3)


def test_subclasses_of_sequences():
    misc = torchvision().ops.misc
    model = seeded(misc.Conv2dNormActivation, 4, 8, 3)
    assert_same_steps(model, X)
    report = fastops.patch(model)
    assert ("", "Conv2dNormActivation: BatchNorm2d + ReLU", "fastops.functional.batch_norm_act") in report.replaced  # fmt: skip
    assert kernels(model, X) == ["batch_norm_act"]

    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 1

    model = Own(nn.BatchNorm2d(4), nn.ReLU())
    fastops.patch(model)
    assert kernels(model, X) == ["relu"]


# ---------------------------------------------------------------------------------------------- when it is not one


@pytest.mark.parametrize("make", [Block, Functional, lambda: sequence(nn.ReLU())], ids=["block", "functions", "sequence"])  # fmt: skip
def test_hooks_are_run(make):
    model = seeded(make)
    expected = copy.deepcopy(model)(X)
    fastops.patch(model)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    handle = norm.register_forward_hook(lambda m, args, y: seen.append((y < 0).any().item()))
    torch.testing.assert_close(model(X), expected)
    assert seen == [True]  # what it was given is not yet rectified
    handle.remove()
    if acts := [m for m in model.modules() if isinstance(m, nn.ReLU)]:
        with acts[0].register_forward_pre_hook(lambda m, args: seen.append(1)):
            model(X)
    assert len(seen) > 1 or make is Functional
    assert "batch_norm_act" in kernels(model, X) and "relu" not in kernels(model, X)
    calls = []
    for register in (nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook):  # fmt: skip
        with register(lambda m, *rest: calls.append(type(m).__name__)):
            model(X)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert calls.count("BatchNorm2d") == 2 * norms


def test_a_child_that_was_changed_runs_as_it_is():
    model = seeded(Block)
    fastops.patch(model)
    model.bn1 = nn.InstanceNorm2d(4)
    assert kernels(model, X) and torch.isfinite(model(X)).all()
    model.bn1, model.act = nn.BatchNorm2d(4), nn.Tanh()
    assert "relu" not in kernels(model, X)
    model.bn1.forward = lambda x: x * 0 + 1
    expected = copy.deepcopy(model)
    fastops.unpatch(expected)
    torch.testing.assert_close(model(X), expected(X))


class Twice(nn.Module):
    """What a batch norm gives is read by two, or its turn may not change."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), how

    def forward(self, x):
        if self.how == "read twice":
            y = self.bn(self.conv(x))
            return torch.relu(y) + y
        if self.how == "sum read twice":
            y = self.bn(self.conv(x)) + x
            return torch.relu(y) * y
        if self.how == "norm twice":
            y = self.bn(self.conv(x))
            z = self.bn(self.conv(x * 2))
            return torch.relu(y + x) + z
        if self.how == "input overwritten":
            y = self.conv(x)
            z = self.bn(y)
            y.mul_(2)
            return torch.relu(z + x)
        if self.how == "other overwritten":
            y = self.conv(x)
            y += self.bn(x)
            return torch.relu(y) + y
        return torch.relu(self.bn(self.bn(x)))


HOWS = ["read twice", "sum read twice", "norm twice", "input overwritten", "other overwritten", "norm of a norm"]  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_forwards_that_are_not_one_kernel(how):
    model = seeded(Twice, how)
    theirs = copy.deepcopy(model)
    report = fastops.patch(model)
    fused = [w for _, w, after in report.replaced if after.endswith("batch_norm_act")]
    assert len(fused) == (1 if how == "norm of a norm" else 0), report
    with torch.no_grad():
        torch.testing.assert_close(model(X), theirs(X))
    for a, b in zip(model.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_residuals_that_are_no_like_tensor():
    class Scaled(Block):
        def forward(self, x, r):
            return torch.relu(self.bn1(x) + r)

    class InPlace(Block):
        def forward(self, x, r):
            y = self.bn1(x)
            y += r
            return torch.relu(y)

    for cls in (Scaled, InPlace):
        model = seeded(cls)
        theirs = copy.deepcopy(model)
        assert "BatchNorm2d + add + relu" in str(fastops.patch(model))
        for r in (X, X.double(), X[:1], X[0, :, :1], X.to(memory_format=torch.channels_last)):
            y, expected = model(X, r), theirs(X, r)
            assert y.dtype == expected.dtype
            torch.testing.assert_close(y, expected)
        torch.testing.assert_close(model(X, 2), theirs(X, 2))
        with pytest.raises(TypeError):
            model(X, None)


# ---------------------------------------------------------------------------------------------- copies and tools


def test_copies_pickles_and_tools():
    model = nn.Sequential(seeded(Block), seeded(sequence, nn.SiLU()))
    theirs = copy.deepcopy(model)
    fastops.patch(model)
    twin = copy.deepcopy(model)
    assert kernels(twin, X) == ["batch_norm_act"] * 3
    loaded = pickle.loads(pickle.dumps(model))
    assert not any(attached(m) for m in loaded.modules()) and kernels(loaded, X) == []
    model.eval(), theirs.eval()
    expected = theirs(X)
    torch.testing.assert_close(model(X), expected)
    for other in (
        torch.compile(model, backend="aot_eager", fullgraph=True),
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (X,)).module(),
        torch.jit.trace(model, X),
        torch.jit.script(model),
    ):
        torch.testing.assert_close(other(X), expected)
    model.train(), theirs.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), theirs(X))
    for a, b in zip(model.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_and_no_grad():
    model = seeded(Block)
    theirs = copy.deepcopy(model)
    fastops.patch(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, native = model(X), theirs(X)
        assert kernels(model, X)[0] == "batch_norm_act"
    assert mine.dtype == native.dtype
    with torch.no_grad():
        exact = seeded(Block).double()(X.double())
    assert_as_accurate(mine, native, exact, torch.bfloat16)
