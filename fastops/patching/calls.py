"""torch's functions and ours: the table of calls, and forwards in which those calls are replaced.

A forward is replaced by its own code with other callees: its syntax tree is compiled again, `F.relu` and `x.relu()`
become variables of a closure, and everything else (globals, defaults, control flow, line numbers) stays. So a replaced
forward costs nothing where a TorchFunctionMode costs microseconds for each call of torch's."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .. import functional
from .._core.by_torch import DISABLED
from .._core.registry import COMPOSED, OPS
from .._core.usable import CLASSES
from ..nn import MODULES
from .reading import MISSING, Refused, chain, is_hashable, lookup, tree_of

CALLS: dict[Callable, Callable] = {}  # torch's function -> ours for tensors we take, else torch's
NAMES: dict[Callable, str] = {}  # torch's function -> our name


def _call(name: str, ours: Callable, theirs: Callable, tensors: int = 1) -> None:
    """Enters `ours` in place of `theirs`, where the first `tensors` arguments are tensors. What of them the kernels do not
    take is torch's by itself; what torch.fx traces and what knows its own functions has to see torch's."""
    accepted = frozenset(inspect.signature(ours).parameters)

    def one(*args, **kwargs):
        if args and type(args[0]) in CLASSES and (not kwargs or accepted >= kwargs.keys()):
            return ours(*args, **kwargs)
        return theirs(*args, **kwargs)

    def two(*args, **kwargs):
        if len(args) > 1 and type(args[1]) in CLASSES:
            return one(*args, **kwargs)
        return theirs(*args, **kwargs)

    call = one if tensors == 1 else two

    title = fx.node._get_qualified_name(theirs).replace(".", "_")
    call.__name__ = call.__qualname__ = f"call_{title}"
    globals().setdefault(call.__name__, call)
    CALLS[theirs], NAMES[theirs] = globals()[call.__name__], name


def _in_place(function: Callable) -> Callable:
    def in_place(input, *args, **kwargs):
        return function(input, *args, **kwargs, inplace=True)

    in_place.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return in_place


def _softmax(function: Callable) -> Callable:
    """torch.softmax and Tensor.softmax, which have no _stacklevel between the dimension and the dtype."""

    def softmax(input, dim, dtype=None):
        return function(input, dim, dtype=dtype)

    return softmax


def _dropout(input, p, train):
    return functional.dropout(input, p, train)


def _fill_calls() -> None:
    for name, entry in OPS.items():
        if (theirs := getattr(TF, name, None)) is None or entry.kind == "fused":
            continue
        _call(name, entry.function, theirs, 2 if entry.kind == "loss" else 1)
        if entry.kind == "elementwise":
            for place in (torch, Tensor):
                if (same := getattr(place, name, None)) is not None:
                    _call(name, entry.function, same)
                if "inplace" in entry.signature.parameters:
                    for where in (place, TF):
                        if (same := getattr(where, f"{name}_", None)) is not None:
                            _call(name, _in_place(entry.function), same)
    for name in ("softmax", "log_softmax"):
        for place in (torch, Tensor):
            _call(name, _softmax(OPS[name].function), getattr(place, name))
    _call("dropout", _dropout, torch.dropout)
    for name, function in COMPOSED.items():
        if "dropout" in name or name in ("layer_norm", "rms_norm"):
            _call(name, function, getattr(TF, name))


if not DISABLED:
    _fill_calls()


def _function_of(cls: type) -> str:
    """Our function that a class of fastops.nn calls, as its documentation says."""
    found = re.search(r"fastops\.functional\.(\w+)", cls.__doc__ or "")
    return found[1] if found else cls.__name__


class FunctionalMode(TorchFunctionMode):
    """Within it, torch's functions are ours where we take their tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return CALLS.get(func, func)(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------- values known beforehand

UNKNOWN = object()
_PLAIN = bool | int | float | str | None
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


def _assigned(tree: ast.AST) -> frozenset[tuple[str, ...]]:
    """The attributes that a function writes to, as ("self", "config", "problem_type")."""
    found = (
        n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    )
    return frozenset(tuple(chain(n) or ()) for n in found)


