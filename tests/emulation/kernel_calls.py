"""How the tests call the emulated kernels: where buffers lie, in which orders threads run, and how results are judged."""

import pytest
import torch
import torch.nn.functional as F

from fastops._core.registry import OPS

from .library import (
    DTYPES,
    I64,
    ORDERS,
    POINTER,
    Device,
    address,
    call,
    doubles,
    library,
    order,
    rows,
)

PLACEMENTS = [
    (0, False),
    (1, False),
    (0, True),
]  # elements after a 16-byte boundary; up against the next page


SIZES = [0, 1, 7, 260, 70_003]  # the last is more than one round of the smallest grid


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def each_row(kind):
    return pytest.mark.parametrize("row", rows(kind), ids=lambda row: row.name)


def reference(name):
    if name == "gelu_tanh":
        return lambda x: F.gelu(x, approximate="tanh")
    return OPS[name].exact if name in OPS else getattr(F, name)


def real(dtype):
    """What a dtype is computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def judged(dtype):
    """What torch computes in to be compared with: see check()."""
    return torch.float32 if dtype is torch.float64 else dtype


def random(shape, dtype, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def error(value, true):
    """The largest error, relative to the largest value where that is above 1. Equal infinities and NaNs are right."""
    if true.numel() == 0:
        return 0.0
    value = value.double()
    same = (value == true) | (value.isnan() & true.isnan())
    difference = torch.where(same, 0.0, (value - true).abs())
    scale = true[true.isfinite()].abs().max().clamp(min=1) if true.isfinite().any() else 1.0
    return (difference / scale).max().item()


def check(value, torchs, true, dtype):
    """`torchs` is torch's own result in `dtype`. For float64 it is that in float32, because the truth is then no better
    than the value: torch's error is taken to be that of float32, scaled by the precision, and both may have it."""
    assert value.dtype == dtype and value.shape == true.shape
    eps = torch.finfo(dtype).eps
    allowed = 2 * error(torchs, true) + 4 * eps
    if dtype is torch.float64 and torchs.dtype is torch.float32:
        allowed = 2 * (2 * error(torchs, true) * eps / torch.finfo(torch.float32).eps + 4 * eps)
    assert error(value, true) <= allowed


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor


def everywhere(run, placements=PLACEMENTS):
    """The results of run(device) at every placement; in each, the orders of threads must agree to the bit."""
    for offset, flush in placements:
        results = []
        for kind, seed in ORDERS:
            with order(kind, seed), Device(offset, flush) as device:
                results.append([tensor.clone() for tensor in run(device)])
        for other in results[1:]:
            assert all(
                torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True)
            )
        yield results[0]


COMBINATIONS = [(dtype, state) for dtype in DTYPES for state in dict.fromkeys((dtype, real(dtype)))]


def run_optimizer(row, tensors, numbers, dtype, state, grad_scale=None, found_inf=None):
    """tensors: lists of p, g and the states."""
    n = (I64 * len(tensors))(*(t[0].numel() for t in tensors))
    pointers = (POINTER * (len(tensors) * (2 + row.states)))(
        *(address(v) for t in tensors for v in t)
    )
    values = doubles([v for each in numbers for v in each])
    call("run_optimizer", row.index, DTYPES[dtype], DTYPES[state], I64(len(tensors)), n, pointers, values, address(grad_scale), address(found_inf))  # fmt: skip


def step_by_formula(row, tensors, numbers, kind, grad_scale):
    """The row's formula, element by element on the host."""
    results = []
    function = (
        library().optimizer_in_double if kind is torch.float64 else library().optimizer_in_float
    )
    for (p, g, *states), values in zip(tensors, numbers, strict=True):
        p, *states = (t.to(kind, copy=True) for t in (p, *states))
        g = g.to(kind) * (1 / grad_scale)
        pointers = (POINTER * row.states)(*(address(s) for s in states))
        assert function(
            row.name.encode(), doubles(values), I64(p.numel()), address(p), address(g), pointers
        )
        results.append([p, *states])
    return results


def step_tensors(row, sizes, dtype, state):
    def positive(
        n, seed
    ):  # the first, a second moment for some, above the square of any of the others
        return random(n, torch.float64, seed).abs().add(0.1 if seed >= 100 else 100).to(state)

    return [
        [
            random(n, dtype, 3 * k),
            random(n, dtype, 3 * k + 1),
            *(positive(n, 100 * j + k) for j in range(row.states)),
        ]
        for k, n in enumerate(sizes)
    ]


def optimizer_numbers(row, sets):
    """Any values will do: the loops do not know what they mean, and the reference is the formula itself."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.rand(row.numbers, generator=generator) * 0.7 + 0.25).tolist() for _ in range(sets)
    ]
