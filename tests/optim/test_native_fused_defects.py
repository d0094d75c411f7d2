"""What torch's own fused=True gets wrong on the CPU (2.14.1), one test each, for every optimizer here: the for-loop is right.
For RMSprop, which has no fused form, they say that ours is not wrong in the same ways."""

import copy

import pytest
import torch
from torch import nn

import fastops.optim

CONFIGURATIONS = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "eps": 1e-3}),
]


@pytest.fixture(params=CONFIGURATIONS, ids=lambda c: f"{c[0]}-{c[1]}")
def both(request):
    """(torch's for-loop, ours), to be made of parameters."""
    name, options = request.param
    options = {"lr": 0.1, **options}
    return (
        lambda params: getattr(torch.optim, name)(params, foreach=False, **options),
        lambda params: getattr(fastops.optim, name)(params, **options),
    )


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_close(a, b):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


def test_1_strided_parameters_are_stepped_whole_and_nothing_beside_them(both):
    bases = [rand(40, 6), rand(40, 6)]
    before = bases[0].clone()
    params = [[nn.Parameter(b[:, 1]), nn.Parameter(b[::2, 3:5])] for b in bases]
    for make, ps in zip(both, params, strict=True):
        optimizer = make(ps)
        for step in range(3):
            for k, p in enumerate(ps):
                p.grad = rand(*p.shape, seed=10 * step + k)
            optimizer.step()
    assert_close(bases[:1], bases[1:])
    for t in (before, bases[1]):
        t[:, 1] = 0
        t[::2, 3:5] = 0
    assert torch.equal(before, bases[1])


@pytest.mark.parametrize("of_param", [torch.channels_last, torch.contiguous_format])
def test_2_gradients_and_states_of_another_memory_format(both, of_param):
    """A channels_last parameter with a contiguous gradient, and a model that is converted after its first steps."""
    results = []
    other = torch.contiguous_format if of_param is torch.channels_last else torch.channels_last
    for make in both:
        p = nn.Parameter(rand(4, 3, 5, 2).contiguous(memory_format=of_param))
        optimizer = make([p])
        for step in range(6):
            if step == 3:
                p.data = p.data.contiguous(memory_format=other)
            p.grad = rand(4, 3, 5, 2, seed=step).contiguous(memory_format=other if step < 3 else of_param)  # fmt: skip
            optimizer.step()
        results.append([p.detach().clone(memory_format=torch.contiguous_format)])
    assert_close(*results)


def test_2_a_contiguous_checkpoint_resumed_into_a_channels_last_model(both):
    torchs, ours = both
    p = nn.Parameter(rand(4, 3, 5, 2))
    first = torchs([p])
    for step in range(3):
        p.grad = rand(4, 3, 5, 2, seed=step)
        first.step()
    q = nn.Parameter(p.detach().contiguous(memory_format=torch.channels_last))
    resumed = ours([q])
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        p.grad = rand(4, 3, 5, 2, seed=step)
        q.grad = p.grad.contiguous(memory_format=torch.channels_last)
        first.step(), resumed.step()
    assert_close([p], [q])


def test_3_a_late_first_gradient(both):
    params = [[nn.Parameter(rand(4, seed=i)) for i in range(3)] for _ in both]
    counts = []
    for make, ps in zip(both, params, strict=True):
        optimizer = make(ps)
        for step, given in enumerate([(0, 2), (0, 2), (0, 1, 2), (1,), (), (0, 1, 2)]):
            for i, p in enumerate(ps):
                p.grad = rand(4, seed=10 * step + i) if i in given else None
            optimizer.step()
        counts.append([float(optimizer.state[p].get("step", 0)) for p in ps])  # SGD has none
    assert_close(*params)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_4_steps_that_an_infinity_stops(both, skipped):
    """GradScaler's protocol, from the very first step: parameters, states and step counts stay, and nothing
    uninitialised comes into use."""
    torchs, ours = both
    p, q = nn.Parameter(rand(300)), nn.Parameter(rand(300))
    reference, optimizer = torchs([p]), ours([q])
    for step in range(4):
        p.grad = rand(300, seed=step)
        q.grad = p.grad * 4
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.found_inf = torch.tensor(float(step == skipped))
        if step != skipped:
            reference.step()
        else:
            q.grad[7] = torch.inf
        optimizer.step()
        assert len(optimizer.state) == len(reference.state)
    assert_close([p], [q])
    for key, value in reference.state[p].items():
        if value is not None:
            torch.testing.assert_close(optimizer.state[q][key], value, rtol=1e-12, atol=1e-12)


def test_5_version_counters_move(both):
    """Else backward through a parameter that was stepped meanwhile is silently wrong."""
    for make in both:
        p = nn.Parameter(torch.ones(3))
        y = (p * p).sum()  # saves p
        optimizer = make([p])
        p.grad = torch.ones(3)
        optimizer.step()
        before = [v._version for v in (p, *optimizer.state[p].values()) if v is not None]
        optimizer.step()
        after = [v._version for v in (p, *optimizer.state[p].values()) if v is not None]
        assert all(a > b for a, b in zip(after, before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_6_expanded_gradients_are_not_read_past_their_end(both):
    results = []
    for make in both:
        p, q = nn.Parameter(rand(3, 200)), nn.Parameter(rand(50))
        optimizer = make([p, q])
        for _ in range(3):
            p.grad, q.grad = torch.ones((), dtype=p.dtype).expand(3, 200), rand(1).expand(50)
            optimizer.step()
        results.append([p, q])
    assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_7_every_element_of_reduced_precision_moves(both, dtype):
    """pytorch#191763: the vectorised part was left out."""
    p = nn.Parameter(torch.ones(40, dtype=dtype))
    optimizer = both[1]([p])
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.0)
    if "eps" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["eps"] = 1e-4
    p.grad = torch.ones(40, dtype=dtype)
    optimizer.step()
    assert (p != 1).all() and (p == p[0]).all()