def _known(
    node: ast.expr,
    module: nn.Module | None,
    owner: str | None,
    assigned: frozenset[tuple[str, ...]],
) -> object:
    """What a condition comes to, from the module's plain attributes; UNKNOWN where it depends on anything else, or on what
    the function itself writes."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        names = chain(node)
        if (
            module is None
            or not names
            or names[0] != owner
            or names[1:] == ["training"]
            or tuple(names) in assigned
        ):
            return UNKNOWN
        value: object = module
        for name in names[1:]:
            value = inspect.getattr_static(value, name, MISSING)
            if value is MISSING or isinstance(value, property):
                return UNKNOWN
        return value if isinstance(value, _PLAIN) else UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _known(node.operand, module, owner, assigned)
        return UNKNOWN if value is UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        ends = isinstance(node.op, ast.Or)
        values = [_known(v, module, owner, assigned) for v in node.values]
        if any(v is not UNKNOWN and bool(v) is ends for v in values):
            return ends
        return UNKNOWN if any(v is UNKNOWN for v in values) else not ends
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        pair = [_known(n, module, owner, assigned) for n in (node.left, node.comparators[0])]
        compare = _COMPARISONS.get(type(node.ops[0]))
        if compare is None or any(v is UNKNOWN for v in pair):
            return UNKNOWN
        try:
            return bool(compare(*pair))
        except TypeError:
            return UNKNOWN
    return UNKNOWN


# ---------------------------------------------------------------------------------------------- replacing callees

_METHODS = {m.__name__: name for m, name in NAMES.items() if getattr(Tensor, m.__name__, None) is m}


def _method(name: str) -> Callable:
    theirs = getattr(Tensor, name)
    ours = CALLS[theirs]

    def method(of, *args, **kwargs):
        if isinstance(of, Tensor):
            return ours(of, *args, **kwargs)
        return getattr(of, name)(*args, **kwargs)

    return method


def _chosen(name: str, theirs: Callable, replaced: Callable) -> Callable:
    """self.name(...), where the attribute, or what a property of the class chooses, is `theirs` now."""

    def chosen(self, *args, **kwargs):
        function = getattr(self, name)
        return (replaced if function is theirs else function)(*args, **kwargs)

    return chosen


def _own_method(name: str, replaced: Callable) -> Callable:
    """self.name(...), where the name is a method of the class that calls torch's functions."""

    def own_method(self, *args, **kwargs):
        if name in self.__dict__:
            return self.__dict__[name](*args, **kwargs)
        return replaced(self, *args, **kwargs)

    return own_method


