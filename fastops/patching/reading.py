"""The source of a function and the names in it: what the rest of this package reads of a forward."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any


class Refused(Exception):
    """Why a forward is left as it is."""


MISSING = object()
_TREES: dict[types.CodeType, ast.FunctionDef] = {}


def tree_of(function: Callable) -> ast.FunctionDef:
    """The syntax tree of a function, not to be changed.

    Raises:
        Refused: there is no source, or it is no plain ``def``.
    """
    code = function.__code__
    if code not in _TREES:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, TypeError, SyntaxError, IndexError) as error:
            raise Refused("its source is not at hand") from error
        if not isinstance(tree, ast.FunctionDef):
            raise Refused("its forward is no plain function")
        _TREES[code] = tree
    return _TREES[code]


def chain(node: ast.AST) -> list[str] | None:
    """["torch", "nn", "functional", "relu"] of such an expression, None of others."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return [node.id, *reversed(names)]


def lookup(function: Any, names: list[str]) -> object:
    """What a chain of names that starts with a global one stands for, or MISSING."""
    value = function.__globals__.get(names[0], getattr(builtins, names[0], MISSING))
    for name in names[1:]:
        value = getattr(value, name, MISSING)
    return value


def is_hashable(value: object) -> bool:
    return callable(value) and type(value).__hash__ is not None
