"""What the emulated device sees of csrc/torch and no GPU can tell: on which device and stream each launch was made, and how
many there were. Collected by tests/cuda/test_emulated_device.py, in a process where that device is."""

import pytest
import torch
from cuda_cases import FEW, captured, inputs_of
from emulation.device import DEVICE, Stream, stream
from optimizer_cases import OPTIONS

import fastops


def leaves(t):
    return [v for v in t.tensors if v.requires_grad]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_launches_are_on_the_current_stream_of_the_tensors_device(case):
    """Forward and backward, with another device current and a stream that is not the default one."""
    there = inputs_of(case, "cuda:1").leaves()
    mine = Stream(1)
    before = DEVICE.exchange_stream(1, mine.id)
    DEVICE.launches()
    try:
        assert DEVICE.current_device() == 0
        y = there()
        forward = DEVICE.launches()
        torch.autograd.grad(y, leaves(there), torch.ones_like(y))
        backward = DEVICE.launches()
    finally:
        DEVICE.exchange_stream(1, before)
    assert forward and set(forward) == {(1, mine.id)}
    assert set(backward) <= {(1, mine.id)}
    assert backward or case.op.kind in ("softmax", "cross_entropy") or case.op.name == "l1_loss"
    assert DEVICE.current_device() == 0 and y.device.index == 1


# Launches of ours, beside what torch's autograd adds: forward, and backward where there is one of ours. l1_loss keeps its
# slope, so that input and target may be overwritten: backward is torch's multiplication.
LAUNCHES = {"l1_loss": (1, 0), "elementwise": (1, 1), "fused": (1, 1), "gate": (1, 1), "loss": (1, 1), "softmax": (1, 1), "log_softmax": (1, 1)}  # fmt: skip


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_launches_per_op(case):
    """One pass forward, one backward; cross-entropy's gradient comes with its loss, after the sum of the weights."""
    there = inputs_of(case, "cuda").leaves()
    DEVICE.launches()
    y = there()
    forward = len(DEVICE.launches())
    torch.autograd.grad(y, leaves(there)[:1], torch.ones_like(y))
    backward = len(DEVICE.launches())
    expected = LAUNCHES.get(case.op.name) or LAUNCHES.get(case.op.kind)
    if (
        case.op.name == "cross_entropy"
    ):  # divisor, rows, sum of the losses; the gradient is handed on
        expected = (3, 1)
    assert (forward, backward) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_over_two_devices_is_a_launch_on_each(name):
    params = [torch.nn.Parameter(torch.ones(300, device=f"cuda:{k % 2}")) for k in range(8)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = getattr(fastops.optim, name)(params)
    optimizer.step()
    streams = [Stream(device) for device in range(2)]
    DEVICE.launches()
    with stream(streams[1]), stream(streams[0]):
        optimizer.step()
    assert sorted(DEVICE.launches()) == [(s.device.index, s.id) for s in streams]


def test_a_graph_holds_the_seed_and_the_mask():
    """dropout under capture: torch's draw of the seed is in the graph, and so are the words made from it."""
    x = torch.ones(64, device="cuda")
    graph, y = captured(lambda: fastops.functional.dropout(x, 0.5))
    seen = set()
    for _ in range(8):
        graph.replay()
        seen.add(tuple(y.cpu().tolist()))
    assert len(seen) > 4


@pytest.mark.parametrize("bad", [10, -1])
def test_a_target_out_of_range_is_an_error(bad):
    t = torch.tensor([0, bad], device="cuda")
    with pytest.raises(RuntimeError, match=f"target {bad} at row 1 is out of range for 10 classes"):
        fastops.functional.cross_entropy(torch.randn(2, 10, device="cuda"), t)
