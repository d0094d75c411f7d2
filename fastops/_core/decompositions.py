"""What torch's own ops make of ours: decompositions for torch.export's `run_decompositions()` and the ONNX exporter, so
that a program that was exported with fastops can do without it.

Only forward ops have one. A dropout that is being trained has none: its mask comes from a seed in a way that torch's ops
do not know, and backward makes the mask again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fallback import reference_of
from .registry import has_slope, kernels_of, overload


def _wide(x: Tensor, upcast: bool) -> Tensor:
    """What a loss is computed in: under autocast the result is float32."""
    return x.float() if upcast and x.dtype in (torch.bfloat16, torch.float16) else x


def _loss(name: str) -> Callable:
    reference = reference_of(name)

    def decomposed(input, target, reduction=1, upcast=False, *params):
        return reference(_wide(input, upcast), _wide(target, upcast), reduction, *params)

    return decomposed


def _loss_with_slope(name: str) -> Callable:
    """Of a loss that is constant in pieces but for a slope of -1 and 1."""
    loss = _loss(name)

    def decomposed(input, target, *rest):
        return loss(input, target, *rest), (input - target).sign()

    return decomposed


def _cross_entropy(
    input, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0, upcast=False,
    second_target=None, lam=1.0,
):  # fmt: skip
    name = ("none", "mean", "sum")[reduction]
    x = _wide(input, upcast)
    wide = weight if weight is None else _wide(weight, upcast)
    dim = min(1, x.dim() - 1)

    def of(target):
        if target.is_floating_point():
            return F.cross_entropy(x, _wide(target, upcast), wide, reduction=name, label_smoothing=label_smoothing)  # fmt: skip
        target, logs = target.to(torch.int64), F.log_softmax(x, dim)
        loss = F.nll_loss(logs, target, wide, ignore_index=ignore_index, reduction=name)
        if label_smoothing == 0:
            return loss
        # torch's own smoothing fills in place, which a decomposition may not.
        live = target != ignore_index
        each = logs if wide is None else logs * wide.view(-1, *(1,) * (x.dim() - 1 - dim))
        smooth = torch.where(live, -each.sum(dim), 0)
        if name == "mean":
            mass = (
                live if wide is None else torch.where(live, wide[torch.where(live, target, 0)], 0)
            )
            smooth = smooth.sum() / mass.sum()
        elif name == "sum":
            smooth = smooth.sum()
        return (1 - label_smoothing) * loss + label_smoothing / x.shape[dim] * smooth

    first = of(target)
    return first if second_target is None else lam * first + (1 - lam) * of(second_target)


@functools.cache
def decompositions() -> dict[Any, Callable]:
    """The table: op -> a function of torch's ops."""
    table: dict[Any, Callable] = {}
    for name in (
        *kernels_of("elementwise"),
        *kernels_of("softmax"),
        *kernels_of("fused"),
        *kernels_of("gate"),
    ):
        table[overload(name)] = reference_of(name)
    for name in kernels_of("loss"):
        if name != "sum":
            table[overload(name)] = _loss(name)
            if has_slope(name):
                table[overload(f"{name}_with_slope")] = _loss_with_slope(name)
    table[overload("cross_entropy")] = _cross_entropy
    return table


def _register() -> None:
    """In torch's global table, which the ONNX exporter reads, and in the default one of `run_decompositions()`, which torch
    fills from a list of its own ops."""
    torch._decomp.global_decomposition_table["post_autograd"].update(decompositions())  # type: ignore[attr-defined]
    of_torch = torch._decomp._core_aten_decompositions_post_autograd

    @functools.wraps(of_torch)
    def with_ours():
        return {**of_torch(), **decompositions()}

    torch._decomp._core_aten_decompositions_post_autograd = with_ours


_register()
