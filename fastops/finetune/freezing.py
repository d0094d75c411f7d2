"""Where a network's training starts: its stages, what is frozen, and what need be computed only once."""

from dataclasses import dataclass

import torch
from torch import nn

from .config import parse_mode
from .errors import ConfigError
from .networks import head_of

FEWEST_STAGES = 3
"""A backbone of fewer modules that have modules is cut within the largest of them."""

CHAIN = ("conv1", "bn1", "relu", "maxpool", "avgpool", "fc")
"""The modules that torchvision's ResNets call one after another, with layer1 ... between."""


@dataclass
class Split:
    """A network cut where its training starts.

    Attributes:
        frozen: computes without gradients what `trained` takes; None where that takes images.
        trained: the rest of the network.
        pieces: the stages that learn by name, in order; the last is "head".
    """

    frozen: nn.Module | None
    trained: nn.Module
    pieces: dict[str, nn.Module]


class Backbone(nn.Module):
    """All of a network before its head: gives what the head is called with."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head = head_of(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: list[torch.Tensor] = []
        head = self.model.get_submodule(self.head)
        handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            self.model(x)
        finally:
            handle.remove()
        return features[0]


def is_chain(model: nn.Module) -> bool:
    """Whether the network calls its modules one after another, so that it can be cut in two."""
    names = [name for name, _ in model.named_children() if not name.startswith("layer")]
    return sorted(names) == sorted(CHAIN)


def stages_of(model: nn.Module) -> dict[str, nn.Module]:
    """The network by name: stem, stages in order, head; modules are shared.

    Cut after patching: a patched module is another object.
    """
    if is_chain(model):
        parts = dict(model.named_children())
        stem = nn.Sequential(*(parts[name] for name in CHAIN[:4]))
        layers = {name: part for name, part in parts.items() if name.startswith("layer")}
        pool = nn.Sequential(parts["avgpool"], nn.Flatten())
        return {"stem": stem, **layers, "pool": pool, "head": parts["fc"]}
    head = model.get_submodule(head_of(model))
    in_head = {id(p) for p in head.parameters()}

    def parts_of(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
        """The children with parameters; of one that holds the head, what is beside it."""
        parts: dict[str, nn.Module] = {}
        for name, child in module.named_children():
            own = {id(p) for p in child.parameters()}
            if own and own.isdisjoint(in_head):
                parts[prefix + name] = child
            elif own - in_head:
                parts |= parts_of(child, f"{prefix}{name}.")
        return parts

    found = parts_of(model, "")
    while sum(any(True for _ in part.children()) for part in found.values()) < FEWEST_STAGES:
        inner = {name: parts_of(part, f"{name}.") for name, part in found.items()}
        dividable = [name for name in found if inner[name]]
        if not dividable:
            break
        largest = max(dividable, key=lambda n: sum(p.numel() for p in found[n].parameters()))
        found = {
            k: v
            for name, part in found.items()
            for k, v in (inner[name] if name == largest else {name: part}).items()
        }
    stages: dict[str, nn.Module] = {"stem": nn.ModuleList()}
    single = {n for n, part in found.items() if not any(parts_of(part, "").values())}
    for name, part in found.items():
        # A layer by itself is of the stem, or of the stage before it, but in networks of nothing else.
        if name in single and len(single) < len(found):
            last = list(stages)[-1]
            stages[last] = nn.ModuleList([stages[last], part])
        else:
            stages[name] = part
    placed = in_head | {id(p) for stage in stages.values() for p in stage.parameters()}
    loose = [p for p in model.parameters() if id(p) not in placed]  # class tokens, positions
    stages["stem"] = nn.ModuleList([stages["stem"], nn.ParameterList(loose)])
    return {**stages, "head": head}


def split(model: nn.Module, mode: str) -> Split:
    """Cut the network where `mode` starts to train it.

    What is before loses its gradients and goes to eval, so that neither its weights nor its
    BatchNorm statistics move; the rest is put into training.

    Raises:
        ConfigError: "last:N" with more stages than the network has.
    """
    chain = stages_of(model)
    _, count = parse_mode(mode)
    stages = [name for name in chain if name not in ("stem", "pool", "head")]
    if count > len(stages):
        raise ConfigError(f"mode {mode}: the network has {len(stages)} stages")
    first = {-1: "stem", 0: "head"}.get(count) or stages[-count]
    position = list(chain).index(first)
    before = nn.ModuleList(list(chain.values())[:position])
    pieces = dict(list(chain.items())[position:])
    frozen: nn.Module | None = None
    if is_chain(model):
        if position:
            frozen = nn.Sequential(*before)
        trained: nn.Module = nn.Sequential(*pieces.values())
    elif count == 0 and not isinstance(chain["head"], nn.Conv2d):
        frozen, trained = Backbone(model), chain["head"]
    else:
        trained = model
    model.requires_grad_(False).train()
    before.eval()
    if frozen is not None:
        frozen.eval()
    for piece in pieces.values():
        piece.requires_grad_(True).train()
    return Split(frozen, trained, pieces)
