"""Other libraries' optimizers, timed beside ours where they are installed and where they compute what torch computes.

Nothing here is a dependency. A peer that is missing is left out without a word; one that cannot take the case, or whose
result is not torch's, is named in the row's note and not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


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
    parameters and torch's arguments."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    for label, peer in PEERS.items():
        if name not in peer.classes or device not in peer.devices:
            continue
        try:
            cls = getattr(importlib.import_module(peer.module), peer.classes[name])
        except Exception:  # not installed, or broken in its own way
            continue
        fixed = {**peer.options, **peer.own.get(name, {})}

        def make(parameters, cls=cls, fixed=fixed, **arguments):
            return cls(parameters, **{**fixed, **arguments})

        found[label] = make
    return found
