"""Parameter groups with regularization and without."""

from __future__ import annotations

from collections.abc import Callable

import torch

_NORMS: tuple[type[torch.nn.Module], ...] = (
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.RMSNorm,
    torch.nn.LocalResponseNorm,
)


def _is_bias_or_norm(name: str, parameter: torch.nn.Parameter, owner: torch.nn.Module) -> bool:
    return parameter.dim() <= 1 or name.rpartition(".")[2] == "bias" or isinstance(owner, _NORMS)


def param_groups(
    model: torch.nn.Module,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    no_decay: Callable[[str, torch.nn.Parameter, torch.nn.Module], bool] | None = None,
) -> list[dict]:
    """Splits the parameters of a model into two groups for an optimizer: those to regularize, and the others.

    Args:
        model: the model. Each parameter that requires grad is taken once.
        weight_decay, l1: of the first group; 0 in the second.
        no_decay: called with (name, parameter, module that holds it), says whether the parameter goes into the second
            group. By default biases, the parameters of normalization layers, and all parameters with fewer than two
            dimensions do.

    Returns:
        A list of the groups that are not empty, as an optimizer takes them.

    Raises:
        TypeError: `model` is no module.
        ValueError: a negative weight_decay or l1, or a model of which no parameter requires grad.

    Example: ``fastops.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-3)``.
    """
    for name, value in (("weight_decay", weight_decay), ("l1", l1)):
        if not value >= 0:
            raise ValueError(f"param_groups: {name} must not be negative, got {value}")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"param_groups: expected a torch.nn.Module, got {type(model).__name__}")
    rule = no_decay or _is_bias_or_norm
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    seen = set()
    for prefix, module in model.named_modules():
        for key, p in module.named_parameters(prefix, recurse=False):
            if p.requires_grad and p not in seen:
                seen.add(p)
                (spared if rule(key, p, module) else decayed).append(p)
    if not seen:
        raise ValueError("param_groups: no parameter of the model requires grad")
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "l1": l1},
        {"params": spared, "weight_decay": 0.0, "l1": 0.0},
    ]
    return [g for g in groups if g["params"]]
