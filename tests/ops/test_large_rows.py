"""Results of 24 MB and more go past the caches: row by row they are what a call on a few rows gives. Row lengths are such
that rows begin anywhere in a vector."""

import pytest
import torch

import fastops.functional as F

pytestmark = pytest.mark.slow

KERNELS = 64  # of the calls whose results are small
LENGTHS = (10007, 8200)


def logits(n, dtype):
    rows = (25 << 20) // (n * dtype.itemsize) + 1
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(n)).to(dtype)


def targets(x):
    """Classes at both ends of their rows and all over them; some rows are ignored."""
    t = torch.randint(0, x.shape[1], x.shape[:1], generator=torch.Generator().manual_seed(1))
    t[::5], t[1::5] = 0, x.shape[1] - 1
    t[3::50] = -100
    return t


def gradient(x, *rest, **kwargs):
    leaf = x.detach().requires_grad_()
    loss = F.mixup_cross_entropy if len(rest) == 3 else F.cross_entropy
    losses = loss(leaf, *rest, reduction="none", **kwargs)
    losses.sum().backward()
    return losses.detach(), leaf.grad


def weight(x):
    return torch.linspace(0.5, 2, x.shape[1]).to(x.dtype)


def softmax(x, function):
    leaf = x.detach().requires_grad_()
    y = function(leaf, 1)
    y.backward(x)
    return y.detach(), leaf.grad


CALLS = {
    "softmax": lambda x, t: softmax(x, F.softmax),
    "log_softmax": lambda x, t: softmax(x, F.log_softmax),
    "classes": gradient,
    "smoothing, weight": lambda x, t: gradient(x, t, weight=weight(x), label_smoothing=0.1),
    "probabilities": lambda x, t: gradient(x, x.sigmoid()),
    "mixup": lambda x, t: gradient(x, t, torch.where(t < 0, t, t // 2), 0.3),
}


# Their gradients are a difference of products, of which a compiler may round either: elsewhere the bits are equal.
ROUNDED = ("log_softmax", "smoothing, weight", "probabilities")


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_rows_are_those_of_small_calls(name, dtype, n):
    x = logits(n, dtype)
    t = targets(x)
    large = CALLS[name](x, t)
    small = [CALLS[name](*rows) for rows in zip(x.split(KERNELS), t.split(KERNELS), strict=True)]
    for whole, parts in zip(large, zip(*small, strict=True), strict=True):
        each = torch.cat(parts)
        error = 4 * torch.finfo(dtype).eps * each.abs().amax().item() if name in ROUNDED else 0
        torch.testing.assert_close(whole, each, rtol=0, atol=error)
