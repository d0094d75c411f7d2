"""What a call becomes that the kernels refuse: torch's function of the same meaning."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .. import _C
from .registry import OPS, overload
from .usable import tensors_of

REDUCTIONS = ("none", "mean", "sum")  # by torch.nn._reduction.get_enum


@cache
def reference_of(name: str) -> Callable[..., Any]:
    """The torch function that computes what the C function `name` does, of the same arguments."""
    kernel = name.removesuffix("_")
    op = next((o for o in OPS.values() if kernel in o.kernels), None)
    if op is None:  # its function asks beforehand what the kernels take
        return lambda *args: NotImplemented
    fixed: dict[str, Any] = {**op.kernels[kernel], **({"inplace": True} if name != kernel else {})}
    if kernel == "dropout":  # the one C function whose arguments are those of the public function
        names = list(op.signature.parameters)
    else:
        names = [a.name for a in overload(kernel)._schema.arguments if a.name != "upcast"]
    try:
        accepted = list(inspect.signature(op.reference).parameters)
    except ValueError:  # a builtin: there are those of the public function
        accepted = list(op.signature.parameters)
    reference = op.reference
    if op.kind == "gate":  # of the halves of one tensor, or of two that are put together
        if kernel.endswith("_packed"):
            return lambda input, dim=-1: reference(input, dim=dim, **fixed)
        return lambda a, b: reference(torch.cat((a, b), -1), dim=-1, **fixed)
    defaults = {n: p.default for n, p in op.signature.parameters.items()}
    extras = {n: p.default for n, p in op.signature.parameters.items() if n not in accepted}

    def call(*args: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        if "seed" in given or any(
            given.get(n, default) != default for n, default in extras.items()
        ):
            return NotImplemented  # torch has nothing that means the same
        if "reduction" in given:
            given["reduction"] = REDUCTIONS[given["reduction"]]
        asked = {  # but numbers at their defaults, which torch may declare as integers
            n: v
            for n, v in given.items()
            if n in accepted and not (isinstance(v, float) and v == defaults.get(n))
        }
        return reference(**asked, **fixed)

    return call


def _unrecord() -> None:
    """make_fx and export note a call before it is made: one that was refused is taken out of their graph again."""
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
    mode = tracing and tracing.get_proxy_mode()
    if mode:
        last = next(iter(reversed(mode.tracer.graph.nodes)))
        if not last.users and str(last.target).startswith("fastops."):
            mode.tracer.graph.erase_node(last)


def fallback(name: str, args: tuple[Any, ...]) -> Any:
    """What a call becomes that the kernels have refused: integers, complex numbers, sparse, quantized and nested tensors,
    other devices, tensors that know torch's own ops only. _C asks after the fact, so that no other call pays for it."""
    if not _C.cuda_built() and any(t.is_cuda for t in tensors_of(args)):
        warnings.warn(
            f"fastops was built without CUDA kernels: torch computes {name} (see `python -m fastops doctor`)",
            stacklevel=3,
        )
    _unrecord()
    return reference_of(name)(*args)


def knows_only_torch(args: tuple[Any, ...]) -> bool:
    """Whether a tensor of these is of a class that has rules for torch's own ops, forward and backward: DTensor. _C asks where
    a class dispatches in Python."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors_of(args))


_C.set_fallback(fallback, knows_only_torch)
