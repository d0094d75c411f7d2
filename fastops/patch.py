"""Puts fastops into a model that is already built: patch(model), unpatch(model), patched(model).

A module is patched by giving it the class of its fastops.nn counterpart, which is a subclass of the class it had: the
object stays the same one, with its parameters, buffers, hooks, name, flags and place in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .nn import MODULES

__all__ = ["PatchReport", "patch", "patched", "unpatch"]
_NATIVE = {ours: native for native, ours in MODULES.items()}


@dataclass
class PatchReport:
    """What patch() or unpatch() did: `replaced` holds (module name, class before, class after) of every module, and
    `left` (module name, class, why) of every module of a kind that fastops has but did not touch."""

    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts: dict[tuple[str, str], int] = {}
        for _, before, after in self.replaced:
            counts[before, after] = counts.get((before, after), 0) + 1
        lines = [f"{before} -> {after}: {n}" for (before, after), n in counts.items()]
        lines += [f"left {name or '(the model)'} ({cls}): {why}" for name, cls, why in self.left]
        return "\n".join(lines) or "nothing to replace"


def _label(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]}.nn.{cls.__name__}"


def _check(model: torch.nn.Module, caller: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")


def patch(model: torch.nn.Module, *, dry_run: bool = False) -> PatchReport:
    """Replaces the activations, losses, softmaxes and dropouts of a model by fastops.nn's, in place.

    Args:
        model: any module; it may itself be one to replace.
        dry_run: report only.

    Returns:
        A :class:`PatchReport`. Subclasses with code of their own are left alone, and said so.

    Raises:
        TypeError: `model` is no module.

    Patching twice changes nothing more. Example: ``print(fastops.patch(torchvision.models.resnet18()))``.
    """
    _check(model, "patch")
    report = PatchReport()
    for name, module in model.named_modules():
        cls = type(module)
        if cls in MODULES:
            report.replaced.append((name, _label(cls), _label(MODULES[cls])))
            if not dry_run:
                module.__class__ = MODULES[cls]
        elif cls not in _NATIVE:
            base = next((b for b in cls.__mro__ if b in MODULES), None)
            if base is not None:
                report.left.append((name, cls.__name__, f"a subclass of {_label(base)} of its own"))
    return report


def unpatch(model: torch.nn.Module) -> PatchReport:
    """Undoes :func:`patch`: every fastops.nn module becomes what it was. Raises TypeError if `model` is no module."""
    _check(model, "unpatch")
    report = PatchReport()
    for name, module in model.named_modules():
        cls = type(module)
        if cls in _NATIVE:
            report.replaced.append((name, _label(cls), _label(_NATIVE[cls])))
            module.__class__ = _NATIVE[cls]
    return report


@contextmanager
def patched(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Patches a model within a ``with`` block, and leaves it as it was found."""
    before = {module: type(module) for module in model.modules()}
    patch(model)
    try:
        yield model
    finally:
        for module, cls in before.items():
            module.__class__ = cls
