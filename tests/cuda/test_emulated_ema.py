"""The running averages of the CUDA step kernel, under emulation."""

import pytest
import torch
from emulation.kernel_calls import (
    COMBINATIONS,
    check,
    each_row,
    everywhere,
    optimizer_numbers,
    random,
    real,
    run_optimizer,
    step_tensors,
)
from emulation.library import DTYPES, F64, I64, POINTER, Device, address, call, counters, doubles


def run_averaged(row, tensors, numbers, averages, weight, dtype, state):
    n = (I64 * len(tensors))(*(t[0].numel() for t in tensors))
    pointers = (POINTER * (len(tensors) * (2 + row.states)))(
        *(address(v) for t in tensors for v in t)
    )
    kept = (POINTER * len(tensors))(*(address(v) for v in averages))
    call("run_optimizer_averaged", row.index, DTYPES[dtype], DTYPES[state], I64(len(tensors)), n, pointers, doubles(numbers), kept, F64(weight))  # fmt: skip


@pytest.mark.parametrize("dtype, state", COMBINATIONS, ids=lambda d: str(d)[6:])
@each_row("optimizer")
@pytest.mark.parametrize("weight", [0.1, 0.75, 1.0])
def test_average(row, dtype, state, weight):
    sizes = [0, 1, 7, 64, 4097]
    tensors, (numbers,) = step_tensors(row, sizes, dtype, state), optimizer_numbers(row, 1)
    before = [random(n, real(dtype), 50 + k) for k, n in enumerate(sizes)]

    def run(device):
        given = [[device.copy(v) for v in t] for t in tensors]
        plain = [[device.copy(v) for v in t] for t in tensors]
        averages = [device.copy(v) for v in before]
        run_averaged(row, given, numbers, averages, weight, dtype, state)
        run_optimizer(row, plain, [numbers] * len(sizes), dtype, state)
        for t, other in zip(given, plain, strict=True):  # the step itself is the same
            assert all(torch.equal(a, b) for a, b in zip(t, other, strict=True))
        return [v for t in given for v in t[:1]] + averages

    for results in everywhere(run):
        params, averages = results[: len(sizes)], results[len(sizes) :]
        for p, old, average in zip(params, before, averages, strict=True):
            # The average is of the parameter before it is rounded to its dtype.
            rounding = p.double().abs() * torch.finfo(dtype).eps
            exact = old.double().lerp(p.double(), weight)
            slack = weight * rounding if dtype in (torch.bfloat16, torch.float16) else 0
            excess = ((average.double() - exact).abs() - slack).clamp(min=0)
            check(
                exact.to(average.dtype) + excess.to(average.dtype),
                exact.to(real(dtype)),
                exact,
                real(dtype),
            )


@each_row("optimizer")
def test_traffic_of_an_average(row):
    n, dtype = 40_960, torch.float32
    with Device() as device:
        tensors = [device.copy(random(n, dtype, k).abs()) for k in range(2 + row.states)]
        average = device.copy(random(n, dtype, 9))
        counters()
        run_averaged(row, [tensors], optimizer_numbers(row, 1)[0], [average], 0.1, dtype, dtype)
        seen = counters()
    assert seen.launches == 1
    assert (
        seen.loaded_bytes == (3 + row.states) * n * 4
        and seen.stored_bytes == (2 + row.states) * n * 4
    )
    assert seen.loads == seen.wide_loads and seen.stores == seen.wide_stores


@each_row("optimizer")
def test_resnet50_is_one_launch_with_averages(row):
    dtype = torch.float32
    tensors = step_tensors(row, [64] * 161, dtype, dtype)
    averages = [random(64, dtype, k) for k in range(161)]
    counters()
    run_averaged(row, tensors, optimizer_numbers(row, 1)[0], averages, 0.1, dtype, dtype)
    assert counters().launches == 1
