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
from .._core.usable import CLASSES, usable

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]

#: eps=None of rms_norm, by dtype: that of what it is computed in.
_EPS = {torch.float64: torch.finfo(torch.float64).eps}
_EPS_OF_FLOAT = torch.finfo(torch.float32).eps


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
    if dims := _dims(input, normalized_shape, weight, bias):
        return _C.layer_norm(input, None, weight, bias, dims, eps)[0]
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
    if dims := _dims(input, normalized_shape, weight, None):
        if eps is None:
            eps = _EPS.get(input.dtype, _EPS_OF_FLOAT)
        return _C.rms_norm(input, None, weight, None, dims, eps)[0]
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
    if _fits(x, residual) and (dims := _dims(x, normalized_shape, weight, bias)):
        return _C.layer_norm(x, residual, weight, bias, dims, eps)
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
    if _fits(x, residual) and (dims := _dims(x, normalized_shape, weight, None)):
        if eps is None:
            eps = _EPS.get(x.dtype, _EPS_OF_FLOAT)
        return _C.rms_norm(x, residual, weight, None, dims, eps)
    total = _sum(x, residual)
    return rms_norm(total, normalized_shape, weight, eps), total


def _dims(input, normalized_shape, weight, bias) -> int:
    """The number of dimensions to normalize over if the kernels take these, else 0. What they do not take is torch's, and so
    is what is wrong."""
    if (
        DISABLED
        or not usable(input)
        or not input.is_cpu
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not isinstance(normalized_shape, tuple | list)
        or input.numel() == 0
    ):
        return 0
    dims, shape = len(normalized_shape), input.shape
    if not 0 < dims <= len(shape):
        return 0
    shape = shape[-dims:]
    if shape != tuple(normalized_shape) or float in map(type, normalized_shape):
        return 0
    if shape.numel() == 1:
        return 0  # nothing deviates from a mean of one: the gradient is 0 to the bit in torch
    dtype = input.dtype
    if weight is not None:
        dtype = weight.dtype if type(weight) in CLASSES else None
    elif bias is not None:
        dtype = bias.dtype if type(bias) in CLASSES else None
    if dtype != input.dtype and (dtype != torch.float32 or input.dtype == torch.float64):
        return 0
    for t in (weight, bias):
        if t is not None and not (usable(t) and t.dtype == dtype and t.shape == shape and t.is_cpu):
            return 0
    return dims


def _fits(x, residual) -> bool:
    """Whether the kernels add these."""
    return (
        usable(residual)
        and type(x) in CLASSES
        and x.dtype == residual.dtype
        and x.shape == residual.shape
        and x.device == residual.device
        and x.is_contiguous()
        and residual.is_contiguous()
    )


def _sum(x, residual):
    if not isinstance(residual, Tensor):
        raise TypeError("residual must be a Tensor")  # composed() says it in torch's words
    return x + residual
