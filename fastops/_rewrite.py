"""Other forward passes for single modules: what a module's forward means is found with torch.fx, `add` and `relu` become
fastops.functional.add_relu in it (and, where asked, torch's functions ours), and the module gets a class that is a subclass
of its own with that forward. What cannot be shown to mean the same is refused, with the reason.

Nothing of a module is run or changed to find out: its forward is called with a stand-in for `self` that knows its
submodules by name only. The new forward holds where the values that the old one looked at are what they were, and calls the
old one where they are not.
"""

from __future__ import annotations

import abc
import ast
import builtins
import dataclasses
import functools
import importlib
import inspect
import linecache
import operator
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn
from torch.nn.modules import module as _hooks
from torch.overrides import TorchFunctionMode, get_testing_overrides

from . import functional
from ._guard import DISABLED, usable
from ._op import COMPOSED, OPS
from .nn import MODULES

RELUS = (nn.ReLU, MODULES[nn.ReLU])


class Refused(Exception):
    """Why a forward pass is left as it is."""


# ---------------------------------------------------------------------------------------------- torch's functions -> ours

CALLS: dict[
    Callable, Callable
] = {}  # torch's function -> ours for the tensors that we take, torch's for others
NAMES: dict[Callable, str] = {}  # torch's function -> our name


def _call(name: str, ours: Callable, theirs: Callable, tensors: int = 1) -> None:
    """Enters the call of `ours` in place of `theirs`. `tensors` is how many of the first arguments have to be ours to take."""
    accepted = frozenset(inspect.signature(ours).parameters)

    def call(*args, **kwargs):
        if len(args) >= tensors and all(usable(t) for t in args[:tensors]):
            if accepted >= kwargs.keys():
                return ours(*args, **kwargs)
        return theirs(*args, **kwargs)

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
    """torch.softmax and Tensor.softmax: no _stacklevel between the dimension and the dtype."""

    def softmax(input, dim, dtype=None):
        return function(input, dim, dtype=dtype)

    return softmax


def _dropout(input, p, train):
    return functional.dropout(input, p, train)


def _fill_calls() -> None:
    for name, entry in OPS.items():
        if (theirs := getattr(TF, name, None)) is None or entry.kind == "fused":
            continue
        _call(name, entry.function, theirs, 2 if entry.kind == "reduce" else 1)
        if entry.kind == "map":
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
        if "dropout" in name:
            _call(name, function, getattr(TF, name))


if not DISABLED:
    _fill_calls()
CALLED = frozenset(
    {*NAMES.values(), *(f"{name}_" for name in OPS)}
)  # what such calls look like in source


class FunctionalMode(TorchFunctionMode):
    """Within it, torch's functions are ours where we take their tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return CALLS.get(func, func)(*args, **(kwargs or {}))


def joined(input, other, inplace):
    """relu(input + other) of a rewritten forward."""
    if usable(input) and usable(other):
        return functional.add_relu(input, other, inplace)
    return torch.relu_(operator.iadd(input, other) if inplace else input + other)


# ---------------------------------------------------------------------------------------------- reading a forward pass


@functools.cache
def _overridable() -> frozenset:
    """torch's functions that torch.fx records when they are called with what it traces."""
    return frozenset(get_testing_overrides()) | CALLS.keys()


_TREES: dict[types.CodeType, ast.FunctionDef] = {}


def _tree(function: Callable) -> ast.FunctionDef:
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


