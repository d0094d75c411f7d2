"""What of the optimizers only a GPU has: step counts and learning rates there, graphs, and steps that wait for nothing. On
machines without one, tests/cuda/test_emulated_device.py runs these on a device that is emulated."""

from contextlib import contextmanager

import pytest
import torch
from cases import CUDA
from rounding_cases import BF16, parameters, rand, rounded

import fastops.optim

pytestmark = pytest.mark.parametrize("device", [CUDA])
CONFIGURATIONS = {
    "Adam": {},
    "Adam amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "RMSprop": {},
    "RMSprop centered": {"centered": True, "momentum": 0.5, "eps": 1e-3},
    "Adadelta": {},
    "Adamax": {},
    "RAdam": {"betas": (0.9, 0.9)},
}
every = pytest.mark.parametrize("name", CONFIGURATIONS)


def there(device, dtype=torch.float64):
    return [torch.nn.Parameter(p.detach().to(device)) for p in parameters(dtype)]


def make(name, params, package=fastops.optim, **more):
    return getattr(package, name.split()[0])(params, **{**CONFIGURATIONS[name], **more})


def gradients(params, step):
    """Made on the CPU, written into what is there."""
    for k, p in enumerate(params):
        g = rand(*p.shape, seed=100 * step + k).to(p.dtype)
        if p.grad is None:
            p.grad = g.to(p.device)
        else:
            p.grad.copy_(g)


@contextmanager
def waiting_for_nothing():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(a, b, tolerance=1e-12):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=tolerance, atol=tolerance)  # fmt: skip


def graph_of(step):
    """step() in a graph, after the three steps that torch wants before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@every
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_capturable_is_the_for_loop(name, tensor_lr, device):
    """Step counts on the device, as torch keeps them; a learning rate there, too, which a scheduler may write to."""
    expected, params = parameters(torch.float64), there(device)
    theirs = make(name, expected, torch.optim, foreach=False, lr=0.01)
    lr = torch.tensor(0.01, dtype=torch.float64, device=device) if tensor_lr else 0.01
    mine = make(name, params, capturable=True, lr=lr)
    for step in range(6):
        gradients(expected, step), gradients(params, step)
        theirs.step()
        if step == 0:
            mine.step()
        else:
            with waiting_for_nothing():
                mine.step()
        if tensor_lr:
            theirs.param_groups[0]["lr"] *= 0.9
            lr.mul_(0.9)
    assert_close(params, expected)
    for p, q in zip(params, expected, strict=True):
        assert list(mine.state[p]) == list(theirs.state[q])
        assert mine.state[p]["step"].device == p.device and mine.state[p]["step"].item() == 6
        for key, value in theirs.state[q].items():
            assert_close([mine.state[p][key].double()], [value.double()])


def assert_replays_are_steps(theirs, expected, mine, params, lr):
    """Each replay is the next step, with the gradients and the learning rate of now."""
    gradients(params, 0), gradients(expected, 0)
    graph = graph_of(mine.step)
    for _ in range(3):
        theirs.step()
    for step in range(1, 5):
        gradients(params, step), gradients(expected, step)
        lr.fill_(0.01 / step)
        theirs.param_groups[0]["lr"] = 0.01 / step
        graph.replay()
        theirs.step()
    assert_close(params, expected)


@every
def test_graphs_replay_steps(name, device):
    expected, params = parameters(torch.float64), there(device)
    theirs = make(name, expected, torch.optim, foreach=False, lr=0.01)
    lr = torch.tensor(0.01, dtype=torch.float64, device=device)
    mine = make(name, params, capturable=True, lr=lr)
    assert_replays_are_steps(theirs, expected, mine, params, lr)


def test_graphs_replay_steps_of_sgd(device):
    """It counts nothing; where fused, the learning rate may be on the device."""
    expected, params = parameters(torch.float64), there(device)
    theirs = torch.optim.SGD(expected, lr=0.01, momentum=0.9, foreach=False)
    lr = torch.tensor(0.01, dtype=torch.float64, device=device)
    mine = fastops.optim.SGD(params, lr=lr, momentum=0.9, fused=True)
    assert_replays_are_steps(theirs, expected, mine, params, lr)


def test_graphs_round_anew_at_each_replay(device):
    p = torch.nn.Parameter(torch.ones(4096, dtype=BF16, device=device))
    optimizer = fastops.optim.Adam([p], lr=2.0**-10, capturable=True, rounding="stochastic")
    p.grad = torch.ones_like(p)
    graph = graph_of(optimizer.step)
    seen = []
    for _ in range(3):
        p.data.fill_(1)
        graph.replay()
        seen.append((p != 1).cpu())
    assert all(0 < s.sum() < 4096 for s in seen)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_graph_would_repeat_the_rounding_of_sgd(device):
    p = torch.nn.Parameter(torch.ones(64, dtype=BF16, device=device))
    optimizer = fastops.optim.SGD([p], lr=0.1, rounding="stochastic")
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="use Adam, AdamW or RMSprop with capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):  # fmt: skip
        optimizer.step()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_fused_counts_on_the_device_as_torch(name, device):
    params = there(device, torch.float32)
    optimizer = make(name, params, fused=True)
    gradients(params, 0)
    optimizer.step()
    for state in optimizer.state.values():
        assert state["step"].is_cuda and state["step"].dtype == torch.float32
    assert optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("name, more", [("Adam", {"fused": True}), ("AdamW", {"capturable": True}), ("RMSprop", {"capturable": True}), ("SGD", {"momentum": 0.9})])  # fmt: skip
def test_an_infinity_found_is_left_to_the_device(name, more, device):
    """GradScaler's found_inf is not waited for; parameters, states and step counts stay where it is not 0."""
    params = there(device, torch.float32)
    optimizer = getattr(fastops.optim, name)(params, **more)
    gradients(params, 0)
    optimizer.step()
    before = [v.clone() for p in params for v in (p.detach(), *optimizer.state[p].values())]
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    for found in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(found, device=device)
        with waiting_for_nothing():
            optimizer.step()
        after = [v for p in params for v in (p.detach(), *optimizer.state[p].values())]
        same = [torch.equal(a, b) for a, b in zip(after, before, strict=True) if a.numel()]
        assert all(same) if found else not any(same)


