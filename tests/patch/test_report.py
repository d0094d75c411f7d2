"""patch's report: nothing that fastops has a counterpart for is passed over in silence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    def forward(self, x):
        return F.relu(x).tanh()


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.prelu, self.glu, self.relu = nn.PReLU(), nn.GLU(), nn.ReLU()

    def forward(self, x):
        return self.relu(self.glu(self.prelu(x)))


def reasons(report):
    return {name: why for name, _, why in report.left}


def test_calls_that_need_functional_are_named():
    report = fastops.patch(nn.Sequential(Calls()))
    assert not report.replaced
    assert "calls relu, tanh; patch(model, functional=True) replaces" in reasons(report)["0"]
    assert "functional=True" in str(report)


def test_activations_without_a_counterpart_are_named():
    report = fastops.patch(Parts())
    left = reasons(report)
    for name, cls in (("prelu", nn.PReLU), ("glu", nn.GLU)):
        if cls not in fastops.nn.MODULES:
            assert "no counterpart" in left[name]
    assert [r[0] for r in report.replaced if r[0] == "relu"] == ["relu"]


def test_the_activation_of_a_transformer_layer_is_named():
    for cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        layer = cls(8, 2, 16)
        for functional in (False, True):
            left = reasons(fastops.patch(layer, functional=functional, dry_run=True))
            assert "module.activation = fastops.functional.relu" in left[""]


def test_a_forward_on_the_instance_is_named_and_kept():
    m = Parts()
    m.relu.forward = lambda x: x * 2
    report = fastops.patch(m)
    assert "relu" not in [r[0] for r in report.replaced]
    assert "`del module.forward`" in reasons(report)["relu"]
    assert torch.equal(m.relu(X), X * 2)
    m = Calls()
    m.forward = lambda x: x
    for functional in (False, True):
        assert "`del module.forward`" in reasons(fastops.patch(m, functional=functional))[""]


def test_modules_made_by_others_are_named():
    for make in (torch.jit.script, torch.fx.symbolic_trace):
        m = make(nn.Sequential(nn.ReLU(), nn.GELU()))
        assert torch.equal(m(X), nn.Sequential(nn.ReLU(), nn.GELU())(X))
        fastops.patch(m, functional=True)
        torch.testing.assert_close(m(X), nn.Sequential(nn.ReLU(), nn.GELU())(X))


# ---------------------------------------------------------------------------------------------- functional=True


def has_mode(m):
    """Whether a forward runs within a mode."""
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(bool(torch.overrides._get_current_function_mode_stack()))
            return x

    for name, child in list(m._modules.items()):
        m._modules[name] = nn.Sequential(Look(), child)
    m(X)
    return any(seen)


class Dead(nn.Module):
    """densenet's layer: a dropout that never runs, behind a false attribute."""

    def __init__(self):
        super().__init__()
        self.drop_rate, self.checkpointed, self.linear = 0.0, False, nn.Linear(6, 6)

    def forward(self, *inputs):
        x = self.linear(*inputs)
        if self.checkpointed and self.training:
            x = F.relu(x)
        if self.drop_rate > 0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x


def test_calls_that_cannot_run_cost_nothing():
    m = Dead()
    report = fastops.patch(m, functional=True)
    assert not report.replaced and "forward" not in vars(m)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, n=2):
        for _ in range(n):
            x = F.silu(self.linear(x))
        while x.sum() > 1e9:
            x = x.tanh()
        return [t.relu() for t in (x,)][0]


def test_calls_are_replaced_without_a_mode():
    m = Loop()
    y = m(X)
    report = fastops.patch(m, functional=True)
    assert "TorchFunctionMode" not in str(report)
    assert [r[2] for r in report.replaced] == [f"fastops.functional.{n}" for n in ("relu", "silu", "tanh")]  # fmt: skip
    torch.testing.assert_close(m(X), y)
    torch.testing.assert_close(m(X, n=1), Loop.forward(m, X, 1))
    assert not has_mode(m)


def with_defaults(x, y=1.0, *rest: "int", scale: float = 2.0, **named) -> torch.Tensor:
    return torch.relu(x) * scale + y


def turns(x, n):
    """It calls itself."""
    return F.silu(x) if n == 0 else turns(x, n - 1)


class Helped(nn.Module):
    def forward(self, x):
        return with_defaults(x) + with_defaults(x, 3.0, scale=0.5) + turns(x, 2)


def test_helpers_keep_their_defaults_and_may_call_themselves():
    for m in (Helped(), Helped()):
        y = m(X)
        assert len(fastops.patch(m, functional=True).replaced) == 2
        torch.testing.assert_close(m(X), y)


def decorated(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    wrapper.__wrapped__ = function
    return wrapper


class Decorated(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.linear, self.inner = nn.Linear(6, 6), inner or nn.Identity()

    @decorated
    def forward(self, x):
        return self.inner(F.relu(self.linear(x)))


def test_one_mode_at_the_root_for_what_cannot_be_written_anew():
    m = nn.Sequential(nn.Sequential(Decorated(Decorated())), nn.Linear(6, 6))
    y = m(X)
    report = fastops.patch(m, functional=True)
    assert str(report).count("by one TorchFunctionMode around the model") == 1
    assert [k for k in m.modules() if "forward" in vars(k)] == [m]
    torch.testing.assert_close(m(X), y)
    assert not fastops.patch(m, functional=True).replaced
    assert has_mode(m)
    fastops.unpatch(m)
    assert "forward" not in vars(m)


def test_no_mode_where_it_costs_a_fast_path():
    m = nn.Sequential(Decorated(), nn.TransformerEncoderLayer(6, 2, 8))
    report = fastops.patch(m, functional=True)
    assert "fast path" in reasons(report)["0"] and "forward" not in vars(m)


def test_globals_closures_defaults_and_lines_stay(monkeypatch):
    m = Uses()
    fastops.patch(m, functional=True)
    y = torch.relu(X) * 3 + OFFSET
    assert torch.equal(m(X), y)
    monkeypatch.setitem(globals(), "OFFSET", 5.0)
    assert torch.equal(m(X), y + 4.0)
    with pytest.raises(ValueError) as caught:
        m(X, fail=True)
    line = caught.traceback[-1].lineno
    assert "raise ValueError" in str(caught.traceback[-1].statement) and line > 0


OFFSET = 1.0


class Base(nn.Module):
    def forward(self, x, *, scale=3):
        return x * scale


class Uses(Base):
    def forward(self, x, *, fail=False):
        """A docstring."""
        x = super().forward(F.relu(x))
        if fail:
            raise ValueError("here")
        return x + OFFSET
