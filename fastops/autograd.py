"""A torch.autograd.Function for every op, over the same kernels. Build on these when you write a Function of your own
around one of ours. `fastops.functional` is faster, because its forward and backward passes run no Python. These work with
autograd, gradients of gradients included, and under torch.func (grad, vmap, jvp ...), where apply() calls the op of the
dispatcher, which has rules for all of them.

`<Name>Function.apply(...)` takes the op's arguments by position:

    ReLUFunction(x)  GELUFunction(x)  GELUTanhFunction(x)  LeakyReLUFunction(x, negative_slope)  ... (elementwise)
    MSELossFunction(input, target, reduction)  SmoothL1LossFunction(input, target, reduction, beta)  ... (losses)
    BinaryCrossEntropyWithLogitsPosWeightFunction(input, target, reduction, pos_weight)
    GLUFunction(a, b)  GLUPackedFunction(x, dim)  SwiGLUFunction(gate, up)  SwiGLUPackedFunction(x, dim)
    SoftmaxFunction(x, dim)  LogSoftmaxFunction(x, dim)  DropoutFunction(x, p, seed)
    CrossEntropyFunction(input, target, weight, reduction, ignore_index, label_smoothing)

with `reduction` 0 for none, 1 for mean, 2 for sum, and `seed` an int64 tensor of one element. With FASTOPS_DISABLE=1 in the
environment apply() is torch's function of the same meaning; its dropout draws from a generator seeded by `seed`.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from . import _C
from ._core.arguments import not_a_tensor
from ._core.by_torch import BY_TORCH, DISABLED
from ._core.fallback import reference_of
from ._core.registry import KERNELS, overload

__all__: list[str] = []
_WORDS = {
    w.lower(): w
    for w in ("ReLU", "ReLU6", "ELU", "SELU", "CELU", "GELU", "SiLU", "GLU", "SwiGLU", "MSE", "L1")
} | {"logsigmoid": "LogSigmoid"}


def class_name(kernel: str) -> str:
    """The name of the Function of a kernel: "gelu_tanh" is GELUTanhFunction."""
    return "".join(_WORDS.get(w, w.capitalize()) for w in kernel.split("_")) + "Function"


def _elementwise(kernel: str):
    forward_op, backward_op = overload(kernel), overload(f"{kernel}_backward")
    from_output = _C.from_output(kernel)

    def forward(ctx, x, *params):
        y = forward_op(x, *params)
        ctx.save_for_backward(y if from_output else x)
        ctx.params = params
        return y

    def backward(ctx, grad):
        return backward_op(ctx.saved_tensors[0], grad, *ctx.params), *(None for _ in ctx.params)

    return forward, backward


def _loss(kernel: str):
    forward_op, backward_op = overload(kernel), overload(f"{kernel}_backward")

    def forward(ctx, x, target, reduction, *params):
        if any(ctx.needs_input_grad[2:]):
            raise NotImplementedError(
                f"fastops::{kernel}: no gradient flows to a weight; detach it"
            )
        # Of the parameters, one may be a tensor.
        ctx.save_for_backward(x, target, *(p for p in params if isinstance(p, torch.Tensor)))
        ctx.rest = [reduction, *(None if isinstance(p, torch.Tensor) else p for p in params)]
        return forward_op(x, target, reduction, False, *params)

    def backward(ctx, grad):
        x, target, *weights = ctx.saved_tensors
        rest = [weights.pop(0) if p is None else p for p in ctx.rest]
        grads = [
            backward_op(grad, x, target, *rest, wrt) if need else None
            for wrt, need in enumerate(ctx.needs_input_grad[:2])
        ]
        return *grads, *(None for _ in ctx.rest)

    return forward, backward


def _softmax(kernel: str):
    forward_op, backward_op = overload(kernel), overload(f"{kernel}_backward")

    def forward(ctx, x, dim):
        y = forward_op(x, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    def backward(ctx, grad):
        return backward_op(grad, ctx.saved_tensors[0], ctx.dim), None

    return forward, backward


def _recorded(kernel: str, tensors: int):
    """Of an op whose own graph, from leaves that stand for its first `tensors` inputs, is what is saved."""
    op = overload(kernel)

    def forward(ctx, *args):
        leaves = [
            t.detach().requires_grad_(need)
            for t, need in zip(args[:tensors], ctx.needs_input_grad, strict=False)
        ]
        ctx.rest = args[tensors:]
        with torch.enable_grad():
            y = op(*leaves, *ctx.rest)
        ctx.save_for_backward(*args[:tensors])
        ctx.graph = (leaves, y)
        return y.detach()

    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
        ):  # a gradient of the gradient is wanted: it has to reach the inputs
            inputs = [t.view_as(t) for t in inputs]  # one may be made of another: each for itself
            y = op(*inputs, *ctx.rest)
        else:
            inputs, y = ctx.graph
        needed = [k for k in range(tensors) if ctx.needs_input_grad[k]]
        found = torch.autograd.grad(
            y, [inputs[k] for k in needed], grad, retain_graph=True,
            create_graph=torch.is_grad_enabled(),
        )  # fmt: skip
        result = [None] * (tensors + len(ctx.rest))
        for k, dx in zip(needed, found, strict=True):
            result[k] = dx
        return tuple(result)

    return forward, backward


def _cross_entropy(kernel: str):
    return _recorded(kernel, 2)


def _fused(kernel: str):
    return _recorded(kernel, 2)


def _gate(kernel: str):
    return _recorded(kernel, 1 if kernel.endswith("_packed") else 2)


def _dropout(kernel: str):
    op = overload(kernel)
    tensors = len([a for a in op._schema.arguments if str(a.type) == "Tensor"]) - 1  # but the seed
    if kernel != "dropout":  # which is linear, and its own derivative
        return _recorded(kernel, tensors)

    def forward(ctx, x, p, seed):
        ctx.save_for_backward(seed)
        ctx.p = p
        return op(x, p, seed)

    def backward(ctx, grad):
        return op(grad, ctx.p, ctx.saved_tensors[0]), None, None

    return forward, backward


_KINDS = {
    "elementwise": _elementwise,
    "fused": _fused,
    "gate": _gate,
    "loss": _loss,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "dropout": _dropout,
}


class _OpFunction(Function):
    @classmethod
    def apply(cls, *args):
        """What the class's docstring says; under torch.func, the op; with FASTOPS_DISABLE, torch's function."""
        try:
            if DISABLED:
                return cls._by_torch(*args)
            if torch._C._are_functorch_transforms_active():
                return cls._op(*args)
            return super().apply(*args)
        except (RuntimeError, TypeError, AttributeError) as error:
            if (refused := cls._refusal(*args)) is None:
                raise
            raise refused from error


def _op(kernel: str, kind: str):
    op = overload(kernel)
    if kind != "loss":
        return op
    return lambda x, target, reduction, *params: op(x, target, reduction, False, *params)


def _refusal(name: str, kernel: str):
    """torch's error where an argument of apply() that has to be a tensor is none."""
    arguments = [a for a in overload(kernel)._schema.arguments if a.name != "upcast"]
    tensors = [(k, a.name) for k, a in enumerate(arguments) if str(a.type) == "Tensor"]

    def refusal(*args):
        for k, argument in tensors:
            if k < len(args) and not isinstance(args[k], torch.Tensor):
                return not_a_tensor(f"{name}.apply", argument, k + 1, args[k])
        return None

    return refusal


def _by_torch(kernel: str, kind: str):
    if kind != "dropout":
        return lambda *args: reference_of(kernel)(*args)

    def seeded(*args):
        *rest, seed = args
        generator = torch.Generator(args[0].device).manual_seed(int(seed))
        return BY_TORCH[kernel](*rest, generator=generator)

    return seeded


for _kernel, (_kind, _) in KERNELS.items():
    if _kind not in _KINDS or _kernel == "sum":
        continue
    _forward, _backward = _KINDS[_kind](_kernel)
    _name = class_name(_kernel)
    globals()[_name] = type(
        _name,
        (_OpFunction,),
        {
            "__doc__": f"fastops::{_kernel} as a torch.autograd.Function; see the module's docstring.",
            "__module__": __name__,
            "forward": staticmethod(_forward),
            "backward": staticmethod(_backward),
            "_op": staticmethod(_op(_kernel, _kind)),
            "_refusal": staticmethod(_refusal(_name, _kernel)),
            "_by_torch": staticmethod(_by_torch(_kernel, _kind)),
        },
    )
    __all__.append(_name)
