"""Makes a case callable: its tensors, our call, and torch's calls to set beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastops import functional
from fastops._core.by_torch import BY_TORCH
from fastops._core.registry import OPS
from fastops.selfcheck import example_inputs

from . import peers
from .cases import BOTH, FORWARD, NORM, ROW_NORM, STEP, Case
from .models import MODEL, model_calls

Call = Callable[[], Any]
STEPPERS = {
    "for-loop": {"foreach": False},  # on the CPU torch takes nothing fused unless asked
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


class Skipped(Exception):
    """A case that cannot run here, with the reason."""


@dataclass
class Contenders:
    """Calls that do the same work: ours, torch's, and those of other libraries. `notes` says which could not be made, and
    why."""

    ours: Call
    theirs: dict[str, Call]
    peers: dict[str, Call] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def seeded(case: Case, salt: int = 0) -> torch.Generator:
    """A generator of its own for each case, so that a filtered run gets the same numbers as a full one."""
    return torch.Generator().manual_seed(sum(map(ord, case.label)) + salt)


def normal(shape: Sequence[int], case: Case, generator: torch.Generator, device: str) -> Tensor:
    """Values of the normal distribution in the case's dtype, made on the CPU whatever the device."""
    return torch.randn(shape, generator=generator).to(case.dtype).to(device)


