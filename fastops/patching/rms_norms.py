"""RMS norms that models bring along, such as Hugging Face's: recognized by what they compute.

Two things are asked. The forward, traced with torch.fx, is made of nothing but the operations of an RMS norm: no branch, no
attribute but epsilon, no dropout, no detach. And its result for a sample is that of fastops.functional.rms_norm."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import functional
from ..selfcheck import Wrong, compare
from .modules import Recipe
from .reading import Refused
from .tracing import trace

_EPS = ("variance_epsilon", "eps", "epsilon")
_NAMES = (
    ("rms_norm", "fastops.functional:rms_norm"),
    ("usable", "fastops._core.usable:usable"),
)
# By what the weight stands for: what is called, and where. A product with a weight of another dtype has another dtype,
# while `1 + weight` is computed in float32 and the result has the input's.
_CALLS = {
    "weight": (
        "usable({x}) and self.weight.dtype == {x}.dtype",
        "rms_norm({x}, self.weight.shape, self.weight, self.{eps})",
    ),
    "1 + weight": (
        "usable({x}) and {x}.dtype != float64",
        "rms_norm({x}, self.weight.shape, 1.0 + self.weight.float(), self.{eps})",
    ),
}


_METHODS = {"to", "float", "type", "type_as", "pow", "square", "mean", "rsqrt", "sqrt", "mul", "div", "add"}  # fmt: skip
_FUNCTIONS = {
    operator.add, operator.mul, operator.truediv, operator.pow, torch.add, torch.mul, torch.div, torch.pow, torch.square,
    torch.mean, torch.rsqrt, torch.sqrt,
}  # fmt: skip


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is one that an RMS norm over the last dimension has."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return node.target == "weight"
    if node.op == "call_function" and node.target is getattr:
        return bool(node.args[1] == "dtype")
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name == "mean" and (node.args[1:], node.kwargs) not in (
        ((-1,), {"keepdim": True}), ((-1, True), {}), ((), {"dim": -1, "keepdim": True}),
    ):  # fmt: skip
        return False
    return node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS)


def _is_all_plain(module: nn.Module, eps: str) -> bool:
    try:
        graph, read = trace(module, type(module))
    except Refused:
        return False
    return all(map(_is_plain, graph.nodes)) and read.keys() <= {"weight", eps}


def may_be_rms_norm(module: nn.Module) -> bool:
    """Whether a module looks like one: by its class's name, and one vector of weights."""
    name = type(module).__name__
    return (
        (name.endswith("RMSNorm") or name == "T5LayerNorm")
        and not type(module).__module__.startswith("torch.")
        and [*module._parameters] == ["weight"]
        and isinstance(weight := module._parameters["weight"], Tensor)
        and weight.dim() == 1
        and weight.numel() > 1
        and not module._modules
        and not module._buffers
        and any(isinstance(vars(module).get(name), float) for name in _EPS)
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


def rms_norm_recipe(module: Any) -> tuple[Recipe | None, str | None]:
    """The recipe of an RMS norm; why not, where it computes something else."""
    eps = next(name for name in _EPS if isinstance(vars(module).get(name), float))
    name = list(inspect.signature(type(module).forward).parameters)[1]
    if not _is_all_plain(module, eps):
        return None, "its forward is more than an RMS norm over the last dimension"
    for weight, (condition, call) in _CALLS.items():
        if _computes(module, getattr(module, eps), weight):
            cls = type(module)
            fields = {"x": name, "eps": eps}
            source = (
                f"def forward(self, {name}):\n"
                f"    if not ({condition.format(**fields)}):\n"
                f"        return original(self, {name})\n"
                f"    return {call.format(**fields)}\n"
            )
            words = ((f"{cls.__module__}.{cls.__qualname__}", "fastops.functional.rms_norm"),)
            names = _NAMES + ((("float64", "torch:float64"),) if "float64" in condition else ())
            return Recipe("source", words, False, source, names), None
    return None, "it computes something else than fastops.functional.rms_norm"


@torch.no_grad()
def _computes(module: Any, eps: float, weight: str) -> bool:
    """Whether a module is the RMS norm with this weight, by a sample of large and small rows."""
    try:
        twin = copy.deepcopy(module).cpu()
        generator = torch.Generator().manual_seed(0)
        n = twin.weight.numel()
        twin.weight.copy_(torch.randn(n, generator=generator))
        x = torch.randn(3, n, generator=generator) * torch.tensor([[1.0], [eps**0.5], [30.0]])
        for dtype in (torch.float32, torch.bfloat16):
            twin, given = twin.to(dtype), x.to(dtype)
            w, wide = twin.weight.double(), given.double()
            if weight == "1 + weight":
                w = 1 + w
            exact = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * w
            theirs = type(module).forward(twin, given)
            factor = twin.weight if weight == "weight" else 1 + twin.weight.float()
            ours = functional.rms_norm(given, (n,), factor, eps)
            if theirs.dtype != ours.dtype:
                return False
            torch.testing.assert_close(theirs.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)  # fmt: skip
            compare("value", ours, theirs, exact)
    except (Wrong, AssertionError):
        return False
    except Exception:  # of the model's own code, anything
        return False
    return True
