"""What torch's own ops make of ours: decompositions for torch.export's `run_decompositions()` and the ONNX exporter, so
that a program that was exported with fastops can do without it.

Only forward ops have one. A dropout that is being trained has none: its mask comes from a seed in a way that torch's ops
do not know, and backward makes the mask again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._compile import rows_of
from ._op import overload, reference_of


def _wide(x: Tensor, upcast: bool) -> Tensor:
    """What a loss is computed in: under autocast the result is float32."""
    return x.float() if upcast and x.dtype in (torch.bfloat16, torch.float16) else x


def _loss(name: str) -> Callable:
    reference = reference_of(name)

    def decomposed(input, target, reduction=1, upcast=False, *params):
        return reference(_wide(input, upcast), _wide(target, upcast), reduction, *params)

    return decomposed


def _cross_entropy(
    input, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0, upcast=False,
    second_target=None, lam=1.0,
):  # fmt: skip
    def of(target):
        if target.is_floating_point():
            target = _wide(target, upcast)
        elif target.dtype != torch.int64:
            target = target.to(torch.int64)
        wide = weight if weight is None else _wide(weight, upcast)
        return torch.nn.functional.cross_entropy(
            _wide(input, upcast), target, wide, ignore_index=ignore_index,
            reduction=("none", "mean", "sum")[reduction], label_smoothing=label_smoothing,
        )  # fmt: skip

    first = of(target)
    return first if second_target is None else lam * first + (1 - lam) * of(second_target)


@functools.cache
def decompositions() -> dict[Any, Callable]:
    """The table: op -> a function of torch's ops."""
    table: dict[Any, Callable] = {}
    for name in (*rows_of("map"), *rows_of("softmax"), *rows_of("fused")):
        table[overload(name)] = reference_of(name)
    for name in rows_of("reduce"):
        if name != "sum":
            table[overload(name)] = _loss(name)
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
