"""What a tool sees of a patched model is what it saw before: types, torch.fx's graphs, hooks, copies, pickles, the compiler,
torch.ao, the fast paths of torch.nn."""

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastops


class Spy(TorchDispatchMode):
    """The ops that run."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def ours(m, *args):
    """Which of our ops a model runs."""
    with Spy() as spy:
        m(*args)
    return [o.removeprefix("fastops.") for o in spy.ops if o.startswith("fastops.")]


class Block(nn.Module):
    """torchvision's BasicBlock, with a dropout, and where nothing is said with norms that fastops leaves to torch."""

    def __init__(self, norm=lambda: nn.GroupNorm(2, 4)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), norm()
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x):
        out = self.drop(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(out)) + x)


class Attention(nn.Module):
    """What torch.fx does not follow: a loop over an attribute, functions, methods, a helper."""

    def __init__(self, p=0.0):
        super().__init__()
        self.linear, self.p, self.act = nn.Linear(6, 6), p, F.silu

    def scores(self, x):
        return F.softmax(self.linear(x), dim=-1)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x + mask
        for _ in range(2 if x.shape[0] > 1 else 1):
            x = self.act(x).relu()
        if self.p > 0:
            x = F.dropout(x, self.p, self.training)
        return helper(self.scores(x))


def helper(x):
    return F.gelu(x, approximate="tanh") if x.dim() else x


def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Flatten(2), nn.LazyLinear(6), nn.GELU(), Attention(), nn.Softmax(-1))  # fmt: skip


X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair():
    """A model, and its twin that is patched."""
    m = model().eval()
    m(X)
    twin = copy.deepcopy(m)
    fastops.patch(twin, functional=True)
    assert {"relu", "add_relu", "gelu", "gelu_tanh", "silu", "softmax"} <= set(ours(twin, X))
    return m, twin


def test_classes_and_attributes_are_what_they_were(pair):
    m, twin = pair
    assert [type(k) for k in m.modules()] == [type(k) for k in twin.modules()]
    assert repr(m) == repr(twin)
    assert list(m.state_dict()) == list(twin.state_dict())
    for a, b in zip(m.modules(), twin.modules(), strict=True):
        assert inspect.signature(a.forward) == inspect.signature(b.forward)
        assert inspect.getsource(a.forward) == inspect.getsource(b.forward)
    torch.testing.assert_close(m(X), twin(X))
    fastops.unpatch(twin)
    assert [vars(k).keys() for k in m.modules()] == [vars(k).keys() for k in twin.modules()]
    assert not ours(twin, X)


def test_a_trace_is_what_it_was(pair):
    m, twin = pair
    for part in (0, 3, 5):
        graphs = [fx.symbolic_trace(nn.Sequential(k[part])).graph for k in pair]
        assert str(graphs[0]) == str(graphs[1])
    assert "call_module" in str(graphs[0])
    wrapped = nn.Sequential(nn.Sequential(twin[0]))
    names = [n.name for n in fx.symbolic_trace(wrapped).graph.nodes]
    assert "_0_0_relu" in names and "_0_0_relu_1" in names


def test_a_traced_dropout_obeys_train_and_eval():
    """A trace once froze the flag: dropout in eval, or never."""
    for training in (True, False):
        m = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5))
        m.train(training)
        fastops.patch(m)
        traced = fx.symbolic_trace(m)
        x = torch.ones(4, 8, 5, 5)
        assert torch.equal(traced.eval()(x), x)
        assert not torch.equal(traced.train()(x), x)
        assert "dropout" in ours(traced, x)


@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d", "alpha_dropout"])
def test_functions_made_of_others_are_one_function_to_torch_fx(name):
    function = getattr(fastops.functional, name)

    class M(nn.Module):
        def forward(self, x):
            return function(x, 0.5, training=self.training) + 1

    graph = fx.symbolic_trace(M()).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"][0] is function
    x = torch.ones(2, 3, 4, *[5] * ("3d" in name))
    assert fx.symbolic_trace(M())(x).shape == x.shape

    class Sub(torch.Tensor):
        seen = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    result = function(x.as_subclass(Sub), 0.5)
    assert Sub.seen[0] is function and type(result) is Sub


