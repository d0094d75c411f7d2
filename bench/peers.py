"""Other libraries' functions and optimizers, timed beside ours where they are installed and compute what torch computes.

Nothing here is a dependency. A peer that is missing is left out without a word; one that cannot take the case, or whose
result is not torch's, is named in the row's note and not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from .cases import Case


def installed(module: str) -> bool:
    """Whether the package that a module is in can be imported."""
    return find_spec(module.partition(".")[0]) is not None


# ---------------------------------------------------------------------------------------------- functions, on CUDA

# op -> library -> (module, name), of (input, target) or of (input)
FUNCTIONS = {
    "cross_entropy": {
        "liger": ("liger_kernel.transformers.functional", "liger_cross_entropy"),
        "quack": ("quack.cross_entropy", "cross_entropy"),
        "apex": ("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss"),
    },
    "softmax": {"quack": ("quack.softmax", "softmax")},
}


def functions(case: Case, device: str) -> dict[str, Callable[[], Callable[..., Any]]]:
    """For each library that is installed and has the case's function on `device`: what imports a function to call with
    the case's arguments in the place of torch's."""
    if device != "cuda" or case.variant:
        return {}
    return {
        library: partial(_function, library, case.op, module, name)
        for library, (module, name) in FUNCTIONS.get(case.op, {}).items()
        if installed(module)
    }


def _function(library: str, op: str, module: str, name: str) -> Callable[..., Any]:
    function = getattr(import_module(module), name)
    if library == "quack" and op == "cross_entropy":
        return partial(function, reduction="mean")
    if library == "quack":  # of the last dimension, which it does not ask for
        return lambda input, dim: function(input)
    if library == "apex":
        # smoothing, padding_idx (a class whose rows count as 0), whether to return float32
        return lambda input, target: function.apply(input, target, 0.0, -100, False).mean()
    return function


# ---------------------------------------------------------------------------------------------- optimizers


@dataclass(frozen=True)
class Peer:
    """A library's optimizers: `classes` are its names for torch's, `options` what makes them torch's, `own` the same for
    single classes, and `devices` where they run."""

    module: str
    classes: Mapping[str, str]
    devices: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# torch's defaults are spelled out where the library has others.
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
PEERS: dict[str, Peer] = {
    "optimi": Peer(
        "optimi",
        {"Adam": "Adam", "AdamW": "AdamW", "SGD": "SGD"},
        ("cpu", "cuda"),
        own={"Adam": ADAM, "AdamW": ADAM, "SGD": {"torch_init": True}},
    ),
    "bitsandbytes": Peer(
        "bitsandbytes.optim",
        {name: name for name in ("Adam", "AdamW", "SGD", "RMSprop")},
        ("cpu", "cuda"),
        options={"optim_bits": 32},
    ),
    "DeepSpeed": Peer(
        "deepspeed.ops.adam",
        {"Adam": "DeepSpeedCPUAdam", "AdamW": "DeepSpeedCPUAdam"},
        ("cpu",),
        own={"Adam": {"adamw_mode": False}, "AdamW": {"adamw_mode": True}},
    ),
    "apex": Peer(
        "apex.optimizers",
        {"Adam": "FusedAdam", "AdamW": "FusedAdam", "SGD": "FusedSGD"},
        ("cuda",),
        own={"Adam": {"adam_w_mode": False}, "AdamW": {"adam_w_mode": True}},
    ),
}


def makers(name: str, device: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """For each peer that is installed and has torch.optim's class `name` on `device`: what makes that optimizer of
    parameters and torch's arguments. May raise, when it is called, what an import raises."""
    return {
        label: partial(_optimizer, peer, name)
        for label, peer in PEERS.items()
        if name in peer.classes and device in peer.devices and installed(peer.module)
    }


def _optimizer(peer: Peer, name: str, parameters, **arguments) -> torch.optim.Optimizer:
    cls = getattr(import_module(peer.module), peer.classes[name])
    return cls(parameters, **{**peer.options, **peer.own.get(name, {}), **arguments})
