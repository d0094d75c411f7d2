"""Inputs for every op of the table: what the tests of all kinds iterate over. A new elementwise op needs no line here;
an op with arguments of its own gets them in `ARGUMENTS`, or samples in `SAMPLES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.devices import why_not
from fastops._core.registry import OPS, Op

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FAST = torch.float32
# For parametrize: float32 is the dtype of the quick tests.
QUICK_DTYPES = [pytest.param(d, marks=pytest.mark.quick) if d is FAST else d for d in DTYPES]
NO_CUDA = why_not("cuda")
# The devices of @pytest.mark.parametrize. conftest.py leaves out what is marked cuda where there is no GPU.
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", CUDA]

# Keyword arguments to try beside the defaults.
ARGUMENTS: dict[str, list[dict]] = {
    "gelu": [{"approximate": "tanh"}],
    "bias_gelu": [{"approximate": "tanh"}],
    "smooth_l1_loss": [{"beta": 0.3}, {"beta": 0.0}],
    "huber_loss": [{"delta": 0.3}],
}


# What to make of the samples where an op does not take every number.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {"binary_cross_entropy": torch.sigmoid}


@dataclass
class Case:
    """One call: tensors by position, the rest by name. `name` is the test's id."""

    op: Op
    name: str
    tensors: tuple[Tensor, ...]
    kwargs: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        convert = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
        kwargs = {k: convert(v) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return Case(self.op, self.name, tuple(convert(t) for t in self.tensors), kwargs)

    def on(self, device: str) -> Case:
        """The same on a device; values are made on the CPU wherever they are used. Strides are kept."""
        move = lambda t: moved(t, device)  # noqa: E731
        kwargs = {k: move(v) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return Case(self.op, self.name, tuple(map(move, self.tensors)), kwargs)

    def leaves(self) -> Case:
        """The same with leaves that require grad, in the same memory layout."""
        return Case(
            self.op,
            self.name,
            tuple(t.detach().requires_grad_(t.is_floating_point()) for t in self.tensors),
            self.kwargs,
        )

    def __call__(self, function: Callable | None = None) -> Tensor:
        return (function or self.op.function)(*self.tensors, **self.kwargs)


def moved(t: Tensor, device: str) -> Tensor:
    """t on a device, with its strides and its offset: views that are misaligned or expanded stay so."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return memory.to(device, copy=True).as_strided(t.size(), t.stride(), t.storage_offset())


def randn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        * scale
    )


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: randn(),
    "empty": lambda: randn(0, 3),
    "one": lambda: randn(1),
    "odd": lambda: randn(7, 13),
    "lines": lambda: randn(33, 65),
    "channels_last": lambda: randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: randn(2, 3, 2, 3, 4).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: randn(9, 17).t(),
    "permuted": lambda: randn(3, 4, 5).permute(2, 0, 1),
    "strided": lambda: randn(8, 30)[:, ::3],
    "offset": lambda: randn(101)[1:],
    "expanded": lambda: randn(5, 1).expand(5, 6),
}


def elementwise_cases(op: Op) -> Iterator[Case]:
    for kwargs in [{}, *ARGUMENTS.get(op.name, [])]:
        label = "".join(f",{k}={v}" for k, v in kwargs.items())
        for layout, make in LAYOUTS.items():
            yield Case(op, f"{op.name}-{layout}{label}", (make(),), kwargs)


# Shapes that broadcast to an input: its last dimension's, its channels', and one number.
WEIGHTS: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
    "none": lambda x: x.shape[-1:],
    "mean": lambda x: (x.shape[1], *(1,) * (x.dim() - 2)) if x.dim() > 1 else x.shape,
    "sum": lambda x: (),
}


def loss_cases(op: Op) -> Iterator[Case]:
    within = INPUTS.get(op.name)
    weighted = "pos_weight" in op.signature.parameters
    for kwargs in [{}, *ARGUMENTS.get(op.name, [])]:
        label = "".join(f",{k}={v}" for k, v in kwargs.items())
        for reduction in ("none", "mean", "sum"):
            for layout, make in LAYOUTS.items():
                x = make()
                t = randn(*x.shape, seed=1)
                if within:
                    x, t = (
                        a.copy_(within(a)) if 0 not in a.stride() else within(a) for a in (x, t)
                    )
                yield Case(
                    op, f"{op.name}-{layout},{reduction}{label}", (x, t),
                    {**kwargs, "reduction": reduction},
                )  # fmt: skip
    for reduction, shape_of in WEIGHTS.items() if weighted else ():
        for layout, make in LAYOUTS.items():
            x = make()
            kwargs = {"reduction": reduction, "pos_weight": randn(*shape_of(x), seed=2).abs()}
            name = f"{op.name}-{layout},{reduction},pos_weight"
            yield Case(op, name, (x, randn(*x.shape, seed=1)), kwargs)


def softmax_cases(op: Op) -> Iterator[Case]:
    shapes = {
        "0-d": (randn(), 0),
        "empty": (randn(0, 3), 1),
        "row": (randn(1000), 0),
        "rows": (randn(7, 130), -1),
        "long": (randn(2, 5000), 1),
        "columns": (randn(6, 5, 37), 1),
        "first": (randn(5, 70), 0),
        "channels_last": (randn(2, 19, 3, 5).to(memory_format=torch.channels_last), 1),
        "strided": (randn(8, 60)[:, ::3], 1),
        "one column": (randn(4, 1, 3), 1),
        "large": (randn(3, 40) * 1e4, 1),
    }
    for name, (x, dim) in shapes.items():
        yield Case(op, f"{op.name}-{name}", (x,), {"dim": dim})


def targets(*shape: int, classes: int, seed: int = 3) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def distribution(*shape: int, dim: int = 1) -> Tensor:
    return randn(*shape, seed=6).softmax(dim)


def cross_entropy_cases(op: Op) -> Iterator[Case]:
    ignored = targets(9, classes=13)
    ignored[2::3] = 5
    weight = randn(13, seed=4).abs() + 0.1
    inputs = {
        "(C)": (randn(13), targets(classes=13), {}),
        "(N,C)": (randn(9, 13), targets(9, classes=13), {}),
        "many classes": (randn(3, 5003), targets(3, classes=5003), {}),
        "one class": (randn(4, 1), targets(4, classes=1), {}),
        "ignored": (randn(9, 13), ignored, {"ignore_index": 5}),
        "(N,C,d)": (randn(4, 13, 37), targets(4, 37, classes=13), {}),
        "(N,C,h,w)": (randn(2, 13, 5, 7), targets(2, 5, 7, classes=13), {}),
        "channels_last": (
            randn(2, 13, 5, 7).to(memory_format=torch.channels_last),
            targets(2, 5, 7, classes=13),
            {},
        ),
        "permuted": (randn(5, 2, 13).permute(1, 2, 0), targets(2, 5, classes=13), {}),
        "strided": (randn(9, 39)[:, ::3], targets(9, classes=13), {}),
        "transposed": (randn(13, 9).t(), targets(9, classes=13), {}),
        "uint8": (randn(9, 13), targets(9, classes=13).to(torch.uint8), {}),
        "large": (randn(9, 13) * 1e4, targets(9, classes=13), {}),
        "probabilities (C)": (randn(13), distribution(13, dim=0), {}),
        "probabilities (N,C)": (randn(9, 13), distribution(9, 13), {}),
        "probabilities, many classes": (randn(3, 5003), distribution(3, 5003), {}),
        "probabilities (N,C,d)": (randn(4, 13, 37), distribution(4, 13, 37), {}),
        "probabilities, channels_last": (
            randn(2, 13, 5, 7).to(memory_format=torch.channels_last),
            distribution(2, 13, 5, 7),
            {},
        ),
        "probabilities, strided": (randn(9, 39)[:, ::3], distribution(13, 9, dim=0).t(), {}),
        "probabilities, large": (randn(9, 13) * 1e4, distribution(9, 13), {}),
        "one hot": (randn(9, 13), torch.eye(13, dtype=torch.float64)[targets(9, classes=13)], {}),
        "any numbers for probabilities": (randn(9, 13), randn(9, 13, seed=5), {}),
    }
    for name, (x, t, kwargs) in inputs.items():
        for reduction in ("mean", "sum", "none"):
            yield Case(
                op, f"{op.name}-{name},{reduction}", (x, t), {**kwargs, "reduction": reduction}
            )
        if x.dim() > 1 and x.size(1) == 13 and name != "uint8":
            for smoothing in (0.0, 0.1, 1.0):
                for w in (None, weight):
                    extra = {"label_smoothing": smoothing, "weight": w}
                    label = f"{smoothing}{',weight' if w is not None else ''}"
                    yield Case(
                        op, f"{op.name}-{name},smoothing={label}", (x, t), {**kwargs, **extra}
                    )


def fused_cases(op: Op) -> Iterator[Case]:
    bias = "bias" in op.signature.parameters
    for kwargs in [{}, *ARGUMENTS.get(op.name, [])]:
        label = "".join(f",{k}={v}" for k, v in kwargs.items())
        for layout, make in LAYOUTS.items():
            x = make()
            if bias and x.dim() == 0:
                continue
            other = randn(x.shape[-1], seed=1) if bias else randn(*x.shape, seed=1)
            yield Case(op, f"{op.name}-{layout}{label}", (x, other), kwargs)


def gate_cases(op: Op) -> Iterator[Case]:
    inputs = {
        "empty": (randn(0, 4), 1),
        "odd": (randn(7, 26), 1),
        "lines": (randn(33, 66), -1),
        "first": (randn(6, 35), 0),
        "channels_last": (randn(2, 6, 5, 7).to(memory_format=torch.channels_last), 1),
        "transposed": (randn(16, 9).t(), 1),
        "strided": (randn(8, 60)[:, ::3], 1),
        "offset": (randn(101)[1:], 0),
        "expanded": (randn(5, 1).expand(5, 6), 1),
    }
    for name, (x, dim) in inputs.items():
        yield Case(op, f"{op.name}-{name}", (x,), {"dim": dim})


SAMPLES: dict[str, Callable[[Op], Iterator[Case]]] = {
    "cross_entropy": cross_entropy_cases,
    "softmax": softmax_cases,
    "log_softmax": softmax_cases,
}
KINDS: dict[str, Callable[[Op], Iterator[Case]]] = {
    "elementwise": elementwise_cases,
    "fused": fused_cases,
    "gate": gate_cases,
    "loss": loss_cases,
}


def cases(kind: str | None = None) -> list[Case]:
    """Every sample of every op (of one kind); random ops, which have no reference to the bit, are tested apart."""
    found = []
    for op in OPS.values():
        make = SAMPLES.get(op.name) or KINDS.get(op.kind)
        if make and kind in (None, op.kind):
            found += make(op)
    return found


def roomy(case: Case) -> bool:
    """Whether the first tensor has room for eight special values of their own."""
    x = case.tensors[0]
    return x.numel() >= 8 and 0 not in x.stride()


def ids(found: list[Case]) -> list[str]:
    return [c.name for c in found]


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest deviation, relative to the largest exact value where that is above 1. What is not finite must agree."""
    a, b = actual.detach().double(), exact.detach().double()
    assert a.shape == b.shape, (a.shape, b.shape)
    if b.numel() == 0:
        return 0.0
    finite = b.isfinite()
    torch.testing.assert_close(a[~finite], b[~finite], equal_nan=True)
    if not finite.any():
        return 0.0
    deviation = (a - b)[finite].abs().max().item()
    return deviation / max(1.0, b[finite].abs().max().item())


def assert_as_accurate(ours: Tensor, torchs: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The project's one tolerance: error to float64 at most twice torch's own, plus 4 eps."""
    mine, theirs = error(ours, exact), error(torchs, exact)
    theirs = (
        0.0 if math.isnan(theirs) else theirs
    )  # where torch itself overflows there is nothing to compare with
    assert mine <= 2 * theirs + 4 * torch.finfo(dtype).eps, (
        f"error {mine:.3g}, torch's {theirs:.3g}"
    )


def gradients(case: Case, function, dy):
    """The result of a case, by another function where one is given, and the gradients to its floating tensors."""
    y = case(function)
    inputs = [t for t in case.tensors if t.is_floating_point()]
    return y, torch.autograd.grad(y, inputs, dy.to(y.dtype)) if y.requires_grad else ()


def kept(call: Callable[[], Any]) -> tuple[list[Tensor], Any]:
    """What autograd saves during a call, and its result."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return saved, result
