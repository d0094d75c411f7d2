"""States in bfloat16 and stochastic rounding: the bits, that the mean is right, and that training does not stall."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from rounding_cases import BF16, parameters, philox, rand, rounded
from torch import nn

import fastops.optim

pytestmark = pytest.mark.quick

CONFIGURATIONS = {
    "Adam": {},
    "Adam amsgrad": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "SGD": {"lr": 0.05},
    "SGD momentum": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "RMSprop": {},
    "RMSprop centered": {"centered": True, "momentum": 0.5, "eps": 1e-3},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "ASGD": {},
}
every = pytest.mark.parametrize("name", CONFIGURATIONS)
NUMBERS = {"step", "mu_product", "eta", "mu"}  # of a state, beside its tensors
ISAS = ["default", "avx2"] + ["avx512"] * torch.cpu._is_avx512_supported()


def make(name, params, **more):
    return getattr(fastops.optim, name.split()[0])(params, **CONFIGURATIONS[name], **more)


def train(optimizer, steps, start=0):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(start, start + steps):
        for k, p in enumerate(params):
            p.grad = (torch.cos(p.detach().float()) + rand(*p.shape, seed=100 * step + k)).to(p.dtype)  # fmt: skip
        optimizer.step()
    return params


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------ the bits


def test_philox_known_answer():
    # Random123's kat_vectors
    ones = 0xFFFFFFFF
    assert philox(np.zeros(1), 0, 0, 0)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # fmt: skip
    assert philox(np.array([2**64 - 1], np.uint64), 2**64 - 1, ones, ones)[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]  # fmt: skip


@pytest.mark.parametrize("shapes", [[(70_003,), (5,), (300, 301)], [(1,), (0,), (63,), (64, 65)]])
def test_rounding_is_philox_of_the_element(shapes):
    """SGD with a step of 2^-9 computes without rounding, so that every bit of the result is known."""
    params = parameters(BF16, *shapes)
    optimizer = fastops.optim.SGD(params, lr=2.0**-9, rounding="stochastic")
    seed = optimizer.param_groups[0]["rounding_seed"]
    for step in range(3):
        before = [p.detach().clone() for p in params]
        for k, p in enumerate(params):
            p.grad = rand(*p.shape, dtype=BF16, seed=10 * step + k)
        optimizer.step()
        for number, (p, old) in enumerate(zip(params, before, strict=True)):
            exact = old.double() - 2.0**-9 * p.grad.double()
            assert torch.equal(p, rounded(exact.float(), seed, step, number, 0))


def test_states_are_rounded_too():
    """The buffer of momentum 1/2 after one step is the gradient, then half of itself and the gradient: exact in float32."""
    for dtype, state_dtype in ((BF16, None), (torch.float32, BF16)):
        p = nn.Parameter(rand(1001, dtype=dtype))
        optimizer = fastops.optim.SGD([p], lr=2.0**-9, momentum=0.5, rounding="stochastic", state_dtype=state_dtype)  # fmt: skip
        seed, buffer = optimizer.param_groups[0]["rounding_seed"], torch.zeros(1001)
        for step in range(3):
            p.grad = rand(1001, dtype=BF16, seed=step).to(dtype)
            exact = (buffer.double() * 0.5 + p.grad.double()).float()
            optimizer.step()
            expected = rounded(exact, seed, step, 0, 1)
            assert torch.equal(optimizer.state[p]["momentum_buffer"], expected)
            buffer = expected.float()


def test_infinities_and_nans_stay():
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.3e38, -0.0, 1e-40]).to(BF16)
    p = nn.Parameter(values.repeat(50))
    optimizer = fastops.optim.SGD([p], lr=1.0, rounding="stochastic")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.isnan(), values.isnan().repeat(50))
    assert torch.equal(p[~p.isnan()], values.repeat(50)[~p.isnan()])


def test_mean_is_the_value_itself():
    """10^6 roundings of each of some values: the mean is within five standard deviations of it, and both neighbours come
    up as often as they should."""
    n = 1_000_000
    for value in (1.0 + 2**-9, 1.0 + 2**-12, -3.7, 1e-3, 0.9999):
        p = nn.Parameter(torch.zeros(n, dtype=BF16))
        p.grad = torch.full((n,), -1.0 if value > 0 else 1.0, dtype=BF16)
        torch.manual_seed(3)
        optimizer = fastops.optim.SGD([p], lr=abs(value), rounding="stochastic")
        optimizer.step()
        value = torch.tensor(value).item()  # float32
        seen, counts = p.detach().double().unique(return_counts=True)
        assert len(seen) == 2 and seen[0] < value < seen[1]
        up = (value - seen[0]) / (seen[1] - seen[0])
        assert abs(counts[1] - n * up) < 5 * (n * up * (1 - up)).sqrt()


def test_neighbours_are_independent():
    """Correlation of the roundings of successive elements, of successive steps, and of a parameter and its state."""
    n = 200_000
    p = nn.Parameter(torch.zeros(n, dtype=BF16))
    torch.manual_seed(4)
    optimizer = fastops.optim.SGD([p], lr=1.0, momentum=0.5, rounding="stochastic")
    series = []
    for _ in range(2):
        p.data.zero_()
        optimizer.state.clear()
        p.grad = torch.full((n,), -1.0, dtype=BF16)
        optimizer.grad_scale = torch.tensor(1 / (1 + 2.0**-8))  # half way between two bfloat16
        optimizer.step()
        up = (p.detach() > 1).double() - 0.5, (optimizer.state[p]["momentum_buffer"] < -1).double() - 0.5  # fmt: skip
        assert all(abs(u.mean()) < 0.01 for u in up)
        series += up
    pairs = [(series[0][1:], series[0][:-1]), (series[0][4:], series[0][:-4])]
    pairs += [(series[i], series[j]) for i in range(4) for j in range(i)]
    for a, b in pairs:
        assert abs((a * b).mean() / 0.25) < 5 / n**0.5


@every
@pytest.mark.parametrize("kind", ["bfloat16", "float32 states", "bfloat16 states"])
def test_equal_bits_for_any_number_of_threads(name, kind):
    dtype = torch.float32 if kind == "bfloat16 states" else BF16
    state_dtype = {"float32 states": torch.float32, "bfloat16 states": BF16}.get(kind)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            params = parameters(dtype, (100_003,), (70_001,), (5,), (300, 301))
            optimizer = make(name, params, rounding="stochastic", state_dtype=state_dtype)
            train(optimizer, 2)
            results.append([*params, *(v for s in optimizer.state.values() for v in s.values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_equal_bits_on_every_instruction_set():
    code = (
        "import json, torch, fastops.optim as o\n"
        "torch.manual_seed(0)\n"
        "ps = [torch.nn.Parameter(torch.randn(n).bfloat16()) for n in (3, 1000, 7777)]\n"
        "t = o.SGD(ps, lr=2.0**-9, momentum=.5, rounding='stochastic')\n"
        "for _ in range(3):\n"
        "    for p in ps: p.grad = (torch.randn(p.shape) * 16).round().bfloat16() / 16\n"
        "    t.step()\n"
        "bits = [v.view(torch.int16).tolist() for p in ps for v in (p.detach(), t.state[p]['momentum_buffer'])]\n"
        "print(json.dumps(bits))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": isa}, capture_output=True, text=True, check=True,
        ).stdout
        for isa in ISAS
    }  # fmt: skip
    assert len(outputs) == 1 and json.loads(outputs.pop())


# ------------------------------------------------------------------------------------------------ what it is for


# The steps of the others do not stay at lr where the gradients do.
@pytest.mark.parametrize(
    "name", [n for n in CONFIGURATIONS if n not in ("Adagrad", "Adadelta", "RAdam", "Rprop")]
)
def test_small_updates_are_not_lost(name):
    """1 - 2^-11 a step is less than bfloat16 can tell from 1: rounded to the nearest, the parameter never moves;
    stochastically, it moves as far as a float32 one."""
    name_of_class = name.split()[0]
    results = []
    for dtype, rounding in ((torch.float32, "nearest"), (BF16, "nearest"), (BF16, "stochastic")):
        torch.manual_seed(1)
        p = nn.Parameter(torch.ones(4096, dtype=dtype))
        options = {**CONFIGURATIONS[name], "lr": 2.0**-11, "weight_decay": 0.0, "rounding": rounding}  # fmt: skip
        options.pop("momentum", None)
        options.pop("nesterov", None)
        optimizer = getattr(fastops.optim, name_of_class)([p], **options)
        for step in range(100):
            # Constant for SGD and Adam; RMSprop's centered moments of a constant cancel.
            sign = 1.0 if "centered" not in name or step % 4 else -1.0
            p.grad = torch.full_like(p, sign)
            optimizer.step()
        results.append(p.detach().double())
    exact, nearest, stochastic = results
    moved = 1 - exact.mean()
    assert moved > 0.02
    if "RMSprop" not in name:  # whose first steps are large enough for bfloat16
        assert torch.equal(nearest, torch.ones_like(nearest))
    assert abs(1 - nearest.mean() - moved) > 0.3 * moved
    assert abs(1 - stochastic.mean() - moved) < 0.05 * moved


def test_second_moment_in_bfloat16_decays_only_with_stochastic_rounding():
    """0.999 of a bfloat16 is rounded to itself. The gradients of a run become a hundredth of what they were."""
    results = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(2)
        p = nn.Parameter(torch.zeros(4096))
        optimizer = fastops.optim.Adam([p], state_dtype=BF16, rounding=rounding)
        for step in range(1500):
            p.grad = torch.full_like(p, 1.0 if step < 300 else 0.01)
            optimizer.step()
        results[rounding] = optimizer.state[p]["exp_avg_sq"].double().mean().item()
        assert optimizer.state[p]["exp_avg_sq"].dtype == BF16
    exact = 0.0
    for step in range(1500):
        exact = 0.999 * exact + 0.001 * (1.0 if step < 300 else 1e-4)
    assert results["stochastic"] == pytest.approx(exact, rel=0.02)
    assert results["nearest"] > 2 * exact


# ------------------------------------------------------------------------------------------------ states in bfloat16


@every
def test_states_in_bfloat16(name):
    """One step from bfloat16 states is the float32 step from the same values; what is stored is rounded once."""
    params = parameters(torch.float32)
    ours = make(name, params, state_dtype=BF16)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    float_states = make(name, copies)
    train(ours, 1), train(float_states, 1)
    for step in range(1, 6):
        for p, q in zip(params, copies, strict=True):
            q.data.copy_(p.detach())
            for key, value in ours.state[p].items():
                float_states.state[q][key] = value.float().clone()
        train(ours, 1, start=step), train(float_states, 1, start=step)
        for p, q in zip(params, copies, strict=True):
            assert torch.equal(p, q)
            for key, value in ours.state[p].items():
                if key not in NUMBERS:
                    assert value.dtype == BF16 and value.shape == p.shape
                    assert torch.equal(value, float_states.state[q][key].bfloat16())


@every
def test_float32_states_of_bfloat16_parameters(name):
    params = parameters(BF16)
    optimizer = make(name, params, state_dtype=torch.float32)
    train(optimizer, 3)
    kept = [v for s in optimizer.state.values() for k, v in s.items() if k not in NUMBERS]
    assert all(v.dtype == torch.float32 for v in kept)
    again = parameters(BF16)
    other = make(name, again, state_dtype=torch.float32)
    other.load_state_dict(
        saved(optimizer)
    )  # torch alone would round the states to the parameters' dtype
    restored = [v for s in other.state.values() for k, v in s.items() if k not in NUMBERS]
    assert len(kept) == len(restored) and all(map(torch.equal, kept, restored))


def test_channels_last_and_strided():
    for view in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t[..., ::2]):
        ps = [nn.Parameter(view(rand(4, 6, 3, 8)).detach()) for _ in range(2)]
        a = fastops.optim.Adam([ps[0]], state_dtype=BF16)
        q = nn.Parameter(ps[1].detach().contiguous())
        b = fastops.optim.Adam([q], state_dtype=BF16)
        for step in range(3):
            ps[0].grad, q.grad = view(rand(4, 6, 3, 8, seed=step)), view(rand(4, 6, 3, 8, seed=step)).contiguous()  # fmt: skip
            a.step(), b.step()
        assert torch.equal(ps[0], q)


# ------------------------------------------------------------------------------------------------ resuming, and around


@every
@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16 states"])
def test_resuming_is_equal_to_the_bit(name, kind):
    dtype, state_dtype = (BF16, None) if kind == "bfloat16" else (torch.float32, BF16)
    more = {"rounding": "stochastic", "state_dtype": state_dtype, "ema_decay": 0.9}
    torch.manual_seed(5)
    params = parameters(dtype)
    optimizer = make(name, params, **more)
    train(optimizer, 4)
    checkpoint = saved(optimizer)
    values = [p.detach().clone() for p in params]
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(optimizer, 4, start=4)
    torch.manual_seed(99)  # the seed is the checkpoint's
    resumed = make(name, [nn.Parameter(v) for v in values], **more)
    resumed.load_state_dict(checkpoint)
    for other in (resumed, *twins):
        again = train(other, 4, start=4)
        assert all(map(torch.equal, params, again))
        for p, q in zip(params, again, strict=True):
            assert list(optimizer.state[p]) == list(other.state[q])
            assert all(map(torch.equal, optimizer.state[p].values(), other.state[q].values()))


@every
def test_manual_seed_rules(name):
    def run(seed):
        torch.manual_seed(seed)
        return train(make(name, parameters(BF16), rounding="stochastic"), 3)

    a, b, c = run(0), run(0), run(1)
    assert all(map(torch.equal, a, b))
    assert not all(map(torch.equal, a, c))


def test_off_draws_nothing_and_keeps_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    optimizer = fastops.optim.SGD(parameters(BF16))
    train_state = torch.get_rng_state()
    assert torch.equal(before, train_state)
    assert not any("rounding_seed" in g or "rounding_steps" in g for g in optimizer.param_groups)


def test_groups_have_roundings_and_seeds_of_their_own():
    params = parameters(BF16, (512,), (512,), (512,))
    params[1].data.copy_(params[0].detach()), params[2].data.copy_(params[0].detach())
    groups = [{"params": [params[0]]}, {"params": [params[1]]}, {"params": [params[2]], "rounding": "nearest"}]  # fmt: skip
    optimizer = fastops.optim.SGD(groups, lr=2.0**-9, rounding="stochastic")
    for p in params:
        p.grad = torch.ones_like(p)
    expected = (params[2].detach().float() - 2.0**-9).bfloat16()
    optimizer.step()
    assert torch.equal(params[2], expected)
    assert not torch.equal(params[0], params[1])


@every
def test_torchs_checkpoint(name):
    """Loads, into the dtype of the states asked for, and the seed stays."""
    params = parameters(torch.float32)
    native = getattr(torch.optim, name.split()[0])(params, **CONFIGURATIONS[name])
    train(native, 2)
    optimizer = make(name, parameters(torch.float32), state_dtype=BF16, rounding="stochastic")
    seed = optimizer.param_groups[0]["rounding_seed"]
    optimizer.load_state_dict(saved(native))
    group = optimizer.param_groups[0]
    assert (group["rounding"], group["rounding_seed"]) == ("stochastic", seed)
    for p, q in zip(params, group["params"], strict=True):
        for key, value in native.state[p].items():
            kept = optimizer.state[q][key]
            assert torch.equal(kept, value if key in NUMBERS else value.bfloat16())
    train(optimizer, 1)
    # and back
    native.load_state_dict(saved(optimizer))
    train(native, 1)


@every
def test_an_infinity_found_leaves_everything(name):
    params = parameters(BF16)
    optimizer = make(name, params, rounding="stochastic")
    train(optimizer, 1)
    before = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = optimizer.state_dict()
    assert after["param_groups"] == before[0]["param_groups"]
    kept = [(after["state"], [p.detach() for p in params]), (before[0]["state"], before[1])]
    torch.testing.assert_close(*kept, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
def test_bad_arguments(name):
    cls = getattr(fastops.optim, name)
    for bad, message in [
        ({"rounding": "up"}, "Invalid rounding: 'up'; it is 'nearest' or 'stochastic'"),
        ({"state_dtype": torch.float16}, "Invalid state_dtype: torch.float16"),
        ({"state_dtype": torch.int8}, "Invalid state_dtype: torch.int8"),
    ]:
        with pytest.raises(ValueError, match=message):
            cls(parameters(torch.float32), **bad)
    with pytest.raises(ValueError, match=r"one of shape \(5,\) is torch.float64"):
        cls(parameters(torch.float64), state_dtype=BF16)
    optimizer = cls(parameters(torch.float32), state_dtype=BF16)
    with pytest.raises(ValueError, match="is torch.float16"):
        optimizer.add_param_group({"params": parameters(torch.float16)})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="Invalid rounding: 'down'"):
        optimizer.add_param_group({"params": parameters(torch.float32), "rounding": "down"})


@every
def test_stochastic_rounding_of_float16_is_refused(name):
    params = parameters(torch.float16)
    optimizer = make(name, params, rounding="stochastic")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match='is Half; rounding="stochastic" is for BFloat16'):
        train(optimizer, 1)
    assert all(map(torch.equal, params, before))
    assert name == "Adagrad" or not optimizer.state  # which has one from the beginning


@pytest.mark.parametrize("extra", [{"state_dtype": BF16}, {"rounding": "stochastic"}], ids=str)
def test_what_torch_steps_has_neither(extra):
    params = parameters(torch.float32)
    optimizer = fastops.optim.Adam(params, differentiable=True, **extra)
    with pytest.raises(RuntimeError, match="are not available for what torch steps"):
        train(optimizer, 1)
    assert not optimizer.state
