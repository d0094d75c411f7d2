"""Elementwise functions: activations, and activations fused with their neighbors. A declaration with `@elementwise` is
the whole of an activation: its body, module, autograd.Function, tests and benchmark rows are made from it."""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from .. import _C
from .._core.arguments import refusal  # noqa: F401  of the bodies that are written
from .._core.registry import composed, elementwise, op

__all__ = [
    "add_relu",
    "bias_gelu",
    "celu",
    "elu",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "squareplus",
    "tanh",
    "tanhshrink",
]


@elementwise(reference=F.relu)
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        inplace: overwrite `input` and return it.

    Raises:
        RuntimeError: `inplace` on a leaf that requires grad, or on a tensor that overlaps itself.

    Same as :func:`torch.nn.functional.relu`. Example: ``relu(torch.tensor([-1.0, 2.0]))`` is ``[0., 2.]``.
    """


def _exact_gelu(input, approximate="none"):
    """In float64, torch's 1 + tanh(u) cancels below 0, and its derivative with it; the logistic function of 2 u is the
    same."""
    if approximate != "tanh":
        return F.gelu(input, approximate=approximate)
    twice_u = 1.5957691216057308 * (input + 0.044715 * input**3)
    return input * F.logsigmoid(twice_u).exp()


@elementwise(
    reference=F.gelu,
    exact=_exact_gelu,
    kernels={"gelu": {}, "gelu_tanh": {"approximate": "tanh"}},
)
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input * Phi(input), with Phi the cumulative distribution function of the normal distribution.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        approximate: ``"none"``, or ``"tanh"`` for 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    Raises:
        RuntimeError: `approximate` is neither.

    Same as :func:`torch.nn.functional.gelu` (Hendrycks and Gimpel, 2016). Example: ``gelu(torch.ones(1))`` is 0.8413.
    """


@elementwise(reference=F.relu6)
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input, 0), 6), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.relu6`. Example: ``relu6(torch.tensor([8.0]))`` is 6.
    """


@op(kind="elementwise", reference=F.hardtanh)
def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """min(max(input, min_val), max_val), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        min_val, max_val: the bounds.
        inplace: overwrite `input` and return it.

    Raises:
        ValueError: `min_val` is above `max_val`.

    Same as :func:`torch.nn.functional.hardtanh`. Example: ``hardtanh(torch.tensor([8.0]))`` is 1.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            hardtanh, (input,), input, min_val=min_val, max_val=max_val, inplace=inplace
        )
    if not min_val <= max_val:
        if min_val > max_val:
            raise ValueError(f"min_val cannot be greater than max_val, got {min_val} and {max_val}")
        return F.hardtanh(input, min_val, max_val, inplace)  # a NaN
    return (
        _C.hardtanh_(input, min_val, max_val) if inplace else _C.hardtanh(input, min_val, max_val)
    )


@elementwise(reference=F.leaky_relu)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where positive, else negative_slope * input.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        negative_slope: the slope below 0.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.leaky_relu`. Example: ``leaky_relu(torch.tensor([-1.0]))`` is -0.01.
    """


@elementwise(reference=F.elu)
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """input where positive, else alpha * (exp(input) - 1).

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        alpha: minus the value far below 0.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.elu`. Example: ``elu(torch.tensor([-1.0]))`` is -0.6321.
    """


@elementwise(reference=F.selu)
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """1.0507 * (input where positive, else 1.6733 * (exp(input) - 1)).

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.selu`. Example: ``selu(torch.ones(1))`` is 1.0507.
    """


def _exact_celu(input, alpha=1.0, inplace=False):
    """torch's own gradient has float32's 1 / alpha, for float64 too."""
    return alpha * F.elu(input / alpha)


@op(kind="elementwise", reference=F.celu, exact=_exact_celu)
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """input where positive, else alpha * (exp(input / alpha) - 1).

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        alpha: minus the value far below 0; not 0.
        inplace: overwrite `input` and return it.

    Raises:
        RuntimeError: `alpha` is 0.

    Same as :func:`torch.nn.functional.celu`. Example: ``celu(torch.tensor([-1.0]))`` is -0.6321.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(celu, (input,), input, alpha=alpha, inplace=inplace)
    if alpha == 0:
        raise RuntimeError("ZeroDivisionError: alpha cannot be 0 for CELU")
    return _C.celu_(input, alpha) if inplace else _C.celu(input, alpha)


