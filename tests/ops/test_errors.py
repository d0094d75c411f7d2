"""In-place ops and derivatives: what torch allows, and what it refuses. Bad input is in test_bad_inputs.py."""

import re

import pytest
import torch
from torch.func import grad, jvp

import fastops
from fastops._core.registry import OPS, overload

pytestmark = pytest.mark.quick

F = fastops.functional


def test_third_derivative_is_refused_not_wrong():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(F.gelu(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="derivative for fastops::gelu_second is not implemented"
    ):
        h.sum().backward()


THIRD = sorted(name for name, op in OPS.items() if op.kind != "dropout")


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
    x = torch.tensor([0.3, 0.7, 0.2, 0.6], dtype=torch.float64)
    second = x.flip(0) ** 2
    function, reference = OPS[name].function, OPS[name].exact
    options = {"dim": 0} if "softmax" in name else {}
    args = {"elementwise": (), "loss": (second,), "fused": (second,)}.get(OPS[name].kind, ())
    if name == "cross_entropy":
        args = (second / second.sum(),)
    size = 2 if OPS[name].kind == "gate" else 4  # of the result of a gate, which halves its input
    # ^ 2 and the product: nothing linear is left
    ours, theirs = (
        list(third_derivatives(lambda x, f=f: f(x, *args, **options) ** 2 * x[:size], x))
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
