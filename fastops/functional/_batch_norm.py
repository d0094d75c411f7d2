"""Batch normalization, alone and with the addition and the activation that follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _C
from .._core.by_torch import DISABLED
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
        input: float, of shape (N, C) or (N, C, ...), contiguous or channels_last; other layouts are copied.
        running_mean, running_var: of shape (C,). Updated in training, used otherwise.
        weight, bias: of shape (C,), or None for 1 and 0.
        training: whether the statistics are the batch's own.
        momentum: what the batch's statistics weigh in the running ones.
        eps: added to the variance.

    Raises:
        ValueError: one value per channel in training.
        RuntimeError: shapes that do not fit, or no running statistics outside of training.

    Same as :func:`torch.nn.functional.batch_norm` (Ioffe and Szegedy, 2015). The variance is taken in one pass over
    memory, in an order that depends neither on threads nor on the memory layout. Kernels for the CPU; elsewhere, in
    compiled models and under torch.func it is torch's. Example: ``batch_norm(torch.randn(8, 3), None, None, training=True)``.
    """
    if has_torch_function((input, running_mean, running_var, weight, bias)):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            input, running_mean, running_var, weight=weight, bias=bias, training=training,
            momentum=momentum, eps=eps,
        )  # fmt: skip
    return _batch_norm_act(
        input, running_mean, running_var, weight, bias, None, "none", training, momentum, eps, 0.01
    )


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
        residual: of the input's shape and dtype, or None.
        activation: "none", "relu", "relu6", "leaky_relu" (with `negative_slope`), "silu", "gelu", "hardswish" or "mish".
        The others are those of :func:`batch_norm`.

    Raises:
        ValueError: an unknown activation; and what :func:`batch_norm` raises.

    For backward, the input is kept, and beside a residual either the output (relu, relu6, leaky_relu) or the residual.
    Example: ``batch_norm_act(torch.randn(8, 3, 4, 4), None, None, training=True)``.
    """
    if activation not in _NUMBERS:
        raise ValueError(
            f"batch_norm_act: activation is {activation!r}; it can be {', '.join(map(repr, _NUMBERS))}"
        )
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm_act, tensors, *tensors, activation=activation, training=training,
            momentum=momentum, eps=eps, negative_slope=negative_slope,
        )  # fmt: skip
    return _batch_norm_act(
        input, running_mean, running_var, weight, bias, residual, activation, training, momentum,
        eps, negative_slope,
    )  # fmt: skip


def _taken(input, weight, bias, running_mean, running_var, residual, training) -> bool:
    """Whether the kernels take these; what they do not take, and what is an error, is torch's."""
    if (
        DISABLED
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not usable(input)
        or input.device.type != "cpu"
        or input.dim() < 2
        or input.numel() == 0
        or (training and input.numel() == input.size(1))
        or (not training and (running_mean is None or running_var is None))
        or (running_mean is None) != (running_var is None)
    ):
        return False
    shape, real = (input.size(1),), torch.float64 if input.dtype == torch.float64 else torch.float32
    for t in (weight, bias, running_mean, running_var):
        if t is not None and not (
            usable(t) and t.dtype in (input.dtype, real) and t.shape == shape and t.device == input.device
        ):
            return False
    return residual is None or (
        usable(residual)
        and residual.dtype == input.dtype
        and residual.shape == input.shape
        and residual.device == input.device
    )


def _batch_norm_act(
    input, running_mean, running_var, weight, bias, residual, activation, training, momentum, eps,
    slope,
):  # fmt: skip
    if not _taken(input, weight, bias, running_mean, running_var, residual, training):
        output = F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        if residual is not None:
            output = output + residual
        return ACTIVATIONS[activation](output, slope)
    output, mean, _, variance = _C.batch_norm_act(
        input, residual, weight, bias, running_mean, running_var, training, eps,
        _NUMBERS[activation], slope,
    )  # fmt: skip
    if training and running_mean is not None:
        count = input.numel() // input.size(1)
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(variance, alpha=momentum * count / (count - 1))
    return output
