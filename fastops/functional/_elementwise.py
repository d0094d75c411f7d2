"""The ops, one declaration each: torch.nn.functional's signature, what it computes, and the torch function that means
the same. Every function takes tensors of any dense layout and keeps it (channels_last stays channels_last). What has no
kernels (integers, complex numbers, sparse, quantized and nested tensors, other devices) is computed, promoted or refused
by that torch function."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from . import _C
from ._guard import DISABLED
from ._op import composed, elementwise, op, refusal, refused  # noqa: F401  the bodies written need it

__all__ = [
    "add_relu",
    "alpha_dropout",
    "bias_dropout_add",
    "bias_gelu",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "celu",
    "cross_entropy",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "huber_loss",
    "l1_loss",
    "leaky_relu",
    "log_softmax",
    "logsigmoid",
    "mish",
    "mixup_cross_entropy",
    "mse_loss",
    "nll_loss",
    "relu",
    "relu6",
    "relu_dropout",
    "selu",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "softmax",
    "softplus",
    "softsign",
    "squareplus",
    "tanh",
]

# ---------------------------------------------------------------------------------------------- activations


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
    rows={"gelu": {}, "gelu_tanh": {"approximate": "tanh"}},
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


@op(kind="map", reference=F.hardtanh)
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
    if min_val > max_val:
        raise ValueError(f"min_val cannot be greater than max_val, got {min_val} and {max_val}")
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


@op(kind="map", reference=F.celu, exact=_exact_celu)
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


    torch.nn.functional has no such function; it is like its softplus, without exponentials. Example:
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


# ---------------------------------------------------------------------------------------------- losses


@op(kind="reduce", reference=F.mse_loss)
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The squared difference of input and target, elementwise or its mean or sum.

    Args:
        input, target: float tensors of one shape; others are broadcast, with torch's warning.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: a factor per element, of input's shape; the mean is then the weighted mean.

    Returns:
        A 0-d tensor, or one of the inputs' shape for ``"none"``; of the inputs' dtype, float32 under autocast.

    Raises:
        ValueError: an unknown reduction, or a weight of another size.

    Same as :func:`torch.nn.functional.mse_loss`. Gradients flow to input and target. Example:
    ``mse_loss(torch.zeros(2), torch.tensor([1.0, 3.0]))`` is 5.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            mse_loss, (input, target, weight), input, target, size_average=size_average,
            reduce=reduce, reduction=reduction, weight=weight,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is not None or input.shape != target.shape:
        return _weighted(_C.mse_loss, input, target, reduction, weight, weighted_mean=True)
    return _C.mse_loss(input, target, _reduction.get_enum(reduction))


def _warn_of_broadcasting(input, target):
    if input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=4,
        )


def _reduced(values, reduction, count=None):
    """values, their sum, or their mean (over `count`, which defaults to their number)."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.mean() if count is None else values.sum() / count
    raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")


def _weighted(kernel, input, target, reduction, weight, *params, weighted_mean=False):
    """A loss of tensors that may have to be broadcast, with a weight per element."""
    _warn_of_broadcasting(input, target)
    expanded = torch.broadcast_tensors(input, target)
    if weight is None:
        return kernel(*expanded, _reduction.get_enum(reduction), *params)
    if weight.shape != input.shape:
        raise ValueError("Weights and input must have the same size.")
    values = kernel(*expanded, _reduction.get_enum("none"), *params) * weight
    return _reduced(values, reduction, weight.sum() if weighted_mean else None)


def _not_ours(input, target):
    """Whether a loss of these is left to torch: integers, complex numbers."""
    if input.is_complex() or target.is_complex():
        return True
    return not (input.is_floating_point() or target.is_floating_point())


