"""One module with another forward: what is set on the instance, and taken off again.

The class stays, so that tools which look at types (torch.fx's leaves, torch.ao's patterns, captum's tables, the fast path
of torch.nn.TransformerEncoder) see what they saw. Four attributes of the instance are ours while it is patched:

    forward                        runs our forward; its __wrapped__, source and globals are the class's own, which is what
                                   torch.jit.script compiles
    __deepcopy__                   a copy is patched as the original is, with a forward of its own
    __getstate__                   pickles and shallow copies hold none of this: they are torch's, and load without fastops
    _replicate_for_data_parallel   a replica gets a forward of its own

The forward holds its module weakly, so that a model is freed as soon as nothing refers to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn import MODULES
from .calls import FunctionalMode, replace_calls


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a module's forward is replaced.

    `how` is "module" for the forward of fastops.nn's class, "sequence" for norms.in_sequence, "source" for a forward of its
    own text, "calls" for the class's forward with torch's functions replaced, "" for the class's own. `replaced` holds what
    the report says (before, after).
    """

    how: str
    replaced: tuple[tuple[str, str], ...]
    functional: bool = False  # whether functions were asked for
    source: str = ""
    names: tuple[tuple[str, str], ...] = ()  # in the source: "module:attributes" or "module"
    mode: bool = False  # whether it runs within a FunctionalMode


class Attachment:
    """What :func:`attach` set on a module."""

    def __init__(self, module: nn.Module, recipe: Recipe):
        self.module = weakref.ref(module)
        self.recipe = recipe
        self.forward, self._cell = _forward(module, recipe)
        vars(module).update(self.attributes())

    def attributes(self) -> dict[str, Callable]:
        return {
            "forward": self.forward,
            "__deepcopy__": self.deepcopy,
            "__getstate__": self.getstate,
            "_replicate_for_data_parallel": self.replicate,
        }

    def _alive(self) -> Any:
        module = self.module()
        if module is None:
            raise ReferenceError("the patched module that this is a method of no longer exists")
        return module

    def detach(self) -> bool:
        """Takes it all off. False where somebody has put another forward around ours, which then runs torch's."""
        module = self._alive()
        self._cell.cell_contents = type(module).forward
        ours = vars(module).get("forward") is self.forward
        for name, value in self.attributes().items():
            if vars(module).get(name) == value:
                del vars(module)[name]
        return ours

    def _without(self, state: dict) -> dict:
        ours = self.attributes()
        return {k: v for k, v in state.items() if k not in ours or v != ours[k]}

    def getstate(self) -> Any:
        module = self._alive()
        plain = object.__new__(type(module))
        vars(plain).update(self._without(vars(module)))
        cls: Any = type(module)
        return cls.__getstate__(plain)

    def deepcopy(self, memo: dict) -> nn.Module:
        module = self._alive()
        if own := getattr(type(module), "__deepcopy__", None):
            twin = own(module, memo)
        else:
            make, args, state, *_ = module.__reduce_ex__(4)
            twin = memo[id(module)] = make(*copy.deepcopy(args, memo))
            twin.__setstate__(copy.deepcopy(state, memo))
        return self._again(twin)

    def replicate(self) -> nn.Module:
        module = self._alive()
        return self._again(type(module)._replicate_for_data_parallel(module))

    def _again(self, twin: nn.Module) -> nn.Module:
        state = self._without(vars(twin))
        vars(twin).clear()
        vars(twin).update(state)
        if "forward" not in state:
            Attachment(twin, self.recipe)
        return twin


def attached(module: nn.Module) -> Attachment | None:
    """What is attached to a module, if anything."""
    for name in ("__deepcopy__", "__getstate__"):
        found = getattr(vars(module).get(name), "__self__", None)
        if isinstance(found, Attachment) and found.module() is module:
            return found
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody else has set a forward on the instance."""
    if "forward" not in vars(module):
        return False
    found = attached(module)
    return not (found and vars(module)["forward"] is found.forward)


def attach(module: nn.Module, recipe: Recipe | None) -> None:
    """Replaces a module's forward; with None, restores it."""
    if found := attached(module):
        found.detach()
    if recipe is not None:
        Attachment(module, recipe)


def _forward(module: nn.Module, recipe: Recipe) -> tuple[Any, types.CellType]:
    """The function to set as `forward`, and the cell that says what it runs."""
    original: Any = type(module).forward
    reference = weakref.ref(module)
    run: Any = _function(module, recipe)

    is_traced = (
        torch._C._get_tracing_state
    )  # by torch.jit.trace: what is saved has to load without fastops

    def forward(*args, **kwargs):
        return (original if is_traced() else run)(reference(), *args, **kwargs)

    code = forward.__code__
    cell: Any = (forward.__closure__ or ())[code.co_freevars.index("run")]
    # With the original's globals: torch.jit.script reads the source of __wrapped__, and looks its names up here.
    made: Any = types.FunctionType(
        code, getattr(original, "__globals__", {}), "forward", None, forward.__closure__
    )
    functools.update_wrapper(made, original)
    signature = inspect.signature(original)
    made.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return made, cell


def _function(module: nn.Module, recipe: Recipe) -> Any:
    cls: Any = type(module)
    if recipe.how == "module":
        function: Any = MODULES[cls].forward  # type: ignore[attr-defined]
    elif recipe.how == "sequence":
        from .norms import in_sequence

        function = in_sequence
    elif recipe.how == "source":
        from .joins import compiled

        function = compiled(cls, recipe)
    elif recipe.how == "calls":
        function = replace_calls(cls.forward, module)[0]
    else:
        function = cls.forward
    if not recipe.mode:
        return function

    def within(self, *args, **kwargs):
        with FunctionalMode():
            return function(self, *args, **kwargs)

    return within
