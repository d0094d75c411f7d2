"""Runs every op of the table and every optimizer beside torch, in seconds: `check_ops()`, `check_optimizers()`.

The rule, for each element: error <= 2 x torch's own largest error in the same dtype + 4 eps x its value, errors being
those to torch's result in float64. `python -m fastops doctor` prints what comes of it; `bench` will not time what breaks it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._core.registry import OPS, Op

__all__ = ["Check", "Wrong", "check_ops", "check_optimizers", "compare", "example_inputs"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of float64, torch is its own oracle
SHAPE = (37, 66)  # whole registers and a tail, on every instruction set; even, as gates halve it
DROP = 0.3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "Adam": {"lr": 1e-2, "weight_decay": 1e-2},
    "AdamW": {"lr": 1e-2, "weight_decay": 1e-2},
    "RMSprop": {"lr": 1e-2, "momentum": 0.9},
    "Adagrad": {"lr": 1e-1, "lr_decay": 1e-2},
    "Adadelta": {"lr": 1.0},
    "Adamax": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2, "weight_decay": 1e-2},
    "RAdam": {"lr": 1e-2},
    "Rprop": {"lr": 1e-2},
    "ASGD": {"lr": 1e-1},
}
STEPS = 3


class Wrong(Exception):
    """Our result differs from torch's by more than the rule allows."""


@dataclass(frozen=True)
class Check:
    """One op in one dtype on one device. `problem` is empty where it is right."""

    name: str
    dtype: torch.dtype
    device: str
    problem: str = ""


def compare(what: str, ours: Tensor, native: Tensor, exact: Tensor) -> None:
    """Applies the rule: `native` is torch's result in the dtype of ours, `exact` torch's in float64.

    Raises:
        Wrong: shape or dtype differ, or an element is off by more than allowed.
    """
    if ours.shape != native.shape or ours.dtype != native.dtype:
        raise Wrong(
            f"{what}: {ours.dtype} {tuple(ours.shape)} where torch gives "
            f"{native.dtype} {tuple(native.shape)}"
        )
    own = (native.double() - exact).abs_().max().item() if exact.numel() else 0.0
    error = (ours.double() - exact).abs_()
    allowed = exact.abs().mul_(4 * torch.finfo(ours.dtype).eps).add_(2 * own)
    bad = ~(error <= allowed)  # so that NaN is bad
    if bad.any():
        at = int(bad.flatten().nonzero()[0])
        raise Wrong(
            f"{what}: {int(bad.sum())} of {bad.numel()} differ, the first by "
            f"{error.flatten()[at].item():.2g} where {allowed.flatten()[at].item():.2g} is allowed"
        )


def example_inputs(
    op: Op,
    shape: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
    device: str = "cpu",
    given: Collection[str] = (),
    probabilities: bool = False,
) -> dict[str, Tensor]:
    """A tensor for each parameter of an op that has no default and is not `given`, by its name and the op's kind.

    `probabilities`: targets of cross-entropy are distributions; inputs and targets of a reduction are in [0, 1].

    Raises:
        TypeError: a parameter of a name that is not known here.
    """

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    inputs: dict[str, Tensor] = {}
    for name, parameter in op.signature.parameters.items():
        if parameter.default is not inspect.Parameter.empty or name in given:
            continue
        if name == "target" and op.kind == "cross_entropy" and probabilities:
            inputs[name] = normal(*shape).softmax(1)
        elif name == "target" and op.kind == "cross_entropy":
            target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
            inputs[name] = target.to(device)
        elif name in ("input", "target"):
            values = normal(*shape)
            inputs[name] = values.sigmoid() if probabilities and op.kind == "loss" else values
        elif name in ("gate", "other", "residual"):
            inputs[name] = normal(*shape)
        elif name == "bias":
            inputs[name] = normal(shape[-1])
        else:
            raise TypeError(f"fastops/selfcheck.py cannot make an argument {name!r} of {op.name}")
    return inputs


class Masked(TorchFunctionMode):
    """Makes torch's dropout keep what `keep` says."""

    def __init__(self, keep: Tensor):
        super().__init__()
        self.keep = keep

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.dropout:
            x, p = args[0], kwargs["p"] if "p" in (kwargs or {}) else args[1]
            return x * self.keep.to(x.dtype) / (1 - p)
        return function(*args, **(kwargs or {}))


def _value_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], arguments: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    y = function(*leaves.values(), **arguments)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float32) if y.dim() else torch.ones(1)
    y.backward(upstream.to(y.dtype).to(y.device).reshape(y.shape))
    gradients = {n: x.grad for n, x in leaves.items() if x.grad is not None}
    return y.detach(), gradients