@op(kind="reduce", reference=F.l1_loss)
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The absolute difference of input and target, elementwise or its mean or sum (MAE).

    Arguments, result and errors as :func:`mse_loss`. Same as :func:`torch.nn.functional.l1_loss`. Example:
    ``l1_loss(torch.zeros(2), torch.tensor([1.0, -3.0]))`` is 2.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            l1_loss, (input, target, weight), input, target, size_average=size_average,
            reduce=reduce, reduction=reduction, weight=weight,
        )  # fmt: skip
    if _not_ours(input, target):
        return F.l1_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is not None or input.shape != target.shape:
        return _weighted(_C.l1_loss, input, target, reduction, weight, weighted_mean=True)
    return _C.l1_loss(input, target, _reduction.get_enum(reduction))


@op(kind="reduce", reference=F.smooth_l1_loss)
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """The squared difference over 2 ``beta`` where it is below ``beta``, else the absolute difference less ``beta`` / 2
    (Girshick, 2015); elementwise or its mean or sum.

    Args:
        beta: where the two meet, not negative; 0 gives :func:`l1_loss`.

    Other arguments, result and errors as :func:`mse_loss`; RuntimeError for a negative beta. Same as
    :func:`torch.nn.functional.smooth_l1_loss`. Example: ``smooth_l1_loss(torch.zeros(2), torch.tensor([1.0, 3.0]))`` is 1.5.
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            smooth_l1_loss, (input, target), input, target, size_average=size_average,
            reduce=reduce, reduction=reduction, beta=beta,
        )  # fmt: skip
    if _not_ours(input, target):
        return F.smooth_l1_loss(input, target, size_average, reduce, reduction, beta)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not beta >= 0:
        raise RuntimeError(f"smooth_l1_loss does not support negative values for beta, got {beta}.")
    kernel, params = (_C.l1_loss, ()) if beta == 0 else (_C.smooth_l1_loss, (beta,))
    if input.shape != target.shape:
        return _weighted(kernel, input, target, reduction, None, *params)
    return kernel(input, target, _reduction.get_enum(reduction), *params)


@op(kind="reduce", reference=F.huber_loss)
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Half the squared difference up to ``delta``, beyond it ``delta`` (absolute difference - ``delta`` / 2) (Huber,
    1964); elementwise or its mean or sum.

    Args:
        delta: where the two meet, above 0.

    Other arguments, result and errors as :func:`mse_loss`, with the plain mean where a weight is given; RuntimeError for
    a delta that is not positive. Same as :func:`torch.nn.functional.huber_loss`. Example:
    ``huber_loss(torch.zeros(2), torch.tensor([1.0, 3.0]))`` is 1.5.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            huber_loss, (input, target, weight), input, target, reduction=reduction,
            delta=delta, weight=weight,
        )  # fmt: skip
    if input.dtype != target.dtype or _not_ours(input, target):
        return F.huber_loss(input, target, reduction, delta, weight)  # type: ignore[call-arg]
    if not delta > 0:
        raise RuntimeError(
            f"huber_loss does not support non-positive values for delta, got {delta}."
        )
    if weight is not None or input.shape != target.shape:
        return _weighted(_C.huber_loss, input, target, reduction, weight, delta)
    return _C.huber_loss(input, target, _reduction.get_enum(reduction), delta)


def _exact_binary_cross_entropy(input, target, reduction="mean"):
    """torch's adds 1e-12 to what its second derivatives divide by, in float64 too."""
    logs = input.log().clamp(min=-100), torch.log1p(-input).clamp(min=-100)
    return _reduced(-(target * logs[0] + (1 - target) * logs[1]), reduction)