@elementwise(reference=F.sigmoid)
def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input)), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.

    Same as :func:`torch.nn.functional.sigmoid`. Example: ``sigmoid(torch.zeros(1))`` is 0.5.
    """


@elementwise(reference=F.tanh)
def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent, elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.

    Same as :func:`torch.nn.functional.tanh`. Example: ``tanh(torch.ones(1))`` is 0.7616.
    """


@elementwise(reference=F.logsigmoid)
def logsigmoid(input: Tensor) -> Tensor:
    """log(1 / (1 + exp(-input))), elementwise, without overflow.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.

    Same as :func:`torch.nn.functional.logsigmoid`. Example: ``logsigmoid(torch.zeros(1))`` is -0.6931.
    """


@elementwise(reference=F.softplus)
def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta * input)) / beta, elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        beta: the sharpness of the bend.
        threshold: where beta * input is above it the result is input.

    Same as :func:`torch.nn.functional.softplus`. Example: ``softplus(torch.zeros(1))`` is 0.6931.
    """


@elementwise(reference=F.softsign)
def softsign(input: Tensor) -> Tensor:
    """input / (1 + |input|), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.

    Same as :func:`torch.nn.functional.softsign`. Example: ``softsign(torch.ones(1))`` is 0.5.
    """


def _exact_squareplus(input, b=4.0):
    """Without the cancellation, and inf - inf, that the plain formula has below 0."""
    root = (input * input + b).sqrt()
    return 0.5 * torch.where(input > 0, input + root, b / (root - input))


@elementwise(
    reference=lambda input, b=4.0: 0.5 * (input + (input * input + b).sqrt()),
    exact=_exact_squareplus,
)
def squareplus(input: Tensor, b: float = 4.0) -> Tensor:
    """(input + sqrt(input^2 + b)) / 2, elementwise (`Barron, 2021 <https://arxiv.org/abs/2112.11687>`_).

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        b: how wide the bend around 0 is, not negative; 0 is relu, 4 gives a slope of 1/2 and a value of 1 at 0.

    torch.nn.functional has no such function. It resembles softplus, without exponentials. Example:
    ``squareplus(torch.zeros(1))`` is 1.
    """


@elementwise(reference=F.silu)
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input / (1 + exp(-input)), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.silu`. Example: ``silu(torch.ones(1))`` is 0.7311.
    """


@elementwise(reference=F.mish)
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """input * tanh(log(1 + exp(input))), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.mish`. Example: ``mish(torch.ones(1))`` is 0.8651.
    """


def _hardsigmoid_of_float64(input, inplace=False):
    """torch's own gradient is multiplied by float32's 1 / 6, for float64 too."""
    return F.relu6(input + 3) / 6


