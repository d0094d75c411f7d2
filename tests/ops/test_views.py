"""In place on a view: what autograd makes of the view, of its base, and of its sisters. `linear` of three dimensions
returns a view, so that a ReLU(inplace=True) after it is one of these."""

import inspect

import pytest
import torch
from cases import kept
from torch import nn

import fastops
from fastops._core.registry import OPS

VIEWS = {
    "whole": lambda b: b.view(6, 4),
    "part": lambda b: b[1:3],
    "columns": lambda b: b[:, 1:],
    "transposed": lambda b: b.t(),
    "row": lambda b: b.select(0, 2),
    "of a view": lambda b: b.view(2, 3, 4)[1].unsqueeze(0),
    "strided": lambda b: b.as_strided((3, 2), (8, 1), 1),
}
INPLACE = [
    name
    for name, op in OPS.items()
    if "inplace" in op.signature.parameters and op.kind == "elementwise"
]


def gradients(function, view, read):
    """The gradient to what the base is made of, and the values, after `function` has overwritten a view of it; the result
    is read through the view, through the base, through another view, and through all of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    base = x * 1.5
    v = VIEWS[view](base)
    sister = base.flatten()
    out = function(v)
    assert out is v
    w = torch.randn(base.shape, dtype=torch.float64, generator=generator)
    through = {
        "view": lambda: (v * VIEWS[view](w)).sum(),
        "result": lambda: (out**2).sum(),
        "base": lambda: (base * w).sum(),
        "sister": lambda: (sister * w.flatten()).sum(),
    }
    through["all"] = lambda: sum(f() for name, f in through.items() if name != "all")
    through[read]().backward()
    return base.detach(), x.grad


@pytest.mark.parametrize("read", ["view", "result", "base", "sister", "all"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", INPLACE)
def test_gradients_are_torchs(name, view, read):
    op = OPS[name]
    ours, theirs = (
        gradients(lambda v, f=f: f(v, inplace=True), view, read)
        for f in (op.function, op.reference)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("read", ["view", "result", "base", "sister", "all"])
@pytest.mark.parametrize("view", VIEWS)
def test_gradients_of_a_sum_in_place(view, read):
    torch.manual_seed(1)
    other = torch.randn(6, 4, dtype=torch.float64)
    ours = gradients(
        lambda v: fastops.functional.add_relu(v, VIEWS[view](other), inplace=True), view, read
    )
    theirs = gradients(lambda v: v.add_(VIEWS[view](other)).relu_(), view, read)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("read", ["view", "result", "base", "sister", "all"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["dropout", "relu_dropout"])
def test_gradients_of_dropout_in_place(name, view, read):
    function = OPS[name].function

    def ours(v):
        torch.manual_seed(3)
        return function(v, p=0.4, inplace=True)

    def theirs(v):
        torch.manual_seed(3)
        mask = fastops.functional.dropout(torch.ones_like(v), 0.4)
        return v.mul_(mask * (v.detach() > 0) if name == "relu_dropout" else mask)

    torch.testing.assert_close(gradients(ours, view, read), gradients(theirs, view, read))


def test_every_in_place_argument_is_tested():
    named = {n for n, op in OPS.items() if "inplace" in inspect.signature(op.function).parameters}
    assert named == {*INPLACE, "add_relu", "dropout", "relu_dropout"}


@pytest.mark.parametrize("module", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.ELU])
def test_in_place_after_a_linear_layer(module):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 5), module(inplace=True), nn.Linear(5, 2))
    x = torch.randn(2, 7, 3)
    plain(x).sum().backward()
    expected = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    fastops.patch(plain)
    plain(x).sum().backward()
    for p, e in zip(plain.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def one_call(op, lazy):
    """The result and the gradients of a call; the tensor number `lazy`, the last of which flows back, is a view whose
    negation is left to be done."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "input": (4, 6),
        "gate": (4, 6),
        "target": (4, 6),
        "other": (4, 6),
        "residual": (4, 6),
        "bias": (6,),
    }
    names = [n for n in op.signature.parameters if n in shapes]
    tensors = [torch.rand(shapes[n], dtype=torch.float64, generator=g) - 0.5 for n in names]
    if "target" in names:
        tensors = [t.softmax(-1) for t in tensors]
    tensors.append(None)
    options = {"dim": 1} if "dim" in op.signature.parameters else {}
    if op.kind == "dropout":
        options["generator"] = g
    if "target" in names:
        options["reduction"] = "none"

    def made(k, t):
        return torch._neg_view(-t) if k == lazy else t

    leaves = [made(k, t).detach().requires_grad_() for k, t in enumerate(tensors[:-1])]
    y = op.function(*leaves, **options)
    dy = torch.rand(y.shape, dtype=torch.float64, generator=g)
    return y.detach(), *torch.autograd.grad(y, leaves, made(len(leaves), dy))


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_negations_left_to_be_done(op):
    """As of x.conj().imag: forward and backward see the values, not the memory."""
    expected = one_call(op, None)
    for lazy in range(len(expected)):
        for mine, right in zip(one_call(op, lazy), expected, strict=True):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("op", [o for o in OPS.values() if "inplace" in o.signature.parameters], ids=lambda op: op.name)  # fmt: skip
def test_negations_left_to_be_done_in_place(op):
    names = [n for n in op.signature.parameters if n in ("other", "bias")]
    for shape in ((), (4, 6)):
        if not shape and "bias" in names:
            continue
        x = torch.linspace(-2, 2, max(1, 4 * 6 * len(shape) // 2)).reshape(shape)
        more = [torch.ones(shape[-1:] if n == "bias" else shape) for n in names]
        results = []
        for t in (x.clone(), torch._neg_view(-x)):
            torch.manual_seed(0)
            y = op.function(t, *more, inplace=True)
            assert y.data_ptr() == t.data_ptr()
            results.append(t.resolve_neg())
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("slope", [0.0, 0.01, -0.3])
def test_leaky_relu_in_place_keeps_no_copy_where_the_output_tells(slope):
    """As torch, which refuses a negative slope there."""
    x = torch.randn(64, 33, requires_grad=True)
    for function in (fastops.functional.leaky_relu, torch.nn.functional.leaky_relu):
        if slope < 0 and function is torch.nn.functional.leaky_relu:
            continue
        t = x * 1
        saved, y = kept(lambda: function(t, slope, inplace=True))  # noqa: B023
        assert [s.data_ptr() == y.data_ptr() for s in saved] == [slope >= 0]
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, torch.where(x > 0, 1.0, slope))
