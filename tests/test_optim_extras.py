"""What fastops.optim has beyond torch.optim: L1 penalties, clipping within the step, parameter groups."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import fastops.optim

CONFIGURATIONS = {
    "Adam": {},
    "AdamW": {"weight_decay": 0.1},
    "SGD": {"lr": 0.05},
    "SGD momentum": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "RMSprop": {},
    "RMSprop centered": {"centered": True, "momentum": 0.5, "eps": 1e-3},
}


@pytest.fixture(params=CONFIGURATIONS)
def configured(request):
    """(torch.optim's class, ours, options)"""
    name = request.param.split()[0]
    return (
        getattr(torch.optim, name),
        getattr(fastops.optim, name),
        CONFIGURATIONS[request.param],
    )


def rand(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameters():
    return [nn.Parameter(rand(*s, seed=k)) for k, s in enumerate([(5,), (3, 4), (37, 29)])]


def gradients(params, step):
    for k, p in enumerate(params):
        p.grad = torch.cos(p.detach()) + rand(*p.shape, seed=100 * step + k)


def assert_equal(a, b):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_subgradient_is_what_adding_it_to_the_gradient_gives(configured):
    theirs, ours, options = configured
    a, b = parameters(), parameters()
    for params in (a, b):
        params[1].data[0] = 0  # the subgradient of |0| is 0
    x, y = theirs(a, **options), ours(b, l1=0.1, **options)
    for step in range(20):
        gradients(a, step)
        gradients(b, step)
        for p in a:
            p.grad += 0.1 * p.detach().sign()
        x.step()
        y.step()
    assert_equal(a, b)


def scale_of(optimizer, p):
    """What an adaptive method divides its step by."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    if isinstance(optimizer, torch.optim.SGD):
        return 1.0
    if isinstance(optimizer, torch.optim.RMSprop):
        second = state["square_avg"]
        if group["centered"]:
            second = second - state["grad_avg"] ** 2
        return second.sqrt() + group["eps"]
    correction = 1 - group["betas"][1] ** state["step"].item()
    return (state["exp_avg_sq"] / correction).sqrt() + group["eps"]


def test_proximal_is_the_step_and_then_a_soft_threshold(configured):
    theirs, ours, options = configured
    a, b = parameters(), parameters()
    x, y = theirs(a, **options), ours(b, l1=0.7, l1_mode="proximal", **options)
    zeros = 0
    for step in range(30):
        gradients(a, step)
        gradients(b, step)
        x.step()
        y.step()
        with torch.no_grad():
            for p in a:
                threshold = x.param_groups[0]["lr"] * 0.7 / scale_of(x, p)
                p.copy_(p.sign() * (p.abs() - threshold).clamp(min=0))
                zeros += (p == 0).sum().item()
    assert_equal(a, b)
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p == 0, q == 0)
    assert zeros > 0


def lasso(x, y, l1, sweeps=2000):
    """min |x w - y|^2 / 2n + l1 |w|, by coordinate descent in float64."""
    n, k = x.shape
    w = torch.zeros(k, dtype=torch.float64)
    for _ in range(sweeps):
        for j in range(k):
            residual = y - x @ w + x[:, j] * w[j]
            rho = x[:, j] @ residual / n
            w[j] = rho.sign() * (rho.abs() - l1).clamp(min=0) / (x[:, j] @ x[:, j] / n)
    return w


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"lr": 0.1}), ("Adam", {"lr": 0.01}), ("RMSprop", {"lr": 0.002})],
    ids=lambda v: str(v),
)
def test_lasso_has_the_zeros_of_coordinate_descent(name, options):
    x = rand(60, 12, seed=1)
    true = torch.zeros(12, dtype=torch.float64)
    true[:4] = torch.tensor([2.0, -3.0, 1.5, 0.8], dtype=torch.float64)
    y = x @ true + 0.1 * rand(60, seed=2)
    expected = lasso(x, y, 0.2, sweeps=300)
    assert 0 < (expected == 0).sum() < 12
    w = nn.Parameter(torch.full((12,), 0.5, dtype=torch.float64))
    optimizer = getattr(fastops.optim, name)([w], l1=0.2, l1_mode="proximal", **options)
    for _ in range(3000):
        w.grad = x.T @ (x @ w.detach() - y) / 60
        optimizer.step()
    assert torch.equal(w.detach() == 0, expected == 0)
    torch.testing.assert_close(w.detach(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_clip_grad_norm(configured, limit):
    theirs, ours, options = configured
    a, b = parameters(), parameters()
    x, y = theirs(a, **options), ours(b, max_grad_norm=limit, **options)
    for step in range(10):
        gradients(a, step)
        gradients(b, step)
        before = [p.grad.clone() for p in b]
        norm = torch.nn.utils.clip_grad_norm_(a, limit)
        x.step()
        y.step()
        torch.testing.assert_close(y.grad_norm.double(), norm, rtol=1e-6, atol=0)
        for p, g in zip(b, before, strict=True):
            assert torch.equal(p.grad, g)
    for p, q in zip(a, b, strict=True):  # the norm is taken to float32
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_clipping_spans_the_groups():
    params = parameters()
    gradients(params, 0)
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    optimizer = fastops.optim.SGD([{"params": [p]} for p in params], lr=1.0, max_grad_norm=0.1)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    moved = torch.stack([(p - b).norm() for p, b in zip(params, before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1, rel=1e-5)
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)


def test_clipping_unscales_first():
    plain, scaled = parameters(), parameters()
    gradients(plain, 0)
    gradients(scaled, 0)
    for p in scaled:
        p.grad *= 1024
    fastops.optim.SGD(plain, lr=1.0, max_grad_norm=0.1).step()
    optimizer = fastops.optim.SGD(scaled, lr=1.0, max_grad_norm=0.1)
    optimizer.grad_scale = torch.tensor(1024.0)
    optimizer.step()
    for p, q in zip(plain, scaled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
def test_bad_arguments(name):
    cls = getattr(fastops.optim, name)
    for bad, message in [
        ({"l1": -1}, "Invalid l1 value: -1"),
        ({"l1": float("nan")}, "Invalid l1 value: nan"),
        ({"l1": 1, "l1_mode": "lasso"}, "Invalid l1_mode: 'lasso'"),
        ({"max_grad_norm": 0}, "Invalid max_grad_norm: 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            cls(parameters(), **bad)
    with pytest.raises(ValueError, match="Invalid l1 value: -2"):
        cls([{"params": parameters(), "l1": -2}])
    with pytest.raises(TypeError):
        cls(parameters(), l2=1)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
@pytest.mark.parametrize("extra", [{"l1": 0.1}, {"max_grad_norm": 1.0}], ids=str)
def test_what_torch_steps_has_no_extras(name, extra):
    params = parameters()
    optimizer = getattr(fastops.optim, name)(params, differentiable=True, **extra)
    gradients(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="are not available for what torch steps"):
        optimizer.step()
    assert_equal([p.detach() for p in params], before)
    assert not optimizer.state


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
def test_signature_is_torchs_and_ours(name):
    theirs = list(inspect.signature(getattr(torch.optim, name).__init__).parameters)
    ours = list(inspect.signature(getattr(fastops.optim, name).__init__).parameters)
    own = ["l1", "l1_mode", "max_grad_norm", "ema_decay", "state_dtype", "rounding"]
    assert ours == [*theirs, *own]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
def test_extras_survive_copies_and_checkpoints(name):
    cls = getattr(fastops.optim, name)
    params = parameters()
    optimizer = cls(params, l1=0.1, l1_mode="proximal", max_grad_norm=2.0)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.max_grad_norm == 2.0
        assert copied.param_groups[0]["l1"] == 0.1
        copied.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert copied.param_groups[1]["l1_mode"] == "proximal"
    gradients(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = cls(parameters())
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.param_groups[0]["l1"] == 0.1
    # and of torch's own
    native = getattr(torch.optim, name)(parameters())
    optimizer.load_state_dict(native.state_dict())
    assert optimizer.param_groups[0]["l1"] == 0.1
    native.load_state_dict(again.state_dict())
    gradients(params, 1)
    optimizer.step()


def test_param_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    decayed, spared = fastops.optim.param_groups(model, weight_decay=0.1, l1=0.01)
    assert [p.shape for p in decayed["params"]] == [(2, 4)]
    assert len(spared["params"]) == 4
    assert (decayed["weight_decay"], decayed["l1"]) == (0.1, 0.01)
    assert (spared["weight_decay"], spared["l1"]) == (0, 0)
    optimizer = fastops.optim.AdamW([decayed, spared], lr=1e-3)
    assert [g["l1"] for g in optimizer.param_groups] == [0.01, 0]


def test_param_groups_takes_a_shared_parameter_once_and_a_rule():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    groups = fastops.optim.param_groups(model, 0.1, no_decay=lambda name, p, owner: "1." in name)
    assert [len(g["params"]) for g in groups] == [2, 1]
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        fastops.optim.param_groups(model, weight_decay=-1)
    with pytest.raises(ValueError, match="no parameter of the model"):
        fastops.optim.param_groups(nn.ReLU())


# ------------------------------------------------------------------------------------------------ SGD and RMSprop

CHECKPOINTED = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "eps": 1e-3}),
]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_checkpoints_go_both_ways(name, options, foreach):
    theirs, ours = getattr(torch.optim, name), getattr(fastops.optim, name)
    params = parameters()
    makers = [lambda ps: theirs(ps, foreach=foreach, **options), lambda ps: ours(ps, **options)]
    for first, second in ((0, 1), (1, 0), (1, 1)):
        a = [nn.Parameter(p.detach().clone()) for p in params]
        expected = [nn.Parameter(p.detach().clone()) for p in params]
        x, whole = makers[first](a), makers[0](expected)
        for step in range(3):
            for o, ps in ((x, a), (whole, expected)):
                gradients(ps, step)
                o.step()
        y = makers[second](a)
        y.load_state_dict(copy.deepcopy(x.state_dict()))
        for step in range(3, 6):
            for o, ps in ((y, a), (whole, expected)):
                gradients(ps, step)
                o.step()
        assert_equal(a, expected)
        for p, q in zip(a, expected, strict=True):
            assert list(y.state[p]) == list(whole.state[q])


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_late_first_gradients(name, options):
    a, b = parameters(), parameters()
    optimizers = [
        getattr(torch.optim, name)(a, foreach=False, **options),
        getattr(fastops.optim, name)(b, **options),
    ]
    for step in range(6):
        for o, params in zip(optimizers, (a, b), strict=True):
            gradients(params, step)
            if step < 3:
                params[1].grad = None
            o.step()
    assert_equal(a, b)


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_an_infinity_found_stops_the_step(name, options):
    params = parameters()
    optimizer = getattr(fastops.optim, name)(params, **options)
    gradients(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert_equal([p.detach() for p in params], before)
    assert not optimizer.state


def test_sgd_takes_sparse_gradients_as_torch_does():
    a, b = nn.Embedding(5, 3, sparse=True), nn.Embedding(5, 3, sparse=True)
    b.load_state_dict(a.state_dict())
    for e, cls in ((a, torch.optim.SGD), (b, fastops.optim.SGD)):
        optimizer = cls(e.parameters(), lr=0.1)
        e(torch.tensor([1, 3, 1])).sum().backward()
        optimizer.step()
    torch.testing.assert_close(a.weight, b.weight)
    with pytest.raises(RuntimeError, match="RMSprop does not support sparse gradients"):
        fastops.optim.RMSprop(b.parameters()).step()


def test_sgd_takes_a_checkpoint_whose_buffers_are_none():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = fastops.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(saved)
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.8))
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], p.grad)


NORM_LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", NORM_LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_grad_norm_is_torchs(dtype, layout):
    grads = [
        NORM_LAYOUTS[layout](rand(*s, seed=k)).to(dtype)
        for k, s in enumerate([(5, 3, 2, 7), (2, 1, 1, 1)])
    ]
    grads += [rand(n, seed=n).to(dtype) for n in (0, 1, 2049, 16384, 40_001)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer = fastops.optim.SGD(params, lr=0.1, max_grad_norm=1e6)
    optimizer.step()
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    theirs = torch.nn.utils.get_total_norm(grads)
    eps = torch.finfo(torch.float32).eps  # what grad_norm is kept in
    error = abs(optimizer.grad_norm.double() - exact) / exact
    assert error <= 2 * abs(theirs.double() - exact) / exact + 4 * eps


def test_grad_norm_does_not_depend_on_threads():
    params = [nn.Parameter(torch.zeros(n)) for n in [64] * 1000 + [100_000, 3]]
    for k, p in enumerate(params):
        p.grad = rand(p.numel(), seed=k).float()
    optimizer = fastops.optim.SGD(params, lr=0.1, max_grad_norm=1.0)
    before, norms = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
    finally:
        torch.set_num_threads(before)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_torchs(bad):
    a, b = parameters(), parameters()
    for params in (a, b):
        gradients(params, 0)
        params[1].grad[0, 0] = bad
    torch.nn.utils.clip_grad_norm_(a, 1.0)
    torch.optim.SGD(a, lr=1.0).step()
    fastops.optim.SGD(b, lr=1.0, max_grad_norm=1.0).step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True, rtol=1e-6, atol=1e-6)
