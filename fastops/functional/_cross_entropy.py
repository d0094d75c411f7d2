"""Cross-entropy from logits, and what is made of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _C
from .._core.by_torch import DISABLED
from .._core.registry import composed, op
from .._core.usable import refused

__all__ = ["cross_entropy", "mixup_cross_entropy", "nll_loss"]


@op(kind="cross_entropy", reference=F.cross_entropy)
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
            with input's dtype and theirs promoted to one. On the CPU, float32 probabilities beside bfloat16 or float16
            logits are read as they are, and the logits are not copied. Gradients flow to probabilities too.
        weight: a factor per class, of shape (C) and input's dtype; with probabilities it takes part in the promotion,
            under autocast any float dtype will do. No gradient flows to it.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this target do not count.
        reduction: ``"none"``, ``"mean"`` (weighted, over rows not ignored) or ``"sum"``.
        label_smoothing: in [0, 1]; how much of the target distribution is spread over all classes.
        return_lse: also return log(sum(exp(input))) of each row. Its gradient is softmax(input), for which the logits
            are kept.
        z_loss: a factor, not negative; z_loss * lse^2 is added to the loss of each row not ignored, before the reduction
            (`Chowdhery et al., 2022 <https://arxiv.org/abs/2204.02311>`_, section 5). In the same visit.
        inplace_backward: write the gradient over the logits, which halves the memory. They must be dense, must not be a
            leaf that requires grad, and must not be used for anything else. Other uses of them raise in backward, as do gradients of the
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
        # On the CPU the kernels read float32 targets beside narrower logits, which are not copied.
        if dtype != torch.float32 or target.dtype != dtype or not input.is_cpu:
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
    """-input[target] of log-probabilities: :func:`torch.nn.functional.nll_loss` itself. It reads one number per
    row in forward and fills zeros in backward, so a kernel of ours could not be faster. From logits, use
    :func:`cross_entropy`, which does both steps in one."""
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
    2018), from class indices, without one-hot targets. It visits the logits once and keeps one gradient. It visits them
    once for each target if lam is a tensor, if the targets are not class indices, or if the logits have one dimension.

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
