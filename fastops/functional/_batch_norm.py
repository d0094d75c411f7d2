"""Batch normalization, alone and with the addition and the activation that follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._core.by_torch import DISABLED
from .._core.registry import composed

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
    return normalized_act(
        input, running_mean, running_var, weight, bias, None, "none", training, momentum, eps
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
    return normalized_act(
        input, running_mean, running_var, weight, bias, residual, activation, training, momentum,
        eps, negative_slope,
    )  # fmt: skip


def normalized_act(
    input, running_mean, running_var, weight, bias, residual=None, activation="relu",
    training=False, momentum=0.1, eps=1e-5, negative_slope=0.01,
):  # fmt: skip
    """batch_norm_act of what has no __torch_function__."""
    if not (DISABLED or torch.compiler.is_compiling()):
        output = _C.batch_norm_act(
            input, residual, weight, bias, running_mean, running_var, training, momentum, eps,
            _NUMBERS[activation], negative_slope,
        )  # fmt: skip
        if output is not None:
            return output
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        output = output + residual
    return ACTIVATIONS[activation](output, negative_slope)
