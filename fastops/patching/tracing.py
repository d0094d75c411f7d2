"""What a forward means: its graph, traced by torch.fx without running or changing anything of the module.

A forward is called with a stand-in for `self` that knows its submodules by name only. What cannot be shown to mean the same
is refused, with the reason."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, get_testing_overrides

from .calls import CALLS, NAMES
from .reading import MISSING, Refused, chain, is_hashable, lookup, tree_of


@functools.cache
def _overridable() -> frozenset:
    """torch's functions that torch.fx records when they are called with what it traces."""
    return frozenset(get_testing_overrides()) | CALLS.keys()


_PLAIN = (
    ast.arguments, ast.arg, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.If, ast.Pass, ast.Assert,
    ast.For, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.keyword, ast.Constant, ast.Name,
    ast.Attribute, ast.Tuple, ast.List, ast.Subscript, ast.Slice, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
    ast.expr_context,
)  # fmt: skip
_BUILTINS = (range, tuple, list, int, float)
_FLAGS = (torch.jit.is_scripting,)  # False wherever a forward can be rewritten
_VALUES = (int, float, str, type(None), torch.dtype, torch.memory_format)


def check_source(function: Any) -> None:
    """Refuses a forward, or a method that it calls, whose trace could differ from what it does: by what it calls, what it
    compares, or what is around it."""
    tree = tree_of(function)
    if tree.decorator_list:
        raise Refused(f"{tree.name} is decorated")
    if function.__closure__:
        raise Refused(f"{tree.name} uses super() or variables around it")
    variables = set(function.__code__.co_varnames)
    owner = function.__code__.co_varnames[0] if function.__code__.co_argcount else None

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise):
            return
        if not isinstance(node, _PLAIN):
            raise Refused(f"a {type(node).__name__} in {tree.name}")
        if isinstance(node, ast.Compare) and any(
            isinstance(o, ast.Is | ast.IsNot) for o in node.ops
        ):
            ours = (chain(node.left) or [""])[0] == owner
            constant = isinstance(node.comparators[0], ast.Constant) and len(node.ops) == 1
            if not (ours and constant):
                raise Refused(f"`{ast.unparse(node)}` depends on what it is given")
        if isinstance(node, ast.Attribute | ast.Name) and (names := chain(node)):
            if names[0] not in variables:
                found = lookup(function, names)
                known = (
                    isinstance(found, _VALUES)
                    or any(found is b for b in (*_BUILTINS, *_FLAGS))
                    or (isinstance(found, types.FunctionType | types.BuiltinFunctionType | types.MethodDescriptorType) and found in _overridable())
                )  # fmt: skip
                if not known:
                    raise Refused(f"it uses {'.'.join(names)}, which torch.fx cannot follow")
            return
        if isinstance(node, ast.AnnAssign):
            children: Iterator = iter([n for n in (node.target, node.value) if n is not None])
        else:
            children = ast.iter_child_nodes(node)
        for child in children:
            visit(child)

    for statement in tree.body:
        visit(statement)


def mentions(module: nn.Module, words: set[str]) -> set[str]:
    """Which of these names, or "+", the forward of a module and the methods that it calls mention."""
    found: set[str] = set()
    seen: set[object] = set()

    def read(function: Any) -> None:
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, types.FunctionType) or function in seen:
            return
        seen.add(function)
        try:
            tree = tree_of(function)
        except Refused:
            return
        owner = function.__code__.co_varnames[:1]
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
                found.add("+")
            if isinstance(node, ast.Attribute):
                of_self = isinstance(node.value, ast.Name) and (node.value.id,) == owner
                if not of_self:
                    found.add(node.attr)
                    continue
                method = inspect.getattr_static(type(module), node.attr, None)
                read(method.fget if isinstance(method, property) else method)
                value = module.__dict__.get(node.attr)
                if is_hashable(value) and value in NAMES:
                    found.add(NAMES[value])
            elif isinstance(node, ast.Name) and node.id not in function.__code__.co_varnames:
                value = lookup(function, [node.id])
                if is_hashable(value) and value in NAMES:
                    found.add(NAMES[value])

    read(type(module).forward)
    return found & words


