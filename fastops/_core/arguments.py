"""torch's error for an argument that is no tensor. It is made after a call has failed, so that no other call pays for it."""

from __future__ import annotations

import functools
import inspect
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
    """The function, with torch's error where an argument is no tensor: asked after the fact, so that no call pays for it."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            refused = refusal(function, *args, **kwargs)
            if refused is None:
                raise
            raise refused from error

    return checked
