"""torch's error for an argument that is no tensor. It is made after a call has failed, so that no other call pays for it."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import Tensor


def type_name(value: object) -> str:
    """A type as torch's messages write it."""
    cls = type(value)
    is_of_python = cls.__flags__ & 1 << 9
    return cls.__name__ if is_of_python or cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"  # fmt: skip


@functools.cache
def tensor_parameters(function: Callable) -> tuple[tuple[int, str, bool], ...]:
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
    for position, name, optional in tensor_parameters(function):
        if position > len(args) and name not in kwargs:
            continue
        value = args[position - 1] if position <= len(args) else kwargs[name]
        if not (isinstance(value, Tensor) or (optional and value is None)):
            return not_a_tensor(function.__name__, name, position, value)
    return None


def tensors_checked(function: Any) -> Any:
    """The function, with torch's error where an argument is no tensor: asked after the fact, so that no call pays for it.

    Its body is put into a `try`, which costs nothing until something is raised; a wrapper that passes all arguments on costs
    as much as a small kernel. Where there is no source, a wrapper it is."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:
        return _wrapped(function)
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    parameters = inspect.signature(function).parameters.values()
    given = [p.name if p.kind is not p.KEYWORD_ONLY else f"{p.name}={p.name}" for p in parameters]
    (attempt,) = ast.parse(
        "try:\n    pass\n"
        "except Exception as error:\n"
        f"    raise_refusal(error, {', '.join([function.__name__, *given])})\n"
        "    raise"
    ).body
    assert isinstance(attempt, ast.Try)
    attempt.body = tree.body
    tree.body, tree.decorator_list = [attempt], []
    module = ast.Module([tree], [])
    ast.increment_lineno(module, function.__code__.co_firstlineno - 1)
    code = compile(
        module, function.__code__.co_filename, "exec",
        flags=__future__.annotations.compiler_flag, dont_inherit=True,
    )  # fmt: skip
    space: dict[str, Any] = {}
    function.__globals__["raise_refusal"] = raise_refusal
    exec(code, function.__globals__, space)
    made = space[function.__name__]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    made.__doc__ = function.__doc__
    return made


def raise_refusal(error: Exception, function: Callable, *args: Any, **kwargs: Any) -> None:
    """Raises torch's error where an argument of a call that has failed is no tensor."""
    if (refused := refusal(function, *args, **kwargs)) is not None:
        raise refused from error


def _wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def checked(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise_refusal(error, function, *args, **kwargs)
            raise

    return checked
