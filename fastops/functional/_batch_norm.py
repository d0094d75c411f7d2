"""Batch normalization, alone and with the addition and the activation that follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from .._core.by_torch import DISABLED
from .._core.registry import composed
from .._core.usable import usable

__all__ = ["batch_norm", "batch_norm_act"]

#: The activations of batch_norm_act, in the order of the kernels' numbers, as torch computes them.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "relu6": lambda x, slope: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, slope: F.silu(x),
    "gelu": lambda x, slope: F.gelu(x),
    "hardswish": lambda x, slope: F.hardswish(x),
    "mish": lambda x, slope: F.mish(x),
}
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


@composed
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias per channel, dimension 1.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of shape (N, C) or (N, C, ...). Contiguous and channels_last
            memory is read as it is, other layouts are copied.
        running_mean, running_var: of shape (C,), or None. Updated in training, used otherwise.
        weight, bias: of shape (C,), or None for 1 and 0. Of the input's dtype, or float32 beside bfloat16 and float16.
        training: whether mean and variance are those of the input.
        momentum: the weight of the input's mean and variance in the running ones.
        eps: added to the variance.

    Raises:
        ValueError: one value per channel in training.
        RuntimeError: shapes or dtypes that do not fit, or no running statistics outside of training.

    Same as :func:`torch.nn.functional.batch_norm` (Ioffe and Szegedy, 2015). Mean and variance are taken in one pass over
    memory, in an order that depends neither on threads nor on the memory layout. On CUDA, in compiled models and under
    torch.func, torch's own function is called. Example: ``batch_norm(torch.randn(8, 3), None, None, training=True)``.
    """
    return _normalized(
        input, running_mean, running_var, weight, bias, None, "none", training, momentum, eps, 0.01
    )


@composed
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> Tensor:
    """activation(batch_norm(input) + residual), in the passes over memory that batch norm takes alone.

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps: as :func:`batch_norm`.
        residual: of the input's shape and dtype, or None for 0. Others are added as torch adds them.
        activation: "none", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish" or "mish".
        negative_slope: of leaky_relu.

    Raises:
        ValueError: an unknown activation; and what :func:`batch_norm` raises.

    For backward, the input is kept; beside a residual also the output (relu, relu6, leaky_relu) or the residual (the
    others). Same as :func:`torch.nn.functional.batch_norm`, ``+`` and the activation, one after the other.
    Example: ``batch_norm_act(torch.randn(8, 3, 4, 4), None, None, training=True)``.
    """
    if activation not in _NUMBERS:
        raise ValueError(
            f"batch_norm_act: activation must be one of {', '.join(_NUMBERS)}, got {activation!r}"
        )
    return _normalized(
        input, running_mean, running_var, weight, bias, residual, activation, training, momentum,
        eps, negative_slope,
    )  # fmt: skip


def _takes(input, running_mean, running_var, weight, bias, residual, training) -> bool:
    """Whether the kernels take these. What they do not take is torch's, and so is what is wrong."""
    if (
        DISABLED
        or not usable(input)
        or input.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or input.dim() < 2
        or input.numel() <= (input.size(1) if training else 0)
        or (running_mean is None) != (running_var is None)
        or (running_mean is None and not training)
    ):
        return False
    channels, dtypes = (input.size(1),), set()
    for t in (weight, bias, running_mean, running_var):
        if t is None:
            continue
        if not usable(t) or t.shape != channels or t.device != input.device:
            return False
        dtypes.add(t.dtype)
    if len(dtypes) > 1 or not (
        dtypes <= {input.dtype} or (input.dtype != torch.float64 and dtypes == {torch.float32})
    ):
        return False
    if running_mean is not None and running_mean.requires_grad | running_var.requires_grad:
        return False
    return residual is None or (
        usable(residual)
        and residual.dtype == input.dtype
        and residual.shape == input.shape
        and residual.device == input.device
    )


def _normalized(
    input, running_mean, running_var, weight, bias, residual, activation, training, momentum, eps,
    negative_slope,
):  # fmt: skip
    if _takes(input, running_mean, running_var, weight, bias, residual, training):
        return _C.batch_norm_act(
            input, residual, weight, bias, running_mean, running_var, training, momentum, eps,
            _NUMBERS[activation], negative_slope,
        )  # fmt: skip
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        output = output + residual
    return ACTIVATIONS[activation](output, negative_slope)
