"""What a declaration in functional.py means: `@op` enters it into the table that everything else is made from.

Fake kernels, vmap rules, torch.compile's view of the C functions, autograd.Function classes, tests and benchmarks all
read `OPS`; no op is named here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._guard import bound


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
    rows: tuple[str, ...] = field(default=())  # the rows of the kernels' tables behind it

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)


OPS: dict[str, Op] = {}
ROWS: dict[str, tuple[str, str]] = {name: (kind, params) for kind, name, params in _C.rows()}


def op(
    *,
    kind: str,
    reference: Callable[..., Tensor],
    exact: Callable[..., Tensor] | None = None,
    rows: tuple[str, ...] = (),
):
    """Enters the decorated function into `OPS`. `rows` defaults to the one row of the function's own name."""

    def enter(function):
        name = function.__name__
        function = bound(name, function, reference)
        OPS[name] = Op(name, kind, function, reference, exact or reference, rows or (name,))
        return function

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
