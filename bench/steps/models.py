"""The models of the benchmark of steps, and a batch for each. Weights are random; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

#: A loss from a model and its batch.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """`make(small, dropout)` builds it with its inputs and targets; `small` is the size at which losses are compared."""

    name: str
    size: str
    package: str
    make: Callable[[bool, bool], tuple[nn.Module, Tensor, Tensor]]
    loss: Loss

    def missing(self) -> str | None:
        """The package that has to be installed first."""
        return None if find_spec(self.package) else self.package


def _class_loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), t)


def _token_loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).logits.flatten(0, 1), t.flatten())


def _without_dropout(model: nn.Module) -> nn.Module:
    """Masks differ from library to library, so losses are compared without them."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def _pictures(small: bool, size: int = 224) -> tuple[Tensor, Tensor]:
    n = 2 if small else 16
    x = torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(0, 1000, (n,))


def _torchvision(name: str) -> Callable[[bool, bool], tuple[nn.Module, Tensor, Tensor]]:
    def make(small: bool, dropout: bool) -> tuple[nn.Module, Tensor, Tensor]:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None)
        if not dropout:
            _without_dropout(model)
        return model.to(memory_format=torch.channels_last), *_pictures(small, 64 if small else 224)

    return make


def _timm(name: str) -> Callable[[bool, bool], tuple[nn.Module, Tensor, Tensor]]:
    def make(small: bool, dropout: bool) -> tuple[nn.Module, Tensor, Tensor]:
        import timm

        model = timm.create_model(name, pretrained=False)
        if not dropout:
            _without_dropout(model)
        return model, *_pictures(small)

    return make


def _tokens(batch: int, length: int, words: int, small: bool) -> tuple[Tensor, Tensor]:
    shape = (2, 16) if small else (batch, length)
    return torch.randint(0, words, shape), torch.randint(0, words, shape)


def _bert(small: bool, dropout: bool) -> tuple[nn.Module, Tensor, Tensor]:
    import transformers

    none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**({} if dropout else none))
    return transformers.BertForMaskedLM(config), *_tokens(8, 128, config.vocab_size, small)


def _gpt2(small: bool, dropout: bool) -> tuple[nn.Module, Tensor, Tensor]:
    import transformers

    none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(use_cache=False, **({} if dropout else none))
    return transformers.GPT2LMHeadModel(config), *_tokens(2, 256, config.vocab_size, small)


MODELS = {
    model.name: model
    for model in (
        Model("resnet18", "16x224", "torchvision", _torchvision("resnet18"), _class_loss),
        Model("resnet50", "16x224", "torchvision", _torchvision("resnet50"), _class_loss),
        Model("mobilenet_v2", "16x224", "torchvision", _torchvision("mobilenet_v2"), _class_loss),
        Model("efficientnet_b0", "16x224", "torchvision", _torchvision("efficientnet_b0"), _class_loss),
        Model("vit_tiny", "16x224", "timm", _timm("vit_tiny_patch16_224"), _class_loss),
        Model("bert_base", "8x128", "transformers", _bert, _token_loss),
        Model("gpt2", "2x256", "transformers", _gpt2, _token_loss),
    )
}  # fmt: skip
