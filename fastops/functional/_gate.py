"""Gates: one tensor times a function of another, or of the halves of one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from .. import _C
from .._core.registry import op

__all__ = ["glu", "swiglu"]


@op(kind="gate", reference=F.glu, kernels={"glu": {}, "glu_packed": {}})
def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The first half of input times the sigmoid of the second (Dauphin et al., 2017).

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any dense layout.
        dim: the dimension that is halved; its size is even.

    Raises:
        RuntimeError: an odd size, or no dimension at all.
        IndexError: `dim` is out of range.

    Same as :func:`torch.nn.functional.glu`. Example: ``glu(torch.tensor([2.0, 0.0]))`` is 1.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(glu, (input,), input, dim=dim)
    return _C.glu_packed(input, dim)


def _swiglu(gate, up=None, dim=-1):
    if up is None:
        gate, up = gate.chunk(2, dim)
    elif gate.shape != up.shape:
        raise RuntimeError(
            f"swiglu: expected tensors of one shape, got {gate.shape} and {up.shape}"
        )
    return F.silu(gate) * up


@op(kind="gate", reference=_swiglu, kernels={"swiglu": {}, "swiglu_packed": {}})
def swiglu(gate: Tensor, up: Tensor | None = None, dim: int = -1) -> Tensor:
    """silu(gate) * up, as in the feed-forward layers of language models (`Shazeer, 2020
    <https://arxiv.org/abs/2002.05202>`_).

    Args:
        gate: a float64, float32, bfloat16 or float16 tensor; without `up`, one whose halves along `dim` are gate and up.
        up: a tensor of the same shape, dtype and device. Both may be halves of one tensor: nothing is copied.
        dim: the dimension that is halved; its size is even.

    Raises:
        RuntimeError: tensors that differ in shape, dtype or device; an odd size.

    torch.nn.functional has no such function; it is ``silu(gate) * up`` of its silu, in one pass each way. Example:
    ``swiglu(torch.ones(1), torch.ones(1))`` is 0.7311.
    """
    if has_torch_function_variadic(gate, up):
        return handle_torch_function(swiglu, (gate, up), gate, up=up, dim=dim)
    return _C.swiglu_packed(gate, dim) if up is None else _C.swiglu(gate, up)
