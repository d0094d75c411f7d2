# Written by tools/stubs.py (`make stubs`).
from typing import Any

import torch

MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]]

def __getattr__(name: str) -> Any: ...

class AlphaDropout(torch.nn.AlphaDropout):
    pass

class BCELoss(torch.nn.BCELoss):
    pass

class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    pass

class CELU(torch.nn.CELU):
    pass

class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
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
    pass

class Dropout1d(torch.nn.Dropout1d):
    pass

class Dropout2d(torch.nn.Dropout2d):
    pass

class Dropout3d(torch.nn.Dropout3d):
    pass

class ELU(torch.nn.ELU):
    pass

class GELU(torch.nn.GELU):
    pass

class GLU(torch.nn.GLU):
    pass

class Hardsigmoid(torch.nn.Hardsigmoid):
    pass

class Hardswish(torch.nn.Hardswish):
    pass

class Hardtanh(torch.nn.Hardtanh):
    pass

class HuberLoss(torch.nn.HuberLoss):
    pass

class L1Loss(torch.nn.L1Loss):
    pass

class LeakyReLU(torch.nn.LeakyReLU):
    pass

class LogSigmoid(torch.nn.LogSigmoid):
    pass

class LogSoftmax(torch.nn.LogSoftmax):
    pass

class MSELoss(torch.nn.MSELoss):
    pass

class Mish(torch.nn.Mish):
    pass

class NLLLoss(torch.nn.NLLLoss):
    pass

class ReLU(torch.nn.ReLU):
    pass

class ReLU6(torch.nn.ReLU6):
    pass

class SELU(torch.nn.SELU):
    pass

class SiLU(torch.nn.SiLU):
    pass

class Sigmoid(torch.nn.Sigmoid):
    pass

class SmoothL1Loss(torch.nn.SmoothL1Loss):
    pass

class Softmax(torch.nn.Softmax):
    pass

class Softplus(torch.nn.Softplus):
    pass

class Softsign(torch.nn.Softsign):
    pass

class SwiGLU(torch.nn.Module):
    dim: int
    def __init__(self, *args: Any, dim: int = -1, **kwargs: Any) -> None: ...

class Tanh(torch.nn.Tanh):
    pass
