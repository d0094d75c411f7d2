"""Losses of an elementwise value: none, mean or sum of it."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _C
from .._core.registry import op

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "huber_loss",
    "l1_loss",
    "mse_loss",
    "smooth_l1_loss",
]


@op(kind="loss", reference=F.mse_loss)
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
    if input.shape != target.shape and not torch.compiler.is_compiling():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=5,
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


def _is_unusual(weight, input):
    """Whether a weight promotes or enlarges the loss by itself, or cannot be multiplied with it: torch says what follows."""
    if weight is None:
        return False
    sizes = zip(reversed(weight.shape), reversed(input.shape), strict=False)
    return (
        weight.dtype != input.dtype
        or weight.dim() > input.dim()
        or any(w not in (1, n) for w, n in sizes)
    )


def _not_ours(input, target):
    """Whether a loss of these is left to torch: integers, complex numbers."""
    if input.is_complex() or target.is_complex():
        return True
    return not (input.is_floating_point() or target.is_floating_point())


@op(kind="loss", reference=F.l1_loss)
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The absolute difference of input and target, elementwise or its mean or sum (MAE).

    Backward needs only the slope, and only the slope is kept: input and target may be overwritten in place afterwards.
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


@op(kind="loss", reference=F.smooth_l1_loss)
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


@op(kind="loss", reference=F.huber_loss)
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
    kind="loss",
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
        or _is_unusual(weight, input)
        or (weight is not None and weight.requires_grad)
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
    kind="loss",
    reference=F.binary_cross_entropy_with_logits,
    kernels={
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
        or _is_unusual(weight, input)
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
