"""Softmax and its logarithm along a dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _C
from .._core.registry import composed, op

__all__ = ["log_softmax", "softmax", "softmin"]


def _softmax_dim(name: str, ndim: int, stacklevel: int) -> int:
    return F._get_softmax_dim(name, ndim, stacklevel + 2)  # type: ignore[attr-defined]


@op(kind="softmax", reference=F.softmax)
def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """exp(input) / sum(exp(input)) along a dimension.

    Args:
        input: a float tensor of any shape and dense layout; other dtypes with `dtype` only.
        dim: the dimension whose values sum to 1.
        dtype: what input is converted to first.

    Raises:
        IndexError: `dim` is out of range.
        NotImplementedError: integers without `dtype`.

    Same as :func:`torch.nn.functional.softmax`, under autocast too: float32 on CUDA, the input's dtype on the CPU.
    Example: ``softmax(torch.zeros(4), dim=0)`` is 0.25 four times.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype
        )
    if dim is None:
        dim = _softmax_dim("softmax", input.dim(), _stacklevel)
    if dtype is None:
        return _C.softmax(input, dim)
    return _C.softmax(input.to(dtype=dtype), dim).to(dtype=dtype)  # whatever autocast asks for


@op(kind="softmax", reference=F.log_softmax)
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """log(softmax(input)) along a dimension, without overflow.

    Args, errors: those of :func:`softmax`. Same as :func:`torch.nn.functional.log_softmax`.
    Example: ``log_softmax(torch.zeros(4), dim=0)`` is -1.3863 four times.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            log_softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype
        )
    if dim is None:
        dim = _softmax_dim("log_softmax", input.dim(), _stacklevel)
    if dtype is None:
        return _C.log_softmax(input, dim)
    return _C.log_softmax(input.to(dtype=dtype), dim).to(dtype=dtype)  # whatever autocast asks for


@composed
def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """exp(-input) / sum(exp(-input)) along a dimension.

    Args, errors: those of :func:`softmax`. Same as :func:`torch.nn.functional.softmin`; it is :func:`softmax` of -input.
    Example: ``softmin(torch.zeros(4), dim=0)`` is 0.25 four times.
    """
    if dim is None:
        dim = _softmax_dim("softmin", input.dim(), _stacklevel)
    return softmax(-input, dim, dtype=dtype)
