"""What fastops.optim has beyond torch.optim: L1 penalties, clipping within the step, parameter groups."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from optimizer_cases import CONFIGURATIONS, few_parameters, rand, set_gradients
from torch import nn

import fastops.optim


@pytest.fixture(params=CONFIGURATIONS)
def configured(request):
    """(torch.optim's class, ours, options)"""
    name = request.param.split()[0]
    return (
        getattr(torch.optim, name),
        getattr(fastops.optim, name),
        CONFIGURATIONS[request.param],
    )


def assert_equal(a, b):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_subgradient_is_what_adding_it_to_the_gradient_gives(configured):
    theirs, ours, options = configured
    a, b = few_parameters(), few_parameters()
    for params in (a, b):
        params[1].data[0] = 0  # the subgradient of |0| is 0
    x, y = theirs(a, **options), ours(b, l1=0.1, **options)
    for step in range(20):
        set_gradients(a, step)
        set_gradients(b, step)
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
    if isinstance(optimizer, torch.optim.Adagrad):
        decay = 1 + (state["step"].item() - 1) * group["lr_decay"]
        return decay * (state["sum"].sqrt() + group["eps"])
    if isinstance(optimizer, torch.optim.Adadelta):
        rho, root = group["rho"], state["square_avg"] + group["eps"]
        move = (1 - rho) * p.grad**2 / root
        before = (state["acc_delta"] - move * group["eps"]) / (rho + move)
        return (root / (before + group["eps"])).sqrt()
    if isinstance(optimizer, torch.optim.Adamax):
        return state["exp_inf"]
    if isinstance(optimizer, torch.optim.RAdam):
        beta, step = group["betas"][1], state["step"].item()
        longest = 2 / (1 - beta) - 1
        length = longest - 2 * step * beta**step / (1 - beta**step)
        if length <= 5:
            return 1.0
        rect = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return (state["exp_avg_sq"].sqrt() + group["eps"]) / (rect * (1 - beta**step)) ** 0.5
    if isinstance(optimizer, torch.optim.Rprop):
        return group["lr"] / state["step_size"]
    if isinstance(optimizer, torch.optim.ASGD):
        decayed = (1 + group["lambd"] * group["lr"] * (state["step"].item() - 1)) ** group["alpha"]
        return group["lr"] / torch.tensor(group["lr"] / decayed).item()
    if isinstance(optimizer, torch.optim.RMSprop):
        second = state["square_avg"]
        if group["centered"]:
            second = second - state["grad_avg"] ** 2
        return second.sqrt() + group["eps"]
    correction = 1 - group["betas"][1] ** state["step"].item()
    return (state["exp_avg_sq"] / correction).sqrt() + group["eps"]


def test_proximal_is_the_step_and_then_a_soft_threshold(configured):
    theirs, ours, options = configured
    a, b = few_parameters(), few_parameters()
    x, y = theirs(a, **options), ours(b, l1=0.7, l1_mode="proximal", **options)
    zeros = 0
    for step in range(30):
        set_gradients(a, step)
        set_gradients(b, step)
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


def sparse_problem():
    x = rand(60, 12, seed=1)
    true = torch.zeros(12, dtype=torch.float64)
    true[:4] = torch.tensor([2.0, -3.0, 1.5, 0.8], dtype=torch.float64)
    return x, x @ true + 0.1 * rand(60, seed=2)


def ista(x, y, l1, l2=0.0, steps=5000):
    """min |x w - y|^2 / 2n + l1 |w| + l2 |w|^2 / 2, by proximal gradient descent in float64 (Beck and Teboulle, 2009)."""
    n = len(y)
    lr = 1 / (torch.linalg.matrix_norm(x, 2) ** 2 / n + l2)
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(steps):
        moved = w - lr * (x.T @ (x @ w - y) / n + l2 * w)
        w = moved.sign() * (moved.abs() - lr * l1).clamp(min=0)
    return w


def fitted(name, x, y, steps=3000, **options):
    w = nn.Parameter(torch.full((x.shape[1],), 0.5, dtype=torch.float64))
    optimizer = getattr(fastops.optim, name)([w], l1_mode="proximal", **options)
    for _ in range(steps):
        w.grad = x.T @ (x @ w.detach() - y) / len(y)
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("l1", [0.05, 0.2, 0.8])
@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_proximal_gradient_descent(l1, l2, momentum):
    """The lasso, and with weight_decay the elastic net: the zeros are the reference's, and the values to 1e-9."""
    x, y = sparse_problem()
    expected = ista(x, y, l1, l2)
    assert 0 < (expected == 0).sum() < 12
    # A buffer of momentum m comes to 1 / (1 - m) times the gradient, and the threshold with it where l1 does.
    given = l1 / (1 - momentum)
    w = fitted("SGD", x, y, lr=0.1 * (1 - momentum), momentum=momentum, l1=given, weight_decay=l2)
    assert torch.equal(w == 0, expected == 0)
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.integration("sklearn")
def test_lasso_and_elastic_net_are_scikit_learns():
    from sklearn import linear_model

    x, y = sparse_problem()
    exact = {"fit_intercept": False, "tol": 1e-12, "max_iter": 100_000}
    for l1, l2 in ((0.05, 0.0), (0.2, 0.0), (0.2, 0.3)):
        if l2:
            model = linear_model.ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), **exact)
        else:
            model = linear_model.Lasso(alpha=l1, **exact)
        expected = torch.from_numpy(model.fit(x.numpy(), y.numpy()).coef_)
        w = fitted("SGD", x, y, lr=0.1, l1=l1, weight_decay=l2)
        assert torch.equal(w == 0, expected == 0) and (w == 0).any()
        torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_clip_grad_norm(configured, limit):
    theirs, ours, options = configured
    a, b = few_parameters(), few_parameters()
    x, y = theirs(a, **options), ours(b, max_grad_norm=limit, **options)
    for step in range(10):
        set_gradients(a, step)
        set_gradients(b, step)
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
    params = few_parameters()
    set_gradients(params, 0)
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    optimizer = fastops.optim.SGD([{"params": [p]} for p in params], lr=1.0, max_grad_norm=0.1)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    moved = torch.stack([(p - b).norm() for p, b in zip(params, before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1, rel=1e-5)
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)


def test_clipping_unscales_first():
    plain, scaled = few_parameters(), few_parameters()
    set_gradients(plain, 0)
    set_gradients(scaled, 0)
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
            cls(few_parameters(), **bad)
    with pytest.raises(ValueError, match="Invalid l1 value: -2"):
        cls([{"params": few_parameters(), "l1": -2}])
    with pytest.raises(TypeError):
        cls(few_parameters(), l2=1)


@pytest.mark.parametrize("name, value", [("max_grad_norm", 1.0), ("ema_decay", 0.9), ("state_dtype", torch.float32), ("ema_decay", None)])  # fmt: skip
def test_what_is_one_value_for_all_groups_is_refused_in_one(name, value, configured):
    _, ours, options = configured
    with pytest.raises(ValueError, match=f"{name} is one value for all groups"):
        ours([{"params": few_parameters(), name: value}], **options)
    optimizer = ours(few_parameters(), **options)
    with pytest.raises(ValueError, match=f"{name} is one value for all groups"):
        optimizer.add_param_group({"params": few_parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_a_step_that_fails_in_the_kernels_counts_nothing(configured):
    """And what GradScaler gave it is not given to the next."""
    _, ours, options = configured
    params, other = few_parameters(), few_parameters()
    x, y = ours(params, **options), ours(other, **options)
    for step in range(2):
        for ps, o in ((params, x), (other, y)):
            set_gradients(ps, step)
            o.step()
    before = copy.deepcopy([[p.detach() for p in params], x.state_dict()["state"]])
    versions = [p._version for p in params]
    set_gradients(params, 2)
    x.grad_scale = torch.empty((), device="meta")  # no number to be had
    with pytest.raises((NotImplementedError, RuntimeError)):
        x.step()
    assert versions == [p._version for p in params]
    after = [[p.detach() for p in params], x.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    del x.grad_scale
    set_gradients(other, 2)
    for o in (x, y):
        o.step()
    assert all(map(torch.equal, params, other))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
@pytest.mark.parametrize("extra", [{"l1": 0.1}, {"max_grad_norm": 1.0}], ids=str)
def test_what_torch_steps_has_no_extras(name, extra):
    params = few_parameters()
    optimizer = getattr(fastops.optim, name)(params, differentiable=True, **extra)
    set_gradients(params, 0)
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
    params = few_parameters()
    optimizer = cls(params, l1=0.1, l1_mode="proximal", max_grad_norm=2.0)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.max_grad_norm == 2.0
        assert copied.param_groups[0]["l1"] == 0.1
        copied.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert copied.param_groups[1]["l1_mode"] == "proximal"
    set_gradients(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = cls(few_parameters())
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.param_groups[0]["l1"] == 0.1
    # and of torch's own
    native = getattr(torch.optim, name)(few_parameters())
    optimizer.load_state_dict(native.state_dict())
    assert optimizer.param_groups[0]["l1"] == 0.1
    native.load_state_dict(again.state_dict())
    set_gradients(params, 1)
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
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("Adadelta", {"rho": 0.8}),
    ("Adamax", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1}),
    ("RAdam", {"betas": (0.9, 0.9)}),
    ("Rprop", {"etas": (0.4, 1.3)}),
    ("ASGD", {"t0": 2}),
]


@pytest.fixture
def numbers_in_double():
    """Step counts and the like in float64, so that none is rounded: torch loads some of them in the parameter's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_checkpoints_go_both_ways(name, options, foreach, numbers_in_double):
    theirs, ours = getattr(torch.optim, name), getattr(fastops.optim, name)
    params = few_parameters()
    makers = [lambda ps: theirs(ps, foreach=foreach, **options), lambda ps: ours(ps, **options)]
    for first, second in ((0, 1), (1, 0), (1, 1)):
        a = [nn.Parameter(p.detach().clone()) for p in params]
        expected = [nn.Parameter(p.detach().clone()) for p in params]
        x, whole = makers[first](a), makers[0](expected)
        for step in range(3):
            for o, ps in ((x, a), (whole, expected)):
                set_gradients(ps, step)
                o.step()
        y = makers[second](a)
        y.load_state_dict(copy.deepcopy(x.state_dict()))
        for step in range(3, 6):
            for o, ps in ((y, a), (whole, expected)):
                set_gradients(ps, step)
                o.step()
        assert_equal(a, expected)
        for p, q in zip(a, expected, strict=True):
            assert list(y.state[p]) == list(whole.state[q])


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_late_first_gradients(name, options):
    a, b = few_parameters(), few_parameters()
    optimizers = [
        getattr(torch.optim, name)(a, foreach=False, **options),
        getattr(fastops.optim, name)(b, **options),
    ]
    for step in range(6):
        for o, params in zip(optimizers, (a, b), strict=True):
            set_gradients(params, step)
            if step < 3:
                params[1].grad = None
            o.step()
    assert_equal(a, b)


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_an_infinity_found_stops_the_step(name, options):
    params = few_parameters()
    optimizer = getattr(fastops.optim, name)(params, **options)
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert_equal([p.detach() for p in params], before)
    assert name == "Adagrad" or not optimizer.state  # which has one from the beginning


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
    a, b = few_parameters(), few_parameters()
    for params in (a, b):
        set_gradients(params, 0)
        params[1].grad[0, 0] = bad
    torch.nn.utils.clip_grad_norm_(a, 1.0)
    torch.optim.SGD(a, lr=1.0).step()
    fastops.optim.SGD(b, lr=1.0, max_grad_norm=1.0).step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ schedules, scalers, rollbacks


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "Adagrad"]
)  # those that torch has a fused form of
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_scaler_leaves_the_gradients_that_torch_leaves(name, overflow, clip):
    """With fused=True the step unscales them, unless it is skipped."""
    left = []
    for module, extra in ((torch.optim, {}), (fastops.optim, {"max_grad_norm": clip})):
        p = torch.nn.Parameter(torch.arange(5.0))
        optimizer = getattr(module, name)([p], lr=0.1, fused=True, **extra)
        scaler = torch.amp.GradScaler("cpu", init_scale=3000.0)
        scaler.scale((p * p).sum()).backward()
        if overflow:
            p.grad[2] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        left.append(p.grad)
    torch.testing.assert_close(*left)


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "NAdam"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16, torch.float16])
def test_a_checkpoint_whose_step_has_another_dtype(name, dtype):
    results = []
    for module in (torch.optim, fastops.optim):
        p = torch.nn.Parameter(torch.arange(5.0))
        optimizer = getattr(module, name)([p], lr=0.1)
        for _ in range(3):
            p.grad = torch.ones(5)
            optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["step"] = saved["state"][0]["step"].to(dtype)
        optimizer = getattr(module, name)([p], lr=0.1)
        optimizer.load_state_dict(saved)
        p.grad = torch.ones(5)
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


MOMENTUM = [("Adam", {}), ("AdamW", {}), ("SGD", {"momentum": 0.9}), ("RMSprop", {"momentum": 0.9})]


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize(("name", "options"), MOMENTUM, ids=lambda v: str(v))
def test_schedulers_move_the_momentum(name, options, schedule):
    """Also to 0 and back, where the buffers rest meanwhile."""
    results, seen = [], []
    for package in (torch.optim, fastops.optim):
        params = few_parameters()
        optimizer = getattr(package, name)(params, lr=0.01, foreach=False, **options)
        base = 0.0 if name != "RMSprop" else 0.5  # torch's RMSprop cannot start a momentum late
        if schedule == "OneCycleLR":
            s = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=16, base_momentum=base, max_momentum=0.9)  # fmt: skip
        else:
            s = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.001, 0.1, step_size_up=4, base_momentum=base, max_momentum=0.9)  # fmt: skip
        for step in range(15):
            group = optimizer.param_groups[0]
            seen.append(group["momentum"] if "momentum" in group else group["betas"][0])
            set_gradients(params, step)
            optimizer.step()
            s.step()
        results.append(params)
    assert_equal(*results)
    assert max(seen) > 0.8 and min(seen) < 0.6


def test_momentum_that_comes_late_leaves_the_average():
    """SGD begins without momentum, keeping averages: the first buffer is the gradient, and the average goes on."""
    a, b = few_parameters(), few_parameters()
    theirs = torch.optim.SGD(a, lr=0.1, foreach=False)
    ours = fastops.optim.SGD(b, lr=0.1, ema_decay=0.9)
    expected = None
    for step in range(6):
        for o in (theirs, ours):
            o.param_groups[0]["momentum"] = 0.0 if step < 3 else 0.9
            o.param_groups[0]["dampening"] = 0.5
        set_gradients(a, step)
        set_gradients(b, step)
        theirs.step()
        ours.step()
        now = [p.detach().clone() for p in a]
        expected = now if expected is None else [e.lerp(p, 0.1) for e, p in zip(expected, now, strict=True)]  # fmt: skip
    assert_equal(a, b)
    assert_equal([ours.state[p]["ema"] for p in b], expected)


def test_an_error_restores_a_state_that_was_to_be_completed():
    params = few_parameters()
    optimizer = fastops.optim.SGD(params, lr=0.1, ema_decay=0.9)
    set_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["momentum"] = 0.9
    params[2].grad = None
    params[2].grad_dtype = None
    params[2].grad = torch.ones(37, 29)  # float32
    values = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="gradient"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
    assert_equal(params, values)


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(name, options, unscale):
    results = []
    for package in (torch.optim, fastops.optim):
        params = [nn.Parameter(p.detach().float()) for p in few_parameters()]
        optimizer = getattr(package, name)(params, foreach=False, **options)
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            loss = sum((p * (p + step)).sum() for p in params)
            scaler.scale(loss * float("inf") if step in (0, 2) else loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append((params, scaler.get_scale()))
    assert results[0][1] == results[1][1]
    for p, q in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_grad_scaler_leaves_the_scaling_to_a_fused_sgd():
    """_step_supports_amp_scaling is torch's: with fused=True alone, which then gets grad_scale and found_inf."""
    params = [nn.Parameter(torch.ones(3))]
    optimizer = fastops.optim.SGD(params, lr=0.5, fused=True)
    assert optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(params[0].sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(params[0].grad, torch.ones(3))  # the scale is divided out within the step
    assert torch.equal(params[0].detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize(("name", "options"), [*CHECKPOINTED, ("Adam", {"amsgrad": True})], ids=str)
def test_equal_bits_for_any_number_of_threads(name, options):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = [nn.Parameter(rand(n, seed=n).float()) for n in (100_003, 70_001, 5, 90_300)]
            optimizer = getattr(fastops.optim, name)(params, max_grad_norm=1.0, ema_decay=0.9, **options)  # fmt: skip
            for step in range(2):
                for k, p in enumerate(params):
                    p.grad = rand(*p.shape, seed=10 * step + k).float()
                optimizer.step()
            results.append([*params, *(v for s in optimizer.state.values() for v in s.values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_a_parameter_listed_twice(name, options):
    ps = [nn.Parameter(rand(30)) for _ in range(2)]
    for p, package in zip(ps, (torch.optim, fastops.optim), strict=True):
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = getattr(package, name)([p, p], foreach=False, **options)
        for step in range(3):
            p.grad = rand(30, seed=step)
            optimizer.step()
    assert_equal(ps[:1], ps[1:])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")  # fmt: skip
def test_averages_of_dtensors(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)  # fmt: skip
    try:
        mesh = init_device_mesh("cpu", (1,))
        ps = [nn.Parameter(distribute_tensor(rand(6, 4, seed=k), mesh, [Shard(0)])) for k in range(3)]  # fmt: skip
        qs = [nn.Parameter(rand(6, 4, seed=k)) for k in range(3)]
        a, b = (fastops.optim.Adam(x, ema_decay=0.9) for x in (ps, qs))
        for step in range(3):
            set_gradients(qs, step)
            for p, q in zip(ps, qs, strict=True):
                p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)])
            a.step()
            b.step()
        assert_equal([p.detach().full_tensor() for p in ps], [q.detach() for q in qs])
        assert_equal([a.state[p]["ema"].full_tensor() for p in ps], [b.state[q]["ema"] for q in qs])
        c = fastops.optim.Adam(ps, rounding="stochastic")
        with pytest.raises(
            RuntimeError, match='rounding="stochastic" is not available for DTensors'
        ):
            c.step()
        assert not c.state
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------ interrupted steps


class Interrupted:
    """The plan of an optimizer, with an interrupt just before its kernels, or while they run: that one is raised where the
    call of them returns."""

    def __init__(self, optimizer, late):
        self.optimizer, self.plan, self.late = optimizer, optimizer._stepper, late

    def __getattr__(self, name):
        return getattr(self.plan, name)

    def step(self, *args, check_only=False, **kwargs):
        found = self.plan.step(*args, check_only=True, **kwargs)
        if check_only or found is not None:
            return found
        if self.late:
            self.plan.step(*args, **kwargs)
        raise KeyboardInterrupt

    def __enter__(self):
        self.optimizer._stepper = self

    def __exit__(self, *_):
        self.optimizer._stepper = self.plan


def whole(t):
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return t.detach().to_dense().clone()


def held(optimizer):
    """All that a step may change, as it is now."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    states = [{k: v if v is None else whole(v) for k, v in optimizer.state[p].items()} if p in optimizer.state else None for p in params]  # fmt: skip
    return [whole(p) for p in params], states, [g.get("rounding_steps", 0) for g in optimizer.param_groups]  # fmt: skip


def assert_same(a, b):
    assert a[2] == b[2]
    torch.testing.assert_close(a[:1], b[:1], rtol=0, atol=0)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, allow_subclasses=False)


@pytest.mark.parametrize("late", [False, True], ids=["before the kernels", "while they run"])
def test_an_interrupt_leaves_a_whole_step_or_none(configured, late):
    """The first step, which makes the states, and later ones."""
    _, ours, options = configured
    lists = few_parameters(), few_parameters()
    more = {"ema_decay": 0.9, "max_grad_norm": 1.0, "rounding": "stochastic", **options}
    a, b = (ours(params, **more) for params in lists)
    for step in range(3):
        for params in lists:
            set_gradients(params, step)
        b.step()
        before = held(a)
        with Interrupted(a, late), pytest.raises(KeyboardInterrupt):
            a.step()
        if not late:
            assert_same(held(a), before)
            a.step()
        assert_same(held(a), held(b))


def sparsely(params, step):
    """Gradients of which the first and the last are sparse."""
    for p in (params[0], params[-1]):
        rows = torch.tensor([1 + step, 3, 3, 0])
        p.grad = torch.sparse_coo_tensor(
            rows[None], rand(4, p.shape[1], seed=step), p.shape, check_invariants=True
        )
    params[1].grad = rand(*params[1].shape, seed=step)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_group_that_torch_refuses_leaves_the_others(momentum, steps):
    """Sparse gradients are stepped by torch, which fails at the weight decay of the second of their groups."""
    params = [nn.Parameter(rand(9, 4)), nn.Parameter(rand(5)), nn.Parameter(rand(7, 3))]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = fastops.optim.SGD(groups, lr=0.1, momentum=momentum)
    for step in range(steps):
        sparsely(params, step)
        optimizer.step()
    before = held(optimizer)
    sparsely(params, 4)
    optimizer.param_groups[1]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(held(optimizer), before)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    optimizer.step()
    assert not any(map(torch.equal, held(optimizer)[0], before[0]))


@pytest.mark.parametrize("late", [False, True], ids=["before the kernels", "while they run"])
def test_an_interrupt_after_torchs_part(late):
    """Torch has stepped the sparse gradients when the interrupt comes; a dense buffer moves all rows."""
    lists = [[nn.Parameter(rand(9, 4)), nn.Parameter(rand(5)), nn.Parameter(rand(7, 3))] for _ in range(2)]  # fmt: skip
    a, b = (fastops.optim.SGD(params, lr=0.1, momentum=0.9) for params in lists)
    for step in range(4):
        for params in lists:
            sparsely(params, step)
            if step == 0:
                params[2].grad = params[2].grad.to_dense()
        b.step()
        before = held(a)
        with Interrupted(a, late), pytest.raises(KeyboardInterrupt):
            a.step()
        if not late:
            assert_same(held(a), before)
            a.step()
        assert_same(held(a), held(b))


def test_hooks_that_raise(configured):
    """Before a step nothing has been changed, after it everything has."""
    _, ours, options = configured
    lists = few_parameters(), few_parameters()
    a, b = (ours(params, **options) for params in lists)

    def interrupt(*_):
        raise KeyboardInterrupt

    for step in range(2):
        for params in lists:
            set_gradients(params, step)
        b.step()
        before = held(a)
        hook = a.register_step_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            a.step()
        hook.remove()
        assert_same(held(a), before)
        with pytest.raises(KeyboardInterrupt):
            a.step(interrupt)  # as a closure
        assert_same(held(a), before)
        hook = a.register_step_post_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            a.step()
        hook.remove()
        assert_same(held(a), held(b))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")  # fmt: skip
@pytest.mark.parametrize("late", [False, True], ids=["before the kernels", "while they run"])
def test_an_interrupt_among_dtensors(tmp_path, late):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)  # fmt: skip
    try:
        mesh = init_device_mesh("cpu", (1,))
        lists = [[nn.Parameter(distribute_tensor(rand(6, 4), mesh, [Shard(0)])), nn.Parameter(rand(5))] for _ in range(2)]  # fmt: skip
        a, b = (fastops.optim.SGD(params, momentum=0.9, dampening=0.5, ema_decay=0.9) for params in lists)  # fmt: skip
        for step in range(3):
            for p, q in lists:
                p.grad = distribute_tensor(rand(6, 4, seed=step), mesh, [Shard(0)])
                q.grad = rand(5, seed=step)
            b.step()
            before = held(a)
            with Interrupted(a, late), pytest.raises(KeyboardInterrupt):
                a.step()
            if not late:
                assert_same(held(a), before)
                a.step()
            assert_same(held(a), held(b))
    finally:
        torch.distributed.destroy_process_group()


def test_repr_says_what_holds_for_every_group():
    w = [torch.nn.Parameter(torch.ones(2))]
    plain = repr(fastops.optim.SGD(w))
    assert (
        plain.startswith("SGD (\nParameter Group 0\n    dampening: 0\n")
        and "max_grad_norm" not in plain
    )
    given = repr(fastops.optim.SGD(w, max_grad_norm=1.5, ema_decay=0.9))
    assert given == plain[:-1] + "Every Group\n    max_grad_norm: 1.5\n    ema_decay: 0.9\n)"
