"""Shapes without values, for torch.compile, torch.export and meta tensors. From the tables, in loops; no formula."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import ROWS, rows_of
from .usable import refused, tensors_of

NONE, MEAN, SUM = 0, 1, 2  # torch.nn._reduction.get_enum


def fake(name: str):
    """Registers the shape function of an op. It refuses what the kernels refuse, so that a call with tensors without
    values goes where one with values does; and tensors on several devices: a meta tensor among others brings a real call
    here, whose result would be uninitialised memory."""

    def register(shape_of):
        def checked(*args, **kwargs):
            given = (*args, *kwargs.values())
            if refused(*given):
                raise NotImplementedError(
                    f"fastops::{name}: not float64, float32, bfloat16, float16"
                )
            devices = {t.device for t in tensors_of(given)}
            if len(devices) > 1:
                found = " and ".join(sorted(map(str, devices)))
                raise RuntimeError(
                    f"fastops::{name}: expected all tensors on one device, got {found}"
                )
            return shape_of(*args, **kwargs)

        return torch.library.register_fake(f"fastops::{name}", checked)

    return register


def like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fakes() -> None:
    for name in rows_of("map"):
        fake(name)(lambda input, *params: like(input))
        fake(f"{name}_")(lambda self, *params: None)
        fake(f"{name}_backward")(lambda saved, grad, *params: like(saved))
        fake(f"{name}_second")(lambda saved, grad, grad_grad, *params: like(saved))

    def real(x: Tensor, upcast: bool) -> torch.dtype:
        return torch.float64 if x.dtype == torch.float64 else torch.float32 if upcast else x.dtype

    def loss(input, target, reduction=MEAN, upcast=False, *params):
        for weight in tensors_of(params):
            weight.expand(input.shape)  # raises where it cannot
        x = like(input).to(torch.result_type(input, target))
        x = x.to(real(x, upcast))
        return x if reduction == NONE else x.new_empty(())

    for name in rows_of("reduce"):
        if name == "sum":
            continue
        fake(name)(loss)
        fake(f"{name}_backward")(
            lambda grad, input, target, reduction, *rest: like(target if rest[-1] else input)
        )
        fake(f"{name}_second")(
            lambda input, target, *rest: like(input).to(torch.result_type(input, target))
        )

    for name in rows_of("softmax"):
        fake(name)(lambda input, dim: like(input))
        fake(f"{name}_backward")(lambda grad, output, dim: like(output))

    def cross_entropy(
        input, target, weight=None, reduction=MEAN, ignore_index=-100, smoothing=0.0, upcast=False,
        second_target=None, lam=1.0,
    ):  # fmt: skip
        shape = target.shape if reduction == NONE else ()
        if reduction == NONE and target.is_floating_point():
            shape = torch.Size(n for d, n in enumerate(shape) if d != min(1, input.dim() - 1))
        return input.new_empty(shape, dtype=real(input, upcast))

    fake("cross_entropy")(cross_entropy)
    fake("cross_entropy_forward")(lambda input, *rest: (cross_entropy(input, *rest), like(input)))

    def with_lse(
        input, target, weight=None, reduction=MEAN, ignore_index=-100, smoothing=0.0, upcast=False
    ):
        each = cross_entropy(input, target, reduction=NONE)
        lse = each.new_empty(each.shape, dtype=real(input, True))
        return cross_entropy(input, target, reduction=reduction, upcast=upcast), lse

    @fake("cross_entropy_lse")
    def _(input, target, *rest):
        rest = (*rest, *(None, MEAN, -100, 0.0, False, 0.0, True, False)[len(rest) :])
        return *with_lse(input, target, *rest[:5]), like(input) if rest[7] else input.new_empty(0)

    fake("cross_entropy_")(lambda input, target, *rest: with_lse(input, target, *rest[:5]))

    def contiguous(input, *rest):
        return input.new_empty(input.shape)

    for name in rows_of("fused"):
        fake(name)(contiguous if ROWS[name][1] else lambda input, other: like(input))
        fake(f"{name}_")(lambda self, other: None)

    fake("relu_dropout")(lambda input, p, seed: like(input))
    fake("relu_dropout_")(lambda self, p, seed: None)
    fake("bias_dropout_add")(contiguous)
    fake("dropout")(lambda input, p, seed: like(input))
    fake("dropout_")(lambda self, p, seed: None)


_fakes()
