"""What holds on the CPU holds on a GPU: every op, dtype and layout, every optimizer option, masks to the bit; and what only
a GPU has: streams, several devices, graphs, host synchronisation, device assertions, memory beyond 2^31 elements.

Inputs are made on the CPU and moved, results are moved back and judged there. The tests that compare run on the CPU
too, for one case of each op, so that their own code has run on machines without a GPU.
"""

import subprocess
import sys

import pytest
import torch
from cases import (
    CUDA,
    DEVICES,
    DTYPES,
    INPUTS,
    LAYOUTS,
    NO_CUDA,
    assert_as_accurate,
    gradients,
    ids,
    moved,
    roomy,
)
from cuda_cases import ALL, FEW, captured, inputs_of
from optimizer_cases import OPTIONS, gradient, parameters

import fastops
from fastops._core.registry import OPS, overload

PLACES = [pytest.param(case, "cpu", id=f"{case.name}-cpu") for case in FEW] + [
    pytest.param(case, *CUDA.values, id=f"{case.name}-cuda", marks=CUDA.marks)
    for case in (ALL if NO_CUDA is None else ())
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
cuda = pytest.mark.parametrize("device", [CUDA])
SEED = torch.tensor(0x1234_5678_9ABC_DEF)


def back(t):
    """A result, on the CPU and without its history."""
    return t.detach().cpu()


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case, device", PLACES)
def test_as_accurate_as_torch(case, device, dtype):
    rounded = case.to(dtype)
    exact = rounded.to(torch.float64).leaves()
    shape = exact(case.op.exact).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    true, true_grads = gradients(exact, case.op.exact, dy)
    theirs, their_grads = gradients(rounded.leaves(), case.op.reference, dy)
    there = rounded.on(device)
    ours, our_grads = gradients(there.leaves(), None, dy.to(device))
    assert ours.device.type == device and ours.dtype == theirs.dtype
    assert_as_accurate(back(ours), theirs, true, dtype)
    assert_as_accurate(back(there()), theirs, true, dtype)
    for mine, other, exactly in zip(our_grads, their_grads, true_grads, strict=True):
        assert_as_accurate(back(mine), other, exactly, dtype)
    for tensor, before in zip(there.tensors, rounded.tensors, strict=True):
        assert torch.equal(back(tensor), before) and tensor.stride() == before.stride()


@pytest.mark.parametrize("case, device", [place for place in PLACES if roomy(place.values[0])])
def test_special_values(case, device):
    """inf, -inf, nan, huge and denormal values give what torch gives, in float32 or in float64."""
    tensors = case.to(torch.float32).tensors
    values = [torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 0.0, -0.0, 1e-37]
    if case.op.name in INPUTS:
        values = [0.0, -0.0, 1.0, 1e-37, 1e-36, 1 - 6e-8, 0.5, 1e-12]
    flat = tensors[0].reshape(-1).clone()
    flat[:8] = torch.tensor(values)
    special = type(case)(case.op, case.name, (flat.reshape(tensors[0].shape), *tensors[1:]), case.to(torch.float32).kwargs)  # fmt: skip
    ours = back(special.on(device)())
    theirs, exact = special(case.op.reference), special.to(torch.float64)(case.op.exact).float()
    close = [torch.isclose(ours, t, equal_nan=True, rtol=1e-5, atol=1e-6) for t in (theirs, exact)]
    outside = (
        case.op.name == "binary_cross_entropy" and device == "cuda"
    )  # a NaN where the CPU raises
    assert outside or (close[0] | close[1]).all()


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_those_of_the_cpu(layout, dtype, device):
    x = LAYOUTS[layout]().to(dtype)
    y = overload("dropout")(moved(x, device), 0.4, SEED.to(device))
    assert torch.equal(back(y), overload("dropout")(x, 0.4, SEED))


@on_every_device
def test_sums_are_the_same_in_every_run(device):
    x, t = (torch.randn(1_000_003, generator=torch.Generator().manual_seed(k)) for k in range(2))
    x, t = x.to(device), t.to(device)
    first = fastops.functional.mse_loss(x, t)
    assert all(torch.equal(fastops.functional.mse_loss(x, t), first) for _ in range(5))


# ------------------------------------------------------------------------------------------------ optimizers


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name, options", [(n, o) for n, every in OPTIONS.items() for o in every], ids=str)  # fmt: skip
def test_optimizers_are_torchs(name, options, dtype, device):
    """Three steps with gradients made on the CPU; torch's for-loop on the CPU, in the dtype and in float64."""

    def walk(cls, where, kind, **more):
        params = [
            torch.nn.Parameter(p.detach().to(kind).to(where)) for p in parameters(dtype=dtype)
        ]
        optimizer = cls(params, **options, **more)
        for step in range(3):
            for k, p in enumerate(parameters(dtype=dtype)):
                params[k].grad = gradient(p, step, k).to(dtype).to(kind).to(where)
            optimizer.step()
        return [back(p) for p in params]

    ours = walk(getattr(fastops.optim, name), device, dtype)
    theirs = walk(getattr(torch.optim, name), "cpu", dtype, foreach=False)
    exact = walk(getattr(torch.optim, name), "cpu", torch.float64, foreach=False)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(mine, other, true, dtype)


@on_every_device
def test_a_patched_model_trains(device):
    def losses(patch, where):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 30), torch.nn.GELU(), torch.nn.Linear(30, 5)
        )
        x, t = torch.randn(64, 20), torch.randint(5, (64,))
        model, x, t = model.double().to(where), x.double().to(where), t.to(where)
        if patch:
            fastops.patch(model)
        optimizer = (fastops.optim if patch else torch.optim).AdamW(model.parameters(), lr=0.01)
        loss = (fastops if patch else torch.nn).functional.cross_entropy
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            value = loss(model(x), t)
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    ours, theirs = losses(True, device), losses(False, "cpu")
    assert ours[-1] < ours[0] / 2
    assert ours == pytest.approx(theirs, rel=1e-9)


