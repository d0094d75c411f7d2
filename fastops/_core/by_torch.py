"""What torch would run: the switch that leaves everything to it, and its functions where the reference of an op does not take
all of the op's arguments."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

#: FASTOPS_DISABLE=1 in the environment, read when the package is imported: every function is torch's, every optimizer steps
#: as torch's does, and patch() leaves everything.
DISABLED = os.environ.get("FASTOPS_DISABLE", "") not in ("", "0")
DISABLED_REASON = "FASTOPS_DISABLE is set"

#: The numbers of elements below which torch's own kernel was measured to be faster, by op; `@op` binds the check at import,
#: so that ops that are not here pay nothing. `python -m bench` found no op that is slower at its smallest size by more than
#: the noise; what is slower at others (docs/benchmarks.md) is no matter of a threshold.
SMALLEST: dict[str, int] = {}

# ---------------------------------------------------------------------------------------------- what torch would run


def _gelu(input, approximate="none"):
    return F.gelu(input, approximate=approximate)


def _dropout(input, p=0.5, training=True, inplace=False, *, generator=None):
    if generator is None:
        return F.dropout(input, p, training, inplace)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0:
        return input
    mask = torch.empty_like(input, requires_grad=False).bernoulli_(1 - p, generator=generator)
    mask = mask.div_(1 - p) if p < 1 else mask
    return input.mul_(mask) if inplace else input * mask


def _add_relu(input, other, inplace=False):
    return F.relu(input.add_(other) if inplace else input + other, inplace)


def _relu_dropout(input, p=0.5, training=True, inplace=False, generator=None):
    return _dropout(F.relu(input, inplace), p, training, inplace, generator=generator)


def _bias_dropout_add(input, bias, residual, p=0.5, training=True, generator=None):
    return residual + _dropout(
        input if bias is None else input + bias, p, training, generator=generator
    )


def _cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
    label_smoothing=0.0, *, return_lse=False, z_loss=0.0, inplace_backward=False,
):  # fmt: skip
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"cross_entropy: z_loss must be finite and not negative, but got {z_loss}")
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    loss = F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )  # fmt: skip
    if not return_lse and z_loss == 0:
        return loss
    dim = min(1, input.dim() - 1)
    x = input if input.dtype == torch.float64 else input.float()
    top = x.detach().amax(dim, keepdim=True)
    lse = (x - top).logsumexp(dim) + top.squeeze(dim)  # of a row that holds inf NaN, as the loss
    count = lse.numel()
    if not target.is_floating_point():
        target = target.reshape(lse.shape)
        live = target != ignore_index
        lse = torch.where(live, lse, 0)
        count = live.sum() if weight is None else weight[target.where(live, 0)].where(live, 0).sum()
    if z_loss:
        z = z_loss * lse**2
        z = z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / count
        loss = (loss + z).to(loss.dtype)
    return (loss, lse) if return_lse else loss


#: Where the reference of an op does not take all of its arguments.
BY_TORCH: dict[str, Callable[..., Tensor]] = {
    "gelu": _gelu,
    "cross_entropy": _cross_entropy,
    "dropout": _dropout,
    "add_relu": _add_relu,
    "relu_dropout": _relu_dropout,
    "bias_dropout_add": _bias_dropout_add,
}


def bound(name: str, function: Callable, reference: Callable) -> Callable:
    """What a public function is: itself; torch's where FASTOPS_DISABLE is set; either, by size, where `SMALLEST` has it."""
    by_torch = BY_TORCH.get(name, reference)
    if DISABLED:
        return by_torch
    return above(SMALLEST[name], function, by_torch) if name in SMALLEST else function


def above(smallest: int, function: Callable, by_torch: Callable) -> Callable:
    """`function` for inputs of at least so many elements, `by_torch` for others."""

    @functools.wraps(function)
    def by_size(input, *args, **kwargs):
        return (function if input.numel() >= smallest else by_torch)(input, *args, **kwargs)

    return by_size