@elementwise(reference=F.hardsigmoid, exact=_hardsigmoid_of_float64)
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input + 3, 0), 6) / 6, elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.hardsigmoid`. Example: ``hardsigmoid(torch.zeros(1))`` is 0.5.
    """


@elementwise(reference=F.hardswish)
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """input * min(max(input + 3, 0), 6) / 6, elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        inplace: overwrite `input` and return it.

    Same as :func:`torch.nn.functional.hardswish`. Example: ``hardswish(torch.ones(1))`` is 0.6667.
    """


@elementwise(reference=F.hardshrink)
def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """input where |input| > lambd, else 0.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        lambd: the largest magnitude that becomes 0.

    Same as :func:`torch.nn.functional.hardshrink`. Example: ``hardshrink(torch.tensor([0.4, -2.0]))`` is ``[0., -2.]``.
    """


@op(kind="elementwise", reference=F.softshrink)
def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """input - lambd above lambd, input + lambd below -lambd, else 0.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.
        lambd: the threshold, not negative.

    Raises:
        RuntimeError: `lambd` is negative.

    Same as :func:`torch.nn.functional.softshrink`. Example: ``softshrink(torch.tensor([0.4, -2.0]))`` is
    ``[0.0, -1.5]``.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(softshrink, (input,), input, lambd=lambd)
    if not 0 <= lambd <= 65504:  # beyond, it depends on the dtype, and torch says so
        return F.softshrink(input, lambd)
    return _C.softshrink(input, lambd)


@composed
def tanhshrink(input: Tensor) -> Tensor:
    """input - tanh(input), elementwise.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape.

    Same as :func:`torch.nn.functional.tanhshrink`; it is :func:`tanh` and a subtraction. Example:
    ``tanhshrink(torch.ones(1))`` is 0.2384.
    """
    return input - tanh(input)


@op(
    kind="fused",
    reference=lambda input, other, inplace=False: F.relu(
        input.add_(other) if inplace else input + other, inplace
    ),
)
def add_relu(input: Tensor, other: Tensor, inplace: bool = False) -> Tensor:
    """relu(input + other) in one pass: the join of a residual block (He et al., 2015).

    Only the output is kept for backward, which is one pass too.

    Args:
        input: a float64, float32, bfloat16 or float16 tensor of any shape and dense layout.
        other: a tensor of the same shape and dtype; others are broadcast and promoted as by ``+``, in two passes.
        inplace: overwrite `input` and return it.

    Raises:
        RuntimeError: shapes that do not broadcast; `inplace` on a leaf that requires grad, or where memory overlaps.

    Same as ``torch.nn.functional.relu(input + other)``. Example: ``add_relu(torch.tensor([1.0, -3.0]), torch.ones(2))``
    is ``[2., 0.]``.
    """
    if has_torch_function_variadic(input, other):
        return handle_torch_function(add_relu, (input, other), input, other, inplace=inplace)
    if input.shape != other.shape or input.dtype != other.dtype:
        return relu(input.add_(other) if inplace else input + other, inplace=inplace)
    return _C.add_relu_(input, other) if inplace else _C.add_relu(input, other)


@op(
    kind="fused",
    reference=lambda input, bias, approximate="none": F.gelu(input + bias, approximate=approximate),
    exact=lambda input, bias, approximate="none": _exact_gelu(input + bias, approximate),
    kernels={"bias_gelu": {}, "bias_gelu_tanh": {"approximate": "tanh"}},
)
def bias_gelu(input: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """gelu(input + bias) in one pass, and in one pass backward, in which the bias's gradient is summed as well: what
    follows a linear layer without its bias.

    Args:
        input: a contiguous float64, float32, bfloat16 or float16 tensor of shape (..., C); another layout is kept, in
            two passes.
        bias: a tensor of shape (C) and input's dtype (another is promoted as by ``+``, in two passes).
        approximate: ``"none"`` or ``"tanh"``, as :func:`gelu` has it.

    Raises:
        RuntimeError: a `bias` of another shape or device, an unknown `approximate`.

    Same as ``torch.nn.functional.gelu(input + bias)``, as Megatron-LM fuses it (Shoeybi et al., 2019).
    Example: ``bias_gelu(torch.zeros(1, 2), torch.tensor([0.0, 1.0]))`` is ``[[0.0000, 0.8413]]``.
    """
    if has_torch_function_variadic(input, bias):
        return handle_torch_function(bias_gelu, (input, bias), input, bias, approximate=approximate)
    if input.dtype != bias.dtype or not input.is_contiguous():
        check_bias("bias_gelu", bias, input)
        return gelu(input + bias, approximate=approximate)
    if approximate == "none":
        return _C.bias_gelu(input, bias)
    if approximate == "tanh":
        return _C.bias_gelu_tanh(input, bias)
    raise RuntimeError(f"approximate argument must be either none or tanh, got {approximate!r}")


def check_bias(name: str, bias: Tensor, input: Tensor) -> None:
    """What the kernels check themselves, for the ways around them."""
    if input.dim() < 1 or bias.shape != input.shape[-1:]:
        raise RuntimeError(
            f"{name}: expected a bias of as many elements as the input's last dimension has, got {list(bias.shape)} "
            f"for an input of {list(input.shape)}"
        )
