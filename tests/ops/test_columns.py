"""Softmax and cross-entropy over a dimension that is not the last, in every way that such rows are walked: kept beside each
other, read and written in tiles where their elements are a page or megabytes apart, and too long to be kept."""

import pytest
import torch
import torch.nn.functional as TF
from cases import assert_as_accurate

import fastops.functional as F

SHAPES = [
    (3, 5, 7),
    (2, 40, 65),
    (2, 31, 1024),  # a page apart: tiles
    (2, 100, 32, 32),
    (1, 33, 1024 + 1024),
    (1, 150, 96, 100),  # 5.8 MB of a batch: tiles, the last of which is not full
    (1, 600, 1024),  # too long for a tile
    (1, 1100, 40),  # and to be kept
]


CALLS = {
    "softmax": lambda module, x, y, q, w: module.softmax(x, 1),
    "log_softmax": lambda module, x, y, q, w: module.log_softmax(x, 1),
    "classes": lambda module, x, y, q, w: module.cross_entropy(x, y),
    "none": lambda module, x, y, q, w: module.cross_entropy(x, y, reduction="none"),
    "weight, smoothing": lambda module, x, y, q, w: module.cross_entropy(
        x, y, weight=w, label_smoothing=0.1
    ),
    "probabilities": lambda module, x, y, q, w: module.cross_entropy(x, q, weight=w),
}


def inputs(shape):
    g = torch.Generator().manual_seed(shape[1])
    batch, n, *rest = shape
    y = torch.randint(0, n, (batch, *rest), generator=g)
    y[torch.rand(y.shape, generator=g) < 0.1] = -100
    x, dy = (torch.randn(shape, generator=g) * 3 for _ in range(2))
    return x, dy, y, torch.rand(shape, generator=g), torch.rand(n, generator=g)


def run(module, name, dtype, x, dy, y, q, w):
    leaf = x.to(dtype, copy=True).requires_grad_()
    out = CALLS[name](module, leaf, y, q.to(dtype), w.to(dtype))
    upstream = dy.to(dtype) if out.shape == x.shape else torch.ones_like(out)
    return out.detach(), *torch.autograd.grad(out, leaf, upstream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_are_as_accurate_as_torchs(shape, name, dtype):
    given = [t.to(dtype) if t.is_floating_point() else t for t in inputs(shape)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(F, name, dtype, *given))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    torchs, exact = run(TF, name, dtype, *given), run(TF, name, torch.float64, *given)
    for mine, other, true in zip(results[0], torchs, exact, strict=True):
        assert_as_accurate(mine, other, true, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_column_is_what_it_is_as_a_row(shape):
    x, _, y, _, _ = inputs(shape)
    rows = x.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
    for name in ("softmax", "log_softmax"):
        y_columns = getattr(F, name)(x, 1).flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(y_columns, getattr(F, name)(rows, 1), rtol=1e-5, atol=1e-6)
    losses = F.cross_entropy(x, y, reduction="none")
    by_rows = F.cross_entropy(rows, y.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), by_rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1}], ids=["", "smoothing"])
def test_the_gradient_in_the_logits_own_memory_is_the_same(shape, extra):
    x, _, y, _, _ = inputs(shape)
    grads = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        F.cross_entropy(logits, y, inplace_backward=inplace, **extra).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
