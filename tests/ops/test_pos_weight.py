"""binary_cross_entropy_with_logits(pos_weight=): every shape that broadcasts, every memory order; and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, assert_as_accurate, randn
from torch.func import grad, vmap

import fastops
import fastops.functional as ours

pytestmark = pytest.mark.quick

mine, theirs = ours.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits


def shapes(shape):
    """Everything that broadcasts to a shape."""
    yield (1,) * len(shape)
    for first in range(len(shape) + 1):
        yield shape[first:]
        for k in range(first, len(shape)):
            yield (*shape[first:k], 1, *shape[k + 1 :])
            yield (*(1,) * (k - first), shape[k], *(1,) * (len(shape) - k - 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_that_broadcasts(layout, dtype):
    x = LAYOUTS[layout]().to(dtype)
    t = randn(*x.shape, seed=1).sigmoid().to(dtype)
    for k, shape in enumerate(sorted(set(shapes(tuple(x.shape))))):
        w = randn(*shape, seed=2).abs().to(dtype)
        w = w.expand(x.shape) if k % 3 == 1 else w.t().contiguous().t() if w.dim() == 2 else w
        results = []
        for function, kind in ((mine, dtype), (theirs, dtype), (theirs, torch.float64)):
            leaves = [v.to(kind).detach().requires_grad_() for v in (x, t)]
            loss = function(
                *leaves, pos_weight=w.to(kind), reduction=("none", "mean", "sum")[k % 3]
            )
            found = (loss.detach(), *torch.autograd.grad(loss.sum(), leaves))
            results.append(found)
        for value, torchs, exact in zip(*results, strict=True):
            assert_as_accurate(value, torchs, exact, dtype)
        if loss.dim():  # as tests/ops/test_values.py has it
            assert mine(x, t, pos_weight=w, reduction="none").stride() in (
                x.stride(),
                loss.stride(),
            )


@pytest.mark.parametrize(
    "n", [(3, 1000), (2000, 1), (500, 3), (40_000,), (7, 3, 100, 100)], ids=str
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_rows_that_are_short_long_or_many(n, reduction):
    """A row that is short is repeated first; where it ends, a group of lanes does."""
    x, t = randn(*n).float(), randn(*n, seed=1).sigmoid().float()
    for shape in {n[-1:], n[1:2] + (1,) * (len(n) - 2), (1,)}:
        w = randn(*shape, seed=2).abs().float()
        args = {"pos_weight": w, "reduction": reduction}
        exact = theirs(x.double(), t.double(), pos_weight=w.double(), reduction=reduction)
        assert_as_accurate(mine(x, t, **args), theirs(x, t, **args), exact, torch.float32)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_special_values(reduction):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 100.0, -100.0, 3e38]).repeat(6)
    t = torch.tensor([0.0, 1.0, 0.5, nan, inf, -1.0]).repeat_interleave(8)
    for w in (0.0, 1.0, 2.5, -1.0, inf, nan):
        results = []
        for function in (mine, theirs):
            leaf = x.clone().requires_grad_()
            loss = function(leaf, t, pos_weight=torch.tensor(w), reduction=reduction)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        torch.testing.assert_close(*results, equal_nan=True)


def test_with_a_weight_too():
    x, t = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).sigmoid()
    for reduction in ("none", "mean", "sum"):
        args = {
            "weight": randn(4, 1, seed=2),
            "pos_weight": randn(3, seed=3),
            "reduction": reduction,
        }
        found, expected = mine(x, t, **args), theirs(x, t, **args)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), x) for v in (found, expected)))


def test_nothing_and_views():
    empty = torch.empty(0, 3)
    for reduction, expected in (("none", empty), ("mean", torch.tensor(torch.nan)), ("sum", torch.tensor(0.0))):  # fmt: skip
        found = mine(empty, empty, pos_weight=torch.ones(3), reduction=reduction)
        torch.testing.assert_close(found, expected, equal_nan=True)
    x, w = randn(4, 3), randn(3, seed=1)
    negative = torch._neg_view(w)
    torch.testing.assert_close(
        mine(x, x.sigmoid(), pos_weight=negative), theirs(x, x.sigmoid(), pos_weight=-w)
    )
    torch.testing.assert_close(
        mine(torch._neg_view(x), x.sigmoid(), pos_weight=w), theirs(-x, x.sigmoid(), pos_weight=w)
    )
    wide = randn(12, seed=1)[::4]
    torch.testing.assert_close(
        mine(x, x.sigmoid(), pos_weight=wide), theirs(x, x.sigmoid(), pos_weight=wide)
    )


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1, 3), (4, 2), (1, 5)], ids=str)
def test_what_does_not_broadcast_is_refused_as_by_torch(shape):
    x, w = randn(4, 3), torch.ones(shape, dtype=torch.float64)
    for function in (mine, theirs):
        with pytest.raises(RuntimeError):
            function(x, x, pos_weight=w)
    with pytest.raises(RuntimeError):  # where torch takes some of them
        mine(x.to("meta"), x.to("meta"), pos_weight=w.to("meta"))


def test_no_gradient_flows_to_it_as_in_torch():
    x, w = randn(4, 3).requires_grad_(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    message = "not differentiable with respect to argument 'pos_weight'"
    for function in (mine, theirs):
        for given in (x, x.detach()):
            with pytest.raises(RuntimeError, match=message):
                function(given, given, pos_weight=w)
        with torch.no_grad():
            function(x, x, pos_weight=w)
    # under torch.func torch has one, and it is torch's
    given = x.detach()
    torch.testing.assert_close(
        *(grad(lambda w, f=f: f(given, given, pos_weight=w))(w.detach()) for f in (mine, theirs))
    )
    with pytest.raises(NotImplementedError, match="no gradient flows to a weight"):
        fastops.autograd.BinaryCrossEntropyWithLogitsPosWeightFunction.apply(x, x, 1, w)
    with pytest.raises(RuntimeError):
        torch.compile(lambda: mine(x, x, pos_weight=w), backend="eager", fullgraph=True)()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.int64)], ids=str)  # fmt: skip
def test_other_dtypes_are_torchs(dtypes):
    x, w = randn(4, 3).to(dtypes[0]), torch.arange(1, 4).to(dtypes[1])
    for reduction in ("none", "mean"):
        found, expected = (f(x, x, pos_weight=w, reduction=reduction) for f in (mine, theirs))
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert fastops.explain(mine, x, x, pos_weight=w).runs == "torch"


def test_batches_of_weights():
    x, t, w = randn(5, 4, 3), randn(5, 4, 3, seed=1).sigmoid(), randn(5, 3, seed=2).abs()
    for reduction in ("none", "mean", "sum"):

        def call(f, x, t, w, r=reduction):
            return f(x, t, pos_weight=w, reduction=r)

        expected = torch.stack([call(theirs, *each) for each in zip(x, t, w, strict=True)])
        torch.testing.assert_close(vmap(lambda *a: call(mine, *a))(x, t, w), expected)
        torch.testing.assert_close(
            vmap(lambda *a: call(mine, *a), (0, 0, 1))(x, t, w.t()), expected
        )
        one = torch.stack([call(theirs, x[k], t[k], w[0]) for k in range(5)])
        torch.testing.assert_close(vmap(lambda x, t: call(mine, x, t, w[0]))(x, t), one)
        # of one input and many weights
        many = torch.stack([call(theirs, x[0], t[0], w[k]) for k in range(5)])
        torch.testing.assert_close(vmap(lambda w: call(mine, x[0], t[0], w))(w), many)
        gradients = vmap(grad(lambda x, t, w: call(mine, x, t, w).sum()))(x, t, w)
        of_torch = [grad(lambda x, t, w: call(theirs, x, t, w).sum())(*each) for each in zip(x, t, w, strict=True)]  # fmt: skip
        torch.testing.assert_close(gradients, torch.stack(of_torch))


def test_module_and_hooks():
    x, t = randn(4, 3).float().requires_grad_(), randn(4, 3, seed=1).sigmoid().float()
    w = randn(3, seed=2).abs().float()
    module, native = (
        fastops.nn.BCEWithLogitsLoss(pos_weight=w),
        torch.nn.BCEWithLogitsLoss(pos_weight=w),
    )
    torch.testing.assert_close(module(x, t), native(x, t))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        loss = mine(x, t, pos_weight=w)
    assert sum(v.nbytes for v in kept) == x.nbytes + t.nbytes + w.nbytes
    loss.backward()
    loss = mine(x, t, pos_weight=w)
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
