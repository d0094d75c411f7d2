"""Networks: the shipped small ResNet and torchvision's, their weights, and where to cut them.

All share torchvision's names (conv1, bn1, layer1 ..., fc), so that one piece of code freezes them.
"""

import contextlib
import pickle
import re
import socket
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from .data import InputFormat
from .errors import ConfigError, WeightsError

ARCHITECTURES = ("small", "resnet18", "resnet34", "resnet50", "resnet101")

SHIPPED_FORMAT = InputFormat(1, 28, (0.286,), (0.353,))
IMAGENET_FORMAT = InputFormat(3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class SmallResNet(nn.Module):
    """The ResNet of 6 n + 2 layers for small images (He et al. 2015, section 4.2).

    Input (N, channels, H, W), output (N, num_classes). With the default n = 2 it has 14 layers and
    175,000 parameters.
    """

    def __init__(self, num_classes: int, channels: int = 1, n: int = 2, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        self.layer1 = self._make_layer(width, width, n, stride=1)
        self.layer2 = self._make_layer(width, 2 * width, n, stride=2)
        self.layer3 = self._make_layer(2 * width, 4 * width, n, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _make_layer(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def input_format(arch: str, image_size: int | None = None) -> InputFormat:
    """What images `arch` takes, at its own size or at `image_size`."""
    own = SHIPPED_FORMAT if arch == "small" else IMAGENET_FORMAT
    return InputFormat(own.channels, image_size or own.size, own.mean, own.std)


def build(arch: str, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """A network with random weights from torch's default generator.

    Args:
        arch: one of ARCHITECTURES.
        dropout: probability of dropping a feature before the last linear layer; with 0 the head
            stays the plain `fc`.

    Raises:
        ConfigError: unknown `arch`.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if arch == "small":
        model = SmallResNet(num_classes)
    else:
        model = torchvision.models.get_model(arch, weights=None)
        model.fc = nn.Linear(model.fc.in_features, num_classes)
    if dropout:
        model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
    return model


def pieces(model: nn.Module) -> dict[str, nn.Module]:
    """The network as a chain by name: stem, layer1 ... layerN, pool, head; modules are shared.

    Cut after patching: a patched module is another object.
    """
    parts = dict(model.named_children())
    stem = nn.Sequential(*(parts[name] for name in ("conv1", "bn1", "relu", "maxpool")))
    stages = {name: part for name, part in parts.items() if name.startswith("layer")}
    pool = nn.Sequential(parts["avgpool"], nn.Flatten())
    return {"stem": stem, **stages, "pool": pool, "head": parts["fc"]}


def parse_mode(mode: str) -> tuple[str, int]:
    """Split a mode into its name and the number of stages it trains beside the head.

    "features" trains none, "last" one, "last:N" N; -1 stands for the whole network ("full" and
    "scratch").

    Raises:
        ConfigError: not a mode.
    """
    name, _, number = mode.partition(":")
    if mode in ("full", "scratch"):
        return mode, -1
    if mode == "features":
        return mode, 0
    if name == "last" and (mode == name or (number.isascii() and number.isdigit())):
        count = int(number or 1)
        if count:
            return name, count
    raise ConfigError(
        f"unknown mode {mode!r}: choose from features, last, last:N (N >= 1), full, scratch"
    )


def split(model: nn.Module, mode: str) -> tuple[nn.Sequential, dict[str, nn.Module]]:
    """Cut the network where `mode` starts to train it.

    The first part loses its gradients and goes to eval, so that neither its weights nor its
    BatchNorm statistics move; run it under torch.no_grad(). The second, the pieces by name in
    order, is put into training.

    Raises:
        ConfigError: "last:N" with more stages than the network has.
    """
    chain = pieces(model)
    _, count = parse_mode(mode)
    stages = [piece for piece in chain if piece.startswith("layer")]
    if count > len(stages):
        raise ConfigError(f"mode {mode}: the network has {len(stages)} stages")
    first = {-1: "stem", 0: "head"}.get(count) or stages[-count]
    first_trained = list(chain).index(first)
    frozen = nn.Sequential(*list(chain.values())[:first_trained])
    trained = dict(list(chain.items())[first_trained:])
    frozen.requires_grad_(False).eval()
    for piece in trained.values():
        piece.requires_grad_(True).train()
    return frozen, trained


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a .pt/.pth file (tensors and plain values only: no code is run) or .safetensors.

    Raises:
        WeightsError: the file is missing, truncated or damaged, or holds more than weights.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a folder: name a checkpoint in it")
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise WeightsError(f"{path}: reading it needs `pip install safetensors`") from error
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        # The rest of the message tells how to run whatever code a file brings along.
        found = re.search(
            r"WeightsUnpickler error:\s*(.+?)(?= was not an allowed global|$)", str(error), re.M
        )
        reason = found[1] if found else str(error).splitlines()[0]
        raise WeightsError(
            f"{path} is damaged or holds more than weights: {reason}; weights alone are what "
            "torch.save(model.state_dict(), FILE) writes"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        if " " not in reason:  # a KeyError's is a number
            reason = "torch.load cannot read it"
        raise WeightsError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}: expected weights by name")
    return dict(content)


def find_weights(arch: str, weights: str) -> dict[str, torch.Tensor] | None:
    """The weights by name that `weights` stands for.

    Args:
        weights: "DEFAULT" (the shipped checkpoint for small, torchvision's download otherwise),
            "none", or a file with a state_dict, bare or under "model" or "state_dict".

    Raises:
        WeightsError: the file cannot be read or holds no weights, or the download failed.
    """
    if weights == "none":
        return None
    if weights == "DEFAULT" and arch != "small":
        return download_weights(arch)
    if weights == "DEFAULT":
        with resources.as_file(resources.files(__package__) / "assets" / "resnet14.pt") as path:
            content = read_checkpoint(path)
    else:
        content = read_checkpoint(Path(weights))
    for container in ("model", "state_dict"):
        if isinstance(content.get(container), Mapping):
            content = content[container]
    state = {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    if not state:
        raise WeightsError(f"{weights} holds no weights")
    return state


def download_weights(arch: str) -> dict[str, torch.Tensor]:
    """torchvision's best ImageNet weights, from its cache or the network.

    Raises:
        WeightsError: no network, or a damaged download.
    """
    entry = torchvision.models.get_model_weights(arch).DEFAULT
    patience = socket.getdefaulttimeout()
    # urlopen has no time limit of its own and would hang where packets are dropped.
    socket.setdefaulttimeout(patience or 20)
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except Exception as error:
        raise WeightsError(
            f"cannot download {arch} weights from {entry.url} ({error}): "
            "pass --weights FILE, or --weights none to train from scratch"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], *, head: bool) -> None:
    """Copy weights into `model`, all names and shapes matching.

    Args:
        head: False leaves the last layer (fc) as it is: it belongs to the new classes.

    Raises:
        WeightsError: names or shapes differ; the message names them. `model` is then unchanged.
    """
    own = {k: v for k, v in model.state_dict().items() if head or not k.startswith("fc.")}
    given = {k: v for k, v in state.items() if head or not k.startswith("fc.")}
    # Checkpoints from before torch 0.4.1 lack the counters.
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in own]
    reshaped = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in given and given[k].shape != own[k].shape
    ]
    differences = []
    for title, names in (("missing", missing), ("unknown", unexpected), ("shape", reshaped)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            differences.append(f"{title}: {', '.join(names[:4])}{more}")
    if differences:
        raise WeightsError("the weights are of another architecture; " + "; ".join(differences))
    model.load_state_dict({**own, **{k: given[k] for k in own if k in given}}, strict=False)


def count_parameters(*modules: nn.Module) -> int:
    """The number of trainable values in the modules."""
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


@contextlib.contextmanager
def evaluating(*modules: nn.Module):
    """Put modules into eval without gradients, and back as they were."""
    before = {m: m.training for module in modules for m in module.modules()}
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training
