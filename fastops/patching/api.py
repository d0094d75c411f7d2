"""patch(model), unpatch(model), patched(model): all is planned before anything is changed."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx, nn

from .._core.by_torch import DISABLED, DISABLED_REASON
from ..nn import MODULES
from .calls import NAMES, replace_calls
from .joins import FOREIGN, join, may_join
from .modules import Recipe, attach, attached, has_own_forward
from .norms import NORMS, sequence
from .reading import Refused, is_hashable
from .report import PatchReport
from .rms_norms import may_be_rms_norm, rms_norm_recipe

__all__ = ["PatchReport", "patch", "patched", "unpatch"]
_NATIVE = {ours: native for native, ours in MODULES.items()}
_Plan = list[tuple[nn.Module, Recipe | None]]


def _label(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]}.nn.{cls.__name__}"


def _check(model: nn.Module, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")


def _check_flags(caller: str, **flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{caller}: {name} must be True or False, got {flag!r}")


# ---------------------------------------------------------------------------------------------- what is left, and why

_KINDS = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.loss")
OWN_FORWARD = "a forward is set on the module itself; `del module.forward` and patch again"


def _why_not_class(cls: type) -> str | None:
    """Why modules of a class cannot be given another forward."""
    if issubclass(cls, torch.jit.ScriptModule | fx.GraphModule):
        kind = "ScriptModule" if issubclass(cls, torch.jit.ScriptModule) else "GraphModule"
        return f"a {kind}; patch the model before it is made one"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "its class pickles in a way of its own"
    return None


def _of_torch_nn(module: nn.Module) -> str | None:
    """Why a module of torch.nn's that fastops has no class for keeps its forward, where it is one to ask about."""
    cls = type(module)
    for name, value in vars(module).items():
        if (
            is_hashable(value) and value in NAMES
        ):  # TransformerEncoderLayer, TransformerDecoderLayer
            ours = f"fastops.functional.{NAMES[value]}"
            return f"its {name} is torch's function; `module.{name} = {ours}` replaces it"
    if cls.__module__ in _KINDS and cls is not nn.MultiheadAttention:
        return "fastops has no counterpart; torch's own runs"
    return None


# ---------------------------------------------------------------------------------------------- planning


def _recipe_for(
    module: nn.Module, functional: bool
) -> tuple[Recipe | None, list[str], set[str], bool]:
    """How the forward of a module that is not torch.nn's is replaced; why something was left; our names of calls that only
    a mode reaches."""
    cls: Any = type(module)
    if functional and (found := FOREIGN.get(f"{cls.__module__}.{cls.__qualname__}")):
        return found, [], set(), False
    if may_be_rms_norm(module):
        reason = OWN_FORWARD if has_own_forward(module) else _why_not_class(cls)
        recipe, different = (None, reason) if reason else rms_norm_recipe(module)
        return recipe, [different] if different else [], set(), False
    _, calls, missed = replace_calls(cls.forward, module)
    joins = may_join(module)
    if not (calls or missed or joins):
        return None, [], set(), False
    if has_own_forward(module):
        return None, [OWN_FORWARD], set(), False
    if reason := _why_not_class(cls):
        return None, [reason], set(), False
    left: list[str] = []
    recipe, remaining = None, sorted(calls | missed)
    if joins:
        try:
            recipe, reason, still = join(module, functional)
            remaining = still if recipe else remaining
        except Refused as refused:
            reason = str(refused)
        if reason:
            left.append(f"{joins} stay apart: {reason}")
    if not functional:
        if remaining:
            names = ", ".join(remaining)
            left.append(f"its forward calls {names}; patch(model, functional=True) replaces that")
        return recipe, left, set(), False
    if recipe is None and calls:
        words = [(f"{cls.__name__}: {n}", f"fastops.functional.{n}") for n in sorted(calls)]
        recipe = Recipe("calls", tuple(words), True)
    return recipe, left, set() if recipe and recipe.how == "source" else missed, True