@op(
    kind="reduce",
    reference=F.binary_cross_entropy,
    exact=_exact_binary_cross_entropy,
)
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-(target log(input) + (1 - target) log(1 - input)), logarithms kept above -100; elementwise or its mean or sum.

    Args:
        input: probabilities in [0, 1].
        target: of input's shape, usually in [0, 1].
        weight: a factor per element, broadcast to target; the mean is not weighted.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: input and target of two sizes, an unknown reduction.
        RuntimeError: an input outside [0, 1] (on CUDA, where looking would mean waiting, the result is NaN).
        Under autocast it is torch's own, which refuses float16 on CUDA: use :func:`binary_cross_entropy_with_logits`.

    Same as :func:`torch.nn.functional.binary_cross_entropy`. Gradients flow to input and target. Example:
    ``binary_cross_entropy(torch.tensor([0.5]), torch.tensor([1.0]))`` is log(2).
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            binary_cross_entropy, (input, target, weight), input, target, weight=weight,
            size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if (
        _not_ours(input, target)
        or input.dtype != target.dtype
        or (input.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(input.device.type))
    ):
        return F.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    enum = _reduction.get_enum(reduction)
    if target.shape != input.shape:
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}) is deprecated. Please ensure they have the same size."
        )
    if weight is None:
        return _C.binary_cross_entropy(input, target, enum)
    weight = weight.expand(torch.broadcast_shapes(target.shape, weight.shape))
    return _reduced(_C.binary_cross_entropy(input, target, 0) * weight, reduction)


