# Written by tools/stubs.py (`make stubs`).
from typing import Any

import torch

MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]]

def __getattr__(name: str) -> Any: ...

class AlphaDropout(torch.nn.AlphaDropout):
    """:func:`fastops.functional.alpha_dropout` as a module; arguments of :class:`torch.nn.AlphaDropout`."""

class BCELoss(torch.nn.BCELoss):
    """:func:`fastops.functional.binary_cross_entropy` as a module; arguments of :class:`torch.nn.BCELoss`."""

class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """:func:`fastops.functional.binary_cross_entropy_with_logits` as a module; arguments of :class:`torch.nn.BCEWithLogitsLoss`."""

class BatchNorm1d(torch.nn.BatchNorm1d):
    """:func:`fastops.functional.batch_norm` as a module; arguments of :class:`torch.nn.BatchNorm1d`."""

class BatchNorm2d(torch.nn.BatchNorm2d):
    """:func:`fastops.functional.batch_norm` as a module; arguments of :class:`torch.nn.BatchNorm2d`."""

class BatchNorm3d(torch.nn.BatchNorm3d):
    """:func:`fastops.functional.batch_norm` as a module; arguments of :class:`torch.nn.BatchNorm3d`."""

class CELU(torch.nn.CELU):
    """:func:`fastops.functional.celu` as a module; arguments of :class:`torch.nn.CELU`."""

class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`fastops.functional.cross_entropy` as a module; arguments of :class:`torch.nn.CrossEntropyLoss`, and the
    function's return_lse, z_loss and inplace_backward."""

    return_lse: bool
    z_loss: float
    inplace_backward: bool
    def __init__(
        self,
        *args: Any,
        return_lse: bool = False,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
        **kwargs: Any,
    ) -> None: ...

class Dropout(torch.nn.Dropout):
    """:func:`fastops.functional.dropout` as a module; arguments of :class:`torch.nn.Dropout`."""

class Dropout1d(torch.nn.Dropout1d):
    """:func:`fastops.functional.dropout1d` as a module; arguments of :class:`torch.nn.Dropout1d`."""

class Dropout2d(torch.nn.Dropout2d):
    """:func:`fastops.functional.dropout2d` as a module; arguments of :class:`torch.nn.Dropout2d`."""

class Dropout3d(torch.nn.Dropout3d):
    """:func:`fastops.functional.dropout3d` as a module; arguments of :class:`torch.nn.Dropout3d`."""

class ELU(torch.nn.ELU):
    """:func:`fastops.functional.elu` as a module; arguments of :class:`torch.nn.ELU`."""

class GEGLU(torch.nn.Module):
    """:func:`fastops.functional.geglu` as a module: of two tensors, or of the halves of one along `dim`."""

    dim: int
    approximate: str
    def __init__(
        self, *args: Any, dim: int = -1, approximate: str = "none", **kwargs: Any
    ) -> None: ...

class GELU(torch.nn.GELU):
    """:func:`fastops.functional.gelu` as a module; arguments of :class:`torch.nn.GELU`."""

class GLU(torch.nn.GLU):
    """:func:`fastops.functional.glu` as a module; arguments of :class:`torch.nn.GLU`."""

class Hardshrink(torch.nn.Hardshrink):
    """:func:`fastops.functional.hardshrink` as a module; arguments of :class:`torch.nn.Hardshrink`."""

class Hardsigmoid(torch.nn.Hardsigmoid):
    """:func:`fastops.functional.hardsigmoid` as a module; arguments of :class:`torch.nn.Hardsigmoid`."""

class Hardswish(torch.nn.Hardswish):
    """:func:`fastops.functional.hardswish` as a module; arguments of :class:`torch.nn.Hardswish`."""

class Hardtanh(torch.nn.Hardtanh):
    """:func:`fastops.functional.hardtanh` as a module; arguments of :class:`torch.nn.Hardtanh`."""

class HuberLoss(torch.nn.HuberLoss):
    """:func:`fastops.functional.huber_loss` as a module; arguments of :class:`torch.nn.HuberLoss`."""

class L1Loss(torch.nn.L1Loss):
    """:func:`fastops.functional.l1_loss` as a module; arguments of :class:`torch.nn.L1Loss`."""

