"""Bad input: the exception type that torch raises, a message that says what was given, and nothing changed. In-place
ops: what torch allows, and what it refuses."""

import re

import pytest
import torch
from torch.func import grad, jvp

import fastops
from fastops._op import OPS, overload

F, N = fastops.functional, fastops.nn
X = torch.randn(4, 6)
T = torch.tensor([0, 5, 2, 1])

BAD = [
    ("op int", lambda: overload("relu")(torch.ones(3, dtype=torch.int64)), NotImplementedError, "'Long': give it"),
    ("op sparse", lambda: overload("relu")(X.to_sparse()), NotImplementedError, "SparseCPU"),
    ("relu complex", lambda: F.relu(torch.ones(3, dtype=torch.complex64)), NotImplementedError, "complex"),
    ("elu int", lambda: F.elu(torch.ones(3, dtype=torch.int64)), NotImplementedError, "'Long'"),
    ("gelu bool", lambda: F.gelu(torch.ones(3, dtype=torch.bool)), NotImplementedError, "'Bool'"),
    ("gelu approximate", lambda: F.gelu(X, approximate="erf"), RuntimeError, "none or tanh, got 'erf'"),
    ("softmax int", lambda: F.softmax(torch.ones(3, dtype=torch.int32), 0), NotImplementedError, "'Int'"),
    ("softmax dim", lambda: F.softmax(X, 2), IndexError, "Dimension out of range"),
    ("log_softmax dim", lambda: F.log_softmax(X, -3), IndexError, "Dimension out of range"),
    ("mse reduction", lambda: F.mse_loss(X, X, reduction="avg"), ValueError, "avg is not a valid value"),
    ("mse shapes", lambda: F.mse_loss(X, torch.randn(5, 5)), RuntimeError, "must match the size"),
    ("mse weight", lambda: F.mse_loss(X, X, weight=torch.ones(3)), ValueError, "must have the same size"),
    ("mse int", lambda: F.mse_loss(X.long(), X.long()), NotImplementedError, "'Long'"),
    ("dropout p", lambda: F.dropout(X, 1.5), ValueError, "between 0 and 1, but got 1.5"),
    ("dropout p negative", lambda: F.dropout(X, -0.1), ValueError, "but got -0.1"),
    ("dropout nan", lambda: F.dropout(X, float("nan")), ValueError, "but got nan"),
    ("Dropout p", lambda: N.Dropout(1.5), ValueError, "but got 1.5"),
    ("dropout int", lambda: F.dropout(torch.ones(3, dtype=torch.int64)), RuntimeError, "can't be cast .* Long"),
    ("dropout sparse with a generator", lambda: F.dropout(X.to_sparse(), generator=torch.Generator()),
     NotImplementedError, "SparseCPU"),
    ("relu_dropout int", lambda: F.relu_dropout(torch.ones(3, dtype=torch.int64)), NotImplementedError, "'Long'"),
    ("dropout seed", lambda: overload("dropout")(X, 0.5, torch.ones(2)), RuntimeError, "seed must be one int64"),
    ("ce range", lambda: F.cross_entropy(X, torch.tensor([0, 1, 6, 2])), IndexError,
     r"target 6 at row 2 is out of range for 6 classes \(ignore_index=-100\)"),
    ("ce negative", lambda: F.cross_entropy(X, torch.tensor([0, -1, 2, 2])), IndexError, "target -1 at row 1"),
    ("ce batch", lambda: F.cross_entropy(X, T[:3]), ValueError, r"batch_size \(4\) to match target batch_size \(3\)"),
    ("ce target dims", lambda: F.cross_entropy(X, torch.zeros(4, 6, dtype=torch.int64)), RuntimeError, "target of size"),
    ("ce target dtype", lambda: F.cross_entropy(X, T.int()), RuntimeError, "int64 or uint8, got Int"),
    ("ce weight size", lambda: F.cross_entropy(X, T, weight=torch.ones(5)), RuntimeError, "all 6 classes"),
    ("ce smoothing", lambda: F.cross_entropy(X, T, label_smoothing=1.5), RuntimeError, "between 0.0 and 1.0"),
    ("ce reduction", lambda: F.cross_entropy(X, T, reduction="avg"), ValueError, "avg is not a valid value"),
    ("ce 0-d", lambda: F.cross_entropy(torch.tensor(1.0), torch.tensor(0)), ValueError, "1 or more dimensions"),
    ("ce int logits", lambda: F.cross_entropy(X.long(), T), NotImplementedError, "'Long'"),
    ("ce no classes", lambda: F.cross_entropy(torch.randn(2, 0), torch.zeros(2, dtype=torch.int64)),
     RuntimeError, "no classes"),
    ("op reduction", lambda: overload("mse_loss")(X, X, 7), ValueError, "reduction 7"),
    ("op backward shapes", lambda: overload("relu_backward")(X, X[:2]), RuntimeError, "one shape"),
    ("patch", lambda: fastops.patch("model"), TypeError, "torch.nn.Module, got str"),
    ("pool limit", lambda: fastops.memory.set_limit(-1), ValueError, "got -1"),
    ("relu list", lambda: F.relu([1.0]), TypeError, ""),
]  # fmt: skip


