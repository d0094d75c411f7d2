# Written by tools/stubs.py (`make stubs`).
from torch import Tensor
from torch.autograd import Function

def class_name(row: str) -> str: ...

class ReLUFunction(Function):
    """fastops::relu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class ReLU6Function(Function):
    """fastops::relu6 as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class HardtanhFunction(Function):
    """fastops::hardtanh as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, /) -> Tensor: ...  # type: ignore[override]

class LeakyReLUFunction(Function):
    """fastops::leaky_relu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, negative_slope: float = 0.01, /) -> Tensor: ...  # type: ignore[override]

class ELUFunction(Function):
    """fastops::elu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, alpha: float = 1.0, /) -> Tensor: ...  # type: ignore[override]

class SELUFunction(Function):
    """fastops::selu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class CELUFunction(Function):
    """fastops::celu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, alpha: float = 1.0, /) -> Tensor: ...  # type: ignore[override]

class SigmoidFunction(Function):
    """fastops::sigmoid as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class TanhFunction(Function):
    """fastops::tanh as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class LogSigmoidFunction(Function):
    """fastops::logsigmoid as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SoftplusFunction(Function):
    """fastops::softplus as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, beta: float = 1.0, threshold: float = 20.0, /) -> Tensor: ...  # type: ignore[override]

class SoftsignFunction(Function):
    """fastops::softsign as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SiLUFunction(Function):
    """fastops::silu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class MishFunction(Function):
    """fastops::mish as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class HardsigmoidFunction(Function):
    """fastops::hardsigmoid as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class HardswishFunction(Function):
    """fastops::hardswish as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GELUFunction(Function):
    """fastops::gelu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GELUTanhFunction(Function):
    """fastops::gelu_tanh as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SquareplusFunction(Function):
    """fastops::squareplus as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, b: float = 4.0, /) -> Tensor: ...  # type: ignore[override]

class HardshrinkFunction(Function):
    """fastops::hardshrink as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, lambd: float = 0.5, /) -> Tensor: ...  # type: ignore[override]

class SoftshrinkFunction(Function):
    """fastops::softshrink as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, lambd: float = 0.5, /) -> Tensor: ...  # type: ignore[override]

class AddReLUFunction(Function):
    """fastops::add_relu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, other: Tensor, /) -> Tensor: ...  # type: ignore[override]

class BiasGELUFunction(Function):
    """fastops::bias_gelu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, bias: Tensor, /) -> Tensor: ...  # type: ignore[override]

class BiasGELUTanhFunction(Function):
    """fastops::bias_gelu_tanh as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, bias: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GLUFunction(Function):
    """fastops::glu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, a: Tensor, b: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GLUPackedFunction(Function):
    """fastops::glu_packed as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, dim: int = -1, /) -> Tensor: ...  # type: ignore[override]

class SwiGLUFunction(Function):
    """fastops::swiglu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, a: Tensor, b: Tensor, /) -> Tensor: ...  # type: ignore[override]

class SwiGLUPackedFunction(Function):
    """fastops::swiglu_packed as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, dim: int = -1, /) -> Tensor: ...  # type: ignore[override]

class GegluFunction(Function):
    """fastops::geglu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, a: Tensor, b: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GegluPackedFunction(Function):
    """fastops::geglu_packed as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, dim: int = -1, /) -> Tensor: ...  # type: ignore[override]

class GegluTanhFunction(Function):
    """fastops::geglu_tanh as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, a: Tensor, b: Tensor, /) -> Tensor: ...  # type: ignore[override]

class GegluTanhPackedFunction(Function):
    """fastops::geglu_tanh_packed as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, dim: int = -1, /) -> Tensor: ...  # type: ignore[override]

class RegluFunction(Function):
    """fastops::reglu as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, a: Tensor, b: Tensor, /) -> Tensor: ...  # type: ignore[override]

class RegluPackedFunction(Function):
    """fastops::reglu_packed as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, dim: int = -1, /) -> Tensor: ...  # type: ignore[override]

class MSELossFunction(Function):
    """fastops::mse_loss as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class L1LossFunction(Function):
    """fastops::l1_loss as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class SmoothL1LossFunction(Function):
    """fastops::smooth_l1_loss as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(
        cls, input: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0, /
    ) -> Tensor: ...  # type: ignore[override]

class HuberLossFunction(Function):
    """fastops::huber_loss as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(
        cls, input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0, /
    ) -> Tensor: ...  # type: ignore[override]

class BinaryCrossEntropyFunction(Function):
    """fastops::binary_cross_entropy as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class BinaryCrossEntropyWithLogitsFunction(Function):
    """fastops::binary_cross_entropy_with_logits as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, target: Tensor, reduction: int = 1, /) -> Tensor: ...  # type: ignore[override]

class BinaryCrossEntropyWithLogitsPosWeightFunction(Function):
    """fastops::binary_cross_entropy_with_logits_pos_weight as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(
        cls, input: Tensor, target: Tensor, reduction: int, pos_weight: Tensor, /
    ) -> Tensor: ...  # type: ignore[override]

class SoftmaxFunction(Function):
    """fastops::softmax as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, dim: int, /) -> Tensor: ...  # type: ignore[override]

class LogSoftmaxFunction(Function):
    """fastops::log_softmax as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, dim: int, /) -> Tensor: ...  # type: ignore[override]

class CrossEntropyFunction(Function):
    """fastops::cross_entropy as a torch.autograd.Function; see the module's docstring."""
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
    """fastops::dropout as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, p: float, seed: Tensor, /) -> Tensor: ...  # type: ignore[override]

class ReLUDropoutFunction(Function):
    """fastops::relu_dropout as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(cls, input: Tensor, p: float, seed: Tensor, /) -> Tensor: ...  # type: ignore[override]

class BiasDropoutAddFunction(Function):
    """fastops::bias_dropout_add as a torch.autograd.Function; see the module's docstring."""
    @classmethod
    def apply(
        cls, input: Tensor, bias: Tensor, residual: Tensor, p: float, seed: Tensor, /
    ) -> Tensor: ...  # type: ignore[override]
