"""Every kernel of csrc/cuda, executed: compiled for the emulator, run for every row of the tables, every dtype, awkward
sizes and addresses, and three orders of threads that must agree to the bit. What is expected is the torch function of the
row's name in float64; the error to it may be twice that of torch itself, and 4 eps.
"""

import ctypes
import itertools
import mmap
import os
from contextlib import contextmanager
from functools import partial
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulation.build import every_kernel, run
from emulation.kernel_calls import (
    COMBINATIONS,
    PLACEMENTS,
    SIZES,
    bits,
    check,
    each_row,
    every_dtype,
    everywhere,
    judged,
    optimizer_numbers,
    random,
    real,
    reference,
    run_optimizer,
    step_by_formula,
    step_tensors,
)
from emulation.library import (
    DTYPES,
    F64,
    I64,
    POINTER,
    Device,
    Fault,
    address,
    call,
    counters,
    doubles,
    library,
    rows,
    traffic,
)  # fmt: skip

from bench.cases import PARAMETERS
from fastops._core.registry import parameters_of

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------------ map


def run_elementwise(row, which, out, inputs, params=None):
    pointers = (POINTER * 3)(*(address(x) for x in inputs))
    call("run_elementwise", row.index, which.encode(), DTYPES[out.dtype], I64(out.numel()), address(out), pointers, doubles(row.params if params is None else params))  # fmt: skip
    return out


def map_by_torch(row, x, dy, ddx):
    """(y, dx, ddx d dx / dx, f'(x)) by torch's autograd."""
    x = x.clone().requires_grad_()
    y = reference(row.name)(x, *row.params)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    second = None
    if dx.requires_grad:
        (second,) = torch.autograd.grad(dx, x, ddx, allow_unused=True)
    second = torch.zeros_like(x) if second is None else second
    return [t.detach() for t in (y, dx, second, slope)]


def second_by_formula(row, *inputs):
    """The row's second derivative, element by element on the host: Dual numbers are less accurate than what torch wrote
    by hand, which is not the loops' affair."""
    inputs = [t.float().contiguous() for t in inputs]
    out = torch.empty_like(inputs[0])
    arguments = (
        row.name.encode(),
        doubles(row.params),
        I64(out.numel()),
        *map(address, inputs),
        address(out),
    )
    assert library().second_in_float(*arguments)
    return out


@every_dtype
@each_row("elementwise")
@pytest.mark.parametrize("n", SIZES)
def test_map(row, dtype, n):
    x, dy, ddx = random(n, dtype, 1, 3), random(n, dtype, 2), random(n, dtype, 3)
    torchs, true = (
        map_by_torch(row, *(t.to(kind) for t in (x, dy, ddx)))
        for kind in (judged(dtype), torch.float64)
    )
    s = true[0].to(dtype) if row.from_output else x
    formula = second_by_formula(row, s, dy, ddx)

    def run(device):
        inputs = [device.constant(t) for t in (x, s, dy, ddx)]
        yield run_elementwise(row, "forward", device.empty(n, dtype), inputs[:1])
        yield run_elementwise(row, "backward", device.empty(n, dtype), inputs[1:3])
        yield run_elementwise(row, "second", device.empty(n, dtype), inputs[1:])

    for y, dx, second in everywhere(run):
        check(y, torchs[0], true[0], dtype)
        check(dx, torchs[1], true[1], dtype)
        if row.from_output:  # second is ddx d dx / dy: by the chain rule, torch's over f'(x)
            second, by_formula = (second.double() * true[3]).to(dtype), formula * true[3]
        else:
            by_formula = formula
        check(second, by_formula.to(judged(dtype)), true[2], dtype)


@every_dtype
@each_row("elementwise")
def test_map_in_place(row, dtype):
    x = random(1003, dtype, 1, 3)
    with Device() as device:
        out_of_place = run_elementwise(
            row, "forward", device.empty(1003, dtype), [device.copy(x)]
        ).clone()
        buffer = device.copy(x)
        assert torch.equal(run_elementwise(row, "forward", buffer, [buffer]), out_of_place)


@every_dtype
@pytest.mark.parametrize("offsets", list(itertools.permutations((0, 1, 3), 2)), ids=str)
def test_map_of_differently_aligned_buffers(dtype, offsets):
    row = rows("elementwise")[0]
    x = random(1003, dtype, 1)
    with Device() as device:
        given, out = device.copy(x, offset=offsets[0]), device.empty(1003, dtype, offset=offsets[1])
        run_elementwise(row, "forward", out, [given])
        assert torch.equal(out, reference(row.name)(x, *row.params))


