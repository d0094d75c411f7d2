"""torch's own database of optimizers (torch.testing._internal.common_optimizers): every configuration, scheduler and error
that it lists for ours, against torch's for-loop."""

import copy
import io
import warnings

import pytest
import torch
from cases import CUDA, DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastops.optim

INFOS = [info for info in optim_db if info.name in fastops.optim.__all__]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex128, torch.complex64]
FORMS = ["foreach", "fused", None]


def configurations(device):
    return [
        pytest.param(info, i, device, id=f"{info.name}-{given.desc}-{device}")
        for info in INFOS
        for i, given in enumerate(info.optim_inputs_func(device))
    ]


every_configuration = pytest.mark.parametrize("info, index, device", configurations("cpu"))
on_a_gpu_too = pytest.mark.parametrize(
    "info, index, device",
    configurations("cpu")
    + [pytest.param(*p.values, id=p.id, marks=CUDA.marks) for p in configurations("cuda")],
)


def test_all_are_in_the_database():
    assert {info.name for info in INFOS} == set(fastops.optim.__all__) - {"param_groups"}
    assert all(info.optim_inputs_func("cpu") for info in INFOS)


def ours(info):
    return getattr(fastops.optim, info.name)


def options(info, index, device="cpu", dtype=None):
    """Made anew: some are tensors, which a scheduler writes to."""
    return copy.deepcopy(info.optim_inputs_func(device, dtype)[index].kwargs)