@op(
    kind="reduce",
    reference=F.binary_cross_entropy_with_logits,
    rows={
        "binary_cross_entropy_with_logits": {},
        "binary_cross_entropy_with_logits_pos_weight": {},
    },
)
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """:func:`binary_cross_entropy` of sigmoid(input), from the logits and without overflow.

    Args:
        input: logits.
        target: of input's shape, usually in [0, 1].
        weight: a factor per element, broadcast to input; the mean is not weighted.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        pos_weight: a factor for the positive part, broadcast to target: of shape (C) beside (N, C), or (C, 1, 1) beside
            (N, C, H, W). In the same pass. No gradient flows to it.

    Raises:
        ValueError: input and target of two sizes, an unknown reduction.
        RuntimeError: a weight or pos_weight that does not broadcast, a pos_weight that requires grad.

    Tensors of more than one dtype are left to torch, and so are a weight and a pos_weight together. Same as
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`. Gradients flow to input and target. Example:
    ``binary_cross_entropy_with_logits(torch.zeros(1), torch.ones(1))`` is log(2).
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_cross_entropy_with_logits, (input, target, weight, pos_weight), input, target,
            weight=weight, size_average=size_average, reduce=reduce, reduction=reduction,
            pos_weight=pos_weight,
        )  # fmt: skip
    if (
        input.dtype != target.dtype
        or _not_ours(input, target)
        or (weight is not None and pos_weight is not None)
        or not (
            pos_weight is None
            or (pos_weight.dtype == input.dtype and pos_weight.device == input.device)
        )
    ):
        return F.binary_cross_entropy_with_logits(
            input, target, weight, size_average, reduce, reduction, pos_weight
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    enum = _reduction.get_enum(reduction)
    if target.shape != input.shape:
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    if pos_weight is not None:
        return _C.binary_cross_entropy_with_logits_pos_weight(input, target, enum, pos_weight)
    if weight is None:
        return _C.binary_cross_entropy_with_logits(input, target, enum)
    return _reduced(_C.binary_cross_entropy_with_logits(input, target, 0) * weight, reduction)


@op(kind="rows", reference=F.cross_entropy)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    return_lse: bool = False,
    z_loss: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy between logits and targets: -log(softmax(input)[target]).

    The loss and its gradient are computed in one visit of the logits when a gradient will be wanted; nothing else is
    kept for backward.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ...), in any dense layout.
        target: class indices (int64 or uint8) of shape (), (N) or (N, d1, ...); or probabilities of input's shape,
            of which input's dtype and theirs are promoted to one. Gradients flow to them too.
        weight: a factor per class, of shape (C) and input's dtype; with probabilities it takes part in the promotion,
            under autocast any float dtype will do. No gradient flows to it.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this target count for nothing.
        reduction: ``"none"``, ``"mean"`` (weighted, over rows not ignored) or ``"sum"``.
        label_smoothing: in [0, 1]; how much of the target distribution is spread over all classes.
        return_lse: also return log(sum(exp(input))) of each row. Its gradient is softmax(input), for which the logits
            are kept.
        z_loss: a factor, not negative; z_loss * lse^2 is added to the loss of each row not ignored, before the reduction
            (`Chowdhery et al., 2022 <https://arxiv.org/abs/2204.02311>`_, section 5). In the same visit.
        inplace_backward: write the gradient over the logits, which halves the memory: they must be dense, no leaf that
            requires grad, and of no use to anybody else. Other uses of them raise in backward, as do gradients of the
            gradient, of target and of lse. Without a gradient to be taken, and under torch.compile, torch.func and
            forward-mode AD, the logits are left alone.

    Returns:
        A 0-d tensor, or one of target's shape for ``"none"``; of input's dtype, float32 under autocast. With return_lse
        (loss, lse), lse of the unreduced loss's shape, float64 for float64 and else float32, 0 where a row is ignored
        and NaN where it holds inf, as the loss does.

    Raises:
        IndexError: a target out of range (on CUDA a device assertion, as torch's).
        ValueError: batch sizes that differ, an unknown reduction, a z_loss that is negative or not finite.
        RuntimeError: shapes, dtypes or devices that do not fit; inplace_backward on a leaf that requires grad, or on
            logits that are not dense.

    Same as :func:`torch.nn.functional.cross_entropy`. Example: ``cross_entropy(torch.zeros(1, 10), torch.tensor([3]))``
    is log(10) = 2.3026.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight=weight,
            size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction, label_smoothing=label_smoothing, return_lse=return_lse,
            z_loss=z_loss, inplace_backward=inplace_backward,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not isinstance(target, Tensor):
        raise TypeError(f"cross_entropy: target must be a Tensor, got {type(target).__name__}")
    if target.is_floating_point():
        dtype = torch.promote_types(input.dtype, target.dtype)
        if isinstance(weight, Tensor) and weight.dtype != dtype:
            # autocast brings all to float32, but for float64
            narrow = (torch.float32, torch.bfloat16, torch.float16)
            if not (
                weight.dtype in narrow
                and dtype in narrow
                and torch.is_autocast_enabled(input.device.type)
            ):
                dtype = torch.promote_types(dtype, weight.dtype)
                weight = weight.to(dtype)
        if input.dtype != dtype or target.dtype != dtype:
            input, target = input.to(dtype), target.to(dtype)
    elif input.dim() == 1 and target.shape == (1,):
        target = target.squeeze(0)
    if return_lse or z_loss != 0 or inplace_backward:
        call = _C.cross_entropy_ if inplace_backward else _C.cross_entropy_lse
        loss, lse = call(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing, z_loss, return_lse
        )  # fmt: skip
        return (loss, lse) if return_lse else loss
    return _C.cross_entropy(
        input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
    )


# ---------------------------------------------------------------------------------------------- softmax


def _softmax_dim(name: str, ndim: int, stacklevel: int) -> int:
    return F._get_softmax_dim(name, ndim, stacklevel + 1)  # type: ignore[attr-defined]


@op(kind="rows", reference=F.softmax)
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

    Same as :func:`torch.nn.functional.softmax`; float32 under autocast. Example: ``softmax(torch.zeros(4), dim=0)`` is
    0.25 four times.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype
        )
    if dim is None:
        dim = _softmax_dim("softmax", input.dim(), _stacklevel)
    return _C.softmax(input if dtype is None else input.to(dtype=dtype), dim)


@op(kind="rows", reference=F.log_softmax)
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
    return _C.log_softmax(input if dtype is None else input.to(dtype=dtype), dim)


# ---------------------------------------------------------------------------------------------- dropout


@op(kind="random", reference=F.dropout)
def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zeroes each element with probability p and scales the others by 1 / (1 - p).

    The mask comes of a counter-based generator (Philox 4x32-10) keyed by one random seed and the element's row-major
    index. Backward makes it again: no mask is kept. It is the same on every device, for any number of threads and any
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


# ---------------------------------------------------------------------------------------------- composed


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
            stacklevel=3,
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
    if not training or p == 0 or input.numel() == 0:
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


@composed
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-input[target] of log-probabilities: :func:`torch.nn.functional.nll_loss` itself, which reads one number a row
    forward and fills zeros backward: nothing is left to win. From logits, :func:`cross_entropy` does both steps in one."""
    return F.nll_loss(
        input, target, weight=weight, size_average=size_average, ignore_index=ignore_index,
        reduce=reduce, reduction=reduction,
    )  # fmt: skip