@cache
def class_weights(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(0.5, 2, n).to(dtype).to(device)


def _pos_weight(f: Callable) -> Callable:
    return lambda x, t: f(x, t, pos_weight=class_weights(x.shape[-1], x.dtype, x.device))


def _torchs_mixup(input: Tensor, first: Tensor, second: Tensor, lam: float) -> Tensor:
    loss = torch.nn.functional.cross_entropy
    return lam * loss(input, first) + (1 - lam) * loss(input, second)


def _mixup(f: Callable) -> Callable:
    return lambda x, t: f(x, t, t.roll(1), 0.3)


def _with_lse(f: Callable) -> Callable:
    return lambda x, t: f(x, t, return_lse=True, z_loss=1e-4)[0]


# (op, variant) -> ours and torch's, of the inputs. What torch has no function for is made of torch's functions.
VARIANTS: dict[tuple[str, str], tuple[Callable, Callable]] = {
    ("binary_cross_entropy_with_logits", "pos_weight"): (
        _pos_weight(functional.binary_cross_entropy_with_logits),
        _pos_weight(torch.nn.functional.binary_cross_entropy_with_logits),
    ),
    ("cross_entropy", "mixup"): (_mixup(functional.mixup_cross_entropy), _mixup(_torchs_mixup)),
    ("cross_entropy", "lse+z_loss"): (
        _with_lse(functional.cross_entropy),
        _with_lse(BY_TORCH["cross_entropy"]),
    ),
    ("cross_entropy", "inplace_backward"): (
        lambda x, t: functional.cross_entropy(x * 1, t, inplace_backward=True),
        lambda x, t: torch.nn.functional.cross_entropy(x * 1, t),
    ),
}


def _norm(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(batch_norm(input) + residual), in training."""
    return functional.batch_norm_act(input, None, None, weight, bias, residual, training=True)


def _torchs_norm(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    y = torch.nn.functional.batch_norm(input, None, None, weight, bias, training=True)
    return torch.relu_(y if residual is None else y.add_(residual))


def _norm_inputs(case: Case, device: str) -> dict[str, Tensor]:
    """Parameters are float32, as those of a model under autocast are."""
    (shape,), generator = case.shapes, seeded(case)
    last = case.variant.endswith("channels_last")
    form = torch.channels_last if last else torch.contiguous_format
    inputs = {"input": normal(shape, case, generator, device).to(memory_format=form)}
    for name in ("weight", "bias"):
        inputs[name] = torch.randn(shape[1], generator=generator).to(device)
    if case.variant.startswith("add"):
        inputs["residual"] = normal(shape, case, generator, device).to(memory_format=form)
    return inputs


def _row_norm(name: str, module: Any) -> Callable:
    """layer_norm, rms_norm and, where `name` says so, of the sum of two tensors, with the functions of a module."""
    plain = getattr(module, name.removeprefix("add_"))
    both = getattr(module, name, None)

    def norm(input: Tensor, *rest: Tensor) -> Tensor:
        if not name.startswith("add_"):
            return plain(input, input.shape[-1:], *rest)
        residual, *parameters = rest
        if both is None:
            return plain(input + residual, input.shape[-1:], *parameters)
        return both(input, residual, input.shape[-1:], *parameters)[0]

    return norm


def _row_norm_inputs(case: Case, device: str) -> dict[str, Tensor]:
    """Parameters are of the input's dtype, as those of a model in bfloat16 are."""
    (shape,), generator = case.shapes, seeded(case)
    tensors = ["input", "residual"] if case.op.startswith("add_") else ["input"]
    vectors = ["weight", "bias"] if "layer" in case.op else ["weight"]
    inputs = {name: normal(shape, case, generator, device) for name in tensors}
    return inputs | {name: normal(shape[-1:], case, generator, device) for name in vectors}


def functions_of(case: Case) -> tuple[Callable, Callable]:
    """Our function of a case, and torch's."""
    if case.kind == NORM:
        return _norm, _torchs_norm
    if case.kind == ROW_NORM:
        return _row_norm(case.op, functional), _row_norm(case.op, torch.nn.functional)
    op = OPS[case.op]
    return VARIANTS.get((case.op, case.variant)) or (op.function, op.reference)


def make_inputs(case: Case, device: str) -> dict[str, Tensor]:
    """The tensors for each parameter of the case's function that has no default.

    Raises:
        TypeError: a parameter of a name that is not known here.
    """
    if case.kind == NORM:
        return _norm_inputs(case, device)
    if case.kind == ROW_NORM:
        return _row_norm_inputs(case, device)
    (shape,) = case.shapes
    return example_inputs(
        OPS[case.op], shape, case.dtype, seeded(case), device, case.arguments, case.probabilities
    )


def as_leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same memory as new leaves, of which all but targets require grad. Each contender gets leaves of its own, or
    it would pay for freeing another's gradient."""
    return {
        name: x.detach().requires_grad_(x.is_floating_point() and name != "target")
        for name, x in inputs.items()
    }


def make_upstream(case: Case, inputs: dict[str, Tensor], device: str) -> Tensor:
    """The gradient that backward starts from: 1 for a scalar loss, as in training."""
    with torch.no_grad():
        y = functions_of(case)[1](*inputs.values(), **case.arguments)
    if not y.dim():
        return torch.ones_like(y)
    return torch.empty_like(y).copy_(normal(y.shape, case, seeded(case, 1), device))


def function_call(
    function: Callable, case: Case, inputs: dict[str, Tensor], dy: Tensor
) -> tuple[Call, dict[str, Tensor]]:
    """One call of `function`, with backward if the case has it, that returns the value; and the leaves whose `grad` it
    sets. What is verified and what is timed are both made here."""
    arguments = dict(case.arguments)
    if case.mode == FORWARD:
        return partial(function, *inputs.values(), **arguments), {}
    leaves = as_leaves(inputs)
    x = tuple(leaves.values())
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    upstream = (dy,) if dy.dim() else ()

    def call():
        for leaf in wanted.values():
            leaf.grad = None
        y = function(*x, **arguments)
        y.backward(*upstream)
        return y

    return call, wanted


def compiled(function: Callable) -> Callable:
    """`function` by torch.compile, as a new function: a shared one would be recompiled with dynamic shapes."""
    import torch._inductor.config as config

    # It warns of a CUDA toolkit without a GPU each time.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Worker processes that start in the background would run while we measure.
    config.compile_threads = 1
    torch._dynamo.reset()
    return torch.compile(lambda *args, **kwargs: function(*args, **kwargs), dynamic=False)


def function_contenders(case: Case, device: str, with_compile: bool) -> Contenders:
    """Our function beside torch's, eager and compiled. torch.compile has done its compiling when this returns."""
    function, reference = functions_of(case)
    inputs = make_inputs(case, device)
    dy = make_upstream(case, inputs, device)
    ours, _ = function_call(function, case, inputs, dy)
    eager, _ = function_call(reference, case, inputs, dy)
    made = Contenders(ours, {"eager": eager})
    if with_compile:
        try:
            call, _ = function_call(compiled(reference), case, inputs, dy)
            with torch.set_grad_enabled(case.mode == BOTH):
                call()
            made.theirs["compile"] = call
        except Exception as error:
            made.notes.append(f"torch.compile failed: {first_line(error)}")
    for name, find in peers.functions(case, device).items():
        try:
            # On a copy: some write the gradient where the logits were.
            own = {k: x.clone() for k, x in inputs.items()}
            call, _ = function_call(find(), case, own, dy)
            with torch.set_grad_enabled(case.mode == BOTH):
                check_peer(call().detach(), eager().detach())
            made.peers[name] = call
        except Exception as error:  # of a library of others, anything
            made.notes.append(f"{name} is not timed: {first_line(error)}")
    return made


def our_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class fastops.optim.`name`.

    Raises:
        Skipped: there is none.
    """
    try:
        import fastops.optim as optim

        return vars(optim)[name]  # not getattr, which finds torch's own where there is none of ours
    except (ImportError, KeyError):
        raise Skipped(f"fastops.optim has no {name}") from None


def native_step(case: Case, optimizer: torch.optim.Optimizer) -> tuple[Call, list[Tensor]]:
    """The step of one of torch's optimizers, with what the case has beyond it as torch has it; and the averages that it
    keeps, from the first step on."""
    if not case.beyond:
        return optimizer.step, []
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    averages: list[Tensor] = []

    @torch.no_grad()
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, case.beyond["max_grad_norm"])
        optimizer.step()
        if averages:
            torch._foreach_lerp_(averages, parameters, 1 - case.beyond["ema_decay"])
        else:
            averages.extend(p.detach().clone() for p in parameters)

    return step, averages


def optimizer_contenders(case: Case, device: str) -> Contenders:
    """Our optimizer's step beside torch's three. All have parameters and states of their own and share gradients."""
    ours = our_optimizer(case.op)
    theirs = getattr(torch.optim, case.op)
    generator = seeded(case)
    start = [normal(shape, case, generator, device) for shape in case.shapes]
    gradients = [normal(shape, case, generator, device) for shape in case.shapes]

    def stepper(cls, **options) -> Call:
        parameters = [p.clone().requires_grad_() for p in start]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone() if case.beyond else g  # clip_grad_norm_ writes it
        if cls is theirs:
            return native_step(case, cls(parameters, **case.arguments, **options))[0]
        return cls(parameters, **case.arguments, **options).step

    made = Contenders(stepper(ours, **case.beyond), {})
    for name, options in STEPPERS.items():
        try:
            made.theirs[name] = stepper(theirs, **options)
        except (RuntimeError, TypeError, ValueError) as error:
            made.notes.append(f"torch has no {name}: {first_line(error)}")
    if not case.beyond:
        for name, make in peers.makers(case.op, device).items():
            try:
                verify_peer(make, theirs, start, gradients, case)
                made.peers[name] = stepper(make)
            except Exception as error:  # of a library of others, anything
                made.notes.append(f"{name} is not timed: {first_line(error)}")
    return made


@torch.no_grad()
def verify_peer(make, theirs, start: list[Tensor], gradients: list[Tensor], case: Case) -> None:
    """Whether three steps of another library's optimizer move the parameters as torch's do.

    Raises:
        ValueError: it does not.
    """

    def walk(cls, **options) -> Tensor:
        parameters = [p.clone().requires_grad_() for p in start]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        optimizer = cls(parameters, **case.arguments, **options)
        for _ in range(3):
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in parameters])

    before = torch.cat([p.flatten() for p in start])
    check_peer(walk(make) - before, walk(theirs, foreach=False) - before)


def check_peer(value: Tensor, native: Tensor) -> None:
    """Whether another library computes what torch does, however roughly: its rounding is its own affair.

    Raises:
        ValueError: it does not.
    """
    if value.shape != native.shape:
        raise ValueError(f"gives {tuple(value.shape)} where torch gives {tuple(native.shape)}")
    size, off = native.abs().max().item(), (value.double() - native.double()).abs().max().item()
    if not off <= 8 * torch.finfo(native.dtype).eps ** 0.5 * size:
        raise ValueError(f"off torch's by {off:.1e}, of {size:.1e}")


def contenders(case: Case, device: str, with_compile: bool) -> Contenders:
    """The calls of a case, on tensors that are ready.

    Raises:
        Skipped: it cannot run here.
    """
    if case.kind == STEP:
        return optimizer_contenders(case, device)
    if case.kind == MODEL:
        try:
            ours, theirs = model_calls(case, device)
        except ImportError as error:
            raise Skipped(first_line(error)) from None
        return Contenders(ours, {"eager": theirs})
    return function_contenders(case, device, with_compile)


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else ''}".rstrip(": ")