@contextmanager
def folded(size, fold=1 << 26):
    """`size` bytes of addresses over `fold` bytes of memory: every `fold` bytes the same pages appear again."""
    file = os.memfd_create("folded")
    os.ftruncate(file, fold)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = POINTER
    libc.mmap.argtypes = [
        POINTER,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    room = (size + fold - 1) // fold * fold
    start = libc.mmap(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    protection, fixed = mmap.PROT_READ | mmap.PROT_WRITE, 0x10
    for offset in range(0, room, fold):
        assert (
            libc.mmap(start + offset, fold, protection, mmap.MAP_SHARED | fixed, file, 0)
            == start + offset
        )
    try:
        yield start
    finally:
        libc.munmap(POINTER(start), ctypes.c_size_t(room))
        os.close(file)


def test_map_beyond_31_bits():
    """An index that overflows would leave the addresses, or miss some of them."""
    n = 2**31 + 9
    with folded(2 * n) as start:
        pointers = (POINTER * 3)(start)
        counters()
        call("run_elementwise", rows("elementwise")[0].index, b"forward", DTYPES[torch.bfloat16], I64(n), POINTER(start), pointers, doubles([]))  # fmt: skip
        assert counters().stored_bytes == 2 * n


def test_map_refuses_other_dtypes():
    with Device() as device, pytest.raises(Fault, match="unsupported dtype"):
        x = device.empty(4, torch.float32)
        call(
            "run_elementwise",
            rows("elementwise")[0].index,
            b"forward",
            3,
            I64(4),
            address(x),
            (POINTER * 3)(address(x)),
            doubles([]),
        )


@every_dtype
@pytest.mark.parametrize("period, repeat", [(1, 1), (7, 1), (64, 1), (5, 3), (16, 48), (1003, 1)])
@pytest.mark.parametrize("n", [1003, 2304, 20_000])
def test_broadcast_and_two_outputs(dtype, period, repeat, n):
    """(x w, x + w), where w[i / repeat % period] is beside x[i]: what channels, rows and gates are read by."""
    x, w = random(n, dtype, 1), random(period, dtype, 2)
    beside = w[torch.arange(n) // repeat % period].to(real(dtype))
    product, total = (v.to(dtype) for v in (x.to(real(dtype)) * beside, x.to(real(dtype)) + beside))

    def run(device):
        first, second = device.empty(n, dtype), device.empty(n, dtype)
        call("run_probe", DTYPES[dtype], I64(n), address(first), address(second), address(device.constant(x)), address(device.constant(w)), I64(period), I64(repeat))  # fmt: skip
        return first, second

    for first, second in everywhere(run):
        assert torch.equal(first, product) and torch.equal(second, total)


# ------------------------------------------------------------------------------------------------ reduce


def run_loss(
    row, which, out, x, t=None, grad=None, scalar=False, scale=1.0, divisor=None, workspace=None,
    w=None,
):  # fmt: skip
    period = 0 if w is None else w.numel()
    call("run_loss", row.index, which.encode(), DTYPES[x.dtype], I64(x.numel()), address(out), address(x), address(t), address(grad), ctypes.c_bool(scalar), F64(scale), address(divisor), doubles(row.params), address(workspace), address(w), I64(period))  # fmt: skip
    return out


def loss_inputs(row, n, dtype):
    if row.name == "binary_cross_entropy":  # of probabilities
        return random(n, torch.float64, 1).sigmoid().to(dtype), random(
            n, torch.float64, 2
        ).sigmoid().to(dtype)
    return random(n, dtype, 1), random(n, dtype, 2)


def weights(row, n, dtype):
    """Rows to be repeated beside n elements, for a loss that takes one: as long, whole packs, and neither."""
    if not row.weighted or n == 0:
        return [None]
    return [random(period, dtype, 5).abs() for period in (n, 64, 37, 1)]


def loss_of(row, x, t, reduction, w=None):
    if w is not None:
        w = w.to(x.dtype).repeat(-(-x.numel() // w.numel()))[: x.numel()]
        return F.binary_cross_entropy_with_logits(x, t, pos_weight=w, reduction=reduction)
    if row.weighted:
        return F.binary_cross_entropy_with_logits(x, t, reduction=reduction)
    named = [name for name, _ in parameters_of(row.name)]
    return reference(row.name)(
        x, t, **dict(zip(named, row.params, strict=True)), reduction=reduction
    )


def total_of(row, x, t, w=None):
    return x.sum() if row.name == "sum" else loss_of(row, x, t, "sum", w)


def reduce_by_torch(row, x, t, grad, w):
    """values, and the derivatives times grad."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    values = loss_of(row, x, t, "none", w)

    def gradients(y, inputs):
        if not y.requires_grad:
            return [torch.zeros_like(v) for v in inputs]
        return torch.autograd.grad(y.sum(), inputs, create_graph=True, materialize_grads=True)

    d0, d1 = gradients(values, (x, t))
    d00, d01 = gradients(d0, (x, t))
    (d11,) = gradients(d1, (t,))
    return [values.detach(), *(d.detach() * grad for d in (d0, d1, d00, d01, d11))]


DERIVATIVES = ["values", "d0", "d1", "d00", "d01", "d11"]


@every_dtype
@pytest.mark.parametrize(
    "row", [r for r in rows("loss") if r.name != "sum"], ids=lambda row: row.name
)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("grad_is_scalar", [True, False])
def test_reduce_elementwise(row, dtype, n, grad_is_scalar):
    x, t = loss_inputs(row, n, dtype)
    grad, scale = random(1 if grad_is_scalar else n, dtype, 3), 0.25
    for w in weights(row, n, dtype):
        torchs, true = (
            reduce_by_torch(row, x.to(kind), t.to(kind), grad.to(kind) * scale, w)
            for kind in (judged(dtype), torch.float64)
        )

        def run(device, w=w):
            vx, vt, g = (device.constant(v) for v in (x, t, grad))
            vw = None if w is None else device.constant(w)
            yield run_loss(row, "values", device.empty(n, dtype), vx, vt, w=vw)
            for which in DERIVATIVES[1:]:
                yield run_loss(
                    row, which, device.empty(n, dtype), vx, vt, g, grad_is_scalar, scale, w=vw
                )

        for results in everywhere(run):
            for value, torch_value, true_value in zip(results, torchs, true, strict=True):
                check(value, torch_value, true_value, dtype)


@every_dtype
@each_row("loss")
@pytest.mark.parametrize("n", [1, 1000, 4096, 4097, 100_003])
@pytest.mark.parametrize("divided", [False, True])
def test_reduce_total(row, dtype, n, divided):
    if row.name == "sum" and dtype != real(dtype):
        dtype = real(dtype)  # the table's "sum" is of reals
    x, t = loss_inputs(row, n, dtype)
    scale, divisor = 1 / n, torch.tensor([3.0], dtype=real(dtype)) if divided else None
    factor = scale / (3 if divided else 1)
    for w in weights(row, n, dtype) if row.weighted else [None]:
        torchs, true = (
            total_of(row, x.to(kind), t.to(kind), w) * factor
            for kind in (torch.float32, torch.float64)
        )

        def run(device, w=w):
            out, workspace = device.empty(1, real(dtype)), device.empty(library().workspace_bytes(I64(n)) // 8, torch.float64, 0)  # fmt: skip
            d = None if divisor is None else device.constant(divisor)
            vx, vt = device.constant(x), device.constant(t)
            vw = None if w is None else device.constant(w)
            yield run_loss(row, "total", out, vx, vt, scale=scale, divisor=d, workspace=workspace, w=vw)  # fmt: skip

        results = [total for (total,) in everywhere(run)]
        check(results[0], torchs.view(1), true.view(1), real(dtype))
        assert all(torch.equal(bits(result), bits(results[0])) for result in results), (
            "the sum depends on the address"
        )


@each_row("loss")
def test_reduce_total_of_nothing(row):
    with Device() as device:
        x, out = device.empty(0, torch.float32), device.empty(1, torch.float32)
        assert run_loss(row, "total", out, x, x, scale=2.0, workspace=x).item() == 0
        assert run_loss(
            row, "total", out, x, x, scale=float("inf"), workspace=x
        ).isnan()  # the mean


# ------------------------------------------------------------------------------------------------ rows

SHAPES = [
    (0, 5, 1), (4, 1, 1), (5, 7, 1), (130, 10, 1), (3, 1001, 1), (3, 1024, 1), (3, 1100, 1), (2, 4000, 1), (1, 16_384, 1),
    (2, 33_001, 1), (3, 5, 2), (2, 10, 49), (1, 130, 7), (40, 3, 33),
]  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def run_softmax(row, backward, out, first, second=None):
    extents = [I64(extent) for extent in out.shape]
    call("run_softmax", row.index, backward, DTYPES[out.dtype], *extents, address(out), address(first), address(second))  # fmt: skip


@every_dtype
@each_row("softmax")
@every_shape
def test_softmax(row, dtype, shape):
    x, dy = random(shape, dtype, 1, 3), random(shape, dtype, 2)
    function = reference(row.name)

    def by_torch(x, dy):
        x = x.clone().requires_grad_()
        y = function(x, dim=1)
        return y.detach(), *torch.autograd.grad(y, x, dy)

    torchs, true = (by_torch(x.to(kind), dy.to(kind)) for kind in (judged(dtype), torch.float64))

    def run(device):
        vx, vy, g = (device.constant(v) for v in (x, true[0].to(dtype), dy))
        y, dx = device.empty(shape, dtype), device.empty(shape, dtype)
        run_softmax(row, False, y, vx)
        run_softmax(row, True, dx, vy, g)
        return y, dx

    for y, dx in everywhere(run):
        check(y, torchs[0], true[0], dtype)
        check(dx, torchs[1], true[1], dtype)


@each_row("softmax")
@pytest.mark.parametrize("shape", [(4, 9, 1), (4, 1500, 1), (4, 20_001, 1), (2, 9, 2)], ids=str)
def test_softmax_of_infinities(row, shape):
    x = random(shape, torch.float32, 1, 50)
    x[0, ::2], x[1], x[1, 3] = -torch.inf, -torch.inf, 1e4
    if shape[0] == 4:
        x[2], x[3, 5] = -torch.inf, torch.inf
    with Device() as device:
        y = device.empty(shape, x.dtype)
        run_softmax(row, False, y, device.copy(x))
        check(y, reference(row.name)(x, dim=1), reference(row.name)(x.double(), dim=1), x.dtype)


def run_cross_entropy(
    row, x, target, weight, smoothing, loss, grad, scale=1.0, divisor=None, divisor_out=None,
    z_loss=0.0, lse=None, second=None, lam=1.0, second_divisor=None,
):  # fmt: skip
    extents = [I64(extent) for extent in x.shape]
    call("run_cross_entropy", row.index, DTYPES[x.dtype], *extents, address(x), address(target), address(weight), I64(-100), F64(smoothing), address(loss), address(grad), F64(scale), address(divisor), address(divisor_out), F64(z_loss), address(lse), address(second), F64(lam), address(second_divisor))  # fmt: skip


@every_dtype
@each_row("cross_entropy")
@every_shape
@pytest.mark.parametrize(
    "smoothing, weighted", [(0.0, False), (0.0, True), (0.2, False), (0.2, True)]
)
def test_cross_entropy(row, dtype, shape, smoothing, weighted):
    outer, n, inner = shape
    x = random(shape, dtype, 1, 3)
    target = torch.randint(0, n, (outer, inner), generator=torch.Generator().manual_seed(4))
    if outer:
        target.view(-1)[1::3] = -100
    weight = (torch.arange(n) % 5 + 1) / 4 if weighted else None  # exact in every dtype
    scale, function = 0.5, reference(row.name)

    def by_torch(kind):
        vx = x.to(kind, copy=True).requires_grad_()
        w = None if weight is None else weight.to(kind)
        loss = function(vx, target, w, reduction="none", label_smoothing=smoothing)
        live = target[target != -100]
        divisor = (w[live].sum() if weighted else torch.tensor(float(len(live)))).to(kind)
        if outer == 0:
            return loss.detach(), torch.zeros_like(vx), divisor
        (grad,) = torch.autograd.grad((loss * scale / divisor).sum(), vx)
        return loss.detach(), grad, divisor

    true = by_torch(torch.float64)
    torch_loss, torch_grad = by_torch(torch.float32)[0], by_torch(judged(dtype))[1]

    def run(device):
        vx, t = device.copy(x), device.constant(target, 0)
        w = None if weight is None else device.constant(weight.to(real(dtype)))
        loss, divisor = device.empty((outer, inner), real(dtype)), device.empty(1, real(dtype))
        alone = device.empty((outer, inner), real(dtype))
        grad = device.empty(shape, dtype)
        run_cross_entropy(row, vx, t, w, smoothing, None, None, divisor_out=divisor)
        run_cross_entropy(row, vx, t, w, smoothing, alone, None)
        run_cross_entropy(row, vx, t, w, smoothing, loss, grad, scale, divisor)
        run_cross_entropy(
            row, vx, t, w, smoothing, device.empty((outer, inner), real(dtype)), vx, scale, divisor
        )
        return loss, grad, divisor, alone, vx

    for loss, grad, divisor, alone, in_place in everywhere(run):
        check(loss, torch_loss, true[0], real(dtype))
        check(grad, torch_grad, true[1], dtype)
        assert torch.equal(loss, alone) and torch.equal(bits(grad), bits(in_place))
        check(divisor, true[2].view(1), true[2].view(1), real(dtype))


@every_dtype
@each_row("cross_entropy")
@every_shape
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.2, True)])
def test_cross_entropy_of_two_targets(row, dtype, shape, smoothing, weighted):
    """lam of the one and the rest of the other, each divided by a divisor of its own; either may be ignored."""
    outer, n, inner = shape
    x, lam, scale, function = random(shape, dtype, 1, 3), 0.3, 0.5, reference(row.name)
    both = [
        torch.randint(0, n, (outer, inner), generator=torch.Generator().manual_seed(seed))
        for seed in (4, 5)
    ]
    if outer:
        both[0].view(-1)[1::3], both[1].view(-1)[1::2] = -100, -100
    weight = (torch.arange(n) % 5 + 1) / 4 if weighted else None
    divisors = [3.0, 0.5]

    def by_torch(kind):
        vx = x.to(kind, copy=True).requires_grad_()
        w = None if weight is None else weight.to(kind)
        a, b = (function(vx, t, w, reduction="none", label_smoothing=smoothing) for t in both)
        loss = a * (lam / divisors[0]) + b * ((1 - lam) / divisors[1])
        if outer == 0:
            return loss.detach(), torch.zeros_like(vx)
        return loss.detach(), torch.autograd.grad(loss.sum() * scale, vx)[0]

    true = by_torch(torch.float64)
    torch_loss, torch_grad = by_torch(torch.float32)[0], by_torch(judged(dtype))[1]

    def run(device):
        vx, (a, b) = device.copy(x), (device.constant(t, 0) for t in both)
        w = None if weight is None else device.constant(weight.to(real(dtype)))
        first, second = (device.constant(torch.tensor([d], dtype=real(dtype))) for d in divisors)
        loss, alone = (device.empty((outer, inner), real(dtype)) for _ in range(2))
        grad = device.empty(shape, dtype)
        more = {"second": b, "lam": lam, "second_divisor": second}
        run_cross_entropy(row, vx, a, w, smoothing, alone, None, scale, first, **more)
        run_cross_entropy(row, vx, a, w, smoothing, loss, grad, scale, first, **more)
        return loss, grad, alone

    for loss, grad, alone in everywhere(run):
        check(loss, torch_loss, true[0], real(dtype))
        check(grad, torch_grad, true[1], dtype)
        assert torch.equal(loss, alone)


@each_row("cross_entropy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count, launches", [(8192, 1), (8193, 2), (70_001, 2)])
def test_divisor_of_many_rows(row, dtype, weighted, count, launches):
    """Blocks share the targets; their sums are joined in order, in the memory that the losses will have."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randint(0, 3, (count, 1), generator=generator)
    target[::7] = -100
    weight = torch.tensor([0.25, 1.5, 3.0], dtype=real(dtype)) if weighted else None
    live = target[target != -100]
    true = weight.double()[live].sum() if weighted else torch.tensor(float(len(live))).double()

    def run(device):
        x, t = device.empty((count, 3, 1), dtype), device.constant(target, 0)
        w = None if weight is None else device.constant(weight)
        loss, out = device.empty(count, real(dtype)), device.empty(1, real(dtype))
        extents = [I64(extent) for extent in x.shape]
        counters()
        call("run_divisor", row.index, DTYPES[dtype], *extents, address(t), address(w), I64(-100), address(loss), address(out))  # fmt: skip
        assert counters().launches == launches
        yield out

    for (out,) in everywhere(run, PLACEMENTS[:2]):
        check(out, true.view(1).to(out.dtype), true.view(1), out.dtype)


@every_dtype
@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("real_factor", [False, True])
def test_a_saved_gradient_is_scaled_where_it_lies(dtype, factor, real_factor):
    """And where the factor is 1, nothing of it is read or written."""
    (row,) = rows("cross_entropy")
    grad = random(5003, dtype, 1)
    factor_dtype = real(dtype) if real_factor else dtype

    def run(device):
        out, f = device.copy(grad), device.constant(torch.tensor([factor], dtype=factor_dtype))
        counters()
        call("run_rescale", row.index, DTYPES[dtype], I64(grad.numel()), address(out), address(f), ctypes.c_bool(real_factor))  # fmt: skip
        seen = counters()
        moved = 0 if factor == 1 else out.nbytes
        assert seen.stored_bytes == moved
        assert seen.loaded_bytes == moved + seen.threads * f.element_size()
        yield out

    for (out,) in everywhere(run):
        assert torch.equal(out, (grad.to(real(dtype)) * factor).to(dtype))


@each_row("cross_entropy")
@pytest.mark.parametrize("shape", [(3, 10, 1), (3, 10, 2)], ids=str)
@pytest.mark.parametrize("bad", [10, -1])
def test_cross_entropy_stops_at_a_target_out_of_range(row, shape, bad):
    x, target = random(shape, torch.float32, 1), torch.zeros(shape[0], shape[2], dtype=torch.int64)
    target[1, 0] = bad
    bad_row = shape[2]
    message = rf"target {bad} at row {bad_row} is out of range for 10 classes \(ignore_index=-100\)"
    with Device() as device:
        given, t, out = (
            device.copy(x),
            device.copy(target),
            device.empty(target.shape, torch.float32),
        )
        with pytest.raises(Fault, match=message):
            run_cross_entropy(row, given, t, None, 0.0, out, None)
        with pytest.raises(Fault, match=message):
            run_cross_entropy(row, given, t, None, 0.0, None, None, divisor_out=out)


@every_dtype
@each_row("cross_entropy")
@every_shape
@pytest.mark.parametrize(
    "smoothing, weighted", [(0.0, False), (0.0, True), (0.2, False), (0.2, True)]
)
def test_cross_entropy_against_probabilities(row, dtype, shape, smoothing, weighted):
    n, scale, function = shape[1], 0.5, reference(row.name)
    x = random(shape, dtype, 1, 3)
    target = random(shape, torch.float64, 2).softmax(1).to(dtype)
    weight = (torch.arange(n) % 5 + 1) / 4 if weighted else None  # exact in every dtype

    def by_torch(kind):
        vx = x.to(kind, copy=True).requires_grad_()
        w = None if weight is None else weight.to(kind)
        loss = function(vx, target.to(kind), w, reduction="none", label_smoothing=smoothing)
        if shape[0] == 0:
            return loss.detach(), torch.zeros_like(vx)
        return loss.detach(), torch.autograd.grad(loss.sum() * scale, vx)[0]

    true = by_torch(torch.float64)
    torchs = by_torch(torch.float32)[0], by_torch(judged(dtype))[1]

    def run(device):
        vx, q = device.copy(x), device.copy(target)
        w = None if weight is None else device.copy(weight.to(real(dtype)))
        rows = (shape[0], shape[2])
        loss, alone = device.empty(rows, real(dtype)), device.empty(rows, real(dtype))
        grad = device.empty(shape, dtype)
        extents = [I64(extent) for extent in shape]
        for out, gradient in ((alone, None), (loss, grad), (loss, vx)):
            call("run_cross_entropy_probability", row.index, DTYPES[dtype], *extents, address(vx), address(q), address(w), F64(smoothing), address(out), address(gradient), F64(scale), F64(0.0), address(None))  # fmt: skip
        return loss, grad, alone, vx

    for loss, grad, alone, in_place in everywhere(run):
        check(loss, torchs[0], true[0], real(dtype))
        check(grad, torchs[1], true[1], dtype)
        assert torch.equal(loss, alone) and torch.equal(bits(grad), bits(in_place))


@every_dtype
@each_row("cross_entropy")
@every_shape
@pytest.mark.parametrize("smoothing, probabilities", [(0.0, False), (0.2, False), (0.2, True)])
def test_cross_entropy_with_z_loss(row, dtype, shape, smoothing, probabilities):
    """log(sum(exp)) of each row, what z_loss adds to the loss and to the gradient; 0 where a row is ignored."""
    outer, n, inner = shape
    x, z_loss, scale = random(shape, dtype, 1, 3), 0.05, 0.5
    target = torch.randint(0, n, (outer, inner), generator=torch.Generator().manual_seed(4))
    target.view(-1)[1::3] = -100
    if probabilities:
        target = random(shape, torch.float64, 2).softmax(1).to(dtype)

    def by_torch(kind):
        vx = x.to(kind, copy=True).requires_grad_()
        q = target.to(kind) if probabilities else target
        loss = reference(row.name)(vx, q, reduction="none", label_smoothing=smoothing)
        lse = vx.logsumexp(1)
        if not probabilities:
            lse = torch.where(target != -100, lse, 0)
        loss = loss + z_loss * lse**2
        if outer == 0:
            return loss.detach(), lse.detach(), torch.zeros_like(vx)
        return loss.detach(), lse.detach(), torch.autograd.grad(loss.sum() * scale, vx)[0]

    true, single, own = (by_torch(kind) for kind in (torch.float64, torch.float32, judged(dtype)))

    def run(device):
        vx, t = device.copy(x), device.constant(target, 0)
        rows = (outer, inner)
        loss, lse = device.empty(rows, real(dtype)), device.empty(rows, real(dtype))
        grad = device.empty(shape, dtype)
        if probabilities:
            extents = [I64(extent) for extent in shape]
            for gradient in (grad, vx):
                call("run_cross_entropy_probability", row.index, DTYPES[dtype], *extents, address(vx), address(t), address(None), F64(smoothing), address(loss), address(gradient), F64(scale), F64(z_loss), address(lse))  # fmt: skip
        else:
            for gradient in (grad, vx):
                run_cross_entropy(
                    row, vx, t, None, smoothing, loss, gradient, scale, z_loss=z_loss, lse=lse
                )
        return loss, lse, grad, vx

    for loss, lse, grad, in_place in everywhere(run):
        check(loss, single[0], true[0], real(dtype))
        check(lse, single[1], true[1], real(dtype))
        check(grad, own[2], true[2], dtype)
        assert torch.equal(bits(grad), bits(in_place))


# ------------------------------------------------------------------------------------------------ random


def philox(seed, counter):
    """The four words of Philox 4x32-10 for each 64-bit counter, by the paper."""
    mask = np.uint64(0xFFFFFFFF)
    word = [
        counter & mask,
        counter >> np.uint64(32),
        counter * np.uint64(0),
        counter * np.uint64(0),
    ]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        a, b = word[0] * np.uint64(0xD2511F53), word[2] * np.uint64(0xCD9E8D57)
        word = [
            (b >> np.uint64(32)) ^ word[1] ^ key[0],
            b & mask,
            (a >> np.uint64(32)) ^ word[3] ^ key[1],
            a & mask,
        ]
        key = [key[0] + np.uint64(0x9E3779B9) & mask, key[1] + np.uint64(0xBB67AE85) & mask]
    return np.stack(word, axis=-1)


def kept(seed, n, threshold):
    words = philox(seed, np.arange((n + 3) // 4, dtype=np.uint64)).reshape(-1)[:n]
    return torch.from_numpy(words >= np.uint64(threshold))


# What a row computes from a dropout whose mask is given, and its inputs.
RANDOM = {
    "dropout": lambda drop, x, bias, residual: drop(x),
    "relu_dropout": lambda drop, x, bias, residual: drop(x.relu()),
    "bias_dropout_add": lambda drop, x, bias, residual: residual + drop(x + bias),
}


def run_dropout(row, out, x, seed, threshold, scale, sizes=None, strides=None, others=None):
    bias, residual = others or (None, None)
    period = I64(bias.numel() if others else 1)
    sizes, strides = sizes or [x.numel()], strides or [1]
    order_of = [(I64 * len(values))(*values) for values in (sizes, strides)]
    call("run_dropout", row.index, DTYPES[x.dtype], I64(x.numel()), address(out), address(x), address(bias), address(residual), period, address(seed), ctypes.c_uint32(threshold), F64(scale), len(sizes), *order_of)  # fmt: skip
    return out


@every_dtype
@each_row("dropout")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_random(row, dtype, n, p):
    x, seed, threshold = random(n, dtype, 1), -(2**40) - 3, round(p * 2**32)
    bias, residual = random(11, dtype, 2), random(n, dtype, 3)
    formula = RANDOM[row.name]
    wide = formula(
        lambda v: torch.where(kept(seed, n, threshold), v * (1 / (1 - p)), 0),
        x.to(real(dtype)),
        bias.to(real(dtype)).repeat(n // 11 + 1)[:n],
        residual.to(real(dtype)),
    )
    expected = wide.to(dtype)

    def run(device):
        s = device.constant(torch.tensor([seed]), 0)
        others = (device.constant(bias), device.constant(residual)) if row.inputs == 3 else None
        yield run_dropout(
            row,
            device.empty(n, dtype),
            device.constant(x),
            s,
            threshold,
            1 / (1 - p),
            others=others,
        )

    for (y,) in everywhere(run):
        assert torch.equal(y == 0, expected == 0)
        check(y, expected, wide.double(), dtype)


STRIP = 16  # kStrip in csrc/tables.h


def strips(x, strip):
    """The sums of `strip` rows at a time."""
    return torch.stack([rows.sum(0) for rows in x.split(strip)])


@every_dtype
@pytest.mark.parametrize("lines, period", [(1, 64), (17, 7), (40, 16), (9, 1032)])
def test_dropout_summed(dtype, lines, period):
    (row,) = (r for r in rows("dropout") if r.name == "dropout")
    n, strip, threshold, shape = lines * period, STRIP, 2**30, (lines, period)
    x, seed = random(shape, dtype, 1), 12345
    keep = kept(seed, n, threshold).view(shape)
    wide = torch.where(keep, x.to(real(dtype)) * 1.25, 0)

    def run(device):
        s = device.constant(torch.tensor([seed]), 0)
        y, sums = (
            device.empty(shape, dtype),
            device.empty((-(-lines // strip), period), real(dtype)),
        )
        call("run_dropout_summed", row.index, DTYPES[dtype], I64(n), I64(period), address(y), address(device.constant(x)), address(s), ctypes.c_uint32(threshold), F64(1.25), address(sums))  # fmt: skip
        yield from (y, sums)

    for y, sums in everywhere(run):
        assert torch.equal(y, wide.to(dtype))
        check(sums, strips(wide, strip), strips(wide.double(), strip), real(dtype))


@every_dtype
@pytest.mark.parametrize("n", SIZES)
def test_relu_dropout_backward(dtype, n):
    (row,) = (r for r in rows("dropout") if r.name == "relu_dropout")
    y, dy = random(n, dtype, 1).relu(), random(n, dtype, 2)
    wide = torch.where(y > 0, dy.to(real(dtype)) * 1.25, 0)

    def run(device):
        out = device.empty(n, dtype)
        call("run_dropout_backward", row.index, DTYPES[dtype], I64(n), address(out), address(device.copy(y)), address(device.copy(dy)), F64(1.25))  # fmt: skip
        yield out

    for (dx,) in everywhere(run):
        check(dx, wide.to(dtype), wide.double(), dtype)


@every_dtype
@pytest.mark.parametrize("row", [r for r in rows("dropout") if r.inputs == 1], ids=lambda r: r.name)
def test_random_in_any_layout(row, dtype):
    """The mask belongs to the logical index: here, that of (N, C, H, W) elements kept in channels_last order."""
    n, c, h, w = 3, 5, 7, 11
    x = random((n, c, h, w), dtype, 1)
    memory = x.permute(0, 2, 3, 1).contiguous()
    keep = kept(99, x.numel(), 2**31).view(n, c, h, w).permute(0, 2, 3, 1)

    def run(device):
        s = device.copy(torch.tensor([99]), 0)
        strides = [c * h * w, w, 1, h * w]
        yield run_dropout(
            row,
            device.empty(memory.shape, dtype),
            device.copy(memory),
            s,
            2**31,
            2.0,
            [n, h, w, c],
            strides,
        )

    for (y,) in everywhere(run):
        formula = RANDOM[row.name]
        assert torch.equal(y, formula(lambda v: torch.where(keep, v * 2, 0), memory, None, None))


# ------------------------------------------------------------------------------------------------ fused


def run_fused(row, backward, out, inputs, period):
    pointers = (POINTER * 3)(*(address(x) for x in inputs))
    call("run_fused", row.index, backward, DTYPES[out.dtype], I64(out.numel()), I64(period), address(out), pointers)  # fmt: skip
    return out


@every_dtype
@each_row("fused")
@pytest.mark.parametrize("lines, period", [(1, 7), (3, 1), (5, 16), (3, 1030), (2, 4096), (0, 3)])
def test_fused(row, dtype, lines, period):
    shape = (lines, period)
    x, dy = random(shape, dtype, 1), random(shape, dtype, 3)
    other = random(period if row.broadcast else shape, dtype, 2)
    function = reference(row.name.removesuffix("_tanh"))
    options = {"approximate": "tanh"} if row.name.endswith("_tanh") else {}

    def by_torch(kind):
        a = x.to(kind, copy=True).requires_grad_()
        y = function(a, other.to(kind), **options)
        return y.detach(), torch.autograd.grad(y, a, dy.to(kind))[0]

    true, torchs = by_torch(torch.float64), by_torch(judged(dtype))

    def run(device):
        a, t, g = device.copy(x), device.copy(other), device.copy(dy)
        step = period if row.broadcast else x.numel()
        yield run_fused(row, False, device.empty(shape, dtype), [a, t], max(step, 1))
        if row.broadcast:
            yield run_fused(row, True, device.empty(shape, dtype), [a, t, g], max(step, 1))
        yield run_fused(row, False, a, [a, t], max(step, 1))  # in place

    for y, *dx, inplace in everywhere(run):
        check(y, torchs[0], true[0], dtype)
        assert torch.equal(bits(y), bits(inplace))
        for mine in dx:
            check(mine, torchs[1], true[1], dtype)


@every_dtype
@pytest.mark.parametrize("row", [r for r in rows("fused") if r.broadcast], ids=lambda r: r.name)
@pytest.mark.parametrize("lines, period", [(1, 16), (3, 7), (40, 1), (17, 24), (9, 1032)])
def test_fused_summed(row, dtype, lines, period):
    """The gradient is that of the kernel without sums; these are of what is written, before it is rounded."""
    shape, strip = (lines, period), STRIP
    x, t, dy = random(shape, dtype, 1), random(period, dtype, 2), random(shape, dtype, 3)
    options = {"approximate": "tanh"} if row.name.endswith("_tanh") else {}

    def gradient(kind):
        s = (x.to(kind) + t.to(kind)).requires_grad_()
        return torch.autograd.grad(F.gelu(s, **options), s, dy.to(kind))[0]

    def run(device):
        inputs = [device.copy(v) for v in (x, t, dy)]
        dx, sums = (
            device.empty(shape, dtype),
            device.empty((-(-lines // strip), period), real(dtype)),
        )
        pointers = (POINTER * 3)(*map(address, inputs))
        call("run_fused_summed", row.index, DTYPES[dtype], I64(x.numel()), I64(period), address(dx), pointers, address(sums))  # fmt: skip
        yield from (dx, sums, run_fused(row, True, device.empty(shape, dtype), inputs, period))

    judge = (
        torch.float32
    )  # torch's own error, where float64 is no better than the value; see check()
    for dx, sums, alone in everywhere(run):
        assert torch.equal(bits(dx), bits(alone))
        check(
            sums,
            strips(gradient(judge), strip),
            strips(gradient(torch.float64), strip),
            real(dtype),
        )


# ------------------------------------------------------------------------------------------------ gates

GATES = {
    "glu": lambda a, b: a * b.sigmoid(),
    "swiglu": lambda a, b: F.silu(a) * b,
    "geglu": lambda a, b: F.gelu(a) * b,
    "geglu_tanh": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "reglu": lambda a, b: F.relu(a) * b,
}


def run_gate(row, which, outer, inner, outputs, inputs):
    """Rows of two-dimensional tensors, which may be halves of others."""
    tensors = [*outputs, *[None] * (2 - len(outputs)), *inputs, *[None] * (5 - len(inputs))]
    data = (POINTER * 7)(*map(address, tensors))
    stride = (I64 * 7)(*(0 if t is None else t.stride(0) for t in tensors))
    call("run_gate", row.index, which.encode(), DTYPES[inputs[0].dtype], I64(outer), I64(inner), data, stride)  # fmt: skip


@every_dtype
@each_row("gate")
@pytest.mark.parametrize("outer, inner", [(0, 3), (1, 7), (5, 16), (3, 1032), (40, 1), (9, 37)])
def test_gate(row, dtype, outer, inner):
    """Of the halves of one tensor, into the halves of another: values, gradients, tangents and second derivatives."""
    shape = outer, inner
    x, (dy, u, v) = (
        random((outer, 2 * inner), dtype, 1),
        (random(shape, dtype, k) for k in range(2, 5)),
    )

    def by_torch(kind):
        a, b = (h.to(kind, copy=True).requires_grad_() for h in x.chunk(2, 1))
        y = GATES[row.name](a, b)
        slopes = torch.autograd.grad(y, (a, b), torch.ones_like(y), create_graph=True)
        tangent = slopes[0] * u.to(kind) + slopes[1] * v.to(kind)
        second = torch.autograd.grad((tangent * dy.to(kind)).sum(), (a, b), allow_unused=True)
        second = [torch.zeros_like(a) if g is None else g for g in second]
        return [t.detach() for t in (y, *(s * dy.to(kind) for s in slopes), tangent, *second)]

    true, torchs = by_torch(torch.float64), by_torch(judged(dtype))

    def run(device):
        packed = device.constant(x)
        a, b = packed[:, :inner], packed[:, inner:]
        g, p, q = (device.constant(t) for t in (dy, u, v))
        y, tangent = device.empty(shape, dtype), device.empty(shape, dtype)
        first, second = (device.empty((outer, 2 * inner), dtype) for _ in range(2))
        halves = [(t[:, :inner], t[:, inner:]) for t in (first, second)]
        run_gate(row, "forward", outer, inner, [y], [a, b])
        run_gate(row, "backward", outer, inner, halves[0], [a, b, g])
        run_gate(row, "tangent", outer, inner, [tangent], [a, b, p, q])
        run_gate(row, "second", outer, inner, halves[1], [a, b, g, p, q])
        return y, *halves[0], tangent, *halves[1]

    for results in everywhere(run):
        for value, torch_value, true_value in zip(results, torchs, true, strict=True):
            check(value, torch_value, true_value, dtype)


# ------------------------------------------------------------------------------------------------ step


@pytest.mark.parametrize("dtype, state", COMBINATIONS, ids=lambda d: str(d)[6:])
@each_row("optimizer")
@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_step(row, dtype, state, grad_scale):
    sizes = [0, 1, 7, 64, 4096, 4097, 0, 10_001]
    tensors, (numbers,) = step_tensors(row, sizes, dtype, state), optimizer_numbers(row, 1)
    numbers = [numbers] * len(sizes)
    true = step_by_formula(row, tensors, numbers, torch.float64, grad_scale or 1)
    floats = step_by_formula(row, tensors, numbers, real(dtype), grad_scale or 1)

    def run(device):
        given = [[device.copy(p), device.constant(g), *map(device.copy, s)] for p, g, *s in tensors]
        scale, found = (
            (None, None)
            if grad_scale is None
            else (device.copy(torch.tensor([v]), 0) for v in (grad_scale, 0.0))
        )
        run_optimizer(row, given, numbers, dtype, state, scale, found)
        return [v for p, _, *states in given for v in (p, *states)]

    expected = [
        (f, t) for each in zip(floats, true, strict=True) for f, t in zip(*each, strict=True)
    ]
    for results in everywhere(run):
        for value, (in_real, exact) in zip(results, expected, strict=True):
            check(value, in_real.to(value.dtype), exact, value.dtype)


@each_row("optimizer")
def test_step_of_differently_aligned_tensors(row):
    (tensors,), numbers = (
        step_tensors(row, [5000], torch.float32, torch.float32),
        optimizer_numbers(row, 1),
    )
    (expected,) = step_by_formula(row, [tensors], numbers, torch.float32, 1)
    with Device() as device:
        given = [device.copy(v, offset=k % 4) for k, v in enumerate(tensors)]
        run_optimizer(row, [given], numbers, torch.float32, torch.float32)
        for value, other in zip([given[0], *given[2:]], expected, strict=True):
            check(value, other, other.double(), torch.float32)


@each_row("optimizer")
def test_step_does_nothing_where_an_infinity_was_found(row):
    (tensors,), numbers = (
        step_tensors(row, [100], torch.float32, torch.float32),
        optimizer_numbers(row, 1),
    )
    with Device() as device:
        given = [device.copy(v) for v in tensors]
        run_optimizer(
            row, [given], numbers, torch.float32, torch.float32, None, device.copy(torch.ones(1))
        )
        assert all(torch.equal(a, b) for a, b in zip(given, tensors, strict=True))


@each_row("optimizer")
@pytest.mark.parametrize(
    "count, sets, launches", [(161, 1, 1), (1000, 1, 2), (20, 20, 3), (0, 1, 0)]
)
def test_step_launches(row, count, sets, launches):
    """ResNet-50 is one launch; more tensors or more different numbers than the kernel's parameters hold are several."""
    tensors, different = (
        step_tensors(row, [64] * count, torch.float32, torch.float32),
        optimizer_numbers(row, sets),
    )
    numbers = [different[k % sets] for k in range(count)]
    expected = step_by_formula(row, tensors, numbers, torch.float32, 1)
    counters()
    run_optimizer(row, tensors, numbers, torch.float32, torch.float32)
    assert counters().launches == launches
    for (p, _, *states), (q, *others) in zip(tensors, expected, strict=True):
        for value, other in zip((p, *states), (q, *others), strict=True):
            check(value, other, other.double(), torch.float32)


# ------------------------------------------------------------------------------------------------ traffic

SECTOR = 32


def size_of(dtype):
    return torch.empty(0, dtype=dtype).element_size()


def assert_floor(seen, loaded, stored, side_by_side=1):
    """One launch; no byte asked for twice, or beside those that are wanted, beyond 1 percent; all in 16-byte accesses.
    Where a thread has packs side by side, an instruction of its warp asks for as many times the sectors that it needs,
    and the cache has the others ready for the next."""
    floor = loaded + stored
    assert seen.launches == 1
    assert loaded <= seen.wide_loads * 16 <= 1.01 * loaded
    assert stored <= seen.stored_bytes <= 1.01 * stored
    assert SECTOR * (seen.loaded_sectors + seen.stored_sectors) <= 1.01 * floor
    assert SECTOR * (seen.load_requests + seen.store_requests) <= 1.01 * floor * side_by_side


def assert_all_wide(seen):
    assert seen.loads == seen.wide_loads and seen.stores == seen.wide_stores


@every_dtype
@each_row("elementwise")
def test_map_touches_memory_once_in_packs(row, dtype):
    nbytes = 4096 * size_of(dtype)
    with Device() as device:
        *inputs, out = (device.copy(random(4096, dtype, seed)) for seed in range(4))
        for count, which in enumerate(["forward", "backward", "second"], 1):
            seen = traffic(partial(run_elementwise, row, which, out, inputs[:count]))
            assert_floor(seen, count * nbytes, nbytes)
            assert_all_wide(seen)


@every_dtype
@each_row("fused")
@pytest.mark.parametrize("backward", [False, True])
def test_fused_touches_memory_once_in_packs(row, dtype, backward):
    if backward and not row.broadcast:
        return  # it has none of its own
    nbytes = 4096 * size_of(dtype)
    with Device() as device:
        x, dy, out = (device.copy(random(4096, dtype, seed)) for seed in range(3))
        period = 1024 if row.broadcast else 4096
        other = device.copy(random(period, dtype, 4))
        inputs = [x, other, dy] if backward else [x, other]
        seen = traffic(partial(run_fused, row, backward, out, inputs, period))
        assert_floor(seen, len(inputs) * nbytes, nbytes)
        assert_all_wide(seen)


@every_dtype
@pytest.mark.parametrize("row", [r for r in rows("fused") if r.broadcast], ids=lambda r: r.name)
def test_sums_are_taken_on_the_way(row, dtype):
    """Nothing is read again for them: 64 rows of 1024, of which 16 make a strip."""
    nbytes = 64 * 1024 * size_of(dtype)
    with Device() as device:
        x, dy, out = (device.copy(random((64, 1024), dtype, seed)) for seed in range(3))
        t, sums = device.copy(random(1024, dtype, 4)), device.empty((4, 1024), real(dtype))
        pointers = (POINTER * 3)(address(x), address(t), address(dy))
        run = partial(call, "run_fused_summed", row.index, DTYPES[dtype], I64(x.numel()), I64(1024), address(out), pointers, address(sums))  # fmt: skip
        seen = traffic(run)
        packs = 1 + (dtype.itemsize == 2)  # of float, for what is beside one of the dtype
        assert_floor(
            seen, 2 * nbytes + nbytes // 16, nbytes + sums.numel() * size_of(real(dtype)), packs
        )
        assert_all_wide(seen)


@every_dtype
@each_row("gate")
def test_gates_touch_memory_once_in_packs(row, dtype):
    outer, inner = 8, 1024
    nbytes = outer * inner * size_of(dtype)
    with Device() as device:
        x, dx = (device.copy(random((outer, 2 * inner), dtype, k)) for k in range(2))
        dy, y = (device.copy(random((outer, inner), dtype, k)) for k in range(2))
        a, b = x[:, :inner], x[:, inner:]
        seen = traffic(partial(run_gate, row, "forward", outer, inner, [y], [a, b]))
        assert_floor(seen, 2 * nbytes, nbytes)
        assert_all_wide(seen)
        halves = [dx[:, :inner], dx[:, inner:]]
        seen = traffic(partial(run_gate, row, "backward", outer, inner, halves, [a, b, dy]))
        assert_floor(seen, 3 * nbytes, 2 * nbytes)
        assert_all_wide(seen)


@every_dtype
@each_row("elementwise")
def test_map_touches_memory_once_where_it_is_not_aligned(row, dtype):
    """All buffers begin one element after a boundary: a head of single elements, then packs."""
    n, size = 70_000, size_of(dtype)
    with Device(offset=1) as device:
        x, out = device.copy(random(n, dtype, 1)), device.empty(n, dtype)
        seen = traffic(partial(run_elementwise, row, "forward", out, [x]))
        assert seen.loaded_bytes == seen.stored_bytes == n * size
        assert seen.wide_loads * 16 >= 0.99 * n * size and seen.wide_stores == seen.wide_loads


@every_dtype
@pytest.mark.parametrize("row", [r for r in rows("loss") if r.name != "sum"], ids=lambda r: r.name)
def test_losses_touch_memory_once_in_packs(row, dtype):
    nbytes = 4096 * size_of(dtype)
    with Device() as device:
        x, t, grad, out, w = (device.copy(random(4096, dtype, seed).sigmoid()) for seed in range(5))
        more = {"w": w} if row.weighted else {}
        seen = traffic(partial(run_loss, row, "values", out, x, t, **more))
        assert_floor(seen, (2 + len(more)) * nbytes, nbytes)
        assert_all_wide(seen)
        for which in DERIVATIVES[1:]:
            seen = traffic(partial(run_loss, row, which, out, x, t, grad, **more))
            assert_floor(seen, (3 + len(more)) * nbytes, nbytes)
            assert_all_wide(seen)


@every_dtype
@each_row("loss")
@pytest.mark.parametrize("n, launches", [(4096, 1), (131_072, 2)])
def test_sums_read_memory_once_in_packs(row, dtype, n, launches):
    dtype = real(dtype) if row.name == "sum" else dtype
    inputs = 1 if row.name == "sum" else 2 + row.weighted
    with Device() as device:
        x, t, w = (device.copy(random(n, dtype, seed).sigmoid()) for seed in range(3))
        out, workspace = device.empty(1, real(dtype)), device.empty(n // 4096, torch.float64)
        seen = traffic(partial(run_loss, row, "total", out, x, t, workspace=workspace, w=w))
        nbytes = inputs * n * size_of(dtype)
        assert seen.launches == launches and seen.wide_loads * 16 == nbytes
        assert seen.loaded_bytes + seen.stored_bytes <= 1.01 * nbytes
        assert SECTOR * (seen.load_requests + seen.store_requests) <= 1.01 * nbytes


@every_dtype
@each_row("dropout")
def test_random_touches_memory_once_in_packs(row, dtype):
    """Beside its elements a warp reads the seed, once."""
    nbytes = 1 << 20
    n = nbytes // size_of(dtype)
    with Device() as device:
        x, out = device.copy(random(n, dtype, 1)), device.empty(n, dtype)
        seed, others = device.copy(torch.tensor([1])), None
        if row.inputs == 3:
            others = device.copy(random(4096, dtype, 2)), device.copy(random(n, dtype, 3))
        seen = traffic(partial(run_dropout, row, out, x, seed, 2**31, 2.0, others=others))
        assert_floor(
            seen, row.inputs * nbytes, nbytes, side_by_side=2 if dtype is torch.float64 else 1
        )
        assert seen.stores == seen.wide_stores
        assert seen.loads - seen.wide_loads == seen.threads


@pytest.mark.parametrize("dtype, state", COMBINATIONS, ids=lambda d: str(d)[6:])
@each_row("optimizer")
def test_step_touches_memory_once_in_packs(row, dtype, state):
    """ResNet-50's 161 tensors, each with a 64th of its elements, in one launch."""
    sizes = [max(prod(shape) // 64, 1) // 8 * 8 for shape in PARAMETERS["resnet50"]]
    total = sum(sizes)
    loaded = total * (2 * size_of(dtype) + row.states * size_of(state))
    with Device() as device:
        *tensors, numbers = *step_tensors(row, sizes, dtype, state), optimizer_numbers(row, 1)
        given = [[device.copy(v) for v in each] for each in tensors]
        seen = traffic(partial(run_optimizer, row, given, numbers * len(sizes), dtype, state))
        assert len(given) == 161
        assert_floor(
            seen, loaded, loaded - total * size_of(dtype), size_of(state) // size_of(dtype)
        )
        assert_all_wide(seen)


# Rows of so many columns are read once, alone and two at a time; what they are read to decide is in registers meanwhile.
HELD = {
    torch.float32: (16_384, 16_384),
    torch.bfloat16: (32_768, 16_384),
    torch.float16: (32_768, 16_384),
    torch.float64: (4096, 4096),
}
ONCE = [
    (dtype, n, two)
    for dtype, most in HELD.items()
    for two in (False, True)
    for n in sorted({8, 256, 1000, 1024, 4096, most[two]})
]


@pytest.mark.parametrize("dtype, n, backward", ONCE, ids=str)
@each_row("softmax")
def test_softmax_reads_rows_once_in_packs(row, dtype, n, backward):
    nbytes = 3 * n * size_of(dtype)
    with Device() as device:
        y, dy, out = (device.copy(random((3, n, 1), dtype, seed)) for seed in range(3))
        seen = traffic(partial(run_softmax, row, backward, out, y, dy))
        assert_all_wide(seen)
        assert seen.launches == 1 and seen.stored_bytes == nbytes
        assert seen.loaded_bytes == (2 if backward else 1) * nbytes
        ends = 3 * 3 * 2  # of rows that begin or end within a sector
        sectors = seen.loaded_sectors + seen.stored_sectors
        assert sectors <= (seen.loaded_bytes + nbytes) / SECTOR + ends


@pytest.mark.parametrize("dtype", HELD, ids=str)
@pytest.mark.parametrize("backward", [False, True])
@each_row("softmax")
def test_softmax_reads_longer_rows_twice(row, dtype, backward):
    n = HELD[dtype][backward] + 8
    nbytes = 2 * n * size_of(dtype)
    with Device() as device:
        y, dy, out = (device.copy(random((2, n, 1), dtype, seed)) for seed in range(3))
        seen = traffic(partial(run_softmax, row, backward, out, y, dy))
        assert seen.loaded_bytes == 2 * (2 if backward else 1) * nbytes
        assert seen.stored_bytes == nbytes
        assert_all_wide(seen)


@pytest.mark.parametrize("dtype, n", [(dtype, n) for dtype, n, two in ONCE if not two], ids=str)
@each_row("cross_entropy")
@pytest.mark.parametrize("with_gradient", [False, True])
def test_cross_entropy_reads_rows_once_in_packs(row, dtype, n, with_gradient):
    """Narrow are only the targets, what the rows have there, and the losses."""
    with Device() as device:
        x, grad = device.copy(random((3, n, 1), dtype, 1)), device.empty((3, n, 1), dtype)
        target, loss = device.copy(torch.tensor([0, n // 2, n - 1])), device.empty(3, real(dtype))
        seen = traffic(partial(run_cross_entropy, row, x, target, None, 0.0, loss, grad if with_gradient else None))  # fmt: skip
    nbytes = x.numel() * size_of(dtype)
    written = nbytes if with_gradient else 0
    assert (
        seen.launches == 1 and seen.wide_loads * 16 == nbytes and seen.wide_stores * 16 == written
    )
    team = next(t for t in (32, 128, 512, 1024) if n * size_of(dtype) <= 64 * t)  # 64 bytes each
    assert seen.loads - seen.wide_loads == 2 * 3 * team
    assert seen.stored_bytes == written + 3 * size_of(real(dtype))
    ends = 3 * 2 * 2 + 3  # of rows, of targets and losses
    assert seen.loaded_sectors + seen.stored_sectors <= (nbytes + written) / SECTOR + ends


@every_dtype
@each_row("softmax")
def test_columns_are_read_by_neighbours(row, dtype):
    """Threads of a warp take neighbouring columns: each 32-byte sector that they ask for is used whole."""
    shape = 2, 40, 64
    with Device() as device:
        y, dy, out = (device.copy(random(shape, dtype, seed)) for seed in range(3))
        for backward in (False, True):
            seen = traffic(partial(run_softmax, row, backward, out, y, dy))
            assert SECTOR * seen.load_requests == seen.loaded_bytes
            assert SECTOR * seen.store_requests == seen.stored_bytes == out.nbytes


# ------------------------------------------------------------------------------------------------ sanitizers


@pytest.mark.parametrize("variant, dtypes", [("asan", "4"), ("tsan", "1"), ("ucontext", "4")])
def test_sanitizers_report_nothing(variant, dtypes):
    """AddressSanitizer with UBSan; ThreadSanitizer, which is slow, in float32 alone; the fibers of other processors.
    `make sanitize` runs every dtype under all."""
    assert run(every_kernel(variant), dtypes) == (0, "nothing found\n")