@composed
def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """lam cross_entropy(input, target_a) + (1 - lam) cross_entropy(input, target_b): the loss of mixup (Zhang et al.,
    2018), from class indices; no one-hot targets are made. In one visit of the logits, with one gradient kept; in one for
    each target where lam is a tensor, the targets are no class indices, or the logits of one dimension.

    Args:
        input: logits, as for :func:`cross_entropy`.
        target_a, target_b: class indices of the examples that were mixed.
        lam: how much of the first is in the mixture, in [0, 1]: a number, a 0-d tensor, or with ``reduction="none"`` a
            tensor that broadcasts with the losses. A gradient flows to a tensor.
        weight, ignore_index, reduction, label_smoothing: as for :func:`cross_entropy`, of either term.

    Raises:
        ValueError: lam outside [0, 1], or more than one lam to a reduced loss; and what :func:`cross_entropy` raises.

    Example: ``mixup_cross_entropy(logits, y, y[permutation], 0.7)``.
    """
    if isinstance(lam, Tensor):
        if lam.numel() != 1 and reduction != "none":
            raise ValueError(
                f'mixup_cross_entropy: lam of shape {tuple(lam.shape)} needs reduction="none", got {reduction!r}'
            )
    elif not 0 <= lam <= 1:
        raise ValueError(f"mixup_cross_entropy: lam has to be between 0 and 1, but got {lam}")
    elif not (
        DISABLED
        or has_torch_function_variadic(input, target_a, target_b, weight)
        or refused(input)
        or input.dim() < 2
        or target_a.is_floating_point()
        or target_b.is_floating_point()
    ):
        enum = _reduction.get_enum(reduction)
        return _C.cross_entropy_mixup(
            input, target_a, target_b, lam, weight, enum, ignore_index, label_smoothing
        )
    a, b = (
        cross_entropy(
            input, target, weight=weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        )
        for target in (target_a, target_b)
    )  # fmt: skip
    return lam * a + (1 - lam) * b


# ---------------------------------------------------------------------------------------------- fused


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
    rows={"bias_gelu": {}, "bias_gelu_tanh": {"approximate": "tanh"}},
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
        _check_row("bias_gelu", bias, input)
        return gelu(input + bias, approximate=approximate)
    if approximate == "none":
        return _C.bias_gelu(input, bias)
    if approximate == "tanh":
        return _C.bias_gelu_tanh(input, bias)
    raise RuntimeError(f"approximate argument must be either none or tanh, got {approximate!r}")


def _check_row(name: str, bias: Tensor, input: Tensor) -> None:
    """What the kernels check themselves, for the ways around them."""
    if input.dim() < 1 or bias.shape != input.shape[-1:]:
        raise RuntimeError(
            f"{name}: expected a bias of as many elements as the input's last dimension has, got {list(bias.shape)} "
            f"for an input of {list(input.shape)}"
        )


def _seed(input: Tensor, generator: torch.Generator | None) -> Tensor:
    """What a mask is made from: one number of torch's generator, as :func:`dropout` takes it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=input.device, generator=generator)


def _check_p(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


@op(
    kind="random",
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
    kind="random",
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
        _check_row("bias_dropout_add", bias, input)
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
