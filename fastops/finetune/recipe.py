"""What a recipe is made of: losses and optimizers of a back end, rates, schedules, averages."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..optim import param_groups
from .config import OPTIMIZERS, FineTuneConfig
from .errors import ConfigError
from .networks import count_parameters

HEAD_FIRST = 20
"""Percent of the steps in which the schedule head-first trains the head alone."""


@dataclass(frozen=True)
class Ops:
    """What a recipe takes from a back end."""

    cross_entropy: Callable[..., torch.Tensor]
    mixup_cross_entropy: Callable[..., torch.Tensor]
    optimizers: ModuleType
    patch: Callable[[nn.Module], Any]
    fused: bool
    """The optimizers take l1, max_grad_norm and ema_decay."""


def ops_for(backend: str) -> Ops:
    """The losses, the optimizers and the module patch of "fastops" or "torch"."""
    if backend == "torch":
        return Ops(F.cross_entropy, mix_cross_entropies, torch.optim, lambda model: None, False)
    from fastops import functional, optim, patch

    return Ops(functional.cross_entropy, functional.mixup_cross_entropy, optim, patch, True)


def mix_cross_entropies(logits, labels_a, labels_b, share, **options) -> torch.Tensor:
    """fastops.functional.mixup_cross_entropy on torch's own cross-entropy."""
    first = F.cross_entropy(logits, labels_a, **options)
    return share * first + (1 - share) * F.cross_entropy(logits, labels_b, **options)


def find_optimizer(config: FineTuneConfig, ops: Ops) -> Callable[..., torch.optim.Optimizer]:
    """The back end's class for `config.optimizer`.

    Raises:
        ConfigError: the back end has none.
    """
    name = OPTIMIZERS[config.optimizer]
    if not hasattr(ops.optimizers, name):
        raise ConfigError(f"{ops.optimizers.__name__} has no {name}: choose another optimizer")
    return getattr(ops.optimizers, name)


def make_optimizer(
    config: FineTuneConfig, ops: Ops, mode: str, trained: dict[str, nn.Module]
) -> torch.optim.Optimizer:
    """The optimizer over the trained pieces: own rates for the head and each stage, own groups for
    weights (regularised) and for biases and norms (not)."""
    optimizer = find_optimizer(config, ops)
    head_rate = config.chosen_lr
    stages = [name for name, module in reversed(trained.items()) if count_parameters(module)]
    groups = []
    for depth, piece in enumerate(stages):
        rate = head_rate
        if piece != "head" and mode != "scratch":
            rate *= config.backbone_rate * config.layer_decay ** (depth - 1)
        for group in param_groups(trained[piece], config.weight_decay, config.l1):
            groups.append({**group, "lr": rate})
    options: dict[str, Any] = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    if ops.fused:
        options["max_grad_norm"] = config.max_grad_norm
    if averages_in_step(config, ops):
        options["ema_decay"] = config.ema
    return optimizer(groups, lr=head_rate, **options)


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on every learning rate at a step: linear rise, then a cosine down to 0."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


def thaw_steps(
    pieces: dict[str, nn.Module], steps: int, epoch: int, schedule: str
) -> dict[str, int]:
    """The step at which each piece starts to learn: the head at 0; empty for all of them at 0.

    Args:
        epoch: steps in an epoch.
        schedule: "together"; "head-first": the others after a fifth of the steps; or "gradual":
            one after another, in equal intervals over the first half of the steps, and with a new
            epoch where an interval is longer than an epoch.
    """
    if schedule == "together":
        return {}
    names = [name for name in reversed(pieces) if count_parameters(pieces[name])]
    if schedule == "head-first":
        return {name: 0 if name == "head" else HEAD_FIRST * steps // 100 for name in names}
    interval = steps / (2 * len(names))
    starts = [math.ceil(i * interval) for i in range(len(names))]
    if interval > epoch:
        starts = [-(-start // epoch) * epoch for start in starts]
    return dict(zip(names, starts, strict=True))


def regularise(optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
    """What fastops.optim does within its step: clip, then add the L1 penalty's subgradient."""
    if max_grad_norm is not None:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(every, max_grad_norm)
    for group in optimizer.param_groups:
        if group["l1"]:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p.detach().sign(), alpha=group["l1"])


class StepAverage(AveragedModel):
    """The moving average of a network whose parameters the optimizer averages within its step
    (fastops.optim's ema_decay): only the buffers are left to average here."""

    def __init__(self, model: nn.Module, decay: float, optimizer: torch.optim.Optimizer):
        super().__init__(model)
        self.decay, self.optimizer = decay, optimizer

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """After a step."""
        for average, value in zip(self.module.buffers(), model.buffers(), strict=True):
            if self.n_averaged and average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)
        self.n_averaged += 1

    @torch.no_grad()
    def fetch(self, model: nn.Module) -> None:
        """Copy the optimizer's averages of the model's parameters into `module`."""
        for average, p in zip(self.module.parameters(), model.parameters(), strict=True):
            average.copy_(self.optimizer.state[p].get("ema", p))


def averages_in_step(config: FineTuneConfig, ops: Ops) -> bool:
    """Whether the optimizer keeps the moving average: it starts a parameter's average with the
    parameter's first step, as AveragedModel does where all parameters step from the first on."""
    return config.ema is not None and ops.fused and config.chosen_schedule == "together"
