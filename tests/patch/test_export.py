"""Exported, traced and ONNX programs of patched models: they run, and can do without fastops."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops
from fastops._core.decompositions import decompositions

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu, self.gelu, self.softmax = nn.ReLU(), nn.GELU(), nn.Softmax(-1)
        self.drop, self.slope = nn.Dropout(0.3), nn.LeakyReLU(0.2)

    def forward(self, x):
        x = self.relu(self.a(x) + x)
        return self.softmax(self.drop(self.slope(self.gelu(self.b(x)))))


def targets(program):
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@pytest.fixture
def net():
    torch.manual_seed(0)
    m = Net().eval()
    fastops.patch(m)
    return m


def test_run_decompositions_gives_torchs_ops(net):
    program = torch.export.export(net, (X,))
    assert {"fastops.relu.default", "fastops.add_relu.default"} & targets(program)
    plain = program.run_decompositions()
    assert not [t for t in targets(plain) if "fastops" in t]
    torch.testing.assert_close(plain.module()(X), net(X))
    kept = torch.export.default_decompositions()
    del kept[torch.ops.fastops.gelu.default]
    assert [t for t in targets(program.run_decompositions(kept)) if "fastops" in t] == ["fastops.gelu.default"]  # fmt: skip


def test_a_decomposed_program_loads_without_fastops(net, tmp_path):
    plain = torch.export.export(net, (X,)).run_decompositions()
    torch.export.save(plain, tmp_path / "net.pt2")
    torch.save((X, net(X)), tmp_path / "values.pt")
    script = (
        "import sys, torch; p = torch.export.load(sys.argv[1]); x, y = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(p.module()(x), y); assert 'fastops' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "net.pt2", tmp_path / "values.pt"], check=True)  # fmt: skip


def test_a_traced_program_has_torchs_ops(net):
    traced = torch.jit.trace(net, X)
    assert "fastops" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), net(X))


class Loss(nn.Module):
    def __init__(self, name, kwargs):
        super().__init__()
        self.name, self.kwargs = name, kwargs

    def forward(self, x, t):
        return getattr(fastops.functional, self.name)(x, t, **self.kwargs)


INDICES, LOGITS = torch.tensor([0, 5, -100, 2]), X
LOSSES = [
    ("mse_loss", X.roll(1), {"reduction": "none"}),
    ("smooth_l1_loss", X.roll(1), {"beta": 0.3, "reduction": "sum"}),
    ("binary_cross_entropy_with_logits", X.sigmoid(), {"pos_weight": torch.full((6,), 2.0)}),
    ("cross_entropy", INDICES, {"label_smoothing": 0.1}),
    ("cross_entropy", X.softmax(1), {"reduction": "sum"}),
]


@pytest.mark.parametrize(
    "name, target, kwargs", LOSSES, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_decompose(name, target, kwargs, autocast):
    with torch.autocast("cpu", enabled=autocast):
        program = torch.export.export(Loss(name, kwargs), (LOGITS, target))
        plain = program.run_decompositions()
        expected = getattr(F, name)(LOGITS, target, **kwargs)
        assert any("fastops" in t for t in targets(program))
        assert not any("fastops" in t for t in targets(plain))
        result = plain.module()(LOGITS, target)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)


def test_every_forward_op_decomposes_to_what_it_computes():
    for op, decomposed in decompositions().items():
        name = op.name().removeprefix("fastops::")
        arguments = op._schema.arguments
        values = {
            "Tensor": lambda a: {"target": X.sigmoid(), "bias": X[0], "pos_weight": X[0].exp()}.get(
                a.name, X.sigmoid()
            ),
            "int": lambda a: 1,
            "bool": lambda a: False,
        }
        given = []
        for a in arguments:
            if a.has_default_value() and a.name != "pos_weight":
                break
            given.append(values[str(a.type)](a))
        torch.testing.assert_close(decomposed(*given), op(*given), msg=name)


@pytest.mark.integration("onnxscript")
def test_onnx(net):
    program = torch.onnx.export(net, (X,), dynamo=True)
    assert not [n for n in program.model.graph if n.domain == "fastops"]
