"""What a declaration in functional.py means: `@op` enters it into the table that everything else is made from.

Fake kernels, vmap rules, torch.compile's view of the C functions, autograd.Function classes, tests and benchmarks all
read `OPS`; no op is named here.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._guard import DTYPES, bound


@dataclass(frozen=True)
class Op:
    """One public function: what it is called, which kind of kernel computes it, and what it means.

    `reference` is a torch function of the same signature: documentation, test oracle and benchmark baseline. `exact` is
    what its float64 result should be, where torch's own is not that of float64.
    """

    name: str
    kind: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    signature: inspect.Signature
    # The rows of the kernels' tables behind it, and the arguments that each of them stands for.
    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)


OPS: dict[str, Op] = {}
ROWS: dict[str, tuple[str, str]] = {name: (kind, params) for kind, name, params in _C.rows()}


def op(
    *,
    kind: str,
    reference: Callable[..., Tensor],
    exact: Callable[..., Tensor] | None = None,
    rows: Mapping[str, dict[str, Any]] | None = None,
):
    """Enters the decorated function into `OPS`. `rows` defaults to the one row of the function's own name."""

    def enter(function):
        name = function.__name__
        used = bound(name, function, reference)
        signature = inspect.signature(function)
        OPS[name] = Op(
            name, kind, used, reference, exact or reference, signature, rows or {name: {}}
        )
        return used

    return enter


COMPOSED: dict[str, Callable[..., Tensor]] = {}


def composed(function):
    """Enters a public function that is made of others, and has no kernel of its own."""
    COMPOSED[function.__name__] = function
    return function


def parameters_of(row: str) -> list[tuple[str, float]]:
    """The parameters of a row and their defaults, as its schema declares them."""
    return [(n, float(v)) for n, v in re.findall(r"float (\w+)=([-\w.]+)", ROWS[row][1])]


def overload(name: str) -> Any:
    """The dispatcher's op fastops::name."""
    return getattr(torch.ops.fastops, name).default


# ---------------------------------------------------------------------------------------------- what torch computes

REDUCTIONS = ("none", "mean", "sum")  # by torch.nn._reduction.get_enum


def tensors_of(args: Iterable[Any]) -> list[Tensor]:
    """Those of the arguments that are tensors."""
    return [a for a in args if isinstance(a, Tensor)]


def refused(*args: Any) -> bool:
    """Whether the kernels do not take these arguments: no float tensor among them, or one of another kind."""
    tensors = tensors_of(args)
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    return (
        not floats
        or any(t.dtype not in DTYPES for t in floats)
        or any(t.layout is not torch.strided for t in tensors)
    )


@cache
def reference_of(name: str) -> Callable[..., Any]:
    """The torch function that computes what the C function `name` does, of the same arguments."""
    row = name.removesuffix("_")
    op = next(o for o in OPS.values() if row in o.rows)
    fixed: dict[str, Any] = {**op.rows[row], **({"inplace": True} if name != row else {})}
    if row == "dropout":  # the one C function whose arguments are those of the public function
        names = list(op.signature.parameters)
    else:
        names = [a.name for a in overload(row)._schema.arguments if a.name != "upcast"]
    try:
        accepted = list(inspect.signature(op.reference).parameters)
    except ValueError:  # a builtin: there are those of the public function
        accepted = list(op.signature.parameters)
    reference = op.reference
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


def _hand_over(name: str, args: tuple[Any, ...]) -> Any:
    """What a call becomes that the kernels have refused: integers, complex numbers, sparse, quantized and nested tensors,
    other devices, tensors that know torch's own ops only. _C asks after the fact, so that no other call pays for it."""
    if not _C.cuda_built() and any(t.is_cuda for t in tensors_of(args)):
        warnings.warn(
            f"fastops was built without CUDA kernels: torch computes {name} (see `python -m fastops doctor`)",
            stacklevel=3,
        )
    _unrecord()
    return reference_of(name)(*args)


_C.set_hand_over(_hand_over)