# ---------------------------------------------------------------------------------------------- tracing


class _Child:
    """What a traced forward sees of a submodule: it can be called."""

    def __init__(self, stand_in: _Self, name: str):
        self._stand_in, self._name = stand_in, name

    def __call__(self, *args, **kwargs):
        return self._stand_in._tracer.create_proxy("call_module", self._name, args, kwargs)

    def __bool__(self):
        raise Refused(f"it depends on whether self.{self._name} is empty")

    def __getattr__(self, name):
        raise Refused(f"it reads self.{self._name}.{name}")

    def __iter__(self):
        raise Refused(f"it goes through self.{self._name}")

    __getitem__ = __len__ = __contains__ = __iter__  # type: ignore[assignment]


class _Self:
    """What a traced forward sees as `self`. What it reads is kept: the new forward asks whether it still is so."""

    def __init__(self, module: nn.Module, cls: type, tracer: _Tracer):
        self.__dict__.update(_module=module, _cls=cls, _tracer=tracer, _read={})

    def __setattr__(self, name, value):
        raise Refused(f"it assigns to self.{name}")

    def __getattr__(self, name):
        module, cls = self._module, self._cls
        if name in module._modules:
            child = module._modules[name]
            self._read[name] = None if child is None else nn.Module
            return None if child is None else _Child(self, name)
        if name in module._parameters or name in module._buffers:
            value = getattr(module, name)
            self._read[name] = None if value is None else Tensor
            return None if value is None else self._tracer.create_proxy("get_attr", name, (), {})
        if name == "training":
            raise Refused("it depends on self.training")
        if name in module.__dict__:
            value = module.__dict__[name]
        else:
            value = inspect.getattr_static(cls, name, MISSING)
            if isinstance(value, types.FunctionType):
                if name in vars(nn.Module):
                    raise Refused(f"it calls self.{name}")
                check_source(value)
                return types.MethodType(value, self)
        if isinstance(value, bool | int | float | str | None):
            self._read[name] = value
            return value
        if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
            self._read[name] = value
            return value
        if is_hashable(value) and value in _overridable():
            self._read[name] = value
            return value
        raise Refused(f"it reads self.{name}, of type {type(value).__name__}")


class _Proxy(fx.Proxy):
    """fx's own takes `a += b` for `a = a + b`."""


def _augmented(name: str) -> Callable:
    function = getattr(operator, name)

    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "imod", "ipow", "ifloordiv", "imatmul", "iand", "ior", "ixor"):  # fmt: skip
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class _Tracer(fx.proxy.GraphAppendingTracer):
    def proxy(self, node):
        return _Proxy(node, self)

    def create_arg(self, a):
        if isinstance(a, Tensor):
            raise Refused("it uses a tensor of its own")
        return super().create_arg(a)


class _OnlyTraced(TorchFunctionMode):
    """Refuses torch's functions called without anything that is traced: they would run now, and only now."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not any(issubclass(t, fx.Proxy) for t in types):
            raise Refused(f"it calls {getattr(func, '__name__', func)} on what is not given to it")
        return func(*args, **(kwargs or {}))


def trace(module: nn.Module, cls: type) -> tuple[fx.Graph, dict[str, object]]:
    """The graph of a module's forward as class `cls` has it, and what of `self` it depends on."""
    for name in ("__getattr__", "__getattribute__"):
        if getattr(cls, name) is not getattr(nn.Module, name):
            raise Refused(f"its class has a {name} of its own")
    function: Any = cls.forward  # type: ignore[attr-defined]
    check_source(function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters):
        raise Refused("its forward has optional arguments")
    graph = fx.Graph()
    tracer = _Tracer(graph)
    stand_in = _Self(module, cls, tracer)
    inputs = [tracer.create_proxy("placeholder", p.name, (), {}) for p in parameters]
    try:
        with _OnlyTraced():
            result = function(stand_in, *inputs)
        graph.output(tracer.create_arg(result))
        graph.lint()
    except Refused:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"torch.fx does not trace it: {first}") from error
    return graph, stand_in._read