class LayerNorm(torch.nn.LayerNorm):
    """:func:`fastops.functional.layer_norm` as a module; arguments of :class:`torch.nn.LayerNorm`."""

class LeakyReLU(torch.nn.LeakyReLU):
    """:func:`fastops.functional.leaky_relu` as a module; arguments of :class:`torch.nn.LeakyReLU`."""

class LogSigmoid(torch.nn.LogSigmoid):
    """:func:`fastops.functional.logsigmoid` as a module; arguments of :class:`torch.nn.LogSigmoid`."""

class LogSoftmax(torch.nn.LogSoftmax):
    """:func:`fastops.functional.log_softmax` as a module; arguments of :class:`torch.nn.LogSoftmax`."""

class MSELoss(torch.nn.MSELoss):
    """:func:`fastops.functional.mse_loss` as a module; arguments of :class:`torch.nn.MSELoss`."""

class Mish(torch.nn.Mish):
    """:func:`fastops.functional.mish` as a module; arguments of :class:`torch.nn.Mish`."""

class NLLLoss(torch.nn.NLLLoss):
    """:func:`fastops.functional.nll_loss` as a module; arguments of :class:`torch.nn.NLLLoss`."""

class RMSNorm(torch.nn.RMSNorm):
    """:func:`fastops.functional.rms_norm` as a module; arguments of :class:`torch.nn.RMSNorm`."""

class ReGLU(torch.nn.Module):
    """:func:`fastops.functional.reglu` as a module: of two tensors, or of the halves of one along `dim`."""

    dim: int
    def __init__(self, *args: Any, dim: int = -1, **kwargs: Any) -> None: ...

class ReLU(torch.nn.ReLU):
    """:func:`fastops.functional.relu` as a module; arguments of :class:`torch.nn.ReLU`."""

class ReLU6(torch.nn.ReLU6):
    """:func:`fastops.functional.relu6` as a module; arguments of :class:`torch.nn.ReLU6`."""

class SELU(torch.nn.SELU):
    """:func:`fastops.functional.selu` as a module; arguments of :class:`torch.nn.SELU`."""

class SiLU(torch.nn.SiLU):
    """:func:`fastops.functional.silu` as a module; arguments of :class:`torch.nn.SiLU`."""

class Sigmoid(torch.nn.Sigmoid):
    """:func:`fastops.functional.sigmoid` as a module; arguments of :class:`torch.nn.Sigmoid`."""

class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """:func:`fastops.functional.smooth_l1_loss` as a module; arguments of :class:`torch.nn.SmoothL1Loss`."""

class Softmax(torch.nn.Softmax):
    """:func:`fastops.functional.softmax` as a module; arguments of :class:`torch.nn.Softmax`."""

class Softmax2d(torch.nn.Softmax2d):
    """:func:`fastops.functional.softmax` over the channels of images, (C, H, W) or (N, C, H, W); no arguments, as
    :class:`torch.nn.Softmax2d`."""

class Softmin(torch.nn.Softmin):
    """:func:`fastops.functional.softmin` as a module; arguments of :class:`torch.nn.Softmin`."""

class Softplus(torch.nn.Softplus):
    """:func:`fastops.functional.softplus` as a module; arguments of :class:`torch.nn.Softplus`."""

class Softshrink(torch.nn.Softshrink):
    """:func:`fastops.functional.softshrink` as a module; arguments of :class:`torch.nn.Softshrink`."""

class Softsign(torch.nn.Softsign):
    """:func:`fastops.functional.softsign` as a module; arguments of :class:`torch.nn.Softsign`."""

class SwiGLU(torch.nn.Module):
    """:func:`fastops.functional.swiglu` as a module: of two tensors, or of the halves of one along `dim`."""

    dim: int
    def __init__(self, *args: Any, dim: int = -1, **kwargs: Any) -> None: ...

class Tanh(torch.nn.Tanh):
    """:func:`fastops.functional.tanh` as a module; arguments of :class:`torch.nn.Tanh`."""

class Tanhshrink(torch.nn.Tanhshrink):
    """:func:`fastops.functional.tanhshrink` as a module; arguments of :class:`torch.nn.Tanhshrink`."""
