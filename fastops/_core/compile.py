"""What torch.compile traces in place of the C functions."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable

import torch

from .. import _C
from .fallback import reference_of
from .registry import kernels_of, overload
from .usable import refused, tensors_of


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

    for name in kernels_of("elementwise"):
        plain(name)
        inplace(name)
    for name in (*kernels_of("softmax"), *kernels_of("gate")):
        plain(name)
    for name in (*kernels_of("fused"), "relu_dropout"):
        plain(name)
        inplace(name)
    plain("bias_dropout_add")
    plain("cross_entropy")
    cross_entropy_forward = overload("cross_entropy_forward")

    def with_lse(
        input, target, weight, reduction, ignore_index, label_smoothing, z_loss, return_lse
    ):
        loss, _, lse, _ = cross_entropy_forward(
            input, target, weight, reduction, ignore_index, label_smoothing, False, None, 1.0,
            z_loss, return_lse, False,
        )  # fmt: skip
        return loss, lse

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

    for name in kernels_of("loss"):
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


when_imported("torch._dynamo", _polyfills)
