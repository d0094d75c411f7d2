"""What a declaration in functional.py means: `@op` enters it into the table that everything else is made from.

Fake kernels, vmap rules, torch.compile's view of the C functions, autograd.Function classes, tests and benchmarks all
read `OPS`; no op is named here.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _C
from .arguments import refusal, tensor_parameters, tensors_checked
from .by_torch import bound
from .declaration import body_of


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
    # The kernels behind it, by their names in csrc's tables, and the arguments that each of them stands for.
    kernels: Mapping[str, dict[str, Any]] = field(default_factory=dict)


PUBLIC = "fastops.functional"  # where the functions are, whichever file declares them
OPS: dict[str, Op] = {}
KERNELS: dict[str, tuple[str, str]] = {name: (kind, params) for kind, name, params in _C.kernels()}


def op(
    *,
    kind: str,
    reference: Callable[..., Tensor],
    exact: Callable[..., Tensor] | None = None,
    kernels: Mapping[str, dict[str, Any]] | None = None,
):
    """Enters the decorated function into `OPS`. `kernels` defaults to the one of the function's own name."""

    def enter(function):
        return _entered(tensors_checked(function), kind, reference, exact, kernels)

    return enter


def elementwise(
    *,
    reference: Callable[..., Tensor],
    exact: Callable[..., Tensor] | None = None,
    kernels: Mapping[str, dict[str, Any]] | None = None,
):
    """Enters an elementwise function of one tensor, of which the declaration is the whole: its body is written here.

    The parameters are those of the kernel, in order, and `inplace` where there is an in-place form. Of several `kernels`,
    which one is run is the value of the one parameter that they differ in.
    """

    def enter(function):
        return _entered(body_of(function, kernels), "elementwise", reference, exact, kernels)

    return enter


def _entered(function, kind, reference, exact, kernels):
    name = function.__name__
    function.__module__ = PUBLIC
    used = bound(name, function, reference)
    signature = inspect.signature(function)
    OPS[name] = Op(
        name, kind, used, reference, exact or reference, signature, kernels or {name: {}}
    )
    return used


COMPOSED: dict[str, Callable[..., Tensor]] = {}


def composed(function):
    """Enters a public function that is made of others, and has no kernel of its own. As torch's, it goes to the
    `__torch_function__` of what knows its own functions (what torch.fx traces, subclasses, modes) as one function."""
    tensors = tensor_parameters(function)

    @functools.wraps(function)
    def entered(*args, **kwargs):
        given = [args[p - 1] if p <= len(args) else kwargs.get(name) for p, name, _ in tensors]
        if has_torch_function(given):
            return handle_torch_function(entered, given, *args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if (refused := refusal(function, *args, **kwargs)) is None:
                raise
            raise refused from error

    entered.__module__ = PUBLIC
    COMPOSED[function.__name__] = entered
    return entered


def parameters_of(kernel: str) -> list[tuple[str, float]]:
    """The parameters of a kernel and their defaults, as its schema declares them."""
    return [(n, float(v)) for n, v in re.findall(r"float (\w+)=([-\w.]+)", KERNELS[kernel][1])]


def kernels_of(kind: str) -> list[str]:
    return [name for name, (k, _) in KERNELS.items() if k == kind]


def has_slope(loss: str) -> bool:
    """Whether a loss has an op that returns the slope with it, which is all that its backward needs."""
    return hasattr(torch.ops.fastops, f"{loss}_with_slope")


def overload(name: str) -> Any:
    """The dispatcher's op fastops::name."""
    return getattr(torch.ops.fastops, name).default