def _plan(model: nn.Module, functional: bool) -> tuple[PatchReport, _Plan]:
    """What patch() would report, and the recipe of each module that it touches."""
    report, plan = PatchReport(), _Plan()
    missed: dict[str, tuple[nn.Module, set[str]]] = {}
    fast_path = False
    for name, module in model.named_modules():
        cls = type(module)
        fast_path |= isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        if DISABLED:
            if cls in MODULES or not name:
                report.left.append((name, cls.__name__, DISABLED_REASON))
            continue
        if cls in _NATIVE:
            continue
        found = attached(module)
        now = found.recipe if found else None
        recipe: Recipe | None = None
        left: list[str] = []
        base = next((b for b in cls.__mro__ if b in MODULES), None)
        if base in NORMS:
            continue  # torch's is as fast where nothing that follows is fused with it
        if base:
            if has_own_forward(module):
                left = [OWN_FORWARD]
            elif reason := _why_not_class(cls):
                left = [reason]
            elif cls.forward is not base.forward:  # type: ignore[attr-defined]
                left = [f"a subclass of {_label(base)} with a forward of its own; call fastops.functional in it"]  # fmt: skip
            else:
                recipe = Recipe("module", ((_label(base), _label(MODULES[base])),))
        elif pairs := sequence(module):
            if has_own_forward(module):
                left = [OWN_FORWARD]
            elif reason := _why_not_class(cls):
                left = [reason]
            else:
                recipe = pairs
        elif cls.__module__.startswith("torch.nn."):
            left = [reason] if (reason := _of_torch_nn(module)) else []
        elif isinstance(getattr(cls, "forward", None), types.FunctionType):
            wanted = functional or (now is not None and now.functional)
            recipe, left, seen, _ = _recipe_for(module, wanted)
            if seen:
                missed[name] = (module, seen)
        report.left += [(name, cls.__name__, why) for why in left]
        if recipe == now or recipe is None:
            continue
        before = now.replaced if now else ()
        report.replaced += [(name, *what) for what in recipe.replaced if what not in before]
        plan.append((module, recipe))
    if missed:
        _plan_mode(model, missed, fast_path, report, plan)
    return report, plan


def _plan_mode(
    model: nn.Module,
    missed: dict[str, tuple[nn.Module, set[str]]],
    fast_path: bool,
    report: PatchReport,
    plan: _Plan,
) -> None:
    """One mode around the model, for calls in functions that cannot be written anew."""
    names = {n: f"{type(m).__name__}: {', '.join(sorted(w))}" for n, (m, w) in missed.items()}
    reason = None
    if fast_path:
        reason = "a mode around the model would cost torch.nn.MultiheadAttention its fast path"
    elif has_own_forward(model):
        reason = OWN_FORWARD
    else:
        reason = _why_not_class(type(model))
    if reason is not None or not isinstance(type(model).forward, types.FunctionType):
        for name, (module, words) in missed.items():
            why = f"{', '.join(sorted(words))} in a decorated function or one without source: {reason}"
            report.left.append((name, type(module).__name__, why))
        return
    found = attached(model)
    if found and found.recipe.mode:
        return
    how = "fastops.functional by one TorchFunctionMode around the model"
    report.replaced += [(name, what, how) for name, what in names.items()]
    planned = next((r for m, r in plan if m is model), found.recipe if found else None)
    base = planned or Recipe("", (), True)
    within = tuple((what, how) for what in names.values())
    plan[:] = [(m, r) for m, r in plan if m is not model]
    mode = Recipe(base.how, base.replaced + within, True, base.source, base.names, True)
    plan.append((model, mode))


# ---------------------------------------------------------------------------------------------- the functions


