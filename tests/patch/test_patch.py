"""patch, unpatch, patched: what is replaced, what is left, and that nothing else of a model changes."""

import copy
import functools
import inspect
import io
import pickle
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from models import Block, Spy
from torch import nn

import fastops
from fastops.patching.modules import attached

pytestmark = pytest.mark.quick


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
    assert [attached(k) is not None for k in m].count(True) == 5
    assert len(report.replaced) == 4  # the shared ReLU is one module
    assert [left[1] for left in report.left] == ["Own"]
    assert "torch.nn.ReLU -> fastops.nn.ReLU: 1" in str(report)
    torch.testing.assert_close(m(x), y)
    assert list(m.state_dict()) == keys and [n for n, _ in m.named_modules()] == names
    assert all(a is b for a, b in zip(modules, m.modules(), strict=True))
    assert not fastops.patch(m).replaced  # again changes nothing
    fastops.unpatch(m)
    assert not any(attached(k) or "forward" in vars(k) for k in m.modules())
    assert m[1] is m[3]


def test_dry_run_and_root():
    m = nn.ReLU()
    assert fastops.patch(m, dry_run=True).replaced and not attached(m)
    fastops.patch(m)
    assert attached(m) and type(m) is nn.ReLU


def test_context_manager_leaves_the_model_as_found():
    m = nn.Sequential(nn.ReLU(), fastops.nn.GELU())
    with fastops.patched(m):
        assert attached(m[0])
    assert not attached(m[0]) and type(m[1]) is fastops.nn.GELU
    with pytest.raises(ZeroDivisionError), fastops.patched(m):
        raise ZeroDivisionError
    assert not attached(m[0])


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
        assert type(other[2]) is nn.ReLU
    assert attached(twin[2]) and not attached(loaded[2])


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
    # relus, and a relu of the model's own and two of each block's fused with batch norms
    assert len(fastops.patch(m).replaced) == 9 + 1 + 16
    # BatchNorm's running statistics moved, the batch's own did not: a training step is the same again
    ours, our_grads = run(fastops.functional.cross_entropy)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- add + relu


