"""Networks: the shipped small ResNet, torchvision's and timm's, and their heads."""

import contextlib
import difflib
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from .errors import ConfigError
from .pictures import InputFormat

ARCHITECTURES = ("small", *torchvision.models.list_models(torchvision.models))

SHIPPED_FORMAT = InputFormat(1, 28, (0.286,), (0.353,))
IMAGENET_FORMAT = InputFormat(3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256)


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


class DropoutHead(nn.Sequential):
    """Dropout and the last layer; its name is that of the layer alone."""


def check_arch(arch: str) -> None:
    """Raise ConfigError for a name that `build` does not know."""
    if arch.startswith("timm/"):
        timm = find_timm()
        if arch.removeprefix("timm/") not in timm.list_models():
            close = timm.list_models(f"*{arch.removeprefix('timm/')}*")[:4]
            hint = f": did you mean {', '.join(f'timm/{name}' for name in close)}?" if close else ""
            raise ConfigError(f"timm {timm.__version__} has no model {arch[5:]!r}{hint}")
    elif arch not in ARCHITECTURES:
        close = difflib.get_close_matches(arch, ARCHITECTURES, 4)
        hint = f"did you mean {', '.join(close)}? Known" if close else "known"
        raise ConfigError(
            f"unknown arch {arch!r}: {hint} are small, torchvision's classification models "
            "(resnet18, mobilenet_v3_small, efficientnet_b0, vit_b_16, ...) and timm/NAME"
        )


def find_timm() -> Any:
    """The module timm.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"--arch timm/NAME needs timm ({error}): pip install timm") from error
    return timm


def input_format(arch: str, image_size: int | None = None) -> InputFormat:
    """What images `arch` takes, at the size of its pretrained weights or at `image_size`."""
    own = IMAGENET_FORMAT
    if arch == "small":
        own = SHIPPED_FORMAT
    elif arch.startswith("timm/"):
        given = find_timm().get_pretrained_cfg(arch.removeprefix("timm/"))
        if given is not None:
            channels, size, _ = given.input_size
            stored = round(size / (given.crop_pct or 1))
            own = InputFormat(channels, size, tuple(given.mean), tuple(given.std), stored)
    elif arch in ARCHITECTURES:
        recipe = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
        stored = recipe.resize_size[0]
        own = InputFormat(3, recipe.crop_size[0], tuple(recipe.mean), tuple(recipe.std), stored)
    if image_size is None:
        return own
    stored = round(image_size * own.stored / own.size)
    return InputFormat(own.channels, image_size, own.mean, own.std, stored)


def build(arch: str, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """A network with random weights from torch's default generator.

    Args:
        arch: "small", one of torchvision's classification models, or "timm/NAME".
        dropout: probability of dropping a feature before the last layer; with 0 the network has
            the names of torchvision's or timm's own.

    Raises:
        ConfigError: unknown `arch`.
    """
    check_arch(arch)
    if arch == "small":
        model: nn.Module = SmallResNet(num_classes)
    elif arch.startswith("timm/"):
        model = find_timm().create_model(arch.removeprefix("timm/"), num_classes=num_classes)
    else:
        options = {"aux_logits": False} if arch in ("googlenet", "inception_v3") else {}
        options |= {"init_weights": True} if options else {}
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)
    if dropout:
        parent, _, name = head_of(model).rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, name, DropoutHead(nn.Dropout(dropout), getattr(holder, name)))
    return model


def head_of(model: nn.Module) -> str:
    """The name of the layer whose outputs are the classes."""
    for name, module in model.named_modules():
        if isinstance(module, DropoutHead):
            return name
    if callable(find := getattr(model, "get_classifier", None)):  # timm's
        head = find()
        if isinstance(head, tuple):
            raise ConfigError(f"{type(model).__name__} has {len(head)} heads: choose another arch")
        return next(name for name, module in model.named_modules() if module is head)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1]


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