def patch(model: nn.Module, *, functional: bool = False, dry_run: bool = False) -> PatchReport:
    """Makes a model run the kernels of fastops, in place: for its activations, losses, softmaxes and dropouts, for a batch
    norm with the addition and the activation after it (:func:`fastops.functional.batch_norm_act`), for layer norms and RMS
    norms (those of Hugging Face's models too, which are recognized by what they compute), and for any other addition with a
    relu after it (:func:`fastops.functional.add_relu`). A batch norm without either stays torch's.

    Args:
        model: any module. It may be an activation or loss itself.
        functional: also replace torch's functions that the forward passes of the model call (``F.relu``, ``x.relu()``,
            ``F.softmax``, ``F.dropout``, ``F.cross_entropy`` ...), in this model only and at no cost for other calls.
            Calls in decorated functions are reached by one TorchFunctionMode around the model, which costs some
            microseconds for each call of torch's. Calls that torch's own functions make
            (``F.multi_head_attention_forward``) stay. Also replaced are the activations of Hugging Face's transformers
            that are a formula of ours.
        dry_run: report only.

    Returns:
        A :class:`PatchReport`, which says what was replaced, what was left and why, and what to try. patch() leaves
        subclasses of torch.nn's modules with a forward of their own, modules with a forward set on the instance, and
        blocks that it cannot prove equal to the fused kernel: control flow that depends on data or on ``self.training``,
        functions that are not torch's, a sum that is also used elsewhere. With FASTOPS_DISABLE=1 in the environment it
        leaves everything.

    Raises:
        TypeError: `model` is no module, or a flag is no bool.

    Only what runs inside ``forward`` changes. A module keeps its class, parameters, buffers, hooks, names and
    ``state_dict()``; torch.fx, torch.compile, torch.export, torch.jit, torch.ao and other tools see what they saw before. A
    deep copy is patched too. A pickle is not: it is torch's own and loads without fastops, so patch again after loading. A
    fused block checks at each call that it has not changed (that nobody has put a hook on the relu, say), and else runs
    its own forward. Patching twice changes nothing more. Example: ``print(fastops.patch(torchvision.models.resnet18()))``.
    """
    _check(model, "patch")
    _check_flags("patch", functional=functional, dry_run=dry_run)
    report, plan = _plan(model, functional)
    if not dry_run:
        for module, recipe in plan:
            attach(module, recipe)
    return report


def unpatch(model: nn.Module) -> PatchReport:
    """Undoes :func:`patch`: every module gets its own forward back. Modules that were built as fastops.nn's become
    torch.nn's too. If somebody has since wrapped our forward in another one, that one stays and wraps torch's, and the
    report says so. Raises TypeError if `model` is no module."""
    _check(model, "unpatch")
    report = PatchReport()
    for name, module in model.named_modules():
        cls = type(module)
        if cls in _NATIVE:
            report.replaced.append((name, _label(cls), _label(_NATIVE[cls])))
            module.__class__ = _NATIVE[cls]
        if found := attached(module):
            report.replaced += [(name, after, before) for before, after in found.recipe.replaced]
            if not found.detach():
                why = "a forward was set on the module since it was patched; it stays, and runs torch's"
                report.left.append((name, cls.__name__, why))
    return report


def patched(model: nn.Module, *, functional: bool = False) -> AbstractContextManager[nn.Module]:
    """Patches a model within a ``with`` block. Afterwards, even after an exception, the model is as it was before; what was
    patched already stays patched. Arguments and errors as :func:`patch`."""
    _check(model, "patched")
    _check_flags("patched", functional=functional)
    return _patched(model, functional)


@contextmanager
def _patched(model: nn.Module, functional: bool) -> Iterator[nn.Module]:
    before = [(m, found.recipe if (found := attached(m)) else None) for m in model.modules()]
    try:
        patch(model, functional=functional)
        yield model
    finally:
        for module, recipe in before:
            found = attached(module)
            if (found.recipe if found else None) != recipe:
                attach(module, recipe)