def _chain(node: ast.AST) -> list[str] | None:
    """["torch", "nn", "functional", "relu"] of such an expression, None of others."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return [node.id, *reversed(names)]


_MISSING = object()


def _lookup(function: Any, names: list[str]) -> object:
    """What a chain of names that starts with a global one stands for."""
    value = function.__globals__.get(names[0], getattr(builtins, names[0], _MISSING))
    for name in names[1:]:
        value = getattr(value, name, _MISSING)
    return value


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
    tree = _tree(function)
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
            ours = (_chain(node.left) or [""])[0] == owner
            constant = isinstance(node.comparators[0], ast.Constant) and len(node.ops) == 1
            if not (ours and constant):
                raise Refused(f"`{ast.unparse(node)}` depends on what it is given")
        if isinstance(node, ast.Attribute | ast.Name) and (names := _chain(node)):
            if names[0] not in variables:
                found = _lookup(function, names)
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


def mentions(module: nn.Module, words: frozenset[str] | set[str], helpers: bool = True) -> set[str]:
    """Which of these names, or "+", the code behind a module's forward mentions: its own, its methods' and, with
    `helpers`, that of the functions beside it."""
    found: set[str] = set()
    seen: set[object] = set()

    def read(function: Any, depth: int) -> None:
        if isinstance(function, dict):
            for value in function.values():
                read(value, depth)
            return
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, types.FunctionType) or function in seen or depth > 4:
            return
        seen.add(function)
        try:
            tree = _tree(function)
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
                elif isinstance(
                    method := inspect.getattr_static(type(module), node.attr, None),
                    types.FunctionType | property,
                ):
                    read(method.fget if isinstance(method, property) else method, depth + 1)
                else:
                    value = module.__dict__.get(node.attr)
                    value = value.func if isinstance(value, functools.partial) else value
                    if _hashable(value) and value in NAMES:
                        found.add(NAMES[value])
                    else:
                        read(getattr(value, "__func__", value), depth + 1)
            elif isinstance(node, ast.Name) and node.id not in function.__code__.co_varnames:
                value = _lookup(function, [node.id])
                if _hashable(value) and value in NAMES:
                    found.add(NAMES[value])
                elif isinstance(value, type) and value in MODULES:  # made and called in one
                    read(value.forward, depth + 1)
                elif helpers and not str(getattr(value, "__module__", "")).startswith(
                    ("torch.", "builtins")
                ):
                    read(value, depth + 1)

    cls: Any = original(type(module))
    read(cls.forward, 0)
    return found & words


def _hashable(value: object) -> bool:
    return callable(value) and type(value).__hash__ is not None


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
            value = inspect.getattr_static(cls, name, _MISSING)
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
        if _hashable(value) and value in _overridable():
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


def check_class(module: nn.Module, cls: type) -> None:
    """Refuses modules that cannot be given another class, or whose forward is not their class's."""
    if "forward" in vars(module):
        raise Refused("forward is set on the module itself")
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        raise Refused(f"a {type(module).__name__}")
    if type(cls) not in (type, abc.ABCMeta):
        raise Refused(f"its class is made by {type(cls).__name__}")
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        raise Refused("its class pickles in a way of its own")


def trace(module: nn.Module, cls: type) -> tuple[fx.Graph, dict[str, object]]:
    """The graph of a module's forward as class `cls` has it, and what of `self` it depends on."""
    check_class(module, cls)
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


# ---------------------------------------------------------------------------------------------- rewriting


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a rewritten forward is: its source and where the names in it come from, what was replaced (before, after) for
    the report, and whether functions were. Without a source, the module's own forward within a :class:`FunctionalMode`."""

    source: str
    names: tuple[tuple[str, str], ...]  # name in the source, "module:attributes" or "module"
    replaced: tuple[tuple[str, str], ...]
    functional: bool


_ADDS = (operator.add, torch.add)
_IN_PLACE_ADDS = (operator.iadd,)
_FRESH = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)  # fmt: skip


def _relu(module: nn.Module, node: fx.Node) -> bool | None:
    """Whether a node is a relu in place (True), one that is not (False), or none (None)."""
    if node.op == "call_module":
        child = module._modules.get(str(node.target))
        if (
            isinstance(child, nn.ReLU)
            and type(child) in RELUS
            and len(node.args) == 1
            and not node.kwargs
        ):
            return child.inplace
        return None
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return node.target == "relu_"
    if node.op == "call_function" and node.target in (TF.relu, torch.relu, torch.relu_):
        if node.target is torch.relu_:
            return True
        inplace = node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace", False)
        return bool(inplace) if isinstance(inplace, bool) else None
    return None


