"""The modules of torch.nn, with the forward pass of fastops.functional. Each is a subclass of its torch.nn counterpart, and
so names, arguments, attributes and state_dicts are torch.nn's. All other names are torch.nn's own: `fastops.nn.Linear` is
`torch.nn.Linear`.

Modules of elementwise functions are made from the table of ops: `ReLU` from `relu`, with the parameters of the function as
attributes. The others are written here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._core.batch_norms import normalized
from .._core.declaration import module_of
from .._core.registry import OPS


class Softmax(torch.nn.Softmax):
    """:func:`fastops.functional.softmax` as a module; arguments of :class:`torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """:func:`fastops.functional.log_softmax` as a module; arguments of :class:`torch.nn.LogSoftmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(torch.nn.Softmin):
    """:func:`fastops.functional.softmin` as a module; arguments of :class:`torch.nn.Softmin`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmin(input, self.dim, _stacklevel=5)


class Softmax2d(torch.nn.Softmax2d):
    """:func:`fastops.functional.softmax` over the channels of images, (C, H, W) or (N, C, H, W); no arguments, as
    :class:`torch.nn.Softmax2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.dim() not in (3, 4):
            raise ValueError(
                f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead"
            )
        return F.softmax(input, -3, _stacklevel=5)


class Tanhshrink(torch.nn.Tanhshrink):
    """:func:`fastops.functional.tanhshrink` as a module; arguments of :class:`torch.nn.Tanhshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanhshrink(input)


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


def _batch_norm(self: Any, input: Tensor) -> Tensor:
    return normalized(self, input, F.batch_norm)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """:func:`fastops.functional.batch_norm` as a module; arguments of :class:`torch.nn.BatchNorm1d`."""

    forward = _batch_norm


class BatchNorm2d(torch.nn.BatchNorm2d):
    """:func:`fastops.functional.batch_norm` as a module; arguments of :class:`torch.nn.BatchNorm2d`."""

    forward = _batch_norm


class BatchNorm3d(torch.nn.BatchNorm3d):
    """:func:`fastops.functional.batch_norm` as a module; arguments of :class:`torch.nn.BatchNorm3d`."""

    forward = _batch_norm


class LayerNorm(torch.nn.LayerNorm):
    """:func:`fastops.functional.layer_norm` as a module; arguments of :class:`torch.nn.LayerNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """:func:`fastops.functional.rms_norm` as a module; arguments of :class:`torch.nn.RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GLU(torch.nn.GLU):
    """:func:`fastops.functional.glu` as a module; arguments of :class:`torch.nn.GLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.glu(input, self.dim)


class SwiGLU(torch.nn.Module):
    """:func:`fastops.functional.swiglu` as a module: of two tensors, or of the halves of one along `dim`."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return F.swiglu(gate, up, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class GEGLU(torch.nn.Module):
    """:func:`fastops.functional.geglu` as a module: of two tensors, or of the halves of one along `dim`."""

    def __init__(self, dim: int = -1, approximate: str = "none") -> None:
        super().__init__()
        self.dim, self.approximate = dim, approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return F.geglu(gate, up, self.dim, self.approximate)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, approximate={self.approximate!r}"


class ReGLU(torch.nn.Module):
    """:func:`fastops.functional.reglu` as a module: of two tensors, or of the halves of one along `dim`."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return F.reglu(gate, up, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


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


for _op in OPS.values():
    if _op.kind == "elementwise" and (_module := module_of(_op.name, _op.signature, F)) is not None:
        globals()[_module.__name__] = _module
del _op, _module

_CLASSES = [
    cls
    for name, cls in list(vars().items())
    if name[0] != "_"
    and isinstance(cls, type)
    and issubclass(cls, torch.nn.Module)
    and cls.__module__ == __name__
]
# torch.nn's class -> ours
MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    cls.__mro__[1]: cls for cls in _CLASSES if cls.__mro__[1] is not torch.nn.Module
}
__all__ = sorted(cls.__name__ for cls in _CLASSES)


def __getattr__(name: str):
    """torch.nn's own, of the names that are not here."""
    if not name.startswith("__") and hasattr(torch.nn, name):
        return getattr(torch.nn, name)
    raise AttributeError(f"neither {__name__} nor torch.nn has {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for n in dir(torch.nn) if not n.startswith("_"))})
