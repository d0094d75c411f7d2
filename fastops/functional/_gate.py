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

__all__ = ["geglu", "glu", "reglu", "swiglu"]


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


def _halves(name, gate, up, dim):
    if up is None:
        return gate.chunk(2, dim)
    if gate.shape != up.shape:
        raise RuntimeError(
            f"{name}: expected tensors of one shape, got {gate.shape} and {up.shape}"
        )
    return gate, up


def _swiglu(gate, up=None, dim=-1):
    gate, up = _halves("swiglu", gate, up, dim)
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


def _geglu(gate, up=None, dim=-1, approximate="none"):
    gate, up = _halves("geglu", gate, up, dim)
    return F.gelu(gate, approximate=approximate) * up


@op(
    kind="gate",
    reference=_geglu,
    kernels={
        "geglu": {},
        "geglu_packed": {},
        "geglu_tanh": {"approximate": "tanh"},
        "geglu_tanh_packed": {"approximate": "tanh"},
    },
)
def geglu(
    gate: Tensor, up: Tensor | None = None, dim: int = -1, approximate: str = "none"
) -> Tensor:
    """gelu(gate) * up (`Shazeer, 2020 <https://arxiv.org/abs/2002.05202>`_).

    Args:
        gate, up, dim: as :func:`swiglu`.
        approximate: ``"none"`` or ``"tanh"``, as :func:`gelu` has it.

    Raises:
        RuntimeError: what :func:`swiglu` raises; an unknown `approximate`.

    torch.nn.functional has no such function; it is ``gelu(gate) * up`` of its gelu, in one pass each way. Example:
    ``geglu(torch.ones(1), torch.ones(1))`` is 0.8413.
    """
    if has_torch_function_variadic(gate, up):
        return handle_torch_function(
            geglu, (gate, up), gate, up=up, dim=dim, approximate=approximate
        )
    if approximate == "none":
        return _C.geglu_packed(gate, dim) if up is None else _C.geglu(gate, up)
    if approximate == "tanh":
        return _C.geglu_tanh_packed(gate, dim) if up is None else _C.geglu_tanh(gate, up)
    raise RuntimeError(f"approximate argument must be either none or tanh, got {approximate!r}")


def _reglu(gate, up=None, dim=-1):
    gate, up = _halves("reglu", gate, up, dim)
    return F.relu(gate) * up


@op(kind="gate", reference=_reglu, kernels={"reglu": {}, "reglu_packed": {}})
def reglu(gate: Tensor, up: Tensor | None = None, dim: int = -1) -> Tensor:
    """relu(gate) * up (`Shazeer, 2020 <https://arxiv.org/abs/2002.05202>`_).

    Args, errors: those of :func:`swiglu`. torch.nn.functional has no such function; it is ``relu(gate) * up`` of its relu,
    in one pass each way. Example: ``reglu(torch.tensor([-1.0, 2.0]), torch.ones(2))`` is ``[0., 2.]``.
    """
    if has_torch_function_variadic(gate, up):
        return handle_torch_function(reglu, (gate, up), gate, up=up, dim=dim)
    return _C.reglu_packed(gate, dim) if up is None else _C.reglu(gate, up)
