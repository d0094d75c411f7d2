"""A torch.autograd.Function for every op, over the same kernels: the shape to build on when a step of your own is to be
differentiated around one of ours. `fastops.functional` has no Python in its forward and backward passes, is faster, and
works under torch.func; these work with autograd, gradients of gradients included.

`<Name>Function.apply(...)` takes the op's arguments by position:

    ReLUFunction(x)  GELUFunction(x)  GELUTanhFunction(x)  LeakyReLUFunction(x, negative_slope)  ... (elementwise)
    MSELossFunction(input, target, reduction)  SmoothL1LossFunction(input, target, reduction, beta)  ... (losses)
    SoftmaxFunction(x, dim)  LogSoftmaxFunction(x, dim)  DropoutFunction(x, p, seed)
    CrossEntropyFunction(input, target, weight, reduction, ignore_index, label_smoothing)

with `reduction` 0 for none, 1 for mean, 2 for sum, and `seed` an int64 tensor of one element.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from . import _C
from ._op import ROWS, overload

__all__: list[str] = []
_WORDS = {
    w.lower(): w for w in ("ReLU", "ReLU6", "ELU", "SELU", "CELU", "GELU", "SiLU", "MSE", "L1")
} | {"logsigmoid": "LogSigmoid"}


def class_name(row: str) -> str:
    """The name of the Function of a row: "gelu_tanh" is GELUTanhFunction."""
    return "".join(_WORDS.get(w, w.capitalize()) for w in row.split("_")) + "Function"


def _map(row: str):
    forward_op, backward_op = overload(row), overload(f"{row}_backward")
    from_output = _C.from_output(row)

    def forward(ctx, x, *params):
        y = forward_op(x, *params)
        ctx.save_for_backward(y if from_output else x)
        ctx.params = params
        return y

    def backward(ctx, grad):
        return backward_op(ctx.saved_tensors[0], grad, *ctx.params), *(None for _ in ctx.params)

    return forward, backward


def _reduce(row: str):
    forward_op, backward_op = overload(row), overload(f"{row}_backward")

    def forward(ctx, x, target, reduction, *params):
        ctx.save_for_backward(x, target)
        ctx.rest = (reduction, *params)
        return forward_op(x, target, reduction, False, *params)

    def backward(ctx, grad):
        grads = [
            backward_op(grad, *ctx.saved_tensors, *ctx.rest, wrt) if need else None
            for wrt, need in enumerate(ctx.needs_input_grad[:2])
        ]
        return *grads, *(None for _ in ctx.rest)

    return forward, backward


def _softmax(row: str):
    forward_op, backward_op = overload(row), overload(f"{row}_backward")

    def forward(ctx, x, dim):
        y = forward_op(x, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    def backward(ctx, grad):
        return backward_op(grad, ctx.saved_tensors[0], ctx.dim), None

    return forward, backward


def _cross_entropy(row: str):
    op = overload(row)

    def forward(ctx, x, target, weight, reduction, ignore_index, label_smoothing):
        # The op keeps what it needs itself: its graph, from a leaf that stands for x, is what is saved.
        leaf = x.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            loss = op(leaf, target, weight, reduction, ignore_index, label_smoothing)
        ctx.rest = (target, weight, reduction, ignore_index, label_smoothing)
        ctx.save_for_backward(x)
        ctx.graph = (leaf, loss)
        return loss.detach()

    def backward(ctx, grad):
        x = ctx.saved_tensors[0]
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: it has to reach x
            (dx,) = torch.autograd.grad(op(x, *ctx.rest), x, grad, create_graph=True)
        else:
            leaf, loss = ctx.graph
            (dx,) = torch.autograd.grad(loss, leaf, grad, retain_graph=True)
        return dx, None, None, None, None, None

    return forward, backward


def _random(row: str):
    op = overload(row)

    def forward(ctx, x, p, seed):
        ctx.save_for_backward(seed)
        ctx.p = p
        return op(x, p, seed)

    def backward(ctx, grad):
        return op(grad, ctx.p, ctx.saved_tensors[0]), None, None

    return forward, backward


_KINDS = {
    "map": _map,
    "reduce": _reduce,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "random": _random,
}
for _row, (_kind, _) in ROWS.items():
    if _kind not in _KINDS or _row == "sum":
        continue
    _forward, _backward = _KINDS[_kind](_row)
    _name = class_name(_row)
    globals()[_name] = type(
        _name,
        (Function,),
        {
            "__doc__": f"fastops::{_row} as a torch.autograd.Function; see the module's docstring.",
            "__module__": __name__,
            "forward": staticmethod(_forward),
            "backward": staticmethod(_backward),
        },
    )
    __all__.append(_name)