class Functional(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Nested(Block):
    def join(self, out, x):
        return torch.relu_(out.add_(x))

    def forward(self, x):
        return self.join(self.bn2(self.conv2(x)), x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(5, 5), nn.Linear(5, 5), nn.ReLU()

    def forward(self, x):
        y = self.act(torch.add(self.a(x), x))
        return (self.b(y) + y).relu()


def gradients(m, x):
    x = x.clone().requires_grad_()
    m.zero_grad()
    y = m(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in m.parameters() if p.grad is not None)]


def assert_same(m, twin, x):
    """Sums and relus are exact: what is fused changes no bit."""
    for a, b in zip(gradients(m, x), gradients(twin, x), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(m.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
BLOCKS = {
    "in place": (Block, X, 1),
    "relu not in place": (lambda: Block(inplace=False), X, 1),
    "downsample": (lambda: Block(downsample=True), X, 1),
    "functional": (Functional, X, 1),
    "method": (Nested, X, 1),
    "two joins": (Twice, X[0, 0, :, :5], 2),
}


@pytest.mark.parametrize("make, x, joins", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_join_is_one_kernel(make, x, joins, training, monkeypatch):
    m = make().train(training)
    twin = copy.deepcopy(m)
    before = repr(m), list(m.state_dict()), type(m), list(m.modules())
    report = fastops.patch(m)
    line = f"{type(m).__name__}: add + relu -> fastops.functional.add_relu: {joins}"
    assert line in str(report).splitlines()
    assert all("functional=True" in why for _, _, why in report.left)
    assert (repr(m), list(m.state_dict())) == before[:2] and isinstance(m, before[2])
    calls = []
    ours = fastops.functional.add_relu
    monkeypatch.setattr(
        fastops.functional, "add_relu", lambda *args: calls.append(args) or ours(*args)
    )
    m(x)
    twin(x)
    assert len(calls) == joins
    assert_same(m, twin, x)
    assert not fastops.patch(m).replaced
    report = fastops.unpatch(m)
    assert len([r for r in report.replaced if "add + relu" in r[2]]) == joins
    assert type(m) is before[2]
    assert all(a is b for a, b in zip(m.modules(), before[3], strict=True))
    calls.clear()
    m(x)
    assert not calls


class Apart(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def test_the_rewritten_forward_is_the_blocks_own_where_the_block_has_changed(monkeypatch):
    m = Apart(inplace=False)
    fastops.patch(m)
    joined, seen = [], []
    ours = fastops.functional.add_relu
    monkeypatch.setattr(
        fastops.functional, "add_relu", lambda *args: joined.append(1) or ours(*args)
    )

    def fused():
        joined.clear()
        m(X)
        return bool(joined)

    assert fused()
    for register in (
        m.relu.register_forward_hook,
        m.relu.register_forward_pre_hook,
        m.relu.register_full_backward_pre_hook,
        m.relu.register_full_backward_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ):
        handle = register(lambda *a: seen.append(a[0]))
        try:
            assert not fused(), register
        finally:
            handle.remove()
        assert fused()
    assert (
        seen.count(m.relu) == 4 * 2
    )  # forward hooks on a relu that runs twice, of its own and of all modules
    for name, other in (("relu", nn.GELU()), ("downsample", nn.Identity()), ("bn2", None)):
        kept = getattr(m, name)
        setattr(m, name, other)
        if other is None:
            with pytest.raises(TypeError):
                m(X)
        else:
            assert not fused()
        setattr(m, name, kept)
        assert fused()
    m.relu.inplace = True
    assert not fused()
    m.relu.inplace = False
    assert fused()


def test_hooks_of_a_block_and_its_submodules_run():
    m, seen = Block(), []
    for name, module in m.named_modules():
        if name != "relu":
            module.register_forward_hook(lambda mod, *_, name=name: seen.append(name))
    fastops.patch(m)
    m(X)
    assert seen == ["conv1", "bn1", "conv2", "bn2", ""]


class Training(Block):
    def forward(self, x):
        y = self.bn2(x) if self.training else x * 2
        return self.relu(y + x)


class DataDependent(Block):
    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return self.relu(self.bn2(x) + x)


class Foreign(Block):
    def forward(self, x):
        return self.relu(self.bn2(x) * random.random() + x)


class SumUsedTwice(Block):
    def forward(self, x):
        y = self.bn2(x) + x
        return self.relu(y) + y


class IntoItsInput(Block):
    def forward(self, x):
        x += self.bn2(x)
        return torch.relu(x)


class Optional(Block):
    def forward(self, x, skip=None):
        return self.relu(self.bn2(x) + x)


class Counting(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.relu(self.bn2(x) + x)


class Lists(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(1)
        return self.relu(self.bn2(x) + x)


class Within(Block):
    def forward(self, x):
        with torch.no_grad():
            y = self.bn2(x)
        return self.relu(y + x)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        return self.relu(self.bn2(x) + x)


class Super(Block):
    def forward(self, x):
        return self.relu(super().forward(x) + x)


class Noise(Block):
    def forward(self, x):
        return self.relu(self.bn2(x) + torch.rand(4, 6, 6))


class Inspecting(Block):
    def forward(self, x):
        return self.relu(x + x if isinstance(x, torch.Tensor) else x[0] + x[1])


class Through(Block):
    def forward(self, x):
        return self.relu(self.bn2.forward(x) + x)


class GradMode(Block):
    def forward(self, x):
        return self.relu(self.bn2(x) + x) if torch.is_grad_enabled() else x


class Given(Block):
    def forward(self, x):
        return self.relu(self.bn2(x) + (x if x is not None else 0))


REFUSED = {
    Training: "self.training",
    DataDependent: "torch.fx does not trace it",
    Foreign: "random.random",
    SumUsedTwice: "used elsewhere",
    IntoItsInput: "used elsewhere",
    Optional: "optional arguments",
    Counting: "assigns to self.calls|reads self.calls|Attribute|it assigns",
    Lists: "self.seen",
    Within: "With",
    Decorated: "decorated",
    Super: "super",
    Noise: "rand",
    Inspecting: "isinstance",
    Through: "self.bn2.forward",
    GradMode: "is_grad_enabled",
    Given: "depends on what it is given",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_what_cannot_be_shown_to_mean_the_same_is_left(cls):
    m = nn.Sequential(cls())
    state = {k: v.clone() for k, v in m.state_dict().items()}
    rng = torch.get_rng_state(), random.getstate()
    report = fastops.patch(m)
    assert not attached(m[0]) and attached(m[0].relu)
    left = next(found for found in report.left if "stay apart" in found[2])
    assert left[:2] == ("0", cls.__name__)
    assert any(word in left[2] for word in REFUSED[cls].split("|")), left[2]
    assert left[2] in str(report)
    # and looking has run nothing
    assert torch.equal(torch.get_rng_state(), rng[0]) and random.getstate() == rng[1]
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert not getattr(m[0], "calls", 0) and not getattr(m[0], "seen", [])


def test_forward_set_on_the_instance_is_left():
    m = Block()
    m.forward = lambda x: x
    assert "forward is set on the module itself" in str(fastops.patch(m))
    assert not attached(m)


def test_what_is_not_for_add_relu_is_torchs():
    m = Functional()
    m.conv1 = m.bn1 = m.conv2 = m.bn2 = nn.Identity()
    fastops.patch(m)
    x = torch.arange(-4, 4)
    assert torch.equal(m(x), torch.relu(torch.relu(x) + x)) and m(x).dtype == torch.int64
    sparse = x.float().to_sparse()
    assert torch.equal(m(sparse).to_dense(), Functional.forward(m, sparse).to_dense())
    for other in (torch.randn(3).to(torch.complex64), None):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            Functional.forward(m, other)
        with pytest.raises(theirs.type):
            m(other)
    y = torch.randn(2, 3).expand(2, 3)
    assert torch.equal(torch.func.vmap(m)(y), torch.relu(torch.relu(y) + y))


def test_shared_blocks_and_copies():
    block = Block()
    m = nn.Sequential(block, nn.Conv2d(4, 4, 1), block)
    report = fastops.patch(m)
    assert [r[0] for r in report.replaced] == ["0", "0.relu"] and m[0] is m[2]
    other = copy.deepcopy(m).eval()
    y = m.eval()(X)
    assert other[0] is other[2] and other[0] is not m[0] and attached(other[0])
    assert torch.equal(other(X), y)
    fastops.unpatch(other)
    assert not attached(other[0]) and torch.equal(other(X), y)
    twin = nn.Sequential(Block(), nn.Conv2d(4, 4, 1))
    twin[0].load_state_dict(m[0].state_dict())
    assert not attached(twin[0])


REGISTRY = []


def test_a_class_that_registers_its_subclasses_sees_none():
    class Registered(Block):
        def __init_subclass__(cls, *, key):
            REGISTRY.append(key)

    m = Registered()
    assert fastops.patch(m).replaced
    assert type(m) is Registered and not REGISTRY


def test_compile_export_trace_and_functional_call():
    m = nn.Sequential(Block(), Functional()).eval()
    y = m(X)
    fastops.patch(m, functional=True)
    compiled = torch.compile(m, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), y)
    exported = torch.export.export(m, (X,))
    assert exported.graph_module.code.count("fastops.add_relu") == 2
    torch.testing.assert_close(exported.module()(X), y)
    traced = torch.jit.trace(m, X)
    torch.testing.assert_close(traced(X), y)
    called = torch.func.functional_call(m, dict(m.named_parameters()), (X,))
    torch.testing.assert_close(called, y)
    graph = torch.fx.symbolic_trace(nn.Sequential(*m))
    torch.testing.assert_close(graph(X), y)


# ---------------------------------------------------------------------------------------------- functional=True


def helper(x):
    return F.softmax(x, dim=-1)


class Free(nn.Module):
    """What torch.fx does not follow."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.act = F.silu

    def forward(self, x, target=None):
        if x.sum() > 1e9:
            return x
        x = F.gelu(self.linear(x), approximate="tanh") + x.relu() + torch.sigmoid(x) + self.act(x)
        x = helper(x) + torch.softmax(x, 1) + x.log_softmax(dim=1) + F.hardtanh(x, -2.0, 2.0)
        x = F.dropout(x.clone().relu_(), 0.0, self.training)
        return x if target is None else F.cross_entropy(x, target, label_smoothing=0.1)


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        x = F.leaky_relu(self.linear(x), 0.2).tanh()
        return torch.log_softmax(F.softplus(x, beta=2.0) + F.relu(x, inplace=True), dim=-1)


def ops_of(m, *args):
    with Spy() as spy:
        m(*args)
    return [o.removesuffix(".default") for o in spy.ops]


OURS = ["gelu_tanh", "relu", "sigmoid", "silu", "softmax", "softmax", "log_softmax", "hardtanh"]


def test_functions_are_ours_in_this_model_only():
    m, other = Free(), Free()
    x = torch.randn(5, 6)
    target = torch.tensor([0, 1, 2, 3, 5])
    y, loss = m(x), m(x, target)
    keys = list(m.state_dict())
    assert not fastops.patch(m).replaced
    report = fastops.patch(m, functional=True)
    names = "cross_entropy dropout gelu hardtanh log_softmax relu sigmoid silu softmax".split()
    assert [r[1] for r in report.replaced] == [f"Free: {n}" for n in names]
    assert "TorchFunctionMode" not in str(report) and not attached(other)
    ran = ops_of(m, x)
    assert [o.removeprefix("fastops.") for o in ran if o.startswith("fastops.")] == [*OURS, "relu_"]
    assert any(o.startswith("fastops.cross_entropy") for o in ops_of(m, x, target))
    for model in (other, F.relu, lambda x: x.relu()):
        assert not any(o.startswith("fastops") for o in ops_of(model, x))
    torch.testing.assert_close(m(x), y)
    torch.testing.assert_close(m(x, target), loss)
    assert list(m.state_dict()) == keys
    assert inspect.signature(m.forward) == inspect.signature(other.forward)
    assert not fastops.patch(m, functional=True).replaced and not fastops.patch(m).replaced
    compiled = torch.compile(m, backend="eager")
    torch.testing.assert_close(compiled(x), y)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        torch.testing.assert_close(twin(x), y)
    with pytest.raises(RuntimeError):
        m(torch.randn(5, 7))
    assert not any(o.startswith("fastops") for o in ops_of(F.relu, x))  # also after an error
    fastops.unpatch(m)
    assert not attached(m) and not any(o.startswith("fastops") for o in ops_of(m, x))


def test_functions_of_a_forward_that_traces():
    m = Traced()
    x = torch.randn(5, 6)
    y = m(x)
    report = fastops.patch(m, functional=True)
    assert "TorchFunctionMode" not in str(report) and len(report.replaced) == 5
    ran = [o.removeprefix("fastops.") for o in ops_of(m, x) if o.startswith("fastops.")]
    assert ran == ["leaky_relu", "tanh", "softplus", "relu_", "log_softmax"]
    torch.testing.assert_close(m(x), y)
    torch.testing.assert_close(torch.compile(m, backend="eager", fullgraph=True)(x), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(m))(x), y)


def test_functional_leaves_what_the_kernels_do_not_take():
    class Ints(nn.Module):
        def forward(self, x, dtype=None):
            y = torch.relu(x)
            return F.softmax(y, 0, dtype=dtype) if dtype else y

    m = Ints()
    assert fastops.patch(m, functional=True).replaced
    x = torch.arange(-3, 3)
    assert torch.equal(m(x), torch.relu(x))
    torch.testing.assert_close(
        m(x, torch.float32), F.softmax(torch.relu(x), 0, dtype=torch.float32)
    )
    assert m(torch.randn(3, device="meta")).device.type == "meta"
    with pytest.raises(TypeError):
        m("text")


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Wrapped(Free):
    """What cannot be written anew."""

    forward = decorated(Free.forward)


def test_the_mode_is_the_threads_own():
    m, x, found = Wrapped(), torch.randn(4, 6), []
    assert "TorchFunctionMode" in str(fastops.patch(m, functional=True))
    inside, done = threading.Event(), threading.Event()

    def hook(*_):
        inside.set()
        done.wait(10)

    m.linear.register_forward_hook(hook)
    thread = threading.Thread(target=lambda: found.append(ops_of(m, x)))
    thread.start()
    assert inside.wait(10)
    ran = ops_of(torch.relu, x)
    done.set()
    thread.join()
    assert ran == ["aten.relu"] and any(o.startswith("fastops") for o in found[0])
    with pytest.raises(RuntimeError):
        m(torch.randn(4, 7))
    assert ops_of(torch.relu, x) == ["aten.relu"]  # also after an error


def test_a_model_within_a_model():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Free()

        def forward(self, x, flag=True):
            return F.relu(self.inner(x))

    m = Outer()
    fastops.patch(m.inner, functional=True)
    assert [r[1] for r in fastops.patch(m, functional=True).replaced] == ["Outer: relu"]
    assert [o for o in ops_of(m, torch.randn(2, 6)) if "gelu" in o] == ["fastops.gelu_tanh"]
    assert not fastops.patch(m, functional=True).replaced


# ---------------------------------------------------------------------------------------------- patched, dry_run


def test_patched_restores_what_was_patched_in_part_before():
    m = nn.Sequential(Block(), Functional(), nn.GELU(), Traced())
    fastops.patch(m[0])
    before = [attached(k) and attached(k).recipe for k in m.modules()]
    with fastops.patched(m, functional=True) as same:
        assert same is m
        assert attached(m[1]) and attached(m[2])
        with pytest.raises(KeyError), fastops.patched(m):
            raise KeyError
        assert attached(m[2]) and attached(m[3])
    assert [attached(k) and attached(k).recipe for k in m.modules()] == before
    with pytest.raises(TypeError, match="patched: expected a torch.nn.Module, got list"):
        fastops.patched([m])


def test_dry_run_says_the_same_and_changes_nothing():
    m = nn.Sequential(Block(), Functional(), Free(), Training())
    planned = fastops.patch(m, functional=True, dry_run=True)
    assert not any(attached(k) for k in m.modules())
    assert fastops.patch(m, functional=True) == planned and planned.replaced


def test_functional_after_plain_and_back():
    m = Functional()
    assert [r[1] for r in fastops.patch(m).replaced] == ["Functional: add + relu", "torch.nn.ReLU"]
    assert [r[1] for r in fastops.patch(m, functional=True).replaced] == ["Functional: relu"]
    assert not fastops.patch(m).replaced
    assert [o for o in ops_of(m, X) if o.startswith("fastops")] == ["fastops.relu", "fastops.add_relu"]  # fmt: skip
    fastops.unpatch(m)
    assert not attached(m)


@pytest.mark.parametrize("cls", list(fastops.nn.MODULES.values()), ids=lambda c: c.__name__)
def test_modules_are_torchs(cls):
    base = cls.__base__
    given = {"Softmax2d": {}, "Softmax": {"dim": 1}, "Softmin": {"dim": 1}, "ropout": {"p": 0.0}, "BatchNorm": {"num_features": 6}, "Norm": {"normalized_shape": 6}}  # fmt: skip
    args = next((a for word, a in given.items() if word in cls.__name__), {})
    ours, theirs = cls(**args), base(**args)
    assert repr(ours) == repr(theirs)
    x = torch.randn(3, 6)  # GLU needs two halves
    extra: tuple = ()
    if cls.__name__ in ("CrossEntropyLoss", "NLLLoss"):
        extra = (torch.tensor([1, 4, 0]),)
    elif "Loss" in cls.__name__:
        x, extra = x.sigmoid(), (torch.rand(3, 6),)
    elif "BatchNorm" in cls.__name__:
        x = torch.randn(2, 6, *[3] * int(cls.__name__[-2]))
    elif cls.__name__ == "Softmax2d":
        x = torch.randn(2, 3, 4, 5)
    elif cls.__name__ in ("Dropout2d", "Dropout3d"):
        x = torch.randn(2, 3, 4, 2, *[2] * (cls.__name__ == "Dropout3d"))
    torch.testing.assert_close(ours(x, *extra), theirs(x, *extra))


class LossMadeInForward(nn.Module):
    def forward(self, x, t):
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        return loss(x, t) + nn.MSELoss()(x, x * 2)


def chosen_loss(x, t):
    return F.cross_entropy(x, t)


class LossByProperty(nn.Module):
    @property
    def loss_function(self):
        return self.__dict__.get("_loss", chosen_loss)

    def forward(self, x, t):
        return self.loss_function(x, t)


@pytest.mark.parametrize("cls", [LossMadeInForward, LossByProperty])
def test_losses_made_or_chosen_in_a_forward(cls):
    """As in Hugging Face's models."""
    m, x, t = cls(), torch.randn(4, 6), torch.tensor([1, 5, 0, 2])
    expected = m(x, t)
    report = fastops.patch(m, functional=True)
    assert "cross_entropy" in str(report)
    with Spy() as spy:
        torch.testing.assert_close(m(x, t), expected)
    assert [o for o in spy.ops if o.startswith("fastops.cross_entropy")]
    if cls is LossByProperty:
        m._loss = lambda x, t: x.sum()
        assert m(x, t) == x.sum()
    fastops.unpatch(m)
    with Spy() as spy:
        m(x, t)
    assert not [o for o in spy.ops if o.startswith("fastops")]


class ChoosesAtFirst(nn.Module):
    """As Hugging Face's classifiers: what the loss is, is written down by the first forward."""

    def __init__(self):
        super().__init__()
        self.kind = None

    def forward(self, x, t):
        if self.kind is None:
            self.kind = "classes"
        if self.kind == "classes":
            return F.cross_entropy(x, t)
        return F.mse_loss(x, t)


def test_a_condition_on_what_the_forward_writes_is_not_decided_beforehand():
    m, x, t = ChoosesAtFirst(), torch.randn(4, 6), torch.tensor([1, 5, 0, 2])
    report = str(fastops.patch(m, functional=True))
    assert "ChoosesAtFirst: cross_entropy" in report and "ChoosesAtFirst: mse_loss" in report
    with Spy() as spy:
        m(x, t)
    assert [o for o in spy.ops if o.startswith("fastops.cross_entropy")]
