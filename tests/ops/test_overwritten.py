"""Tensors that are overwritten in place between forward and backward, as hand-written activations do: every activation
and loss, with every in-place op on its result and on its inputs. What torch accepts is accepted, with the gradients of
the same calls out of place; whatever else is accepted has these too."""

import inspect

import pytest
import torch
from cases import INPUTS, randn, targets

from fastops._core.registry import OPS

IN_PLACE = {
    "add": lambda t: t.add_(3),
    "mul": lambda t: t.mul_(2),
    "div": lambda t: t.div_(6),
    "sqrt": lambda t: t.abs_().add_(1).sqrt_(),
    "zero": lambda t: t.zero_(),
    "clamp": lambda t: t.clamp_(-0.5, 0.5),
    "copy": lambda t: t.copy_(t.detach() * 2 + 1),
}
OUT_OF_PLACE = {
    "add": lambda t: t + 3,
    "mul": lambda t: t * 2,
    "div": lambda t: t / 6,
    "sqrt": lambda t: (t.abs() + 1).sqrt(),
    "zero": lambda t: t * 0,
    "clamp": lambda t: t.clamp(-0.5, 0.5),
    "copy": lambda t: t * 0 + (t.detach() * 2 + 1),
}


def names(kind):
    return [op.name for op in OPS.values() if op.kind == kind]


def calls():
    """(name, tensors that it is given, keyword arguments)"""
    for name in names("elementwise"):
        yield name, 1, {}
        if "inplace" in OPS[name].signature.parameters:
            yield name, 1, {"inplace": True}
    for name in names("loss"):
        for reduction in ("none", "mean", "sum"):
            yield name, 2, {"reduction": reduction}
    for name in ("softmax", "log_softmax"):
        yield name, 1, {"dim": 1}
    for reduction in ("none", "mean", "sum"):
        yield "cross_entropy", 1, {"reduction": reduction}


CALLS = list(calls())


def gradients(function, name, count, kwargs, change, what, in_place):
    """The gradients to the tensors, or None where autograd says that something it needs has been overwritten."""
    within = INPUTS.get(name, lambda t: t)
    leaves = [within(randn(4, 5, seed=k)).requires_grad_() for k in range(count)]
    given = [leaf * 1 for leaf in leaves]
    rest = [targets(4, classes=5)] if name == "cross_entropy" else []
    if not in_place and kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    y = function(*given, *rest, **kwargs)
    if what == "result":
        y = change(y)
        if not in_place and kwargs.get("inplace") is False:
            given[0] = y  # in place they are one tensor
    else:
        if not in_place and kwargs.get("inplace") is False:
            given[0] = y  # in place it is the result
        given[what] = change(given[what])
        if kwargs.get("inplace") is not None:
            y = given[0]
    total = y.sum() + sum((k + 2) * (t * t).sum() for k, t in enumerate(given))
    try:
        return torch.autograd.grad(total, leaves)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "not supported" in str(error), (
            error
        )
        return None


@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0]}{list(c[2].values())}")
def test_what_torch_lets_be_overwritten(call):
    name, count, kwargs = call
    op = OPS[name]
    refused = 0
    for change in IN_PLACE:
        for what in ("result", *range(count)):
            expected = gradients(op.reference, *call, OUT_OF_PLACE[change], what, in_place=False)
            theirs = gradients(op.reference, *call, IN_PLACE[change], what, in_place=True)
            ours = gradients(op.function, *call, IN_PLACE[change], what, in_place=True)
            if theirs is not None:
                assert ours is not None, f"{change} on {what}: refused, and torch takes it"
                torch.testing.assert_close(ours, theirs)
            if ours is None:
                refused += 1
                continue
            torch.testing.assert_close(ours, expected)
    # What is read again in backward must be refused: a silent wrong value is the other possibility.
    if not kwargs.get("inplace") and name not in ("l1_loss", "cross_entropy"):
        assert refused


def test_a_hand_written_hard_swish_trains():
    x = randn(3, 7).requires_grad_()
    F = {op.name: op.function for op in OPS.values()}
    (ours,) = torch.autograd.grad((x * F["relu6"](x + 3).div_(6)).sum(), x)
    (theirs,) = torch.autograd.grad(torch.nn.functional.hardswish(x).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_l1_loss_keeps_its_slope(reduction, dtype):
    """All that torch keeps of the two tensors is their difference: as many bytes."""
    x, t = (randn(8, 16, seed=k).to(dtype).requires_grad_() for k in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: kept.append(s.nbytes) or s, lambda s: s
    ):
        loss = OPS["l1_loss"].function(x, t, reduction=reduction)
    assert sum(kept) == x.nbytes
    # Its gradient is one of the graph: a gradient of it is 0, as torch's is.
    gx, gt = torch.autograd.grad(loss.sum(), (x, t), create_graph=True)
    assert torch.equal(gx, -gt)
    (zero,) = torch.autograd.grad(gx.float().sum(), x)
    assert torch.equal(zero, torch.zeros_like(x))


def test_dropout_takes_any_overwriting():
    for name in ("dropout", "relu_dropout"):
        function = OPS[name].function
        assert "p" in inspect.signature(function).parameters
        x = randn(50).requires_grad_()
        h = x * 1
        y = function(h, p=0.5)
        mask = y.detach() != 0
        if name == "dropout":
            y.mul_(3)
        h.zero_()
        (dx,) = torch.autograd.grad(y.sum(), x)
        expected = mask * (6.0 if name == "dropout" else 2.0)
        torch.testing.assert_close(dx, expected.double())