def test_hooks_run(pair):
    seen = []
    for name, module in pair[1].named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: seen.append(name))
        module.register_forward_hook(lambda m, a, y, name=name: seen.append(name))
    pair[1](X)
    again = list(seen)
    seen.clear()
    for name, module in pair[0].named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: seen.append(name))
        module.register_forward_hook(lambda m, a, y, name=name: seen.append(name))
    pair[0](X)
    assert seen == again


def test_a_deep_copy_is_patched_and_stands_alone(pair):
    twin = copy.deepcopy(pair[1])
    assert ours(twin, X) == ours(pair[1], X)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(twin(X), pair[1](X))
    fastops.unpatch(twin)
    assert not ours(twin, X) and ours(pair[1], X)
    shared = nn.ReLU()
    m = nn.Sequential(shared, nn.Flatten(), shared)
    fastops.patch(m)
    twin = copy.deepcopy(m)
    assert twin[0] is twin[2] and twin[0] is not m[0] and ours(twin, X) == ["relu", "relu"]


def test_a_shallow_copy_runs_its_own_submodules(pair):
    block = pair[1][0]
    twin = copy.copy(block)
    twin._modules = dict(block._modules, conv1=nn.Conv2d(4, 4, 3, padding=1))
    expected = copy.copy(pair[0][0])
    expected._modules = dict(twin._modules)
    assert torch.equal(twin(X), expected(X)) and not torch.equal(twin(X), block(X))


def test_a_replica_runs_its_own_submodules(pair):
    block = pair[1][0]
    replica = block._replicate_for_data_parallel()
    assert replica._modules is not block._modules
    replica._modules["conv1"] = nn.Conv2d(4, 4, 3, padding=1)
    assert type(replica) is Block and "add_relu" in ours(replica, X)
    assert not torch.equal(replica(X), block(X))


def test_a_pickle_is_torchs_and_loads_without_fastops(tmp_path):
    m = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.3)).eval()
    x = torch.randn(2, 3)
    y = m(x)
    before = pickle.dumps(m)
    fastops.patch(m)
    assert pickle.dumps(m) == before
    torch.save({"model": m, "x": x, "y": y}, tmp_path / "m.pt")
    script = (
        "import sys, torch; kept = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(kept['model'](kept['x']), kept['y']) and 'fastops' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "m.pt"], check=True)
    loaded = pickle.loads(before)
    assert fastops.patch(loaded).replaced and ours(loaded, x) == ["relu"]
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    known = [nn.Sequential, nn.Linear, nn.ReLU, nn.Dropout]
    with torch.serialization.safe_globals(known):
        assert torch.equal(torch.load(buffer, weights_only=True)(x), y)


def test_a_class_with_a_getstate_or_deepcopy_of_its_own():
    class Own(nn.Module):
        def forward(self, x):
            return F.relu(x + 1)

        def __getstate__(self):
            return {**self.__dict__, "kept": 1}

    class Copied(Own):
        def __deepcopy__(self, memo):
            twin = type(self)()
            twin.__dict__.update(self.__dict__)
            return twin

    for cls in (Own, Copied):
        m = cls()
        fastops.patch(m, functional=True)
        assert m.__getstate__()["kept"] == 1 and "forward" not in m.__getstate__()
        twin = copy.deepcopy(m)
        del m
        gc.collect()
        assert type(twin) is cls and ours(twin, X) == ["relu"]


def test_a_patched_model_is_freed_at_once(pair):
    gc.disable()
    try:
        m = copy.deepcopy(pair[1])
        block, attention = weakref.ref(m[0]), weakref.ref(m[4])
        del m
        assert block() is None and attention() is None
    finally:
        gc.enable()


def test_the_compiler_export_and_jit(pair):
    m, twin = pair
    y = m(X)
    torch.testing.assert_close(torch.compile(twin, backend="eager", fullgraph=True)(X), y)
    for strict in (False, True):
        exported = torch.export.export(twin, (X,), strict=strict)
        torch.testing.assert_close(exported.module()(X), y)
    torch.testing.assert_close(torch.jit.trace(twin, X)(X), y)
    for part in (0, 3, 5):
        scripted = torch.jit.script(twin[part])
        assert "fastops" not in str(scripted.code)
    called = torch.func.functional_call(twin, dict(twin.named_parameters()), (X,))
    torch.testing.assert_close(called, y)


def test_fuse_modules_and_prepare_fx_find_their_patterns():
    from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping, quantize_fx

    def net():
        block = Block(lambda: nn.BatchNorm2d(4))
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), block).eval()

    m, twin = net(), net()
    fastops.patch(twin, functional=True)
    fused = [fuse_modules(k, [["0", "1"], ["2.conv1", "2.bn1", "2.relu"]]) for k in (m, twin)]
    assert [type(a) for a in fused[0].modules()] == [type(a) for a in fused[1].modules()]
    assert type(fused[1][0]) is torch.ao.nn.intrinsic.ConvReLU2d
    fused[1].load_state_dict(fused[0].state_dict())
    torch.testing.assert_close(fused[1](X), fused[0](X))
    mapping = get_default_qconfig_mapping("x86")
    prepared = [quantize_fx.prepare_fx(k, mapping, (X,)) for k in (net(), twin)]
    assert prepared[0].code == prepared[1].code