def check_op(op: Op, dtype: torch.dtype, device: str, probabilities: bool = False) -> None:
    """Compares the value and every gradient of an op with its reference's.

    Raises:
        Wrong: by more than the rule allows.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, op.name)))
    always = {"p": DROP, "dim": -1}
    arguments: dict[str, Any] = {n: v for n, v in always.items() if n in op.signature.parameters}
    inputs = example_inputs(op, SHAPE, dtype, generator, device, arguments, probabilities)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    with torch.random.fork_rng(enabled=True), torch.enable_grad():
        torch.manual_seed(0)
        ours, our_gradients = _value_and_gradients(op.function, inputs, arguments)
        if op.kind != "dropout":
            native, natives = _value_and_gradients(op.reference, inputs, arguments)
            exact, exacts = _value_and_gradients(op.exact, wide, arguments)
        else:
            torch.manual_seed(0)
            keep = OPS["dropout"].function(torch.ones_like(inputs["input"]), DROP) != 0
            if not abs(keep.double().mean().item() - 1 + DROP) < 0.1:
                raise Wrong(f"keeps {keep.double().mean().item():.2f} of the elements")
            with Masked(keep):
                native, natives = _value_and_gradients(op.reference, inputs, arguments)
                exact, exacts = _value_and_gradients(op.exact, wide, arguments)
    compare("value", ours, native, exact)
    if our_gradients.keys() != exacts.keys():
        raise Wrong(f"gradients to {sorted(our_gradients)} where torch has {sorted(exacts)}")
    for name in exacts:
        compare(f"gradient of {name}", our_gradients[name], natives[name], exacts[name])


def check_optimizer(name: str, dtype: torch.dtype, device: str) -> None:
    """Compares parameters and states after a few steps with those of torch's for-loop.

    Raises:
        Wrong: by more than the rule allows.
    """
    from . import optim

    def walk(cls, dtype, **options) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        parameters = [
            torch.randn(s, generator=generator).to(start).to(dtype).to(device).requires_grad_()
            for s in (SHAPE, (5,), ())
        ]
        optimizer = cls(parameters, **OPTIMIZERS[name], **options)
        for _ in range(STEPS):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator).to(start).to(dtype).to(device)
            optimizer.step()
        found: dict[str, list[Tensor]] = {"parameters": list(parameters)}
        for p in parameters:
            for key, state in optimizer.state[p].items():
                if torch.is_tensor(state) and key != "step":
                    found.setdefault(key, []).append(state)
        return {k: torch.cat([t.detach().flatten() for t in v]) for k, v in found.items()}

    start = dtype  # what float64 starts from too
    theirs = getattr(torch.optim, name)
    ours = walk(getattr(optim, name), dtype)
    native, exact = walk(theirs, dtype, foreach=False), walk(theirs, torch.float64, foreach=False)
    if ours.keys() != native.keys():
        raise Wrong(f"states {sorted(ours)} where torch has {sorted(native)}")
    for key in native:
        compare(key, ours[key], native[key], exact[key])


def _verdict(name: str, dtype: torch.dtype, device: str, check: Callable, *arguments) -> Check:
    try:
        check(*arguments)
    except Wrong as error:
        return Check(name, dtype, device, str(error))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Check(name, dtype, device, f"{type(error).__name__}: {first}")
    return Check(name, dtype, device)


def _with_pos_weight(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def weighted(input: Tensor, target: Tensor) -> Tensor:
        return function(input, target, pos_weight=torch.linspace(0.5, 2, input.shape[-1]).to(input))

    return weighted


def check_ops(device: str = "cpu") -> Iterator[Check]:
    """Every op of the table, in float32, bfloat16 and float16, with its gradients; cross-entropy against probabilities
    and binary cross-entropy with a pos_weight too. Yields one :class:`Check` each; an op that raises is one with a problem."""
    for op in OPS.values():
        # The one loss that takes nothing outside [0, 1].
        within = op.name == "binary_cross_entropy"
        for dtype in DTYPES:
            yield _verdict(op.name, dtype, device, check_op, op, dtype, device, within)
    bce = OPS["binary_cross_entropy_with_logits"]
    weighted = replace(
        bce,
        name=f"{bce.name} with pos_weight",
        function=_with_pos_weight(bce.function),
        reference=_with_pos_weight(bce.reference),
        exact=_with_pos_weight(bce.exact),
    )
    for dtype in DTYPES:
        yield _verdict(weighted.name, dtype, device, check_op, weighted, dtype, device)
    name = "cross_entropy of probabilities"
    for dtype in DTYPES:
        yield _verdict(name, dtype, device, check_op, OPS["cross_entropy"], dtype, device, True)


def check_optimizers(device: str = "cpu") -> Iterator[Check]:
    """Every optimizer, three steps in float32 and bfloat16 (in float16 torch's Adam divides by 0). Yields one
    :class:`Check` each."""
    for name in OPTIMIZERS:
        for dtype in (torch.float32, torch.bfloat16):
            yield _verdict(name, dtype, device, check_optimizer, name, dtype, device)