def _add(node: object) -> bool | None:
    """Whether a node adds two nodes, and in place (True)."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return None
    if not all(isinstance(a, fx.Node) for a in node.args):
        return None
    if node.op == "call_function" and node.target in (*_ADDS, *_IN_PLACE_ADDS):
        return node.target in _IN_PLACE_ADDS
    if node.op == "call_method" and node.target in ("add", "add_"):
        return node.target == "add_"
    return None


def _makes_fresh(module: nn.Module, node: fx.Node) -> bool:
    """Whether the result of a node is a tensor that nothing else holds."""
    child = module._modules.get(str(node.target)) if node.op == "call_module" else None
    while isinstance(child, nn.Sequential) and len(child):
        child = child[-1]
    return isinstance(child, _FRESH)


def _fuse_joins(module: nn.Module, graph: fx.Graph) -> tuple[int, list[str], str | None]:
    """Makes add_relu of the graph's `add` and `relu`: how often, the guards of relus that are submodules, and why not where
    one was left."""
    count, guards, reason = 0, [], None
    for node in list(graph.nodes):
        if (relu_in_place := _relu(module, node)) is None or not node.args:
            continue
        add = node.args[0]
        if (add_in_place := _add(add)) is None:
            continue
        first, second = add.args
        if len(add.users) > 1:
            reason = "the sum before its relu is used elsewhere too"
        elif add_in_place and len(first.users) > 1:
            reason = "what it adds to in place is used elsewhere too"
        elif add_in_place and not relu_in_place and not _makes_fresh(module, first):
            reason = "it adds in place to what others may hold, and its relu is not in place"
        else:
            with graph.inserting_before(node):
                fused = graph.call_function(joined, (first, second, add_in_place and relu_in_place))
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(add)
            count += 1
            if node.op == "call_module":
                guards.append(f"plain(children.get({node.target!r}), {relu_in_place})")
    return count, guards, reason


def _replace_calls(cls: type, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        theirs = node.target
        if node.op == "call_method":
            theirs = getattr(Tensor, node.target, None)
        if node.op in ("call_function", "call_method") and theirs in CALLS:
            node.op, node.target = "call_function", CALLS[theirs]
            yield f"{cls.__name__}: {NAMES[theirs]}", f"fastops.functional.{NAMES[theirs]}"


def plain(module: nn.Module | None, inplace: bool) -> bool:
    """Whether leaving a relu's module out of a forward changes nothing else: it is one, and has no hooks."""
    return (
        type(module) in RELUS
        and module.inplace is inplace  # type: ignore[union-attr]
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks  # type: ignore[union-attr]
            or _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks
            or _hooks._global_backward_hooks or _hooks._global_backward_pre_hooks
        )
    )  # fmt: skip


def _path(value: object) -> str:
    """Where an object is found again: "torch", "torch:relu"."""
    if inspect.ismodule(value):
        return value.__name__
    name = fx.node._get_qualified_name(value)  # type: ignore[arg-type]
    for path in (f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}",
                 "builtins:" + name, ":".join(name.rsplit(".", 1))):  # fmt: skip
        try:
            if _find(path) is value:
                return path
        except (ImportError, AttributeError, ValueError):
            continue
    raise Refused(f"{name} cannot be found by its name")


def _find(path: str) -> object:
    module, _, names = path.partition(":")
    value: Any = importlib.import_module(module)
    for name in names.split(".") if names else ():
        value = getattr(value, name)
    return value


def _source(
    graph: fx.Graph, read: dict[str, object], guards: list[str]
) -> tuple[str, dict[str, str]]:
    """The text of the new forward, and its names."""
    code = graph.python_code("self")
    names = {k: v for k, v in code.globals.items() if re.search(rf"\b{re.escape(k)}\b", code.src)}
    header, body = re.match(r"\s*(def forward\(.*?\):)[^\n]*\n(.*)", code.src, re.S).groups()  # type: ignore[union-attr]
    header = re.sub(r"\s*->.*", ":", header)
    arguments = [n.target for n in graph.nodes if n.op == "placeholder"]
    tests = [f"isinstance({a}, Tensor)" for a in arguments]
    paths = {}
    for name, value in read.items():
        if value is nn.Module:
            tests.append(f"children.get({name!r}) is not None")
        elif value is Tensor:
            tests.append(f"self.{name} is not None")
        elif value is None or isinstance(value, bool):
            tests.append(f"self.{name} is {value}")
        elif callable(value):
            paths[f"was_{name}"] = _path(value)
            tests.append(f"self.{name} is was_{name}")
        else:
            tests.append(f"self.{name} == {value!r}")
    tests += [g for g in dict.fromkeys(guards)]
    lines = [
        header,
        "    children = self._modules",
        f"    if not ({' and '.join(tests) or 'True'}):",
        f"        return original(self, {', '.join(map(str, arguments))})",
    ]
    paths |= {name: _path(value) for name, value in names.items()}
    return "\n".join(lines) + "\n" + body.rstrip() + "\n", paths


_SUPPLIED = ("Tensor", "original", "plain", "children")


