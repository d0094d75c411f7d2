"""Forwards in which a batch norm, an add and an activation that follow each other are one kernel:
fastops.functional.batch_norm_act, or add_relu where there is no batch norm.

What a forward means is found with torch.fx. The new forward is Python source; it holds where the values that the old one
looked at are what they were, and calls the old one where they are not."""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
import operator
import re
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn
from torch.nn.modules import module as _hooks

from .. import functional
from .._core.usable import usable
from ..nn import MODULES
from .calls import CALLS, NAMES
from .modules import Recipe
from .norms import (
    FUNCTION,
    activation_of,
    fused,
    is_norm,
    norm_act,
    plain_activation,
    plain_norm,
)
from .reading import Refused
from .tracing import mentions, trace

RELUS = (nn.ReLU, MODULES[nn.ReLU])


def joined(input, other, inplace):
    """relu(input + other) of a rewritten forward."""
    if usable(input) and usable(other):
        return functional.add_relu(input, other, inplace)
    return torch.relu_(operator.iadd(input, other) if inplace else input + other)


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


def _follows(module: nn.Module, graph: fx.Graph, norm: fx.Node, last: fx.Node) -> bool:
    """Whether `norm` may run as late as `last`: until then neither what it is given changes, nor its averages."""
    if norm.next is last:
        return True
    given, child = norm.args[0], module._modules[str(norm.target)]
    calls = [n for n in graph.nodes if n.op == "call_module" and module._modules[str(n.target)] is child]  # fmt: skip
    fresh = isinstance(given, fx.Node) and len(given.users) == 1 and _makes_fresh(module, given)
    return fresh and len(calls) == 1


def _norm(module: nn.Module, node: object) -> bool:
    """Whether a node is a batch norm of one tensor that only one other node reads."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and is_norm(module._modules.get(str(node.target)))
        and len(node.args) == 1
        and isinstance(node.args[0], fx.Node)
        and not node.kwargs
        and len(node.users) == 1
    )


def _fuse_norms(module: nn.Module, graph: fx.Graph) -> tuple[list[tuple[str, str]], list[str]]:
    """Makes batch_norm_act of the graph's batch norms and what follows them: what the report says, and the guards."""
    words: list[tuple[str, str]] = []
    guards: list[str] = []
    for node in list(graph.nodes):
        child = module._modules.get(str(node.target)) if node.op == "call_module" else None
        if child is not None:
            if activation_of(child) is None or len(node.args) != 1 or node.kwargs:
                continue
        elif _relu(module, node) is None or not node.args:
            continue
        before: Any = node.args[0]
        added_in_place = _add(before)
        if added_in_place is None:
            norm, residual = before, None
            if not (_norm(module, norm) and _follows(module, graph, norm, node)):
                continue
        else:
            norm, residual = before.args
            if not _norm(module, norm) and not added_in_place:
                norm, residual = residual, norm
            if not _norm(module, norm) or norm is residual or len(before.users) > 1:
                continue
            if not _follows(module, graph, norm, before):
                continue
        with graph.inserting_before(node):
            own = graph.get_attr(str(norm.target))
            act = None if child is None else graph.get_attr(str(node.target))
            if residual is None:
                fused = graph.call_function(norm_act, (own, norm.args[0], act))
            else:
                given = (own, norm.args[0], residual, act, bool(added_in_place))
                fused = graph.call_function(norm_add_act, given)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        if residual is not None:
            graph.erase_node(before)
        graph.erase_node(norm)
        guards.append(f"plain_norm(children.get({norm.target!r}))")
        if child is not None:
            guards.append(f"plain_activation(children.get({node.target!r}))")
        name = type(module._modules[str(norm.target)]).__name__
        last = "relu" if child is None else activation_of(child)
        parts = (name, *(["add"] if residual is not None else []), str(last))
        words.append((f"{type(module).__name__}: {' + '.join(parts)}", FUNCTION))
    return words, guards


