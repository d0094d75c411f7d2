"""Dropout, and dropout fused with its neighbors. Masks come from a counter-based generator: see :func:`dropout`."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from .. import _C
from .._core.registry import composed, op
from ._elementwise import check_bias, relu

__all__ = [
    "alpha_dropout",
    "bias_dropout_add",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "relu_dropout",
]


@op(kind="dropout", reference=F.dropout)
def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zeroes each element with probability p and scales the others by 1 / (1 - p).

    The mask comes from a counter-based generator (Philox 4x32-10) keyed by one random seed and the element's row-major
    index. Backward makes it again instead of keeping it. It is the same on every device, for any number of threads and any
    memory layout, and obeys torch.manual_seed, fork_rng and activation checkpointing.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        p: in [0, 1].
        training: False returns input as it is.
        inplace: overwrite `input` and return it.
        generator: where the seed is drawn from; torch's default generator otherwise.

    Raises:
        ValueError: `p` is not in [0, 1].

    Same in distribution as :func:`torch.nn.functional.dropout` (Srivastava et al., 2014).
    Example: ``dropout(torch.ones(4), 0.5)`` holds zeros and twos.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout, (input,), input, p=p, training=training, inplace=inplace, generator=generator
        )
    return _C.dropout(input, p, training, inplace, generator)


def _features_dropped(input, p, training, inplace, generator):
    """Dropout of whole (N, C) entries of a tensor (N, C, ...)."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0 or input.numel() == 0:
        return input
    if input.dim() < 2:
        raise RuntimeError(
            f"Feature dropout requires at least 2 dimensions in the input, got {input.dim()}"
        )
    ones = input.new_ones((*input.shape[:2], *(1,) * (input.dim() - 2)))
    noise = dropout(ones, p, generator=generator)
    return input.mul_(noise) if inplace else input * noise


def _warn_of_dims(name, input, unbatched):
    """Where torch still takes an input of other dimensions."""
    if input.dim() not in (unbatched, unbatched + 1):
        warnings.warn(
            f"{name}: Received a {input.dim()}-D input to {name}, which is deprecated and will result in an error in a "
            "future release. To retain the behavior and silence this warning, please use dropout instead.",
            stacklevel=4,
        )


@composed
def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zeroes whole channels of an input (N, C, L) or (C, L) with probability p and scales the others by 1 / (1 - p).

    Arguments as :func:`dropout`. Same in distribution as :func:`torch.nn.functional.dropout1d`.

    Raises:
        RuntimeError: an input of other dimensions. ValueError: `p` is not in [0, 1].
    """
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input."
        )
    batched = input if input.dim() == 3 else input.unsqueeze(0)
    result = _features_dropped(batched, p, training, inplace, generator)
    return result if input.dim() == 3 else input if result is batched else result.squeeze(0)


@composed
def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zeroes whole channels of an input (N, C, H, W) with probability p and scales the others by 1 / (1 - p). An input
    of three dimensions is taken as (N, C, L), as torch does; one of two, or of more than four, with a warning.

    Arguments as :func:`dropout`. Same in distribution as :func:`torch.nn.functional.dropout2d`.

    Raises:
        RuntimeError: an input of fewer than two dimensions. ValueError: `p` is not in [0, 1].
    """
    _warn_of_dims("dropout2d", input, 3)
    return _features_dropped(input, p, training, inplace, generator)


