"""Batch norms and what follows them, made one kernel: fastops.functional.batch_norm_act.

In a torch.nn.Sequential the modules that follow each other are seen at each call; in other forwards joins.py finds them. A
batch norm or an activation that is more than its class (with hooks, or a forward of its own) runs as it is. In what is
compiled they stay apart: torch fuses there by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks
from torch.overrides import has_torch_function_unary

from .. import functional
from .._core.batch_norms import normalized
from .._core.usable import CLASSES
from ..functional._batch_norm import normalized_act
from ..nn import MODULES
from .modules import Recipe, has_own_forward

FUNCTION = "fastops.functional.batch_norm_act"


def _both(*classes: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    return (*classes, *(MODULES[c] for c in classes))


NORMS = _both(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS: dict[type[nn.Module], str] = {
    cls: name
    for name, native in {
        "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU,
        "hardswish": nn.Hardswish, "mish": nn.Mish,
    }.items()
    for cls in _both(native)
}  # fmt: skip


def _bare(module: Any) -> bool:
    """Whether to call a module is to call its class's forward, or ours in its place."""
    compiling = torch.compiler.is_compiling()  # when all are called as they are
    return compiling or not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks or _hooks._global_backward_pre_hooks
        or has_own_forward(module)
    )  # fmt: skip


def is_norm(module: object) -> bool:
    return type(module) in NORMS


def activation_of(module: Any) -> str | None:
    """The activation that a module is, by batch_norm_act's name; None of others."""
    name = _ACTIVATIONS.get(type(module))
    return None if name == "gelu" and module.approximate != "none" else name


def plain_norm(module: nn.Module | None) -> bool:
    return is_norm(module) and _bare(module)


def plain_activation(module: nn.Module | None) -> bool:
    return activation_of(module) is not None and _bare(module)


def fused(
    norm: nn.Module, input: Tensor, activation: Any, residual: Tensor | None = None
) -> Tensor:
    """activation(norm(input) + residual) in one call. An activation that is no module is relu."""
    name, slope = "relu", 0.01
    if activation is not None:
        name = _ACTIVATIONS[type(activation)]
        if name == "leaky_relu":
            slope = activation.negative_slope
    # A mode has to see one function; without one, finding that out for each tensor takes longer than a small kernel.
    function = functional.batch_norm_act if has_torch_function_unary(input) else normalized_act
    return normalized(norm, input, function, residual=residual, activation=name, negative_slope=slope)  # fmt: skip


def norm_act(norm, input, activation):
    """activation(norm(input)) of a rewritten forward; of relu, where that is None."""
    if torch.compiler.is_compiling() or type(input) not in CLASSES:
        output = norm(input)
        return torch.relu(output) if activation is None else activation(output)
    return fused(norm, input, activation)


# ---------------------------------------------------------------------------------------------- torch.nn.Sequential


def in_sequence(self: nn.Sequential, input):
    """torch.nn.Sequential's forward."""
    if torch.compiler.is_compiling():
        return nn.Sequential.forward(self, input)
    norm: nn.Module | None = None  # what has not run yet
    for module in self:
        if norm is not None and plain_activation(module):
            input, norm = norm_act(norm, input, module), None
            continue
        if norm is not None:
            input, norm = norm(input), None
        if plain_norm(module):
            norm = module
        else:
            input = module(input)
    return input if norm is None else norm(input)


def sequence(module: nn.Module) -> Recipe | None:
    """The recipe of a torch.nn.Sequential, or of a subclass with its forward, in which activations follow batch norms."""
    cls = type(module)
    if not isinstance(module, nn.Sequential) or cls.forward is not nn.Sequential.forward:
        return None
    children = [c for c in module._modules.values() if c is not None]
    words = tuple(
        (f"{cls.__name__}: {type(norm).__name__} + {type(act).__name__}", FUNCTION)
        for norm, act in zip(children, children[1:], strict=False)
        if is_norm(norm) and activation_of(act)
    )
    return Recipe("sequence", words) if words else None