@pytest.mark.parametrize("more", [{"fused": True}, {}], ids=str)
def test_an_infinity_found_at_the_first_step_makes_no_state(more, device):
    params = there(device, torch.float32)
    optimizer = fastops.optim.Adam(params, **more)
    gradients(params, 0)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert not optimizer.state
    assert_close(params, parameters(torch.float32), 0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_waits_for_nothing(name, limit, device):
    expected, params = parameters(torch.float32), there(device, torch.float32)
    theirs = getattr(torch.optim, name)(expected, lr=0.01)
    mine = getattr(fastops.optim, name)(params, lr=0.01, max_grad_norm=limit)
    for step in range(3):
        gradients(expected, step), gradients(params, step)
        norm = torch.nn.utils.clip_grad_norm_(expected, limit)
        theirs.step()
        if step == 0:
            mine.step()
        else:
            with waiting_for_nothing():
                mine.step()
        assert mine.grad_norm.is_cuda
        torch.testing.assert_close(mine.grad_norm.cpu(), norm, rtol=1e-6, atol=0)
    assert_close(params, expected, 1e-5)


def test_rounding_is_the_cpus_to_the_bit(device):
    params = [torch.nn.Parameter(rand(n, dtype=BF16, seed=n).to(device)) for n in (3, 10_001)]
    optimizer = fastops.optim.SGD(params, lr=2.0**-9, rounding="stochastic")
    seed = optimizer.param_groups[0]["rounding_seed"]
    for step in range(3):
        before = [p.detach().cpu() for p in params]
        gradients(params, step)
        optimizer.step()
        for number, (p, old) in enumerate(zip(params, before, strict=True)):
            exact = (old.double() - 2.0**-9 * p.grad.cpu().double()).float()
            assert torch.equal(p.detach().cpu(), rounded(exact, seed, step, number, 0))


@every
def test_states_in_bfloat16(name, device):
    params, expected = there(device, torch.float32), parameters(torch.float32)
    a, b = (make(name, ps, state_dtype=BF16) for ps in (params, expected))
    for step in range(3):
        gradients(params, step), gradients(expected, step)
        a.step(), b.step()
    assert all(v.dtype == BF16 for s in a.state.values() for k, v in s.items() if k != "step")
    assert_close(params, expected, 1e-3)


@every
def test_checkpoints_between_host_and_device_counts(name, device):
    """From a capturable run to one that counts on the host, to torch's, and back. (Torch's capturable Adam takes powers of
    the betas in float32, and is not the for-loop to 1e-12.)"""
    params = there(device)
    expected = parameters(torch.float64)
    theirs = make(name, expected, torch.optim, foreach=False)
    step = 0
    optimizer = None
    for package, capturable in ((fastops.optim, True), (fastops.optim, False), (torch.optim, False), (fastops.optim, True)):  # fmt: skip
        following = make(name, params, package, capturable=capturable, foreach=False)
        if optimizer is not None:
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                group["capturable"] = capturable
            if not capturable:
                for state in saved["state"].values():
                    state["step"] = state["step"].cpu()
            following.load_state_dict(saved)
        optimizer = following
        for _ in range(2):
            gradients(params, step), gradients(expected, step)
            optimizer.step(), theirs.step()
            step += 1
    assert_close(params, expected)