@composed
def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zeroes whole channels of an input (N, C, D, H, W) or (C, D, H, W) with probability p and scales the others by
    1 / (1 - p). An input of other dimensions is taken as (C, ...), with a warning, as torch does.

    Arguments as :func:`dropout`. Same in distribution as :func:`torch.nn.functional.dropout3d`.

    Raises:
        RuntimeError: an input of no dimensions. ValueError: `p` is not in [0, 1].
    """
    _warn_of_dims("dropout3d", input, 4)
    batched = input if input.dim() == 5 else input.unsqueeze(0)
    result = _features_dropped(batched, p, training, inplace, generator)
    return result if input.dim() == 5 else input if result is batched else result.squeeze(0)


@composed
def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sets elements to SELU's negative limit with probability p, and keeps mean and variance (Klambauer et al., 2017).

    Arguments as :func:`dropout`. Same in distribution as :func:`torch.nn.functional.alpha_dropout`.

    Raises:
        ValueError: `p` is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if input.numel() == 0 or not training or p == 0:
        return input
    if p == 1:
        nothing = input.new_zeros(())  # not 0: bool stays bool
        return input.mul_(nothing) if inplace else input * nothing
    alpha = 1.7580993408473766  # SELU's scale times its alpha
    a = ((alpha * alpha * p + 1) * (1 - p)) ** -0.5
    with torch.no_grad():
        kept = dropout(torch.ones_like(input), p, generator=generator).ne_(0)
        shift = (kept - 1).mul_(alpha * a).add_(alpha * a * p)
        kept.mul_(a)
    return input.mul_(kept).add_(shift) if inplace else input * kept + shift


def _seed(input: Tensor, generator: torch.Generator | None) -> Tensor:
    """What a mask is made from: one number of torch's generator, as :func:`dropout` takes it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=input.device, generator=generator)


def _check_p(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


@op(
    kind="dropout",
    reference=lambda input, p=0.5, training=True, inplace=False, generator=None: F.dropout(
        F.relu(input), p, training
    ),
)
def relu_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """dropout(relu(input), p) in one pass, and in one pass backward, for which only the output is kept.

    Arguments, errors and mask as :func:`dropout`.

    Same in distribution as ``torch.nn.functional.dropout(torch.relu(input), p)``. Example: ``relu_dropout(-torch.ones(4))``
    is zeros.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            relu_dropout, (input,), input, p=p, training=training, inplace=inplace, generator=generator
        )  # fmt: skip
    _check_p(p)
    if not training or p == 0:
        return relu(input, inplace=inplace)
    if p == 1 or input.numel() == 0:
        return dropout(relu(input, inplace=inplace), p, training, inplace)
    seed = _seed(input, generator)
    return _C.relu_dropout_(input, p, seed) if inplace else _C.relu_dropout(input, p, seed)


@op(
    kind="dropout",
    reference=lambda input, bias, residual, p=0.5, training=True, generator=None: (
        residual + F.dropout(input + bias, p, training)
    ),
)
def bias_dropout_add(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """residual + dropout(input + bias, p) in one pass, and in one pass backward, in which the bias's gradient is summed as
    well; nothing is kept for it but the seed of the mask.

    Args:
        input: a contiguous float64, float32, bfloat16 or float16 tensor of shape (..., C).
        bias: a tensor of shape (C), or None.
        residual: a tensor of input's shape.
        p, training, generator: as :func:`dropout`.

    Raises:
        ValueError: p outside [0, 1].
        NotImplementedError: another dtype.
        RuntimeError: shapes or devices that do not fit.

    Dtypes that differ are promoted as by ``+`` and other layouts are kept, in several passes. Same in distribution as
    ``residual + torch.nn.functional.dropout(input + bias, p)``, as Megatron-LM fuses it (Shoeybi et al., 2019).
    Example: ``bias_dropout_add(torch.ones(1, 2), torch.ones(2), torch.ones(1, 2), training=False)`` is threes.
    """
    if has_torch_function_variadic(input, bias, residual):
        return handle_torch_function(
            bias_dropout_add, (input, bias, residual), input, bias, residual, p=p, training=training, generator=generator
        )  # fmt: skip
    _check_p(p)
    if bias is not None:
        check_bias("bias_dropout_add", bias, input)
    if residual.shape != input.shape:
        raise RuntimeError(
            f"bias_dropout_add: expected a residual of the input's shape {list(input.shape)}, got {list(residual.shape)}"
        )
    if (
        bias is None
        or p == 1
        or not input.dtype == bias.dtype == residual.dtype
        or not input.is_contiguous()
    ):
        shifted = input if bias is None else input + bias
        return residual + dropout(shifted, p, training, generator=generator)
    if not training or p == 0 or input.numel() == 0:
        return residual + (input + bias)
    return _C.bias_dropout_add(input, bias, residual, p, _seed(input, generator))
