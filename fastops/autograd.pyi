# Written by tools/stubs.py (`make stubs`).
from torch import Tensor
from torch.autograd import Function

def class_name(row: str) -> str: ...

class ReLUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class ReLU6Function(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class HardtanhFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, /) -> Tensor: ...  # type: ignore[override]

class LeakyReLUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, negative_slope: float = 0.01, /) -> Tensor: ...  # type: ignore[override]

class ELUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, alpha: float = 1.0, /) -> Tensor: ...  # type: ignore[override]

class SELUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class CELUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, alpha: float = 1.0, /) -> Tensor: ...  # type: ignore[override]

class SigmoidFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class TanhFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class LogSigmoidFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SoftplusFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, beta: float = 1.0, threshold: float = 20.0, /) -> Tensor: ...  # type: ignore[override]

class SoftsignFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SiLUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class MishFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class HardsigmoidFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class HardswishFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GELUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GELUTanhFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SquareplusFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, b: float = 4.0, /) -> Tensor: ...  # type: ignore[override]

class AddReLUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, other: Tensor, /) -> Tensor: ...  # type: ignore[override]

class BiasGELUFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, bias: Tensor, /) -> Tensor: ...  # type: ignore[override]

class BiasGELUTanhFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, bias: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GLUFunction(Function):
    @classmethod
    def apply(cls, a: Tensor, b: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GLUPackedFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, dim: int = -1, /) -> Tensor: ...  # type: ignore[override]

class SwiGLUFunction(Function):
    @classmethod
    def apply(cls, a: Tensor, b: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SwiGLUPackedFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, dim: int = -1, /) -> Tensor: ...  # type: ignore[override]

class MSELossFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class L1LossFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class SmoothL1LossFunction(Function):
    @classmethod
    def apply(
        cls, input: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0, /
    ) -> Tensor: ...  # type: ignore[override]

class HuberLossFunction(Function):
    @classmethod
    def apply(
        cls, input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0, /
    ) -> Tensor: ...  # type: ignore[override]

class BinaryCrossEntropyFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class BinaryCrossEntropyWithLogitsFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class BinaryCrossEntropyWithLogitsPosWeightFunction(Function):
    @classmethod
    def apply(
        cls, input: Tensor, target: Tensor, reduction: int, pos_weight: Tensor, /
    ) -> Tensor: ...  # type: ignore[override]

class SoftmaxFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, dim: int, /) -> Tensor: ...  # type: ignore[override]

class LogSoftmaxFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, dim: int, /) -> Tensor: ...  # type: ignore[override]

class CrossEntropyFunction(Function):
    @classmethod
    def apply(
        cls,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: int = 1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        second_target: Tensor | None = None,
        lam: float = 1.0,
        /,
    ) -> Tensor: ...  # type: ignore[override]

class DropoutFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, p: float, seed: Tensor, /) -> Tensor: ...  # type: ignore[override]

class ReLUDropoutFunction(Function):
    @classmethod
    def apply(cls, input: Tensor, p: float, seed: Tensor, /) -> Tensor: ...  # type: ignore[override]

class BiasDropoutAddFunction(Function):
    @classmethod
    def apply(
        cls, input: Tensor, bias: Tensor, residual: Tensor, p: float, seed: Tensor, /
    ) -> Tensor: ...  # type: ignore[override]
