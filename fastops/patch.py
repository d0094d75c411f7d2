"""Puts fastops into a model that is already built: patch(model), unpatch(model), patched(model).

A module is patched by giving it another class, a subclass of the class it had: fastops.nn's for one of torch.nn's, one made
for it (fastops._rewrite) for others. The object stays the same one, with its parameters, buffers, hooks, name, flags and
place in the model, and nothing outside the model changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from . import _rewrite
from ._guard import DISABLED, DISABLED_REASON
from .nn import MODULES

__all__ = ["PatchReport", "patch", "patched", "unpatch"]
_NATIVE = {ours: native for native, ours in MODULES.items()}


@dataclass
class PatchReport:
    """What patch() or unpatch() did, or with ``dry_run`` would do; print it.

    `replaced` holds (module name, before, after) of everything replaced: a module's class, or what in its forward. `left`
    holds (module name, class, why) of what fastops has a counterpart for and did not touch. The name of the model itself
    is "". A module that is in several places is named by the first.
    """

    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts: dict[tuple[str, str], int] = {}
        for _, before, after in self.replaced:
            counts[before, after] = counts.get((before, after), 0) + 1
        lines = [f"{before} -> {after}: {n}" for (before, after), n in counts.items()]
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, cls, why in self.left:
            reasons.setdefault((cls, why), []).append(name or "(the model)")
        for (cls, why), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left {names[0]}{more} ({cls}): {why}")
        return "\n".join(lines) or "nothing to replace"


def _label(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]}.nn.{cls.__name__}"


def _check(model: torch.nn.Module, caller: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")


def _check_flags(caller: str, **flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{caller}: {name} must be True or False, got {flag!r}")


def _plan(
    model: torch.nn.Module, functional: bool
) -> tuple[PatchReport, list[tuple[torch.nn.Module, type]]]:
    """What patch() would report, and the class that each module it touches gets."""
    report, changes = PatchReport(), []
    within: dict[
        str, bool
    ] = {}  # the modules whose mode their submodules run in, and whether it is new
    for name, module in model.named_modules():
        cls = type(module)
        if DISABLED:
            if cls in MODULES or not name:
                report.left.append((name, cls.__name__, DISABLED_REASON))
            continue
        if cls in MODULES:
            report.replaced.append((name, _label(cls), _label(MODULES[cls])))
            changes.append((module, MODULES[cls]))
            continue
        if cls in _NATIVE:
            continue
        base = next((b for b in cls.__mro__ if b in MODULES), None)
        if base is not None:
            report.left.append((name, cls.__name__, f"a subclass of {_label(base)} of its own"))
            continue
        now = _rewrite.recipe_of(module)
        recipe, reason = _rewrite.recipe_for(
            module, functional or (now is not None and now.functional)
        )
        if reason is not None:
            report.left.append((name, cls.__name__, reason))
        if recipe is None:
            continue
        if not recipe.source:
            outer = next((w for w in within if not w or name.startswith(w + ".")), None)
            if outer is not None:  # its calls are seen by that mode
                if within[outer]:
                    before, _ = recipe.replaced[0]
                    report.replaced.append((name, before, f"the same of {outer or 'the model'}"))
                continue
            within[name] = recipe != now
        if recipe == now:
            continue
        report.replaced += [
            (name, *what) for what in recipe.replaced if now is None or what not in now.replaced
        ]
        changes.append((module, _rewrite.rewritten(_rewrite.original(cls), recipe)))
    return report, changes


def patch(
    model: torch.nn.Module, *, functional: bool = False, dry_run: bool = False
) -> PatchReport:
    """Replaces the activations, losses, softmaxes and dropouts of a model by fastops.nn's, and the sum and relu that end
    a residual block by :func:`fastops.functional.add_relu`, in place.

    Args:
        model: any module; it may itself be one to replace.
        functional: also replace torch's functions that the forward passes of the model call (``F.relu``, ``x.relu()``,
            ``F.softmax``, ``F.dropout``, ``F.cross_entropy`` ...), in this model only: where torch.fx can follow a
            forward, by another forward; elsewhere by a TorchFunctionMode around it, which costs some microseconds a call
            of torch's. Calls that torch's own functions make (``F.multi_head_attention_forward``) stay. Also replaced are
            the activations of Hugging Face's transformers that are a formula of ours.
        dry_run: report only.

    Returns:
        A :class:`PatchReport`. Left, and said so, are subclasses of torch.nn's with code of their own, and blocks whose
        forward cannot be shown to mean the same: control flow that depends on data or on ``self.training``, functions
        that are not torch's, a sum that is used elsewhere too. With FASTOPS_DISABLE=1 in the environment all is left.

    Raises:
        TypeError: `model` is no module, or a flag is no bool.

    Parameters, buffers, hooks, names, ``state_dict()``, copies and pickles, ``torch.compile`` and shared modules are as they
    were; isinstance too. A rewritten forward looks at each call whether the block is still what it was (no hook on the relu,
    say), and is the block's own where it is not. Patching twice changes nothing more. All is planned before anything is
    changed. Example: ``print(fastops.patch(torchvision.models.resnet18()))``.
    """
    _check(model, "patch")
    _check_flags("patch", functional=functional, dry_run=dry_run)
    report, changes = _plan(model, functional)
    if not dry_run:
        for module, cls in changes:
            module.__class__ = cls
    return report


def unpatch(model: torch.nn.Module) -> PatchReport:
    """Undoes :func:`patch`: every module gets the class that it had. Modules that were built as fastops.nn's become
    torch.nn's too. Raises TypeError if `model` is no module."""
    _check(model, "unpatch")
    report = PatchReport()
    for name, module in model.named_modules():
        cls = type(module)
        if cls in _NATIVE:
            report.replaced.append((name, _label(cls), _label(_NATIVE[cls])))
            module.__class__ = _NATIVE[cls]
        elif (recipe := _rewrite.recipe_of(module)) is not None:
            report.replaced += [(name, after, before) for before, after in recipe.replaced]
            module.__class__ = _rewrite.original(cls)
    return report


def patched(
    model: torch.nn.Module, *, functional: bool = False
) -> AbstractContextManager[torch.nn.Module]:
    """Patches a model within a ``with`` block, and leaves it as it was found: also after an exception, and with what was
    patched before still patched. Arguments and errors as :func:`patch`."""
    _check(model, "patched")
    _check_flags("patched", functional=functional)
    return _patched(model, functional)


@contextmanager
def _patched(model: torch.nn.Module, functional: bool) -> Iterator[torch.nn.Module]:
    before = {module: type(module) for module in model.modules()}
    try:
        patch(model, functional=functional)
        yield model
    finally:
        for module, cls in before.items():
            module.__class__ = cls