def model(dtype, device):
    """(parameters, closure): two layers and something to learn, after torch's own test."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.complex128)

    def cast(t):
        return (t if dtype.is_complex else t.real).to(dtype).contiguous().to(device)

    params = [nn.Parameter(cast(made(*s) * 0.5)) for s in [(5, 9), (9,), (9, 2), (2,)]]
    x, y = cast(made(7, 5)), cast(made(7, 2))

    def loss():
        h = torch.tanh(x @ params[0] + params[1])
        return ((h @ params[2] + params[3] - y).abs() ** 2).mean()

    return params, loss


def descend(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def assert_same(a, b, dtype):
    real = torch.empty((), dtype=dtype).real.dtype
    tolerance = 1e-12 if real is torch.float64 else 100 * torch.finfo(real).eps
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.bfloat16], ids=str)
@on_a_gpu_too
def test_configuration(info, index, device, dtype):
    # In step, by the same gradients: an ascent (maximize) blows up every rounding.
    expected, loss = model(dtype, device)
    params, _ = model(dtype, device)
    theirs = info.optim_cls(expected, **options(info, index, device, dtype), foreach=False)
    mine = ours(info)(params, **options(info, index, device, dtype))
    for _ in range(20):
        descend(theirs, loss, 1)
        for p, q in zip(params, expected, strict=True):
            p.grad = q.grad.clone()
        mine.step()
    assert_same(params, expected, dtype)
    for p, q in zip(params, expected, strict=True):
        assert list(mine.state[p]) == list(theirs.state[q])
        for key, value in theirs.state[q].items():
            assert (mine.state[p][key].dtype, mine.state[p][key].device) == (value.dtype, value.device)  # fmt: skip
            assert_same([mine.state[p][key]], [value], dtype)


@every_configuration
def test_configuration_in_bfloat16(info, index, device):
    """Not farther from float64 than torch, after a step from the same values."""
    results = []
    for cls, dtype, more in (
        (info.optim_cls, torch.float64, {"foreach": False}),
        (info.optim_cls, torch.bfloat16, {"foreach": False}),
        (ours(info), torch.bfloat16, {}),
    ):
        start, _ = model(torch.bfloat16, device)
        params = [nn.Parameter(p.detach().to(dtype)) for p in start]
        for k, p in enumerate(params):
            p.grad = torch.cos((start[k].detach().double() + k) * 3).bfloat16().to(dtype)
        cls(params, **options(info, index, device), **more).step()
        results.append(params)
    for exact, theirs, mine in zip(*results, strict=True):
        scale = exact.abs().max()
        error, allowed = (mine - exact).abs().max(), 2 * (theirs - exact).abs().max()
        assert error <= allowed + 4 * torch.finfo(torch.bfloat16).eps * scale


SCHEDULES = [
    pytest.param(info, k, id=f"{info.name}-{k}")
    for info in INFOS
    for k in range(len(info.scheduler_inputs))
]


@pytest.mark.parametrize("info, which", SCHEDULES)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(info, which, tensor_lr):
    results = []
    for cls, more in ((info.optim_cls, {"foreach": False}), (ours(info), {})):
        params, loss = model(torch.float64, "cpu")
        lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
        optimizer = cls(params, lr=lr, **more)
        schedulers = [make(optimizer) for make in info.scheduler_inputs[which]]
        for _ in range(20):
            descend(optimizer, loss, 1)
            for s in schedulers:
                s.step(loss().item()) if "Plateau" in type(s).__name__ else s.step()
        results.append((params, optimizer.param_groups[0]["lr"]))
    assert_same(results[0][0], results[1][0], torch.float64)
    assert results[0][1] == results[1][1]


ERRORS = [
    pytest.param(info, i, id=f"{info.name}-{e.optimizer_error_input.desc}-{i}")
    for info in INFOS
    for i, e in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize("info, index", ERRORS)
def test_error(info, index):
    error = info.optim_error_inputs_func("cpu", torch.float32)[index]
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(2, 3))]

    def construct():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return ours(info)(params, **given.kwargs)

    if error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            construct()
    else:
        optimizer = construct()
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


@every_configuration
def test_older_checkpoints(info, index, device):
    """Without the flags that came after the optimizer did, and Adam's and RMSprop's step a number."""
    for number in (int, float):
        params, loss = model(torch.float64, device)
        native = info.optim_cls(params, **options(info, index), foreach=False)
        descend(native, loss, 3)
        old = copy.deepcopy(native.state_dict())
        for group in old["param_groups"]:
            for flag in info.not_og_supported_flags:
                if flag != "maximize":  # which is not read where it is missing
                    group.pop(flag, None)
        for state in old["state"].values():
            if "step" in state:
                state["step"] = number(state["step"])
        again, again_loss = model(torch.float64, device)
        for p, q in zip(again, params, strict=True):
            p.data.copy_(q.detach())
        mine = ours(info)(again, **options(info, index))
        mine.load_state_dict(old)
        descend(native, loss, 3), descend(mine, again_loss, 3)
        assert_same(params, again, torch.float64)


def construct(info, kind, params, index):
    if kind == "ours":
        return ours(info)(params, **options(info, index))
    form = {"foreach": False} if kind is None else {kind: True}
    return info.optim_cls(params, **options(info, index), **form)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
def test_checkpoints_at_random_steps(info, data):
    """A run handed to and fro between our optimizer and torch's for-loop, foreach and fused, by checkpoints at random
    steps, with gradients missing now and then, ends where the for-loop alone does."""
    if info.name in ("NAdam", "ASGD"):
        # torch loads their numbers beside the step count in the parameter's dtype.
        torch.set_default_dtype(torch.float64)
    try:
        hand_to_and_fro(info, data)
    finally:
        torch.set_default_dtype(torch.float32)


def hand_to_and_fro(info, data):
    forms = [f for f in FORMS if f != "fused" or "cpu" in info.supports_fused_on]
    index = data.draw(st.integers(0, len(info.optim_inputs_func("cpu")) - 1), label="configuration")
    legs = data.draw(
        st.lists(st.tuples(st.sampled_from([*forms, "ours"]), st.integers(0, 4)), min_size=1, max_size=5), label="legs",
    )  # fmt: skip
    # torch's fused SGD raises where one of its parameters has its first gradient late
    late = data.draw(st.booleans(), label="late") and not any(form == "fused" for form, _ in legs)
    seed = data.draw(st.integers(0, 2**31), label="seed")

    def gradients(params, step):
        for k, p in enumerate(params):
            generator = torch.Generator().manual_seed(seed + 1000 * step + k)
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            absent = late and torch.rand((), generator=generator) < 0.3
            p.grad = None if absent else torch.cos(p.detach() * (1 + k)) + 0.3 * noise

    expected, _ = model(torch.float64, "cpu")
    params, _ = model(torch.float64, "cpu")
    whole, optimizer, step = construct(info, None, expected, index), None, 0
    for kind, steps in legs:
        following = construct(info, kind, params, index)
        if optimizer is not None:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            flags = {k: following.param_groups[0].get(k) for k in ("foreach", "fused")}
            following.load_state_dict(torch.load(file, weights_only=True))
            following.param_groups[0].update({k: v for k, v in flags.items() if k in following.param_groups[0]})  # fmt: skip
        optimizer = following
        for _ in range(steps):
            gradients(expected, step), gradients(params, step)
            whole.step(), optimizer.step()
            step += 1
    assert_same(params, expected, torch.float64)
    for p, q in zip(params, expected, strict=True):
        mine, theirs = optimizer.state[p], whole.state[q]
        assert {k for k, v in mine.items() if v is not None} == {k for k, v in theirs.items() if v is not None}  # fmt: skip
        assert_same([v for v in mine.values() if v is not None], [theirs[k] for k, v in mine.items() if v is not None], torch.float64)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
def test_named_parameters(info, device):
    """Names are kept in the groups and the state_dict, as torch does."""
    results = []
    for cls in (info.optim_cls, ours(info)):
        layer = nn.Linear(3, 2, device=device)
        optimizer = cls(layer.named_parameters(), lr=0.1)
        layer(torch.ones(1, 3, device=device)).sum().backward()
        optimizer.step()
        results.append(optimizer.state_dict()["param_groups"][0]["param_names"])
    assert results[0] == results[1] == ["weight", "bias"]