# ------------------------------------------------------------------------------------------------ CUDA alone


def one_step(device):
    """A step of Adam on parameters that have states, ready to be called."""
    params = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (5, 70_000)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fastops.optim.Adam(params)
    optimizer.step()
    return optimizer.step


@cuda
@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_runs_on_the_current_stream(case, device):
    """The input is only made after a long wait on the stream: a kernel on another would read zeros."""
    case = case.to(torch.float32)
    there = case.on(device)
    expected = back(there())
    source = there.tensors[0].clone()
    there.tensors[0].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        there.tensors[0].copy_(source)
        y = there()
    stream.synchronize()
    assert torch.equal(back(y), expected)


@cuda
@pytest.mark.skipif(NO_CUDA is None and torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_runs_on_the_device_of_its_input(case, device):
    last = f"cuda:{torch.cuda.device_count() - 1}"
    with torch.cuda.device(0):
        y = inputs_of(case, last)()
        assert str(y.device) == last and torch.cuda.current_device() == 0
    assert torch.equal(back(y), back(inputs_of(case, "cuda:0")()))


@cuda
@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_no_host_synchronisation(case, device):
    there = inputs_of(case, device).leaves()
    y = there()
    dy = torch.ones_like(y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = there()
        if y.requires_grad:
            y.backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("name", OPTIONS)
def test_no_host_synchronisation_in_a_step(name, device):
    params = [torch.nn.Parameter(torch.ones(1000, device=device)) for _ in range(5)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = getattr(fastops.optim, name)(params, max_grad_norm=1.0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_graphs_replay_on_new_inputs(case, device):
    there = inputs_of(case, device)
    graph, y = captured(there)
    there.tensors[0].mul_(0.5)
    graph.replay()
    assert torch.equal(back(y), back(there()))


@cuda
def test_graphs_draw_a_new_mask_at_each_replay(device):
    x = torch.ones(1000, device=device)
    graph, y = captured(lambda: fastops.functional.dropout(x, 0.5))
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(back(y != 0))
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@cuda
def test_capture_of_a_step_that_counts_on_the_host_is_refused(device):
    """As torch's: a replay would take the same step number again."""
    step = one_step(device)
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()


@cuda
def test_beyond_31_bits(device):
    n = 2**31 + 9
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("too little free memory for two tensors of 2^31 bfloat16")
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    x[-5:] = torch.tensor([-1.0, 2.0, -3.0, 4.0, -5.0])
    x[5] = 7.0
    y = fastops.functional.relu(x)
    assert y[-5:].tolist() == [0, 2, 0, 4, 0] and y[5].item() == 7
    del y
    assert fastops.functional.softmax(x.view(-1, 1), 1)[-1].item() == 1


@cuda
@pytest.mark.parametrize("bad", [10, -1])
def test_a_target_out_of_range_stops_the_device(bad, device):
    """In a process of its own: the assertion leaves the device unusable."""
    program = (
        "import torch, fastops\n"
        f"t = torch.tensor([0, {bad}], device='cuda')\n"
        "fastops.functional.cross_entropy(torch.randn(2, 10, device='cuda'), t)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr
    assert f"target {bad} at row 1 is out of range for 10 classes" in done.stdout + done.stderr


def test_every_op_is_among_the_cases():
    assert {case.op.name for case in FEW} | {"dropout"} >= {
        op.name
        for op in OPS.values()
        if op.kind in ("elementwise", "loss", "softmax", "cross_entropy")
    }
