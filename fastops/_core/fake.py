"""Shapes without values, for torch.compile, torch.export and meta tensors. From the tables, in loops; no formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .registry import KERNELS, has_slope, kernels_of
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
    for name in kernels_of("elementwise"):
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

    def with_slope(input, target, reduction=MEAN, upcast=False, *params):
        values = loss(input, target, NONE, upcast and reduction == NONE, *params)
        return loss(input, target, reduction, upcast, *params), like(values)

    for name in kernels_of("loss"):
        if name == "sum":
            continue
        fake(name)(loss)
        if has_slope(name):
            fake(f"{name}_with_slope")(with_slope)
        fake(f"{name}_backward")(
            lambda grad, input, target, reduction, *rest: like(target if rest[-1] else input)
        )
        fake(f"{name}_second")(
            lambda input, target, *rest: like(input).to(torch.result_type(input, target))
        )

    for name in kernels_of("softmax"):
        fake(name)(lambda input, dim: like(input))
        fake(f"{name}_backward")(lambda grad, output, dim: like(output))

    def cross_entropy(
        input, target, weight=None, reduction=MEAN, ignore_index=-100, smoothing=0.0, upcast=False,
        second_target=None, lam=1.0,
    ):  # fmt: skip
        shape = target.shape if reduction == NONE else ()
        if reduction == NONE and target.is_floating_point():
            shape = torch.Size(n for d, n in enumerate(shape) if d != min(1, input.dim() - 1))
        wider = target.dtype == torch.float32  # a distribution beside narrower logits
        return input.new_empty(shape, dtype=real(input, upcast or wider))

    fake("cross_entropy")(cross_entropy)

    def lse_of(input, target):
        each = cross_entropy(input, target, reduction=NONE)
        return each.new_empty(each.shape, dtype=real(input, True))

    def factor(input, reduction):  # what float16 cannot hold is not yet in the gradient of a mean
        has = input.dtype == torch.float16 and reduction == MEAN and input.numel() > 0
        return input.new_empty(() if has else 0, dtype=real(input, True))

    @fake("cross_entropy_forward")
    def _(
        input, target, weight=None, reduction=MEAN, ignore_index=-100, smoothing=0.0, upcast=False,
        second_target=None, lam=1.0, z_loss=0.0, return_lse=False, with_grad=True,
    ):  # fmt: skip
        loss = cross_entropy(input, target, reduction=reduction, upcast=upcast)
        nothing = input.new_empty(0)
        has_lse = return_lse or z_loss != 0
        return (
            loss,
            like(input) if with_grad else nothing,
            lse_of(input, target) if has_lse else nothing.to(real(input, True), copy=True),
            factor(input, reduction if with_grad else NONE),
        )

    @fake("cross_entropy_")
    def _(
        input, target, weight=None, reduction=MEAN, ignore_index=-100, smoothing=0.0, upcast=False, *rest
    ):  # fmt: skip
        loss = cross_entropy(input, target, reduction=reduction, upcast=upcast)
        return loss, lse_of(input, target), factor(input, reduction)

    def contiguous(input, *rest):
        return input.new_empty(input.shape)

    for name in kernels_of("fused"):
        fake(name)(contiguous if KERNELS[name][1] else lambda input, other: like(input))
        fake(f"{name}_")(lambda self, other: None)
        if KERNELS[name][1]:
            fake(f"{name}_backward")(
                lambda grad, input, bias, with_bias=True: (
                    contiguous(input), input.new_empty(bias.shape if with_bias else 0)
                )
            )  # fmt: skip

    def as_one(*tensors):
        """A result of tensors of one shape: in their layout where that is dense and the same, else contiguous."""
        first = tensors[0]
        alike = all(t.stride() == first.stride() for t in tensors)
        return (
            like(first) if alike and like(first).stride() == first.stride() else contiguous(first)
        )

    def halved(name, x, dim):
        """As large as half of x along dim, in the memory order of x."""
        torch._check(x.dim() > 0, lambda: f"{name} does not support 0-dimensional tensors")
        d = dim if dim >= 0 else dim + x.dim()
        if not 0 <= d < x.dim():
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-x.dim()}, {x.dim() - 1}], but got {dim})"
            )
        x, dim = like(x), d
        sizes, strides = list(x.shape), list(x.stride())
        torch._check(
            sizes[dim] % 2 == 0,
            lambda: (
                f"{name}: Halving dimension must be even, but dimension {dim} is size {sizes[dim]}"
            ),
        )
        span = sizes[dim] * strides[dim]
        sizes[dim] //= 2
        strides = [s // 2 if d != dim and span and s >= span else s for d, s in enumerate(strides)]
        return x.new_empty_strided(sizes, strides)

    for name in kernels_of("gate"):
        if name.endswith("_packed"):
            fake(name)(lambda input, dim=-1, name=name: halved(name, input, dim))
            fake(f"{name}_backward")(lambda input, grad, dim: like(input))
            fake(f"{name}_tangent")(lambda input, along, dim, name=name: halved(name, input, dim))
            fake(f"{name}_second")(lambda input, grad, along, dim: like(input))
        else:
            for end in ("", "_tangent"):
                fake(name + end)(as_one)
            for end in ("_backward", "_second"):
                fake(name + end)(lambda *tensors: (as_one(*tensors), as_one(*tensors)))

    @fake("batch_norm_act")
    def _(input, residual, weight, bias, running_mean, running_var, training, eps, *rest):
        dtype = real(input, True)
        x = input.contiguous(memory_format=suggest_memory_format(input))
        return like(x), *(input.new_empty(input.shape[1], dtype=dtype) for _ in range(3))

    def row_norm(centered):
        def shapes(input, residual, weight, bias, dims, eps):
            y = input.new_empty(input.shape)
            total = input.new_empty(0 if residual is None else input.shape)
            rows = (1 + centered, input[(..., *(0,) * dims)].numel())
            return y, total, input.new_empty(rows, dtype=real(input, True))

        return shapes

    fake("layer_norm")(row_norm(True))
    fake("rms_norm")(row_norm(False))

    fake("relu_dropout_backward")(lambda output, grad, p: like(output))

    @fake("bias_dropout_add_backward")
    def _(grad, p, seed, with_bias=True):
        rows = with_bias and grad.dim() > 1 and grad.numel() > 0
        dx = contiguous(grad) if rows else like(grad)
        return dx, grad.new_empty(grad.shape[-1:] if with_bias else 0)

    fake("relu_dropout")(lambda input, p, seed: like(input))
    fake("relu_dropout_")(lambda self, p, seed: None)
    fake("bias_dropout_add")(contiguous)
    fake("dropout")(lambda input, p, seed: like(input))
    fake("dropout_")(lambda self, p, seed: None)


_fakes()
