"""Other libraries' calls for the same work on CUDA, where they are installed: apex, Liger-Kernel and quack. Nothing here is
verified, and none of them is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .cases import Case

# op -> library -> (module, name): a function of (input, target), of (input), or a class of optimizers
FUNCTIONS = {
    "cross_entropy": {
        "liger": ("liger_kernel.transformers.functional", "liger_cross_entropy"),
        "quack": ("quack.cross_entropy", "cross_entropy"),
        "apex": ("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss"),
    },
    "softmax": {"quack": ("quack.softmax", "softmax")},
}
OPTIMIZERS = {
    "Adam": ("apex.optimizers", "FusedAdam", {"adam_w_mode": False}),
    "AdamW": ("apex.optimizers", "FusedAdam", {"adam_w_mode": True}),
    "SGD": ("apex.optimizers", "FusedSGD", {}),
}


def installed(module: str) -> bool:
    """Whether the package that a module is in can be imported."""
    return find_spec(module.partition(".")[0]) is not None


def functions(case: Case, device: str) -> dict[str, Callable[..., Any]]:
    """name -> what to call with the case's tensors in the place of its function. May raise what an import raises."""
    if device != "cuda" or case.variant:
        return {}
    found: dict[str, Callable[..., Any]] = {}
    for library, (module, name) in FUNCTIONS.get(case.op, {}).items():
        if not installed(module):
            continue
        function = getattr(import_module(module), name)
        if library == "quack" and case.op == "cross_entropy":
            function = partial(function, reduction="mean")
        elif library == "quack":  # of the last dimension, which it does not ask for
            function = _without_dim(function)
        elif library == "apex":
            function = _mean_of_rows(function)
        found[library] = function
    return found


def _without_dim(function: Callable) -> Callable:
    return lambda input, dim: function(input)


def _mean_of_rows(loss: Any) -> Callable:
    # smoothing, padding_idx (a class whose rows count as 0), whether to return float32
    return lambda input, target: loss.apply(input, target, 0.0, -100, False).mean()


def optimizer(case: Case, device: str) -> tuple[str, Callable[..., Any]] | None:
    """(name, what makes the optimizer of the parameters), or None."""
    if device != "cuda" or case.beyond or case.op not in OPTIMIZERS:
        return None
    module, name, options = OPTIMIZERS[case.op]
    if not installed(module):
        return None
    return "apex", partial(getattr(import_module(module), name), **case.arguments, **options)
