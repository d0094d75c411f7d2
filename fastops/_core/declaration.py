"""What an elementwise declaration stands for: the body of the function, and its module."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Mapping
from typing import Any

import torch


def body_of(function: Any, kernels: Mapping[str, dict[str, Any]] | None) -> Any:
    """The function that a declaration stands for. It is text and not a closure since the tests of a call's arguments cost
    as much as a small kernel."""
    name, parameters = function.__name__, list(inspect.signature(function).parameters)
    input, rest = parameters[0], parameters[1:]
    inplace = "inplace" in rest
    chosen = [n for n in rest if kernels and any(n in fixed for fixed in kernels.values())]
    given = ", ".join([input, *(n for n in rest if n not in ("inplace", *chosen))])
    lines = [
        f"def {name}({', '.join(parameters)}):",
        f"    if has_torch_function_unary({input}):",
        f"        return handle_torch_function({name}, ({input},), {', '.join([input, *(f'{n}={n}' for n in rest)])})",
        "    try:",
    ]
    for kernel, fixed in (kernels or {name: {}}).items():
        test = [f"{n} == {fixed.get(n, function.__defaults__[rest.index(n)])!r}" for n in chosen]
        indent = "        "
        if test:
            lines.append(f"{indent}if {' and '.join(test)}:")
            indent += "    "
        call = f"_C.{kernel}({given})"
        lines.append(
            f"{indent}return {f'_C.{kernel}_({given}) if inplace else ' if inplace else ''}{call}"
        )
    lines += [
        "    except TypeError as error:",
        f"        raise refusal({name}, {input}) or error from None",
    ]
    for n in chosen:
        values = [
            fixed.get(n, function.__defaults__[rest.index(n)]) for fixed in (kernels or {}).values()
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


def module_of(
    name: str, signature: inspect.Signature, functional: Any
) -> type[torch.nn.Module] | None:
    """The module of a function: torch.nn's of the same name, whose attributes are the function's arguments. None where
    torch.nn has none, or one that takes other attributes."""
    base: Any = next(
        (c for n, c in vars(torch.nn).items() if n.lower() == name.replace("_", "")), None
    )
    if not (isinstance(base, type) and issubclass(base, torch.nn.Module)):
        return None
    attributes = list(signature.parameters)[1:]
    if not set(attributes) <= vars(base()).keys():
        return None
    given = ", ".join(["input", *(f"self.{n}" for n in attributes)])
    text = f"def forward(self, input):\n    return F.{name}({given})\n"
    file = f"<fastops.nn.{base.__name__}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    space: dict[str, Any] = {"F": functional}
    exec(compile(text, file, "exec"), space)
    space["forward"].__annotations__ = {"input": torch.Tensor, "return": torch.Tensor}
    space["forward"].__module__ = "fastops.nn"
    arguments = f"arguments of :class:`torch.nn.{base.__name__}`"
    return type(
        base.__name__,
        (base,),
        {
            "__module__": "fastops.nn",
            "__doc__": f":func:`fastops.functional.{name}` as a module; {arguments}.",
            "forward": space["forward"],
        },
    )