@pytest.mark.parametrize("name, call, kind, message", BAD, ids=[b[0] for b in BAD])
def test_bad_input(name, call, kind, message):
    before = X.clone()
    with pytest.raises(kind, match=message):
        call()
    assert torch.equal(X, before)


def test_no_grad_to_class_weights():
    with pytest.raises(NotImplementedError, match="gradient to weight"):
        F.cross_entropy(
            X.clone().requires_grad_(), T, weight=torch.ones(6, requires_grad=True)
        ).backward()


def test_third_derivative_is_refused_not_wrong():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(F.gelu(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="derivative for fastops::gelu_second is not implemented"
    ):
        h.sum().backward()


THIRD = sorted(name for name, op in OPS.items() if op.kind != "random")


def third_derivatives(function, x):
    """By three reverse passes, by torch.func, and by forward mode over two; each a result, or the exception."""

    def reverse():
        g = function(x.requires_grad_())
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        return g.detach()

    def nested(f):
        return lambda x: grad(lambda v: f(v).sum())(x)

    def forward():
        f = nested(nested(function))
        return jvp(f, (x.detach(),), (torch.ones_like(x),))[1]

    for call in (reverse, lambda: nested(nested(nested(function)))(x.detach()), forward):
        try:
            yield call()
        except (RuntimeError, NotImplementedError) as error:
            yield error


@pytest.mark.parametrize("name", THIRD)
def test_third_derivatives_are_right_or_refused(name):
    """Never silently 0."""
    x = torch.tensor([0.3, 0.7, 0.2], dtype=torch.float64)
    second = x.flip(0) ** 2
    function, reference = OPS[name].function, OPS[name].exact
    options = {"dim": 0} if "softmax" in name else {}
    args = {"map": (), "reduce": (second,), "fused": (second,)}.get(OPS[name].kind, ())
    if name == "cross_entropy":
        args = (second / second.sum(),)
    # ^ 2 and the sum: nothing linear is left
    ours, theirs = (
        list(third_derivatives(lambda x, f=f: f(x, *args, **options) ** 2 * x, x))
        for f in (function, reference)
    )
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, Exception):
            assert re.search("not implemented|does not require grad", str(mine)), mine
        else:
            torch.testing.assert_close(mine, other)


# ------------------------------------------------------------------------------------------ in place


def test_inplace_is_in_place():
    x = torch.randn(40)
    pointer, version, expected = x.data_ptr(), x._version, torch.relu(x)
    y = F.relu(x, inplace=True)
    assert y is x and x.data_ptr() == pointer and x._version == version + 1
    assert torch.equal(x, expected)


@pytest.mark.parametrize("name", ["relu_", "gelu_", "gelu_tanh_"])
def test_inplace_gradient(name):
    """Ops that take their input back for the gradient keep a copy of it; the result is the same."""
    call, plain = overload(name), overload(name[:-1])
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)

    def f(x):
        y = x * 1
        call(y)
        return y

    assert torch.autograd.gradcheck(f, x)
    torch.testing.assert_close(f(x), plain(x))


def test_inplace_on_leaf_is_refused():
    x = torch.randn(4, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        F.relu(x, inplace=True)
    assert torch.equal(x, before)
    with torch.no_grad():
        F.relu(x, inplace=True)


def test_inplace_on_views():
    base = torch.randn(6, 8)
    expected = base.clone()
    expected[:, ::2] = expected[:, ::2].relu()
    F.relu(base[:, ::2], inplace=True)
    assert torch.equal(base, expected)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def f(x):
        y = x * 1
        F.relu(y[:, ::2], inplace=True)
        return y

    assert torch.autograd.gradcheck(f, x)
    with pytest.raises(RuntimeError, match="more than one element|single memory location"):
        F.relu(torch.randn(3, 1).expand(3, 4), inplace=True)


def test_inplace_invalidates_what_was_saved():
    x = torch.randn(5, requires_grad=True)
    y = (x * 1).exp()
    F.relu(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode():
    with torch.inference_mode():
        x = torch.randn(5)
        assert torch.equal(F.relu(x), x.relu())
        F.relu(x, inplace=True)
        assert (x >= 0).all()
