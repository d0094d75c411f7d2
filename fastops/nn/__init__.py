"""Modules: torch.nn's, with the forward pass of fastops.functional. Names, arguments, attributes and state_dicts are
torch.nn's, because each is a subclass of its torch.nn counterpart."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F


class ReLU(torch.nn.ReLU):
    """:func:`fastops.functional.relu` as a module; arguments of :class:`torch.nn.ReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """:func:`fastops.functional.relu6` as a module; arguments of :class:`torch.nn.ReLU6`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """:func:`fastops.functional.hardtanh` as a module; arguments of :class:`torch.nn.Hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """:func:`fastops.functional.leaky_relu` as a module; arguments of :class:`torch.nn.LeakyReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(torch.nn.ELU):
    """:func:`fastops.functional.elu` as a module; arguments of :class:`torch.nn.ELU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU):
    """:func:`fastops.functional.selu` as a module; arguments of :class:`torch.nn.SELU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.selu(input, self.inplace)


class CELU(torch.nn.CELU):
    """:func:`fastops.functional.celu` as a module; arguments of :class:`torch.nn.CELU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.celu(input, self.alpha, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """:func:`fastops.functional.sigmoid` as a module; arguments of :class:`torch.nn.Sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """:func:`fastops.functional.tanh` as a module; arguments of :class:`torch.nn.Tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class LogSigmoid(torch.nn.LogSigmoid):
    """:func:`fastops.functional.logsigmoid` as a module; arguments of :class:`torch.nn.LogSigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.logsigmoid(input)


class Softplus(torch.nn.Softplus):
    """:func:`fastops.functional.softplus` as a module; arguments of :class:`torch.nn.Softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold)


class Softsign(torch.nn.Softsign):
    """:func:`fastops.functional.softsign` as a module; arguments of :class:`torch.nn.Softsign`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softsign(input)


class SiLU(torch.nn.SiLU):
    """:func:`fastops.functional.silu` as a module; arguments of :class:`torch.nn.SiLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, self.inplace)


class Mish(torch.nn.Mish):
    """:func:`fastops.functional.mish` as a module; arguments of :class:`torch.nn.Mish`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input, self.inplace)


class Hardsigmoid(torch.nn.Hardsigmoid):
    """:func:`fastops.functional.hardsigmoid` as a module; arguments of :class:`torch.nn.Hardsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardsigmoid(input, self.inplace)


class Hardswish(torch.nn.Hardswish):
    """:func:`fastops.functional.hardswish` as a module; arguments of :class:`torch.nn.Hardswish`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardswish(input, self.inplace)


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


class Dropout1d(torch.nn.Dropout1d):
    """:func:`fastops.functional.dropout1d` as a module; arguments of :class:`torch.nn.Dropout1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """:func:`fastops.functional.dropout2d` as a module; arguments of :class:`torch.nn.Dropout2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """:func:`fastops.functional.dropout3d` as a module; arguments of :class:`torch.nn.Dropout3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout):
    """:func:`fastops.functional.alpha_dropout` as a module; arguments of :class:`torch.nn.AlphaDropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.alpha_dropout(input, self.p, self.training, self.inplace)


class NLLLoss(torch.nn.NLLLoss):
    """:func:`fastops.functional.nll_loss` as a module; arguments of :class:`torch.nn.NLLLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class MSELoss(torch.nn.MSELoss):
    """:func:`fastops.functional.mse_loss` as a module; arguments of :class:`torch.nn.MSELoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    """:func:`fastops.functional.l1_loss` as a module; arguments of :class:`torch.nn.L1Loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """:func:`fastops.functional.smooth_l1_loss` as a module; arguments of :class:`torch.nn.SmoothL1Loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """:func:`fastops.functional.huber_loss` as a module; arguments of :class:`torch.nn.HuberLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(torch.nn.BCELoss):
    """:func:`fastops.functional.binary_cross_entropy` as a module; arguments of :class:`torch.nn.BCELoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, reduction=self.reduction, weight=self.weight)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """:func:`fastops.functional.binary_cross_entropy_with_logits` as a module; arguments of :class:`torch.nn.BCEWithLogitsLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`fastops.functional.cross_entropy` as a module; arguments of :class:`torch.nn.CrossEntropyLoss`, and the
    function's return_lse, z_loss and inplace_backward."""

    def __init__(
        self,
        *args,
        return_lse: bool = False,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.return_lse, self.z_loss, self.inplace_backward = return_lse, z_loss, inplace_backward

    def forward(self, input: Tensor, target: Tensor):
        own = self.__dict__  # of a patched module of torch's, which has no such attributes
        return F.cross_entropy(
            input, target, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing,
            return_lse=own.get("return_lse", False), z_loss=own.get("z_loss", 0.0),
            inplace_backward=own.get("inplace_backward", False),
        )  # fmt: skip


MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    cls.__mro__[1]: cls  # torch.nn's class -> ours
    for cls in list(vars().values())
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls.__module__ == __name__
}
__all__ = sorted(cls.__name__ for cls in MODULES.values())
