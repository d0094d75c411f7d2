"""Layer norm and RMS norm, alone and of the sum of two tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from .._core.by_torch import DISABLED
from .._core.registry import composed
from .._core.usable import CLASSES

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


@composed
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the last dimensions.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor whose last dimensions are `normalized_shape`. It is read once,
            layouts that are not contiguous are copied first.
        normalized_shape: the sizes of the dimensions that mean and variance are taken over.
        weight, bias: of shape `normalized_shape`, or None for 1 and 0. Of the input's dtype, or float32 beside bfloat16 and
            float16.
        eps: added to the variance.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.

    Same as :func:`torch.nn.functional.layer_norm` (Ba, Kiros and Hinton, 2016). Gradients of weight and bias are summed in an
    order that does not depend on threads. On CUDA, in compiled models and under torch.func, torch's own function is called.
    Example: ``layer_norm(torch.randn(8, 3), (3,))``.
    """
    found = _by_kernels(_C.layer_norm, input, None, normalized_shape, weight, bias, eps)
    if found is not None:
        return found[0]
    return F.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]


@composed
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """input / sqrt(mean(input^2) + eps) * weight over the last dimensions.

    Args:
        input, normalized_shape, weight: as :func:`layer_norm`.
        eps: added to the mean of the squares; None for ``torch.finfo(...).eps`` of float64 if the input is that, else of
            float32.

    Raises:
        RuntimeError, ValueError: shapes that do not fit.

    Same as :func:`torch.nn.functional.rms_norm` (Zhang and Sennrich, 2019), in one visit of memory. On CUDA, in compiled
    models and under torch.func, torch's own function is called. Example: ``rms_norm(torch.randn(8, 3), (3,))``.
    """
    found = _by_kernels(_C.rms_norm, input, None, normalized_shape, weight, None, eps)
    if found is not None:
        return found[0]
    return F.rms_norm(input, normalized_shape, weight, eps)  # type: ignore[arg-type]


@composed
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), in one visit of memory: what transformers have between their blocks.

    Args:
        x, residual: of one shape and dtype, contiguous; others are added as torch adds them.
        normalized_shape, weight, bias, eps: as :func:`layer_norm`.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.

    The sum is rounded to the dtype of `x` before it is normalized, and is all that is kept for backward. Same as ``+`` and
    :func:`torch.nn.functional.layer_norm`, one after the other. Example: ``add_layer_norm(torch.randn(8, 3), torch.ones(8,
    3), (3,))``.
    """
    if residual is not None:
        found = _by_kernels(_C.layer_norm, x, residual, normalized_shape, weight, bias, eps)
        if found is not None:
            return found
    total = _sum(x, residual)
    return layer_norm(total, normalized_shape, weight, bias, eps), total


@composed
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), in one visit of memory: what transformers have between their blocks.

    Args:
        x, residual: of one shape and dtype, contiguous; others are added as torch adds them.
        normalized_shape, weight, eps: as :func:`rms_norm`.

    Raises:
        RuntimeError, ValueError: shapes or dtypes that do not fit.

    The sum is rounded to the dtype of `x` before it is normalized, and is all that is kept for backward. Same as ``+`` and
    :func:`torch.nn.functional.rms_norm`, one after the other. Example: ``add_rms_norm(torch.randn(8, 3), torch.ones(8, 3),
    (3,))``.
    """
    if residual is not None:
        found = _by_kernels(_C.rms_norm, x, residual, normalized_shape, weight, None, eps)
        if found is not None:
            return found
    total = _sum(x, residual)
    return rms_norm(total, normalized_shape, weight, eps), total


def _by_kernels(kernel, input, residual, normalized_shape, weight, bias, eps):
    """(output, sum) if the kernels take these, else None. What they do not take is torch's, and so is what is wrong."""
    if (
        type(input) not in CLASSES
        or DISABLED
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not isinstance(normalized_shape, (tuple, list))  # noqa: UP038  the faster of the two
    ):
        return None
    try:
        return kernel(input, residual, normalized_shape, weight, bias, eps)
    except TypeError:
        return None


def _sum(x, residual):
    if not isinstance(residual, Tensor):
        raise TypeError("residual must be a Tensor")  # composed() says it in torch's words
    return x + residual