class _Replacer(ast.NodeTransformer):
    """Replaces the callees of one function. `found` holds our names of what it replaced, `missed` of what it saw and
    cannot reach."""

    def __init__(
        self, function: Any, tree: ast.AST, module: nn.Module | None, within: dict[Any, Any]
    ):
        code = function.__code__
        self.function, self.within, self.module = function, within, module
        self.owner = code.co_varnames[0] if module is not None and code.co_argcount else None
        self.local = _variables(code)
        self.supplied: dict[str, object] = {}
        self.found: set[str] = set()
        self.missed: set[str] = set()
        self.assigned = _assigned(tree)

    def _supply(self, node: ast.AST, title: str, value: object) -> ast.Name:
        name = f"_fastops_{title}"
        while self.supplied.get(name, value) is not value:
            name += "_"
        self.supplied[name] = value
        return ast.copy_location(ast.Name(name, ast.Load()), node)

    def _callee(self, node: ast.expr) -> ast.expr | None:
        """What stands for a global function: ours, or a helper with its own calls replaced."""
        names = chain(node)
        if not names or names[0] in self.local:
            return None
        value = lookup(self.function, names)
        if not is_hashable(value):
            return None
        if value in NAMES:
            self.found.add(NAMES[value])
            return self._supply(node, NAMES[value], CALLS[value])
        if value in MODULES:  # made during the call: `CrossEntropyLoss()(logits, labels)`
            ours = MODULES[value]
            self.found.add(_function_of(ours))
            return self._supply(node, f"nn_{ours.__name__}", ours)
        if not str(getattr(value, "__module__", "")).startswith(("torch.", "builtins")):
            replaced, found, missed = replace_calls(value, None, self.within)
            self.missed |= missed
            if found:
                self.found |= found
                return self._supply(node, names[-1], replaced)
        return None

    def visit_Name(self, node):
        return (isinstance(node.ctx, ast.Load) and self._callee(node)) or node

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load) and (name := self._callee(node)):
            return name
        return self.generic_visit(node)

    def visit_Compare(self, node):  # `act is F.relu` compares with torch's function
        return node

    def visit_arguments(self, node):
        return node

    def visit_Call(self, node):
        function = node.func
        node.args = [self.visit(a) for a in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        if name := self._callee(function):
            node.func = name
        elif isinstance(function, ast.Attribute):
            names = chain(function) or [""]
            of_self = self.owner is not None and names[0] == self.owner
            first = function.value
            if of_self and len(names) == 2:
                if callee := self._of_self(function, names[1]):
                    return ast.copy_location(
                        ast.Call(callee, [first, *node.args], node.keywords), node
                    )
            elif function.attr in _METHODS and self._may_be_tensor(names):
                self.found.add(_METHODS[function.attr])
                callee = self._supply(
                    function, f"method_{function.attr}", self._cached(_method, function.attr)
                )
                value = self.visit(first)
                return ast.copy_location(ast.Call(callee, [value, *node.args], node.keywords), node)
            function.value = self.visit(first)
        else:
            node.func = self.visit(function)
        return node

    def _may_be_tensor(self, names: list[str]) -> bool:
        """Whether what these names end in may be a method of a tensor: not one of a module, or of what is global."""
        if names[0] and names[0] not in self.local:
            return False
        if self.owner is None or names[0] != self.owner:
            return True
        value: Any = self.module
        for name in names[1:-1]:
            value = getattr(value, name, MISSING)
        return value is MISSING or isinstance(value, Tensor)

    def _cached(self, make: Callable, *args: Any) -> Any:
        return self.within.setdefault((make, *args), make(*args))

    def _of_self(self, node: ast.Attribute, name: str) -> ast.Name | None:
        module = self.module
        assert module is not None
        if name in module._modules or name in module._parameters or name in module._buffers:
            return None
        value = module.__dict__.get(name, MISSING)
        if value is not MISSING:
            if is_hashable(value) and value in NAMES:
                self.found.add(NAMES[value])
                return self._supply(
                    node, f"self_{name}", self._cached(_chosen, name, value, CALLS[value])
                )
            return None
        method = inspect.getattr_static(type(module), name, None)
        if method is None or name in vars(nn.Module):
            return None
        if isinstance(method, property):
            return self._of_property(node, name)
        replaced, found, missed = replace_calls(method, module, self.within)
        self.missed |= missed
        if not found:
            return None
        self.found |= found
        return self._supply(node, f"self_{name}", self._cached(_own_method, name, replaced))

    def _of_property(self, node: ast.Attribute, name: str) -> ast.Name | None:
        """self.name(...), where a property chooses the function, as the losses of Hugging Face's models."""
        try:
            theirs: Any = getattr(self.module, name)
        except Exception:  # of the model's own code, anything
            return None
        if not isinstance(theirs, types.FunctionType):
            return None
        replaced, found, missed = replace_calls(theirs, None, self.within)
        self.missed |= missed
        if not found:
            return None
        self.found |= found
        return self._supply(node, f"self_{name}", self._cached(_chosen, name, theirs, replaced))

    def _branches(self, node, visit_test):
        known = _known(node.test, self.module, self.owner, self.assigned)
        node.test = visit_test(node.test)
        return (
            [] if known is not UNKNOWN and not known else [node.body],
            [] if known is not UNKNOWN and known else [node.orelse],
        )

    def visit_If(self, node):
        bodies, others = self._branches(node, self.visit)
        for body in bodies:
            node.body = [self.visit(s) for s in body]
        for body in others:
            node.orelse = [self.visit(s) for s in body]
        return node

    def visit_IfExp(self, node):
        bodies, others = self._branches(node, self.visit)
        for body in bodies:
            node.body = self.visit(body)
        for body in others:
            node.orelse = self.visit(body)
        return node


def _variables(code: types.CodeType) -> set[str]:
    names = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _variables(constant)
    return names


_FLAGS = 0xFFF0000  # of __future__


def _compiled(function: Any, tree: ast.FunctionDef, supplied: dict[str, object]) -> Callable:
    """The function of a changed syntax tree, with the globals, defaults and closure of the one that it was read from."""
    before = function.__code__
    cells = dict(zip(before.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in supplied.items()}
    # Under its own name it would hide the global one from itself.
    tree.name, tree.decorator_list, tree.returns = "_fastops_function", [], None
    arguments = tree.args
    for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):  # fmt: skip
        if a is not None:
            a.annotation = None

    def none(default: ast.expr) -> ast.expr:
        return ast.copy_location(ast.Constant(None), default)

    arguments.defaults = [none(d) for d in arguments.defaults]
    arguments.kw_defaults = [d and none(d) for d in arguments.kw_defaults]
    outer = ast.parse(f"def outer({', '.join(cells)}): pass").body[0]
    outer.body = [tree]  # type: ignore[attr-defined]
    ast.increment_lineno(tree, before.co_firstlineno - 1)
    whole = ast.fix_missing_locations(ast.Module([outer], []))
    made: Any = compile(whole, before.co_filename, "exec", before.co_flags & _FLAGS, True)
    for name in ("outer", tree.name):
        made = next(
            c for c in made.co_consts if isinstance(c, types.CodeType) and c.co_name == name
        )
    made = made.replace(co_name=before.co_name)
    closure = tuple(cells[name] for name in made.co_freevars)
    result = types.FunctionType(
        made, function.__globals__, function.__name__, function.__defaults__, closure
    )
    result.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(result, function)


def replace_calls(
    function: Any, module: nn.Module | None, within: dict[Any, Any] | None = None
) -> tuple[Any, set[str], set[str]]:
    """A function with torch's functions replaced by ours: the new one, our names of what was replaced in it and in what
    it calls, and of what was seen there and cannot be reached.

    Args:
        function: any callable; one that is no Python function, or calls nothing of interest, is returned as it is.
        module: whose method it is, None for a function.
        within: what was replaced so far, by function; for recursion.
    """
    within = {} if within is None else within
    if not is_hashable(function):
        return function, set(), set()
    key = (function, module is None)
    if module is None and function in _HELPERS:
        return _HELPERS[function]
    if key in within:
        within["recursive"] = within["recursive"] or within[key] is _UNFINISHED
        return (function, set(), set()) if within[key] is _UNFINISHED else within[key]
    outermost = not within
    within.setdefault("recursive", False)
    within[key] = _UNFINISHED
    within[key] = result = _replaced(function, module, within)
    if module is None and not within["recursive"] and isinstance(function, types.FunctionType):
        _HELPERS[function] = result
    if outermost:
        within.clear()
    return result


_UNFINISHED = object()  # of a function that is being looked at
_HELPERS: weakref.WeakKeyDictionary[Any, Any] = (
    weakref.WeakKeyDictionary()
)  # by function, for all modules


def _replaced(function: Any, module: nn.Module | None, within: dict) -> tuple[Any, set, set]:
    plain = inspect.unwrap(function)
    if not isinstance(plain, types.FunctionType) or plain.__module__ in ("torch", "builtins"):
        return function, set(), set()
    try:
        tree = copy.deepcopy(tree_of(plain))
    except Refused:
        return function, set(), set()
    replacer = _Replacer(plain, tree, module, within)
    tree.body = [replacer.visit(s) for s in tree.body]
    found, missed = replacer.found, replacer.missed
    mangled = any(
        name.startswith("__") and not name.endswith("__")
        for name in (*plain.__code__.co_names, *replacer.local)
    )
    if found and (plain is not function or mangled):  # decorated, or with names of its class
        found, missed = set(), missed | found
    return (_compiled(plain, tree, replacer.supplied) if found else function), found, missed
