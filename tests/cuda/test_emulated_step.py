"""The CUDA step kernels' own ways, under emulation: stochastic rounding, numbers made on the device, the norm."""

import ctypes

import pytest
import torch
from emulation.kernel_calls import (
    check,
    each_row,
    everywhere,
    optimizer_numbers,
    random,
    real,
    run_optimizer,
    step_by_formula,
    step_tensors,
)
from emulation.library import (
    BOOL,
    DTYPES,
    F64,
    I64,
    POINTER,
    Device,
    address,
    call,
    counters,
    doubles,
    library,
)
from rounding_cases import rounded

import fastops.optim

BF16, F32 = torch.bfloat16, torch.float32
ROUNDED = [(BF16, BF16), (BF16, F32), (F32, BF16)]
SEED = 0x1234_5678_9ABC_DEF


def pointers(tensors):
    flat = [address(v) for each in tensors for v in each]
    return (POINTER * max(len(flat), 1))(*flat)


def run_extended(row, tensors, dtype, state, numbers=(), seed=None, step=0, counts=None, first=(),
                 options=(), option_at=(), workspace=None, found_inf=None, averages=None, weights=()):  # fmt: skip
    """tensors: lists of p, g and the states. With counts, numbers are made of the options on the device."""
    n = (I64 * len(tensors))(*(t[0].numel() for t in tensors))
    call(
        "run_optimizer_extended", row.index, DTYPES[dtype], DTYPES[state], I64(len(tensors)), n, pointers(tensors),
        doubles(numbers), None if seed is None else ctypes.byref(I64(seed)), ctypes.c_uint32(step),
        None if counts is None else (POINTER * len(counts))(*map(address, counts)),
        (BOOL * max(len(first), 1))(*first), doubles(options), (POINTER * 12)(*map(address, option_at)),
        address(workspace), address(found_inf),
        None if averages is None else (POINTER * len(averages))(*map(address, averages)), doubles(weights),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ rounding


def expected_rounding(row, tensors, numbers, dtype, state, step):
    results = step_by_formula(row, tensors, [numbers] * len(tensors), F32, 1)
    for number, values in enumerate(results):
        for slot, v in enumerate(values):
            if (dtype if slot == 0 else state) is BF16:
                values[slot] = rounded(v, SEED, step, number, slot)
    return results


@pytest.mark.parametrize("dtype, state", ROUNDED, ids=lambda d: str(d)[6:])
@each_row("optimizer")
def test_stochastic_rounding_to_the_bit(row, dtype, state):
    if state is not dtype and row.states == 0:
        return  # it has none
    sizes = [0, 1, 7, 64, 4096, 4097, 10_001]
    tensors, (numbers,) = step_tensors(row, sizes, dtype, state), optimizer_numbers(row, 1)
    expected = expected_rounding(row, tensors, numbers, dtype, state, 5)

    def run(device):
        given = [[device.copy(p), device.constant(g), *map(device.copy, s)] for p, g, *s in tensors]
        run_extended(row, given, dtype, state, numbers, seed=SEED, step=5)
        return [v for p, _, *states in given for v in (p, *states)]

    for results in everywhere(run):
        for value, other in zip(results, (v for e in expected for v in e), strict=True):
            assert torch.equal(value, other)


@each_row("optimizer")
@pytest.mark.parametrize("offset", [1, 4, 6])
def test_stochastic_rounding_of_tensors_at_any_address(row, offset):
    tensors, (numbers,) = step_tensors(row, [5000], BF16, BF16), optimizer_numbers(row, 1)
    (expected,) = expected_rounding(row, tensors, numbers, BF16, BF16, 0)
    with Device(offset=offset) as device:
        given = [[device.copy(v) for v in tensors[0]]]
        run_extended(row, given, BF16, BF16, numbers, seed=SEED)
        p, _, *states = given[0]
        assert all(map(torch.equal, (p, *states), expected))


def test_stochastic_rounding_is_the_cpus():
    """A step of SGD that is exact in float32, by the CPU's kernels and by CUDA's."""
    from emulation.library import rows

    row = next(r for r in rows("optimizer") if r.name == "sgd_momentum")
    values, gradient = random(10_001, BF16, 1), random(10_001, BF16, 2)
    p = torch.nn.Parameter(values.clone())
    optimizer = fastops.optim.SGD([p], lr=2.0**-9, momentum=0.5, rounding="stochastic")
    optimizer.param_groups[0]["rounding_seed"] = SEED
    p.grad = gradient
    optimizer.step()
    buffer = torch.zeros(10_001, dtype=BF16)
    numbers = derived(row, [2.0**-9, 0.5, 0, 0, 0, 0, 0, 0], 1, True)
    with Device() as device:
        there = [device.copy(v) for v in (values, gradient, buffer)]
        run_extended(row, [there], BF16, BF16, numbers, seed=SEED)
        assert torch.equal(there[0], p.detach())
        assert torch.equal(there[2], optimizer.state[p]["momentum_buffer"])


@each_row("optimizer")
def test_bfloat16_states_of_float32_parameters(row):
    if row.states == 0:
        return
    sizes = [0, 1, 7, 4097, 10_001]
    tensors, (numbers,) = step_tensors(row, sizes, F32, BF16), optimizer_numbers(row, 1)
    expected = step_by_formula(row, tensors, [numbers] * len(sizes), F32, 1)
    for offset in (0, 1):
        with Device(offset=offset) as device:
            given = [[device.copy(v) for v in t] for t in tensors]
            run_optimizer(row, given, [numbers] * len(sizes), F32, BF16)
            for (p, _, *states), (q, *others) in zip(given, expected, strict=True):
                assert torch.equal(p, q)
                for value, other in zip(states, others, strict=True):
                    assert torch.equal(value, other.bfloat16())


# ------------------------------------------------------------------------------------------------ numbers of the device


def derived(row, options, step, first):
    values = doubles([0] * row.numbers)
    library().scalars_for_step(row.index, doubles(options), F64(step), BOOL(first), values)
    return list(values)


def some_options(row):
    """An option is a strength, or a flag that stays off."""
    return [0.0 if o.startswith("bool") else 0.3 + 0.02 * k for k, o in enumerate(row.options)]


@each_row("optimizer")
@pytest.mark.parametrize("dtype, state", [(F32, F32), (torch.float64, torch.float64), (BF16, BF16), (F32, BF16)], ids=lambda d: str(d)[6:])  # fmt: skip
def test_numbers_made_on_the_device(row, dtype, state):
    """The same step as with numbers from the host, for tensors that have taken different numbers of steps, the first and
    an empty one among them; the learning rate in device memory."""
    if state is not dtype and row.states == 0:
        return
    sizes, before = [64, 4097, 0, 1000], [0.0, 3.0, 3.0, 7.0]
    first = [True, False, False, False]
    tensors, options = step_tensors(row, sizes, dtype, state), some_options(row)
    numbers = [derived(row, options, b + 1, f) for b, f in zip(before, first, strict=True)]
    with Device() as device:
        given = [[device.copy(v) for v in t] for t in tensors]
        plain = [[device.copy(v) for v in t] for t in tensors]
        counts = [device.copy(torch.tensor([b])) if row.counts else None for b in before]
        lr = device.copy(torch.tensor([options[0]], dtype=torch.float64))
        at = [lr, *[None] * 11]
        workspace = device.empty(4 * library().numbers_bytes(), torch.uint8)
        wrong = [99.0, *options[1:]]  # not looked at
        counters()
        run_extended(row, given, dtype, state, counts=counts, first=first, options=wrong, option_at=at, workspace=workspace)  # fmt: skip
        assert counters().launches == 2
        run_optimizer(row, plain, numbers, dtype, state)
        for a, b in zip(given, plain, strict=True):
            assert all(map(torch.equal, a, b))
        if row.counts:
            assert [c.item() for c in counts] == [b + 1 for b in before]


@each_row("optimizer")
def test_an_infinity_found_on_the_device(row):
    """Neither values nor step counts move."""
    tensors = step_tensors(row, [100, 5], F32, F32)
    with Device() as device:
        given = [[device.copy(v) for v in t] for t in tensors]
        counts = [device.copy(torch.tensor([3.0])) if row.counts else None for _ in given]
        workspace = device.empty(2 * library().numbers_bytes(), torch.uint8)
        found = device.copy(torch.ones(1))
        run_extended(row, given, F32, F32, counts=counts, first=[False] * 2, options=some_options(row), option_at=[None] * 12, workspace=workspace, found_inf=found)  # fmt: skip
        assert all(map(torch.equal, sum(given, []), sum(tensors, [])))
        assert not row.counts or all(c.item() == 3 for c in counts)


@each_row("optimizer")
def test_rounding_follows_the_steps_counted_on_the_device(row):
    if not row.counts:
        return
    tensors, options = step_tensors(row, [1000], BF16, BF16), some_options(row)
    expected = expected_rounding(row, tensors, derived(row, options, 8, False), BF16, BF16, 8)
    with Device() as device:
        given = [[device.copy(v) for v in tensors[0]]]
        workspace = device.empty(library().numbers_bytes(), torch.uint8)
        run_extended(row, given, BF16, BF16, seed=SEED, counts=[device.copy(torch.tensor([7.0]))], first=[False], options=options, option_at=[None] * 12, workspace=workspace)  # fmt: skip
        p, _, *states = given[0]
        assert all(map(torch.equal, (p, *states), expected[0]))


@each_row("optimizer")
def test_weights_of_averages_beside_scalars_made_on_the_device(row):
    """Tensors that are alike in all but the weight of their average, as where some averages are begun later than others;
    more weights than one launch holds."""
    weights = [1.0, 0.25, 1.0, 0.5, *(k / 16 for k in range(1, 12))]
    tensors, options = step_tensors(row, [1000] * len(weights), F32, F32), some_options(row)
    before = [random(1000, F32, 90 + k) for k in range(len(weights))]
    with Device() as device:
        given = [[device.copy(v) for v in t] for t in tensors]
        averages = [device.copy(v) for v in before]
        counts = [device.copy(torch.tensor([3.0])) if row.counts else None for _ in weights]
        workspace = device.empty(len(weights) * library().numbers_bytes(), torch.uint8)
        run_extended(row, given, F32, F32, counts=counts, first=[False] * len(weights), options=options, option_at=[None] * 12, workspace=workspace, averages=averages, weights=weights)  # fmt: skip
        for (p, *_), old, average, weight in zip(given, before, averages, weights, strict=True):
            exact = old.double().lerp(p.double(), weight)
            check(average, old.lerp(p, weight), exact, F32)


@each_row("optimizer")
def test_resnet50_on_the_device_is_two_launches(row):
    """One thread per tensor for the numbers, and the step; rounding adds none."""
    tensors, options = step_tensors(row, [64] * 161, BF16, BF16), some_options(row)
    with Device() as device:
        counts = [device.copy(torch.tensor([0.0])) if row.counts else None for _ in tensors]
        workspace = device.empty(161 * library().numbers_bytes(), torch.uint8)
        counters()
        run_extended(row, tensors, BF16, BF16, seed=SEED, counts=counts, first=[False] * 161, options=options, option_at=[None] * 12, workspace=workspace)  # fmt: skip
        assert counters().launches == 2
        counters()
        run_extended(row, tensors, BF16, BF16, optimizer_numbers(row, 1)[0], seed=SEED)
        assert counters().launches == 1


# ------------------------------------------------------------------------------------------------ norm


def run_norm(device, gradients, dtype, max_norm, grad_scale=None):
    n = (I64 * len(gradients))(*(g.numel() for g in gradients))
    chunks = sum((g.numel() + 16_383) // 16_384 for g in gradients)
    sums = device.empty(chunks, torch.float64)
    norm, divisor = device.empty(1, F32), device.empty(1, F32)
    scale = None if grad_scale is None else device.copy(torch.tensor([grad_scale]))
    call("run_norm", DTYPES[dtype], I64(len(gradients)), n, pointers([gradients]), address(sums), I64(chunks), address(scale), F64(max_norm), address(norm), address(divisor))  # fmt: skip
    return norm, divisor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_clip(dtype, max_norm):
    gradients = [random(n, dtype, 7 * k) for k, n in enumerate([0, 1, 7, 4096, 0, 16_384, 40_001])]
    exact = torch.cat([g.double() for g in gradients]).norm()
    theirs = torch.nn.utils.get_total_norm([g.to(real(dtype)) for g in gradients])
    for grad_scale in (None, 8.0):
        given = exact / (grad_scale or 1)

        def run(device, grad_scale=grad_scale):
            there = [device.constant(g) for g in gradients]
            return run_norm(device, there, dtype, max_norm, grad_scale)

        for norm, divisor in everywhere(run):
            check(norm[0], (theirs / (grad_scale or 1)).float(), given, F32)
            expected = max(1.0, (given + 1e-6).item() / max_norm) * (grad_scale or 1)
            assert divisor.item() == pytest.approx(expected, rel=1e-6)


def test_norm_of_resnet50_is_two_launches_and_reads_once():
    gradients = [random(256, F32, k) for k in range(161)]
    with Device() as device:
        there = [device.copy(g) for g in gradients]
        counters()
        run_norm(device, there, F32, 1.0)
        seen = counters()
    assert seen.launches == 2
    assert seen.wide_loads * 16 == 161 * 256 * 4
    assert seen.loads - seen.wide_loads == 161  # the sums


def test_norm_that_is_not_a_number():
    with Device() as device:
        g = device.copy(torch.tensor([1.0, torch.nan, 2.0]))
        norm, divisor = run_norm(device, [g], F32, 1.0)
        assert norm.isnan().item() and divisor.isnan().item()
