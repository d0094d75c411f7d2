"""What torch.compile, torch.export and torch.func need to know of the ops beside their kernels: shapes without values
(fake), batches (vmap), and what to trace in place of the C functions. From the tables, in loops; no formula."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import (
    _C,
    functional,  # noqa: F401  which fills the table
)
from ._op import ROWS, overload, reference_of, refused, tensors_of

NONE, MEAN, SUM = 0, 1, 2  # torch.nn._reduction.get_enum


def rows_of(kind: str) -> list[str]:
    return [name for name, (k, _) in ROWS.items() if k == kind]


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


# ---------------------------------------------------------------------------------------------- fake kernels


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


# ---------------------------------------------------------------------------------------------- vmap


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
    for name in rows_of("map"):
        batched(name, elementwise_rule(name))
        batched(f"{name}_backward", elementwise_rule(f"{name}_backward"))
        batched(f"{name}_second", elementwise_rule(f"{name}_second"))
        batched(f"{name}_", inplace_rule(f"{name}_"))

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

        batched(name, rule)
        batched(f"{name}_backward", backward_rule)
        batched(f"{name}_second", second_rule)

    for name in rows_of("reduce"):
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

    for name in rows_of("softmax"):
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

    def cross_entropy_forward_rule(info, dims, *args):
        calls = calls_of(info, complete(dims), *complete(args))
        loss, grad = zip(*(overload("cross_entropy_forward")(*c) for c in calls), strict=True)
        return (torch.stack(loss), torch.stack(grad)), (0, 0)

    def cross_entropy_lse_rule(info, dims, *args):
        calls = calls_of(info, complete(dims), *complete(args))
        each = zip(*(overload("cross_entropy_lse")(*c) for c in calls), strict=True)
        return tuple(torch.stack(values) for values in each), (0, 0, 0)

    def complete(given):
        """Arguments (or their batch dimensions, which are then not looked at) left at their defaults are not passed on."""
        defaults = (None, None, None, MEAN, -100, 0.0, False)
        return (*given, *defaults[len(given) :])

    batched("cross_entropy", cross_entropy_rule)
    batched("cross_entropy_forward", cross_entropy_forward_rule)
    batched("cross_entropy_lse", cross_entropy_lse_rule)

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
            return torch.stack(
                [
                    call(*(a[k] if isinstance(a, Tensor) else a for a in each))
                    for k in range(info.batch_size)
                ]
            ), 0

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

    for name in rows_of("fused"):
        if ROWS[name][1]:
            by_row(name)
        else:
            batched(name, elementwise_rule(name))
            batched(f"{name}_", joined(name))
    one_by_one("relu_dropout")
    one_by_one("bias_dropout_add")


# ---------------------------------------------------------------------------------------------- torch.compile


def substitute(function):
    return torch.compiler.substitute_in_graph(function, skip_signature_check=True)


def _polyfills() -> None:
    def plain(name):
        call, torchs = overload(name), reference_of(name)

        def polyfill(*args):
            return torchs(*args) if refused(*args) else call(*args)

        substitute(getattr(_C, name))(polyfill)

    def inplace(name):
        call, torchs = overload(name), reference_of(f"{name}_")

        def polyfill(input, *params):
            if refused(input, *params):
                return torchs(input, *params)
            return input.copy_(call(input, *params))

        substitute(getattr(_C, f"{name}_"))(polyfill)

    for name in rows_of("map"):
        plain(name)
        inplace(name)
    for name in rows_of("softmax"):
        plain(name)
    for name in (*rows_of("fused"), "relu_dropout"):
        plain(name)
        inplace(name)
    plain("bias_dropout_add")
    plain("cross_entropy")
    cross_entropy_lse = overload("cross_entropy_lse")

    def with_lse(
        input, target, weight, reduction, ignore_index, label_smoothing, z_loss, return_lse
    ):
        return cross_entropy_lse(
            input, target, weight, reduction, ignore_index, label_smoothing, False, z_loss, return_lse
        )[:2]  # fmt: skip

    substitute(_C.cross_entropy_lse)(with_lse)
    cross_entropy = overload("cross_entropy")

    def mixup(input, target, second_target, lam, weight, reduction, ignore_index, label_smoothing):
        return cross_entropy(
            input, target, weight, reduction, ignore_index, label_smoothing, False, second_target, lam
        )  # fmt: skip

    substitute(_C.cross_entropy_mixup)(mixup)
    # The compiler plans what memory is used again, and by what.
    substitute(_C.cross_entropy_)(lambda *args: with_lse(*args))

    def loss(name):
        call, torchs = overload(name), reference_of(name)

        def polyfill(input, target, reduction, *params):
            differentiated = any(p.requires_grad for p in tensors_of(params))
            if differentiated or refused(input, target, *params):
                return torchs(input, target, reduction, *params)
            return call(input, target, reduction, False, *params)

        substitute(getattr(_C, name))(polyfill)

    for name in rows_of("reduce"):
        if name != "sum":
            loss(name)

    dropout_op, torchs_dropout = overload("dropout"), reference_of("dropout")

    def dropout(input, p, training, inplace=False, generator=None):
        if p < 0 or p > 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if not training or p == 0 or input.numel() == 0:
            return input
        if p == 1:
            nothing = input.new_zeros(())
            return input.mul_(nothing) if inplace else input * nothing
        if refused(input):
            return torchs_dropout(input, p, training, inplace, generator)
        seed = torch.randint(
            2**63 - 1, (), dtype=torch.int64, device=input.device, generator=generator
        )
        y = dropout_op(input, p, seed)
        return input.copy_(y) if inplace else y

    substitute(_C.dropout)(dropout)


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Calls `then` once module `name` is imported: now, or when somebody does. torch._dynamo takes as long to import as
    torch itself, and only those who compile need it."""
    if name in sys.modules:
        then()
        return

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path, target=None):
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module):
                    execute(module)
                    then()

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder())


_fakes()
_vmaps()
when_imported("torch._dynamo", _polyfills)
