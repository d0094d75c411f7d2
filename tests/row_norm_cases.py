"""Layer norm and RMS norm in long double, with their gradients: what is right in float64, for which torch has no wider type.
Where a row's gradient cancels, torch's own float64 is as far from it as ours."""

import numpy as np
import torch
import torch.nn.functional as F


def _wide(t):
    return t.detach().numpy().astype(np.longdouble)


def _tensor(a):
    return torch.from_numpy(np.asarray(a).astype(np.float64))


class _Exact(torch.autograd.Function):
    """Of float64 tensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, dims, centered, eps):
        inner = tuple(range(-dims, 0))
        wide = _wide(x)
        wide = wide - wide.mean(inner, keepdims=True) if centered else wide
        inverse = 1 / np.sqrt((wide * wide).mean(inner, keepdims=True) + np.longdouble(eps))
        normal, w = wide * inverse, 1 if weight is None else _wide(weight)
        ctx.kept = normal, inverse, w, inner, centered, (weight is None, bias is None)
        return _tensor(normal * w + (0 if bias is None else _wide(bias)))

    @staticmethod
    def backward(ctx, grad):
        normal, inverse, w, inner, centered, absent = ctx.kept
        dy, outer = _wide(grad), tuple(range(normal.ndim - len(inner)))
        g = dy * w
        dx = g - normal * (g * normal).mean(inner, keepdims=True)
        dx = (dx - g.mean(inner, keepdims=True) if centered else dx) * inverse
        dw, db = ((p * dy).sum(outer) for p in (normal, 1))
        both = (None if gone else _tensor(t) for t, gone in zip((dw, db), absent, strict=True))
        return _tensor(dx), *both, None, None, None


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if not input.numel():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _Exact.apply(input, weight, bias, len(normalized_shape), True, eps)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    if not input.numel():
        return F.rms_norm(input, normalized_shape, weight, eps)
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    return _Exact.apply(input, weight, None, len(normalized_shape), False, eps)
