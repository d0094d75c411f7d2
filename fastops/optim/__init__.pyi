# Written by tools/stubs.py (`make stubs`).
from typing import Any

import torch
from torch import Tensor

from .groups import param_groups as param_groups
from .step import FusedStep

def __getattr__(name: str) -> Any: ...

class ASGD(FusedStep, torch.optim.ASGD):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0,
        foreach: Any = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...

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

class Adadelta(FusedStep, torch.optim.Adadelta):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0,
        foreach: Any = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...

class Adagrad(FusedStep, torch.optim.Adagrad):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: Any = None,
        *,
        maximize: bool = False,
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

class Adamax(FusedStep, torch.optim.Adamax):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.002,
        betas: tuple[float | Tensor, ...] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        foreach: Any = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...

class NAdam(FusedStep, torch.optim.NAdam):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.002,
        betas: tuple[float | Tensor, ...] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: Any = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...

class RAdam(FusedStep, torch.optim.RAdam):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, ...] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: Any = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
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

class Rprop(FusedStep, torch.optim.Rprop):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        etas: tuple[float | Tensor, ...] = (0.5, 1.2),
        step_sizes: tuple[float | Tensor, ...] = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: Any = None,
        maximize: bool = False,
        differentiable: bool = False,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: Any = None,
        ema_decay: Any = None,
        state_dtype: Any = None,
        rounding: str = "nearest",
    ) -> None: ...