def _calls_of(graph: fx.Graph) -> list[tuple[fx.Node, Any]]:
    """The nodes that call torch's functions which are ours too, with the function."""
    found = []
    for node in graph.nodes:
        theirs = node.target
        if node.op == "call_method":
            theirs = getattr(Tensor, node.target, None)
        if node.op in ("call_function", "call_method") and theirs in CALLS:
            found.append((node, theirs))
    return found


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


def norm_add_act(norm, input, residual, activation, inplace):
    """activation(norm(input) + residual) of a rewritten forward; of relu, where that is None."""
    if (
        torch.compiler.is_compiling()
        or not (usable(input) and usable(residual))
        or (residual.dtype, residual.shape) != (input.dtype, input.shape)
    ):
        output = norm(input)
        if activation is None or plain(activation, getattr(activation, "inplace", None)):
            return joined(output, residual, inplace)
        return activation(operator.iadd(output, residual) if inplace else output + residual)
    return fused(norm, input, activation, residual)


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


_SUPPLIED = {"plain": plain, "plain_norm": plain_norm, "plain_activation": plain_activation}
_RESERVED = (*_SUPPLIED, "Tensor", "original", "children")


def may_join(module: nn.Module) -> str | None:
    """What of a forward may become one kernel, by what it mentions; tracing it is slower."""
    named = mentions(module, {"+", "add", "add_", "relu", "relu_"})
    children = module._modules.values()
    relu = named & {"relu", "relu_"} or any(type(c) in RELUS for c in children)
    if relu and named & {"+", "add", "add_"}:
        return "an add and a relu"
    if any(map(is_norm, children)) and (relu or any(map(activation_of, children))):
        return "a batch norm and an activation"
    return None


def join(module: nn.Module, functional: bool) -> tuple[Recipe | None, str | None, list[str]]:
    """The forward with its joins fused, and with `functional` with its calls replaced; why not where one was left; our
    names of the calls that stay torch's.

    Raises:
        Refused: the forward cannot be shown to mean the same.
    """
    cls = type(module)
    graph, read = trace(module, cls)
    replaced, of_norms = _fuse_norms(module, graph)
    count, guards, reason = _fuse_joins(module, graph)
    guards = of_norms + guards
    replaced += [(f"{cls.__name__}: add + relu", "fastops.functional.add_relu")] * count
    if not replaced:
        return None, reason, []
    calls = _calls_of(graph)
    for node, theirs in calls if functional else ():
        node.op, node.target = "call_function", CALLS[theirs]
        replaced.append((f"{cls.__name__}: {NAMES[theirs]}", f"fastops.functional.{NAMES[theirs]}"))
    graph.lint()
    source, names = _source(graph, read, guards)
    if any(name in names for name in _RESERVED):
        raise Refused("names of its own are in the way")
    recipe = Recipe("source", tuple(replaced), functional, source, tuple(sorted(names.items())))
    return recipe, reason, [] if functional else sorted({NAMES[theirs] for _, theirs in calls})


# Activations of other packages that are ours by another formula of theirs: the class's name, and the new forward.
FOREIGN = {
    f"transformers.activations.{name}": Recipe(
        "source",
        ((f"transformers.activations.{name}", "fastops.functional.gelu"),),
        True,
        "def forward(self, input):\n"
        "    if not usable(input):\n"
        "        return original(self, input)\n"
        '    return gelu(input, "tanh")\n',
        (("gelu", "fastops.functional:gelu"), ("usable", "fastops._core.usable:usable")),
    )
    for name in ("NewGELUActivation", "AccurateGELUActivation")
}


@functools.cache
def compiled(cls: type, recipe: Recipe) -> Any:
    """The function of a recipe's source."""
    names: dict[str, Any] = {name: _find(path) for name, path in recipe.names}
    names |= {**_SUPPLIED, "Tensor": Tensor, "original": cls.forward}  # type: ignore[attr-defined]
    file = f"<fastops: {cls.__module__}.{cls.__qualname__} {abs(hash(recipe)):x}>"
    linecache.cache[file] = (len(recipe.source), None, recipe.source.splitlines(True), file)
    exec(compile(recipe.source, file, "exec"), names)
    return names["forward"]
