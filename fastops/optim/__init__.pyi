# Written by tools/stubs.py (`make stubs`).
from typing import Any

import torch
from torch import Tensor

from .groups import param_groups as param_groups
from .step import FusedStep

def __getattr__(name: str) -> Any: ...

class SGD(FusedStep, torch.optim.SGD):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: Any = None,
        differentiable: bool = False,
        fused: Any = None,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...

class Adam(FusedStep, torch.optim.Adam):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, ...] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: Any = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: Any = None,
        decoupled_weight_decay: bool = False,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...

class AdamW(FusedStep, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, ...] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: Any = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: Any = None,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...

class RMSprop(FusedStep, torch.optim.RMSprop):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: Any = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...
