"""Batches for torch.func.vmap. From the tables, in loops; no formula."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake import MEAN, NONE
from .registry import KERNELS, has_slope, kernels_of, overload


def at_front(x, dim, size):
    """x with its batch dimension first; expanded to it where x has none."""
    if not isinstance(x, Tensor):
        return x
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def all_at_front(info, dims, *args):
    return [at_front(a, d, info.batch_size) for a, d in zip(args, dims, strict=True)]


def beside(x, dims, params):
    """The parameters; of those that are tensors, which broadcast to each example of x, the shape that broadcasts to all."""

    def shaped(w, dim):
        if dim is None or not isinstance(w, Tensor):
            return w
        w = w.movedim(dim, 0)
        return w.reshape(w.shape[0], *(1,) * (x.dim() - w.dim()), *w.shape[1:])

    return [shaped(w, d) for w, d in zip(params, dims, strict=True)]


def batched(name: str, rule=None):
    def register(rule):
        torch.library.register_vmap(f"fastops::{name}", rule)
        return rule

    return register(rule) if rule else register


def elementwise_rule(name: str):
    call = overload(name)

    def rule(info, dims, *args):
        return call(*all_at_front(info, dims, *args)), 0

    return rule


def inplace_rule(name: str):
    call = overload(name)

    def rule(info, dims, self, *rest):
        if dims[0] is None:
            raise RuntimeError(
                f"fastops::{name}: an unbatched tensor cannot be written to under vmap"
            )
        return call(self.movedim(dims[0], 0), *rest), None

    return rule


def reduced(values: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return values
    flat = values.reshape(values.shape[0], -1)
    return flat.mean(1) if reduction == MEAN else flat.sum(1)


def _vmaps() -> None:
    for name in kernels_of("elementwise"):
        batched(name, elementwise_rule(name))
        batched(f"{name}_backward", elementwise_rule(f"{name}_backward"))
        batched(f"{name}_second", elementwise_rule(f"{name}_second"))
        batched(f"{name}_", inplace_rule(f"{name}_"))

    def gates(name):
        for end in ("", "_backward", "_tangent", "_second"):
            batched(
                name + end, (packed_rule if name.endswith("_packed") else pair_rule)(name + end)
            )

    def pair_rule(name):
        call = overload(name)

        def rule(info, dims, *args):
            found = call(*all_at_front(info, dims, *args))
            return found, 0 if isinstance(found, Tensor) else (0,) * len(found)

        return rule

    def packed_rule(name):
        call = overload(name)

        def rule(info, dims, *args):
            *tensors, dim = args if not isinstance(args[-1], Tensor) else (*args, -1)
            at = [at_front(t, d, info.batch_size) for t, d in zip(tensors, dims, strict=False)]
            return call(*at, dim + 1 if dim >= 0 else dim), 0

        return rule

    for name in kernels_of("gate"):
        gates(name)

    def losses(name):
        forward, backward = overload(name), overload(f"{name}_backward")
        second = overload(f"{name}_second")

        def rule(info, dims, input, target, reduction=MEAN, upcast=False, *params):
            x, t = all_at_front(info, dims[:2], input, target)
            params = beside(x, dims[4:], params)
            return reduced(forward(x, t, NONE, upcast, *params), reduction), 0

        def backward_rule(info, dims, grad, input, target, reduction, *rest):
            g, x, t = all_at_front(info, dims[:3], grad, input, target)
            if reduction != NONE:
                g = g.reshape(-1, *(1,) * (x.dim() - 1)).expand_as(x).to(x.dtype)
                if reduction == MEAN:
                    g = g / x[0].numel()
            return backward(g, x, t, NONE, *beside(x, dims[4:], rest)), 0

        def second_rule(info, dims, input, target, *rest):
            x, t = all_at_front(info, dims[:2], input, target)
            return second(x, t, *beside(x, dims[2:], rest)), 0

        def slope_rule(info, dims, input, target, reduction=MEAN, upcast=False, *params):
            x, t = all_at_front(info, dims[:2], input, target)
            values, slope = overload(f"{name}_with_slope")(x, t, NONE, upcast, *params)
            return (reduced(values, reduction), slope), (0, 0)

        batched(name, rule)
        batched(f"{name}_backward", backward_rule)
        batched(f"{name}_second", second_rule)
        if has_slope(name):
            batched(f"{name}_with_slope", slope_rule)

    for name in kernels_of("loss"):
        if name != "sum":
            losses(name)

    def softmaxes(name):
        forward, backward = overload(name), overload(f"{name}_backward")

        def shifted(dim, logical_dims):
            return dim + 1 if dim >= 0 else dim + max(logical_dims, 1) + 1

        def rule(info, dims, input, dim):
            x = at_front(input, dims[0], info.batch_size)
            if x.dim() == 1:  # a batch of scalars: each is a row of its own
                return forward(x.unsqueeze(1), 1).squeeze(1), 0
            return forward(x, shifted(dim, x.dim() - 1)), 0

        def backward_rule(info, dims, grad, output, dim):
            g, y = all_at_front(info, dims[:2], grad, output)
            if y.dim() == 1:
                return backward(g.unsqueeze(1), y.unsqueeze(1), 1).squeeze(1), 0
            return backward(g, y, shifted(dim, y.dim() - 1)), 0

        batched(name, rule)
        batched(f"{name}_backward", backward_rule)

    for name in kernels_of("softmax"):
        softmaxes(name)

    def calls_of(info, dims, input, target, weight, *rest):
        """The arguments of one unbatched call per example."""
        x, t = all_at_front(info, dims[:2], input, target)
        others = all_at_front(info, dims[3:], *rest)
        return [
            (
                x[k], t[k], weight if dims[2] is None else weight.select(dims[2], k),
                *(a[k] if isinstance(a, Tensor) else a for a in others),
            )
            for k in range(info.batch_size)
        ]  # fmt: skip

    def cross_entropy_rule(info, dims, *args):
        calls = calls_of(info, complete(dims), *complete(args))
        return torch.stack([overload("cross_entropy")(*c) for c in calls]), 0

    def stacked(results):
        """Of several calls that each return several tensors."""
        each = tuple(torch.stack(values) for values in zip(*results, strict=True))
        return each, (0,) * len(each)

    def cross_entropy_forward_rule(info, dims, *args):
        calls = calls_of(info, complete(dims), *complete(args))
        return stacked([overload("cross_entropy_forward")(*c) for c in calls])

    def complete(given):
        """Arguments (or their batch dimensions, which are then not looked at) left at their defaults are not passed on."""
        defaults = (None, None, None, MEAN, -100, 0.0, False)
        return (*given, *defaults[len(given) :])

    batched("cross_entropy", cross_entropy_rule)
    batched("cross_entropy_forward", cross_entropy_forward_rule)

    def dropout_rule(info, dims, input, p, seed):
        call = overload("dropout")
        if dims[2] is None:  # one seed: every example has the same mask
            x = input.movedim(dims[0], 0)
            keep = call(torch.ones_like(x[0]), p, seed)
            return x * keep, 0
        seeds = seed.movedim(dims[2], 0)
        x = at_front(input, dims[0], info.batch_size)
        return torch.stack(
            [call(a, p, s) for a, s in zip(x.unbind(0), seeds.unbind(0), strict=True)]
        ), 0

    batched("dropout", dropout_rule)

    def one_by_one(name):
        """Every example by a call of its own: a row, or a mask, of its own."""
        call = overload(name)

        def rule(info, dims, *args):
            each = [at_front(a, d, info.batch_size) for a, d in zip(args, dims, strict=True)]
            results = [
                call(*(a[k] if isinstance(a, Tensor) else a for a in each))
                for k in range(info.batch_size)
            ]
            return (torch.stack(results), 0) if isinstance(results[0], Tensor) else stacked(results)

        batched(name, rule)

    def by_row(name):
        call, single = overload(name), overload(f"{name}_")

        def rule(info, dims, input, bias):
            if dims[1] is None and input.dim() > 1:
                return call(input.movedim(dims[0], 0), bias), 0
            x, b = (
                at_front(a, d, info.batch_size) for a, d in zip((input, bias), dims, strict=True)
            )
            return torch.stack([call(*pair) for pair in zip(x, b, strict=True)]), 0

        def in_place(info, dims, self, bias):
            if dims[0] is None:
                raise RuntimeError(
                    f"fastops::{name}_: an unbatched tensor cannot be written to under vmap"
                )
            x, b = (
                at_front(a, d, info.batch_size) for a, d in zip((self, bias), dims, strict=True)
            )
            for pair in zip(x, b, strict=True):
                single(*pair)
            return None, None

        batched(name, rule)
        batched(f"{name}_", in_place)

    def joined(name):
        call = overload(f"{name}_")

        def rule(info, dims, self, other):
            if dims[0] is None:
                raise RuntimeError(
                    f"fastops::{name}_: an unbatched tensor cannot be written to under vmap"
                )
            call(self.movedim(dims[0], 0), at_front(other, dims[1], info.batch_size))
            return None, None

        return rule

    for name in kernels_of("fused"):
        if KERNELS[name][1]:
            by_row(name)
            one_by_one(f"{name}_backward")
        else:
            batched(name, elementwise_rule(name))
            batched(f"{name}_", joined(name))
    one_by_one("relu_dropout")
    batched("relu_dropout_backward", elementwise_rule("relu_dropout_backward"))
    one_by_one("bias_dropout_add")
    one_by_one("bias_dropout_add_backward")


_vmaps()