def encoder(**kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("activation", [F.relu, nn.GELU()], ids=["function", "module"])
def test_the_fast_path_of_a_transformer_stays(activation):
    x = torch.randn(2, 5, 8)
    m = encoder(activation=activation)
    report = fastops.patch(m, functional=True)
    with torch.no_grad(), Spy() as spy:
        m(x)
    assert spy.ops == ["aten._transformer_encoder_layer_fwd"] * 2
    if activation is F.relu:
        assert "`module.activation = fastops.functional.relu` replaces it" in str(report)
        m.layers[0].activation = fastops.functional.relu
        assert "relu" in ours(m.train(), x)
        with torch.no_grad(), Spy() as spy:
            m.eval()(x)
        assert spy.ops == ["aten._transformer_encoder_layer_fwd"] * 2


def test_feature_extractors_return_what_they_returned():
    torchvision = pytest.importorskip(
        "torchvision", reason="torchvision does not import beside this torch"
    )
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    torch.manual_seed(0)
    m = torchvision.models.resnet18(num_classes=3).eval()
    twin = copy.deepcopy(m)
    fastops.patch(twin, functional=True)
    assert get_graph_node_names(m) == get_graph_node_names(twin)
    x = torch.randn(1, 3, 64, 64)
    nodes = ["layer1.0.relu", "layer1.0.relu_1", "layer2.1.add", "relu"]
    features = [create_feature_extractor(k, nodes)(x) for k in (m, twin)]
    for node in nodes:
        torch.testing.assert_close(features[0][node], features[1][node])


def test_attributions_by_hooks_on_types():
    """What captum's DeepLift does: rules by the class of a module, and hooks that have to run."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 1), nn.ReLU()

        def forward(self, x):
            return self.b(self.relu(self.a(x) + x))

    m = Net()
    fastops.patch(m)
    assert "add_relu" in ours(m, X[0, 0].new_ones(2, 4))
    rules = {nn.ReLU: "rescale"}
    hooked = [k for k in m.modules() if rules.get(type(k))]
    assert hooked == [m.relu]
    seen = []
    m.relu.register_forward_hook(lambda *a: seen.append(1))
    m(torch.ones(2, 4))
    assert seen == [1]


def test_what_others_put_around_a_forward_stays_and_runs_torchs():
    """accelerate and others keep the forward that they find, and set their own."""
    m = nn.Sequential(nn.ReLU())
    fastops.patch(m)
    before, calls = m[0].forward, []

    def around(x):
        calls.append(1)
        return before(x)

    m[0].forward = around
    assert ours(m, X) == ["relu"] and calls
    report = fastops.unpatch(m)
    assert "a forward was set on the module since" in str(report)
    assert m[0].forward is around and not ours(m, X)
    assert "`del module.forward` and patch again" in str(fastops.patch(m))
    del m[0].forward
    assert fastops.patch(m).replaced and ours(m, X) == ["relu"]
