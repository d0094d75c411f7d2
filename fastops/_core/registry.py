"""What a declaration in functional.py means: `@op` enters it into the table that everything else is made from.

Fake kernels, vmap rules, torch.compile's view of the C functions, autograd.Function classes, tests and benchmarks all
read `OPS`; no op is named here.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

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
        return _entered(tensors_checked(function), kind, reference, exact, rows)

    return enter


def elementwise(
    *,
    reference: Callable[..., Tensor],
    exact: Callable[..., Tensor] | None = None,
    rows: Mapping[str, dict[str, Any]] | None = None,
):
    """Enters an elementwise function of one tensor, of which the declaration is the whole: its body is written here.

    The parameters are those of the kernel, in order, and `inplace` where there is an in-place form. Of several `rows`, which
    one is run is the value of the one parameter that they differ in.
    """

    def enter(function):
        return _entered(_written(function, rows), "map", reference, exact, rows)

    return enter


def _entered(function, kind, reference, exact, rows):
    name = function.__name__
    used = bound(name, function, reference)
    signature = inspect.signature(function)
    OPS[name] = Op(name, kind, used, reference, exact or reference, signature, rows or {name: {}})
    return used


def _written(function: Any, rows: Mapping[str, dict[str, Any]] | None) -> Any:
    """The function that a declaration stands for. It is text and not a closure since the tests of a call's arguments cost
    as much as a small kernel."""
    name, parameters = function.__name__, list(inspect.signature(function).parameters)
    input, rest = parameters[0], parameters[1:]
    inplace = "inplace" in rest
    chosen = [n for n in rest if rows and any(n in fixed for fixed in rows.values())]
    given = ", ".join([input, *(n for n in rest if n not in ("inplace", *chosen))])
    lines = [
        f"def {name}({', '.join(parameters)}):",
        f"    if has_torch_function_unary({input}):",
        f"        return handle_torch_function({name}, ({input},), {', '.join([input, *(f'{n}={n}' for n in rest)])})",
        "    try:",
    ]
    for row, fixed in (rows or {name: {}}).items():
        test = [f"{n} == {fixed.get(n, function.__defaults__[rest.index(n)])!r}" for n in chosen]
        indent = "        "
        if test:
            lines.append(f"{indent}if {' and '.join(test)}:")
            indent += "    "
        call = f"_C.{row}({given})"
        lines.append(
            f"{indent}return {f'_C.{row}_({given}) if inplace else ' if inplace else ''}{call}"
        )
    lines += [
        "    except TypeError as error:",
        f"        raise refusal({name}, {input}) or error from None",
    ]
    for n in chosen:
        values = [
            fixed.get(n, function.__defaults__[rest.index(n)]) for fixed in (rows or {}).values()
        ]
        lines.append(
            f'    raise RuntimeError(f"{n} argument must be either {" or ".join(values)}, got {{{n}!r}}.")'
        )
    text = "\n".join(lines) + "\n"
    file = f"<fastops.functional.{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    space: dict[str, Any] = {}
    exec(compile(text, file, "exec"), function.__globals__, space)
    written = space[name]
    written.__defaults__, written.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return _like(written, function)


def _like(made: Any, function: Any) -> Any:
    """A function in another's place: its names, documentation and annotations."""
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
        setattr(made, attribute, getattr(function, attribute))
    return made


# ---------------------------------------------------------------------------------------------- what is no tensor


def type_name(value: object) -> str:
    """A type as torch's messages write it."""
    cls = type(value)
    is_of_python = cls.__flags__ & 1 << 9
    return cls.__name__ if is_of_python or cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"  # fmt: skip


@cache
def _tensor_parameters(function: Callable) -> tuple[tuple[int, str, bool], ...]:
    """Position, name and whether it may be None, of the parameters of a function that are tensors only."""
    return tuple(
        (position, p.name, "None" in str(p.annotation))
        for position, p in enumerate(inspect.signature(function).parameters.values(), 1)
        if str(p.annotation) in ("Tensor", "Tensor | None")
    )


def not_a_tensor(function: str, argument: str, position: int, value: object) -> TypeError:
    return TypeError(
        f"{function}(): argument '{argument}' (position {position}) must be Tensor, "
        f"not {type_name(value)}"
    )


def refusal(function: Callable, *args: Any, **kwargs: Any) -> TypeError | None:
    """torch's error for an argument that is no tensor where one is due; None where all are."""
    for position, name, optional in _tensor_parameters(function):
        if position > len(args) and name not in kwargs:
            continue
        value = args[position - 1] if position <= len(args) else kwargs[name]
        if not (isinstance(value, Tensor) or (optional and value is None)):
            return not_a_tensor(function.__name__, name, position, value)
    return None


def tensors_checked(function: Any) -> Any:
    """The function, with torch's error where an argument is no tensor: asked after the fact, so that no call pays for it."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, AttributeError) as error:
            refused = refusal(function, *args, **kwargs)
            if refused is None:
                raise
            raise refused from error

    return checked


COMPOSED: dict[str, Callable[..., Tensor]] = {}


def composed(function):
    """Enters a public function that is made of others, and has no kernel of its own. As torch's, it goes to the
    `__torch_function__` of what knows its own functions (what torch.fx traces, subclasses, modes) as one function."""
    tensors = _tensor_parameters(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = [args[p - 1] if p <= len(args) else kwargs.get(name) for p, name, _ in tensors]
        if has_torch_function(given):
            return handle_torch_function(entered, given, *args, **kwargs)
        return function(*args, **kwargs)

    entered = tensors_checked(call)
    COMPOSED[function.__name__] = entered
    return entered


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
