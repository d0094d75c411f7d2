"""Decides whether a case may be timed: values, gradients, masks and optimizer states against torch in float64, by the rule
of fastops.selfcheck."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from fastops._core.registry import OPS
from fastops.selfcheck import Masked, Wrong, compare

from .calls import (
    function_call,
    functions_of,
    make_inputs,
    make_upstream,
    native_step,
    normal,
    our_optimizer,
    seeded,
)
from .cases import BOTH, STEP, Case
from .models import MODEL, verify_model

STEPS = 3


def compute(
    function: Callable, case: Case, inputs: dict[str, Tensor], dy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of `function` and, if the case has backward, the gradient with respect to each input but targets."""
    call, leaves = function_call(function, case, inputs, dy)
    with torch.set_grad_enabled(case.mode == BOTH):
        y = call().detach()
    return y, {name: leaf.grad for name, leaf in leaves.items()}


def verify_function(case: Case, device: str) -> None:
    """Values and gradients of a function against its reference."""
    function, reference = functions_of(case)
    inputs = make_inputs(case, device)
    before = {name: x.clone() for name, x in inputs.items()}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    dy = make_upstream(case, inputs, device)
    y, dx = compute(function, case, inputs, dy)
    for name, x in inputs.items():
        if not torch.equal(x, before[name]):
            raise Wrong(f"{name} was overwritten")
    y_native, dx_native = compute(reference, case, inputs, dy)
    y_exact, dx_exact = compute(reference, case, wide, dy.double())
    compare("value", y, y_native, y_exact)
    for name in dx_exact:
        compare(f"gradient of {name}", dx[name], dx_native[name], dx_exact[name])


def verify_random(case: Case, device: str) -> None:
    """Dropout's share of kept elements and a new mask at each call; values and gradients against the reference under the
    mask that the same seed gives to dropout alone."""
    function, p = OPS[case.op].function, case.arguments["p"]
    inputs = make_inputs(case, device)
    dy = make_upstream(case, inputs, device)
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(0)
        y, dx = compute(function, case, inputs, dy)
        again, _ = compute(function, case, inputs, dy)
        torch.manual_seed(0)
        keep = OPS["dropout"].function(torch.ones_like(inputs["input"]), p) != 0
    share, n = keep.double().mean().item(), keep.numel()
    if not abs(share - (1 - p)) <= 5 * (p * (1 - p) / n) ** 0.5:
        raise Wrong(f"keeps {share:.4f} of the elements, not {1 - p:.4f}")
    if torch.equal(y, again):
        raise Wrong("two calls drew the same mask")
    wide = {name: x.double() for name, x in inputs.items()}
    with Masked(keep):
        y_native, dx_native = compute(OPS[case.op].reference, case, inputs, dy)
        y_exact, dx_exact = compute(OPS[case.op].reference, case, wide, dy.double())
    compare("value", y, y_native, y_exact)
    for name in dx_exact:
        compare(f"gradient of {name}", dx[name], dx_native[name], dx_exact[name])


def verify_optimizer(case: Case, device: str) -> None:
    """Parameters and states after a few steps against torch's for-loop."""
    ours, theirs = our_optimizer(case.op), getattr(torch.optim, case.op)
    loop = {"foreach": False}
    if "fused" in inspect.signature(theirs).parameters:
        loop["fused"] = False

    def walk(cls, dtype, **options) -> dict[str, Tensor]:
        generator = seeded(case)
        parameters = [
            normal(shape, case, generator, device).to(dtype).requires_grad_()
            for shape in case.shapes
        ]
        optimizer = cls(parameters, **case.arguments, **options)
        step, averages = native_step(case, optimizer) if cls is theirs else (optimizer.step, [])
        for _ in range(STEPS):
            for p in parameters:
                p.grad = normal(p.shape, case, generator, device).to(dtype)
            step()
        found = {"parameters": parameters}
        if averages:
            found["ema"] = averages
        for p in parameters:
            for name, state in optimizer.state[p].items():
                if torch.is_tensor(state) and state.shape == p.shape:
                    found.setdefault(name, []).append(state)
        return {k: torch.cat([t.detach().flatten() for t in v]) for k, v in found.items()}

    mine, native = walk(ours, case.dtype, **case.beyond), walk(theirs, case.dtype, **loop)
    if mine.keys() != native.keys():
        raise Wrong(f"states {sorted(mine)} where torch has {sorted(native)}")
    exact = walk(theirs, torch.float64, **loop)
    for name in native:
        compare(name, mine[name], native[name], exact[name])


def verify(case: Case, device: str) -> None:
    """Checks the case on the very tensors that it will be timed on.

    Raises:
        Wrong: our result is not torch's.
        Skipped: the case cannot run here.
    """
    checks = {"dropout": verify_random, STEP: verify_optimizer, MODEL: verify_model}
    checks.get(case.kind, verify_function)(case, device)