def _of_graph(module: nn.Module, cls: type, functional: bool) -> tuple[Recipe | None, str | None]:
    graph, read = trace(module, cls)
    count, guards, reason = _fuse_joins(module, graph)
    replaced = [(f"{cls.__name__}: add + relu", "fastops.functional.add_relu")] * count
    if functional:
        replaced += _replace_calls(cls, graph)
    if not replaced:
        return None, reason
    graph.lint()
    source, names = _source(graph, read, guards)
    if any(name in names for name in _SUPPLIED):
        raise Refused("names of its own are in the way")
    return Recipe(
        source, tuple(sorted(names.items())), tuple(replaced), len(replaced) > count
    ), reason


# Activations of other packages that are ours by another formula of theirs: the class's name, and the new forward.
FOREIGN = {
    f"transformers.activations.{name}": Recipe(
        "def forward(self, input):\n"
        "    if not usable(input):\n"
        "        return original(self, input)\n"
        '    return gelu(input, "tanh")\n',
        (("gelu", "fastops.functional:gelu"), ("usable", "fastops._guard:usable")),
        ((f"transformers.activations.{name}", "fastops.functional.gelu"),),
        True,
    )
    for name in ("NewGELUActivation", "AccurateGELUActivation")
}


def recipe_for(module: nn.Module, functional: bool) -> tuple[Recipe | None, str | None]:
    """How a module's forward is rewritten, or why it is not: both None where there is nothing in it for us."""
    cls = original(type(module))
    if cls.__module__.startswith("torch.nn.") or not isinstance(
        getattr(cls, "forward", None), types.FunctionType
    ):
        return None, None
    if functional and (found := FOREIGN.get(f"{cls.__module__}.{cls.__qualname__}")):
        return found, None
    named = mentions(module, CALLED | {"+", "add", "add_"}, helpers=False)
    relu = named & {"relu", "relu_"} or any(type(c) in RELUS for c in module._modules.values())
    joins = bool(named & {"+", "add", "add_"} and relu)
    calls = sorted(mentions(module, CALLED)) if functional else []
    if not joins and not calls:
        return None, None
    try:
        return _of_graph(module, cls, functional)
    except Refused as refused:
        reason = str(refused)
    if not calls:
        return None, f"its forward is left as it is: {reason}"
    try:
        check_class(module, cls)
    except Refused as refused:
        return None, str(refused)
    words = f"{cls.__name__}: {', '.join(calls)}"
    how = f"fastops.functional by a TorchFunctionMode ({reason})"
    return Recipe("", (), ((words, how),), True), None


# ---------------------------------------------------------------------------------------------- classes


class _Rewritten:
    """First among the bases of every class that is made here, so that __init_subclass__ of the module's own class does not
    see it, and that instances are copied and pickled as their own class and the recipe. (No __slots__: its instances must
    be laid out as a module is.)"""

    def __init_subclass__(cls, **kwargs):
        pass

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(max(protocol, 2))
        cls = type(self)
        return (restore, (cls.__mro__[2], cls._fastops_recipe), *rest)


def original(cls: type) -> type:
    """The class that a module had before :func:`rewritten`."""
    return cls.__mro__[2] if _Rewritten in cls.__bases__ else cls


def recipe_of(module: nn.Module) -> Recipe | None:
    """How a module is rewritten now."""
    return getattr(type(module), "_fastops_recipe", None)


@functools.cache
def rewritten(cls: type, recipe: Recipe) -> type:
    """A subclass of `cls` that is called the same and has the forward of the recipe."""
    before: Any = cls.forward  # type: ignore[attr-defined]
    if recipe.source:
        names: dict[str, Any] = {name: _find(path) for name, path in recipe.names}
        names |= {"Tensor": Tensor, "original": before, "plain": plain}
        file = f"<fastops: {cls.__module__}.{cls.__qualname__} {abs(hash(recipe)):x}>"
        linecache.cache[file] = (len(recipe.source), None, recipe.source.splitlines(True), file)
        exec(compile(recipe.source, file, "exec"), names)
        forward: Any = functools.wraps(before)(names["forward"])
    else:

        @functools.wraps(before)
        def forward(self, *args, **kwargs):
            with FunctionalMode():
                return before(self, *args, **kwargs)

    body = {
        "forward": forward,
        "_fastops_recipe": recipe,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(cls.__name__, (_Rewritten, cls), body)


def restore(cls: type, recipe: Recipe) -> nn.Module:
    """What copy and pickle make a rewritten module from."""
    made: Any = rewritten(cls, recipe)
    return made.__new__(made)
