"""Modules: torch.nn's, with the forward pass of fastops.functional. Names, arguments, attributes and state_dicts are
torch.nn's, because each is a subclass of its torch.nn counterpart."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as F


class ReLU(torch.nn.ReLU):
    """:func:`fastops.functional.relu` as a module; arguments of :class:`torch.nn.ReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class GELU(torch.nn.GELU):
    """:func:`fastops.functional.gelu` as a module; arguments of :class:`torch.nn.GELU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate)


class Softmax(torch.nn.Softmax):
    """:func:`fastops.functional.softmax` as a module; arguments of :class:`torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """:func:`fastops.functional.log_softmax` as a module; arguments of :class:`torch.nn.LogSoftmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Dropout(torch.nn.Dropout):
    """:func:`fastops.functional.dropout` as a module; arguments of :class:`torch.nn.Dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)


class MSELoss(torch.nn.MSELoss):
    """:func:`fastops.functional.mse_loss` as a module; arguments of :class:`torch.nn.MSELoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`fastops.functional.cross_entropy` as a module; arguments of :class:`torch.nn.CrossEntropyLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input, target, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing,
        )  # fmt: skip


MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    cls.__mro__[1]: cls  # torch.nn's class -> ours
    for cls in list(vars().values())
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls.__module__ == __name__
}
__all__ = sorted(cls.__name__ for cls in MODULES.values())
