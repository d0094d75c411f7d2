"""The optimizers against torch's for-loop: values, layouts, checkpoints, and that an error changes nothing."""

import copy
import inspect
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from optimizer_cases import EVERY, NAMES, PAIRS, gradient, parameters, rand
from torch import nn

import fastops.optim

pytestmark = pytest.mark.quick


@pytest.fixture(params=PAIRS, ids=NAMES)
def pair(request):
    return request.param


@pytest.fixture(params=PAIRS[:2], ids=NAMES[:2])
def adam_pair(request):
    """Of tests that name Adam's options or states; what they show of the shared step holds for the others."""
    return request.param


def clones(params):
    """Parameters with the same values and strides on memory of their own."""
    return [nn.Parameter(restrided(p.detach(), p.stride())) for p in params]


def restrided(t, strides):
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


def train(optimizer, steps, start=0):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for s in range(start, start + steps):
        for k, p in enumerate(params):
            p.grad = gradient(p, s, k)
        optimizer.step()
    return params


def reference(cls, params, **options):
    return cls(params, foreach=False, **options)


def assert_close(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)


def states(optimizer, key):
    return [s[key] for s in optimizer.state.values()]


def snapshot(optimizer):
    """Everything that a step may change, as values."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return (
        [p.detach().clone() for p in params],
        [p._version for p in params],
        {
            i: {k: v.clone() for k, v in optimizer.state[p].items()}
            for i, p in enumerate(params)
            if p in optimizer.state
        },
    )


def assert_untouched(optimizer, before):
    params, versions, state = snapshot(optimizer)
    assert versions == before[1]
    assert state.keys() == before[2].keys()
    for a, b in zip(params, before[0], strict=True):
        assert torch.equal(a, b)
    for i, s in state.items():
        assert s.keys() == before[2][i].keys()
        for k in s:
            assert torch.equal(s[k], before[2][i][k])


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(("pair", "options"), EVERY)
def test_200_steps_are_the_for_loops(pair, options):
    params = parameters()
    theirs, ours = reference(pair[0], params, **options), pair[1](clones(params), **options)
    assert_close(train(theirs, 200), train(ours, 200))
    for key in theirs.state[params[0]]:
        assert_close(states(theirs, key), states(ours, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("pair", "options"), EVERY)
def test_error_to_float64_is_not_more_than_torchs(pair, dtype, options):
    # 1e-8 is 0 in float16, where the for-loop then divides by it
    if "eps" in pair[1]([nn.Parameter(torch.ones(1))]).defaults:
        options = {"eps": 1e-4, **options}
    start = parameters((5,), (3, 4), (130, 257), dtype=dtype)
    gradients = [[gradient(p, s, k) for k, p in enumerate(start)] for s in range(5)]

    def run(cls, params, **more):
        params = [nn.Parameter(p) for p in params]
        optimizer = cls(params, **options, **more)
        for at_step in gradients:
            for p, g in zip(params, at_step, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
        return params

    exact = run(pair[0], [p.detach().double() for p in start], foreach=False)
    theirs = run(pair[0], [p.detach().clone() for p in start], foreach=False)
    ours = run(pair[1], [p.detach().clone() for p in start])
    for e, t, o in zip(exact, theirs, ours, strict=True):
        error, allowed = (o - e).abs().max(), 2 * (t - e).abs().max()
        assert error <= allowed + 4 * torch.finfo(dtype).eps * e.abs().max()


def test_reduced_parameters_with_float32_states(adam_pair):
    for dtype in (torch.bfloat16, torch.float16):
        params = [nn.Parameter(rand(77, dtype=dtype))]
        optimizer = adam_pair[1](params)
        params[0].grad = gradient(params[0], 0)
        optimizer.step()
        state = optimizer.state[params[0]]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].float()
        exact = nn.Parameter(params[0].detach().double())
        theirs = adam_pair[0]([exact], foreach=False)
        exact.grad = torch.zeros_like(exact)
        theirs.state[exact] = {
            k: v.double() if k != "step" else v.clone() for k, v in state.items()
        }
        for s in (1, 2):
            params[0].grad = gradient(params[0], s)
            exact.grad = params[0].grad.double()
            optimizer.step()
            theirs.step()
        assert state["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(
            state["exp_avg"].double(), theirs.state[exact]["exp_avg"], rtol=1e-6, atol=1e-8
        )
        torch.testing.assert_close(
            state["exp_avg_sq"].double(), theirs.state[exact]["exp_avg_sq"], rtol=1e-6, atol=1e-8
        )


def test_complex_parameters(adam_pair):
    for dtype in (torch.complex64, torch.complex128):
        params = [nn.Parameter(torch.complex(rand(6, 5), rand(6, 5, seed=1)).to(dtype))]
        theirs, ours = (
            reference(adam_pair[0], params, amsgrad=True),
            adam_pair[1](clones(params), amsgrad=True),
        )
        for s in range(5):
            for o in (theirs, ours):
                p = o.param_groups[0]["params"][0]
                g = torch.complex(rand(6, 5, seed=s), rand(6, 5, seed=s + 9)).to(dtype)
                g = g.conj() if s % 2 else g  # lazily conjugated, which torch's loop does not take
                p.grad = g.resolve_conj() if o is theirs else g
                o.step()
        tolerance = 1e-12 if dtype == torch.complex128 else 1e-6
        assert_close(params, ours.param_groups[0]["params"], tolerance)


def test_mixed_dtypes_in_one_group(adam_pair):
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    ours = adam_pair[1]([nn.Parameter(torch.ones(33, dtype=d)) for d in kinds], lr=0.1)
    for p in ours.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    ours.step()
    for p in ours.param_groups[0]["params"]:
        assert torch.allclose(
            p.detach().to(torch.complex128), torch.tensor(0.9 + 0j).to(torch.complex128), atol=1e-2
        )


def test_equal_bits_for_any_number_of_threads(adam_pair):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = parameters((100_003,), (70_001,), (5,), (300, 301), dtype=torch.float32)
            results.append(train(adam_pair[1](params, amsgrad=True, weight_decay=0.1), 3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_instruction_set_agrees():
    code = (
        "import json, torch, fastops.optim as o\n"
        "g = torch.Generator().manual_seed(0)\n"
        "ps = [torch.nn.Parameter(torch.randn(n, generator=g, dtype=torch.float64)) for n in (3, 1000)]\n"
        "t = o.Adam(ps, amsgrad=True, weight_decay=.1)\n"
        "for _ in range(5):\n"
        "    for p in ps: p.grad = p.detach().cos()\n"
        "    t.step()\n"
        "print(json.dumps(sum((p.tolist() for p in ps), [])))\n"
    )
    outputs = []
    for isa in ["default", "avx2"] + ["avx512"] * torch.cpu._is_avx512_supported():
        env = {**os.environ, "ATEN_CPU_CAPABILITY": isa}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        outputs.append(torch.tensor(json.loads(run.stdout), dtype=torch.float64))
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0], other, rtol=1e-14, atol=1e-14)


# ------------------------------------------------------------------------------------------------ layouts

SHAPE = (4, 3, 2, 5)


def laid_out(layout, t):
    """(tensor with t's values in this layout, the memory around it)."""
    if layout == "contiguous":
        memory = t.clone()
        return memory, memory
    if layout == "channels_last":
        memory = t.clone(memory_format=torch.channels_last)
        return memory, memory
    if layout == "transposed":
        memory = t.transpose(0, 3).contiguous()
        return memory.transpose(0, 3), memory
    if layout == "strided":
        memory = torch.full((t.shape[0], 2, *t.shape[1:-1], 3 * t.shape[-1]), 7.25, dtype=t.dtype)
        view = memory[:, 1, ..., ::3]
        view.copy_(t)
        return view, memory
    if layout == "expanded":
        memory = t[:1, :, :1].clone()
        return memory.expand(t.shape), memory
    raise AssertionError(layout)


DENSE = ["contiguous", "channels_last", "transposed", "strided"]


@pytest.mark.parametrize("of_state", DENSE)
@pytest.mark.parametrize("of_grad", [*DENSE, "expanded"])
@pytest.mark.parametrize("of_param", DENSE)
def test_every_layout_of_parameter_gradient_and_state(of_param, of_grad, of_state):
    view, memory = laid_out(of_param, rand(*SHAPE))
    canaries = memory.clone()
    ours, theirs = nn.Parameter(view), nn.Parameter(rand(*SHAPE))
    a = reference(torch.optim.Adam, [theirs], amsgrad=True, weight_decay=0.1)
    b = fastops.optim.Adam([ours], amsgrad=True, weight_decay=0.1)
    for s in range(4):
        g, g_memory = laid_out(of_grad, rand(*SHAPE, seed=10 + s))
        g_before = g_memory.clone()
        theirs.grad, ours.grad = g.clone(memory_format=torch.contiguous_format), g
        a.step()
        b.step()
        assert torch.equal(g_memory, g_before)
        if s == 1:
            kept = {k: laid_out(of_state, v) for k, v in b.state[ours].items() if k != "step"}
            before = {k: m.clone() for k, (_, m) in kept.items()}
            b.state[ours].update({k: v for k, (v, _) in kept.items()})
    assert_close([theirs], [ours])
    assert ours.stride() == view.stride() and ours.data_ptr() == view.data_ptr()
    if of_param == "strided":
        view.copy_(rand(*SHAPE))
        assert torch.equal(memory, canaries)
    for key, (v, m) in kept.items():
        assert b.state[ours][key] is v
        assert_close([a.state[theirs][key]], [v])
        if of_state == "strided":
            v.fill_(0)
            before[key][:, 1, ..., ::3] = 0
            assert torch.equal(m, before[key])


def test_0d_empty_and_single_element(adam_pair):
    for shape in ((), (0,), (3, 0, 2), (1,), (1, 1, 1)):
        theirs, ours = nn.Parameter(rand(*shape)), nn.Parameter(rand(*shape))
        a, b = reference(adam_pair[0], [theirs]), adam_pair[1]([ours])
        for s in range(3):
            theirs.grad, ours.grad = rand(*shape, seed=s), rand(*shape, seed=s)
            a.step()
            b.step()
        assert_close([theirs], [ours])
        assert b.state[ours]["step"].item() == 3
        assert b.state[ours]["exp_avg"].shape == shape


def test_views_of_one_flat_buffer(pair):
    flat = [rand(1000), rand(1000)]
    groups = [[nn.Parameter(f[i : i + 100]) for i in range(0, 1000, 100)] for f in flat]
    a, b = reference(pair[0], groups[0]), pair[1](groups[1])
    assert_close(train(a, 5), train(b, 5))
    assert_close([flat[0]], [flat[1]])


def test_interleaved_views(pair):
    flat = [rand(64, 2), rand(64, 2)]
    groups = [[nn.Parameter(f[:, 0]), nn.Parameter(f[:, 1])] for f in flat]
    a, b = reference(pair[0], groups[0]), pair[1](groups[1])
    assert_close(train(a, 5), train(b, 5))
    assert_close([flat[0]], [flat[1]])


def test_two_parameters_on_the_same_memory_take_turns(pair):
    buffers = [rand(300), rand(300)]
    groups = [[nn.Parameter(f[:200]), nn.Parameter(f[100:])] for f in buffers]
    a, b = reference(pair[0], groups[0], lr=0.1), pair[1](groups[1], lr=0.1)
    for s in range(5):
        for ps in groups:
            for k, p in enumerate(ps):
                p.grad = rand(200, seed=10 * s + k)
        a.step()
        b.step()
    assert_close([buffers[0]], [buffers[1]])


def test_a_parameter_listed_twice_is_stepped_twice(adam_pair):
    ps = [nn.Parameter(rand(30)) for _ in range(2)]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        a = reference(adam_pair[0], [ps[0], ps[0]])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        b = adam_pair[1]([ps[1], ps[1]])
    for s in range(3):
        for p in ps:
            p.grad = rand(30, seed=s)
        a.step()
        b.step()
    assert_close(ps[:1], ps[1:])
    assert a.state[ps[0]]["step"] == b.state[ps[1]]["step"] == 6


def test_a_gradient_that_lies_in_another_parameter(pair):
    results = []
    for cls, more in ((pair[0], {"foreach": False}), (pair[1], {})):
        p, q = nn.Parameter(rand(50)), nn.Parameter(rand(50, seed=1))
        o = cls([p, q], lr=0.1, **more)
        for s in range(3):
            p.grad, q.grad = rand(50, seed=s), p.detach()
            o.step()
        results.append([p, q])
    assert_close(*results)


# ------------------------------------------------------------------------------------------------ options


def test_arguments_are_torchs(pair):
    theirs, ours = (inspect.signature(c.__init__).parameters for c in pair)
    assert list(theirs) == list(ours)[: len(theirs)]
    assert [p.default for p in theirs.values()] == [
        p.default for p in list(ours.values())[: len(theirs)]
    ]
    p = nn.Parameter(torch.ones(1))
    a, b = pair[0]([p]), pair[1]([p])
    assert isinstance(b, pair[0])
    assert {k: v for k, v in b.param_groups[0].items() if k in a.param_groups[0]} == a.param_groups[
        0
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1}, {"eps": -1e-8}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1},
        {"betas": (0.9, torch.tensor(0.9))}, {"lr": torch.ones(2)}, {"lr": torch.tensor(0.1), "foreach": True},
        {"fused": True, "foreach": True}, {"fused": True, "differentiable": True}, {"no_such_option": 1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_raise_what_torch_raises(adam_pair, options):
    errors = []
    for cls in adam_pair:
        with pytest.raises((ValueError, RuntimeError, TypeError)) as e:
            cls([nn.Parameter(torch.ones(1))], **options)
        errors.append((e.type, str(e.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "params", [torch.ones(1), [], [torch.ones(1, requires_grad=True) * 2], [1], [{"params": {1}}]]
)
def test_bad_parameters_raise_what_torch_raises(pair, params):
    errors = []
    for cls in pair:
        with pytest.raises((ValueError, TypeError)) as e:
            cls(params)
        errors.append((e.type, str(e.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_foreach_and_fused_are_accepted(adam_pair, flag):
    params = parameters()
    theirs, ours = reference(adam_pair[0], params), adam_pair[1](clones(params), **{flag: True})
    assert_close(train(theirs, 5), train(ours, 5))


def test_options_are_read_at_each_step(adam_pair):
    params = parameters()
    optimizers = [reference(adam_pair[0], params), adam_pair[1](clones(params))]
    changes = [
        ("lr", 0.1),
        ("betas", (0.5, 0.6)),
        ("eps", 1e-2),
        ("weight_decay", 0.3),
        ("maximize", True),
    ]
    for s, (key, value) in enumerate(changes):
        for o in optimizers:
            train(o, 2, start=2 * s)
            o.param_groups[0][key] = value
    assert_close(*(train(o, 2) for o in optimizers))


@pytest.mark.parametrize("as_tensor", ["lr", "betas", "both"])
def test_tensor_options(adam_pair, as_tensor):
    options = {}
    if as_tensor != "betas":
        options["lr"] = torch.tensor(0.01, dtype=torch.float64)
    if as_tensor != "lr":
        options["betas"] = (
            torch.tensor(0.8, dtype=torch.float64),
            torch.tensor([0.99], dtype=torch.float64),
        )
    params = parameters()
    theirs, ours = (
        reference(adam_pair[0], params, **options),
        adam_pair[1](clones(params), **options),
    )
    assert_close(train(theirs, 20), train(ours, 20))


def test_groups(pair):
    params = parameters((3,), (4, 4), (5,), (6,))

    def groups(ps):
        return [
            {"params": ps[:2], "lr": 0.1},
            {"params": ps[2:3], "betas": (0.5, 0.5)},
            {"params": ps[3:], "amsgrad": True},
        ]

    theirs, ours = reference(pair[0], groups(params)), pair[1](groups(clones(params)))
    assert_close(train(theirs, 20), train(ours, 20))


def test_add_param_group(pair):
    params = parameters((3,), (4, 4))
    copies = clones(params)
    theirs, ours = reference(pair[0], params[:1]), pair[1](copies[:1])
    train(theirs, 3), train(ours, 3)
    theirs.add_param_group({"params": params[1:], "lr": 0.5})
    ours.add_param_group({"params": copies[1:], "lr": 0.5})
    assert_close(train(theirs, 3), train(ours, 3))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CyclicLR(
            o, 0.001, 0.1, step_size_up=3, cycle_momentum=True
        ),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
    ids=["StepLR", "OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "ReduceLROnPlateau"],
)
def test_schedulers(adam_pair, scheduler):
    params = parameters()
    results = []
    for o in (reference(adam_pair[0], params), adam_pair[1](clones(params))):
        schedule = scheduler(o)
        for s in range(10):
            train(o, 1, start=s)
            schedule.step(
                *([1.0] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
            )
        results.append([p for g in o.param_groups for p in g["params"]])
    assert_close(*results)


def test_differentiable(pair):
    results = []
    for cls in pair:
        p = torch.ones(3, dtype=torch.float64, requires_grad=True)
        q = p.clone()
        o = cls([nn.Parameter(torch.ones(1))], lr=0.1, differentiable=True)
        o.param_groups[0]["params"] = [q]
        q.grad = 2 * p
        o.step()
        q.sum().backward()
        results.append(p.grad)
    assert_close(results[:1], results[1:])


def test_capturable_on_the_cpu_is_refused_as_by_torch(adam_pair):
    errors = []
    for cls in adam_pair:
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        o = cls([{"params": [q], "capturable": False}, {"params": [p]}], capturable=True)
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        with pytest.raises(AssertionError) as e:
            o.step()
        errors.append(str(e.value))
        if cls is adam_pair[1]:
            assert torch.equal(q, torch.ones(3))
    assert errors[0] == errors[1]


# ------------------------------------------------------------------------------------------------ around the step


def test_closure_and_hooks(pair):
    p = nn.Parameter(torch.tensor([3.0]))
    o = pair[1]([p], lr=0.1)
    seen = []
    o.register_step_pre_hook(lambda *_: seen.append("before"))
    o.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        seen.append("closure")
        assert torch.is_grad_enabled()
        o.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = o.step(closure)
    assert loss.item() == 9 and seen == ["before", "closure", "after"]
    assert p.item() < 3
    seen.clear()
    torch.optim.Adam(
        [nn.Parameter(torch.ones(1))]
    )  # torch wraps its classes' step when one is made
    o.param_groups[0]["differentiable"] = True
    o.step()
    assert seen == ["before", "after"]


def test_grad_scaler(adam_pair):
    for fused in (None, True):
        for inf in (False, True):
            params = parameters((5,), (70, 3), dtype=torch.float32)
            results = []
            for cls, more in ((adam_pair[0], {}), (adam_pair[1], {"fused": fused})):
                ps = [nn.Parameter(p.detach().clone()) for p in params]
                o = cls(ps, lr=0.1, **more)
                scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
                for s in range(4):
                    o.zero_grad()
                    loss = sum((p * (p + s)).sum() for p in ps)
                    if inf and s in (0, 2):
                        loss = loss * float("inf")
                    scaler.scale(loss).backward()
                    if s == 3:
                        scaler.unscale_(o)
                    scaler.step(o)
                    scaler.update()
                results.append((ps, scaler.get_scale()))
            assert results[0][1] == results[1][1]
            assert_close(results[0][0], results[1][0], tolerance=1e-6)
    assert not getattr(adam_pair[1](params), "_step_supports_amp_scaling", False)


def test_no_gradient_no_step(pair):
    p = nn.Parameter(torch.ones(2))
    o = pair[1]([p])
    o.step()
    assert torch.equal(p, torch.ones(2)) and not o.state


def test_deepcopy_and_pickle(pair):
    o = pair[1](parameters())
    train(o, 2)
    twins = [copy.deepcopy(o), pickle.loads(pickle.dumps(o))]
    expected = [p.detach().clone() for p in train(o, 2, start=2)]
    for twin in twins:
        assert_close(expected, train(twin, 2, start=2))


def test_states_replaced_between_steps(adam_pair):
    """Whatever is in `state` and the parameters when step() is called is what counts."""
    params = parameters((3,), (4, 4), (200,))
    theirs, ours = reference(adam_pair[0], params), adam_pair[1](clones(params))

    def replaced(o):
        for p in o.state:
            o.state[p]["exp_avg"] = o.state[p]["exp_avg"].clone() * 2

    def cleared(o):
        o.state.clear()

    def one_removed(o):
        del o.state[o.param_groups[0]["params"][1]]

    def reordered(o):
        items = list(o.state.items())[::-1]
        o.state.clear()
        o.state.update({p: dict(list(s.items())[::-1]) for p, s in items})

    def data_swapped(o):
        for p in o.param_groups[0]["params"]:
            p.data = p.data.clone() + 1

    def data_transposed(o):
        p = o.param_groups[0]["params"][1]
        p.data = p.data.t()

    def storage_set(o):
        for s in o.state.values():
            s["exp_avg_sq"].set_(s["exp_avg_sq"].clone())

    def parameter_exchanged(o):
        o.param_groups[0]["params"][0] = nn.Parameter(torch.ones(9, dtype=torch.float64))

    changes = [
        replaced,
        cleared,
        one_removed,
        reordered,
        data_swapped,
        data_transposed,
        storage_set,
        parameter_exchanged,
    ]
    for s, change in enumerate(changes):
        for o in (theirs, ours):
            train(o, 2, start=2 * s)
            change(o)
        assert_close(train(theirs, 1, start=99), train(ours, 1, start=99))


def test_the_model_changes_dtype(adam_pair):
    model = nn.Linear(3, 2)
    o = adam_pair[1](model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    o.step()
    model.double()
    o.zero_grad()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    before = snapshot(o)
    with pytest.raises(RuntimeError, match="Double but"):
        o.step()
    assert_untouched(o, before)


def test_zero_grad_in_place(pair):
    params = parameters()
    theirs, ours = reference(pair[0], params), pair[1](clones(params))
    for s in range(3):
        for o in (theirs, ours):
            for k, p in enumerate(o.param_groups[0]["params"]):
                o.zero_grad(set_to_none=False)
                p.grad = gradient(p, s, k)
            o.step()
    assert_close(params, ours.param_groups[0]["params"])


# ------------------------------------------------------------------------------------------------ checkpoints

FORMS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_checkpoints_both_ways(adam_pair, form, amsgrad):
    def saved(o):
        file = io.BytesIO()
        torch.save(o.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    options = {"weight_decay": 0.1, "amsgrad": amsgrad}
    params = parameters((3,), (4, 5))
    whole = reference(adam_pair[0], clones(params), **options)
    expected = train(whole, 10)
    for first, second in (
        (lambda p: adam_pair[0](p, **options, **form), lambda p: adam_pair[1](p, **options)),
        (lambda p: adam_pair[1](p, **options), lambda p: adam_pair[0](p, **options, **form)),
        (lambda p: adam_pair[1](p, **options), lambda p: adam_pair[1](p, **options)),
    ):
        a = first(clones(params))
        half = train(a, 5)
        b = second(clones(half))
        b.load_state_dict(saved(a))
        assert_close(expected, train(b, 5, start=5))


def test_checkpoint_is_the_same_as_torchs(adam_pair):
    params = parameters((3,), (4, 5), dtype=torch.float32)
    theirs, ours = (
        reference(adam_pair[0], params, amsgrad=True),
        adam_pair[1](clones(params), amsgrad=True),
    )
    train(theirs, 3), train(ours, 3)
    a, b = theirs.state_dict(), ours.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for i in a["state"]:
        assert list(a["state"][i]) == list(b["state"][i])
        for k, v in a["state"][i].items():
            w = b["state"][i][k]
            assert (v.dtype, v.shape, v.device, v.stride()) == (
                w.dtype,
                w.shape,
                w.device,
                w.stride(),
            )
    for g, h in zip(a["param_groups"], b["param_groups"], strict=True):
        assert {**g, "foreach": None} == {k: h[k] for k in g}


def test_old_checkpoints(adam_pair):
    """Before torch 1.12 a step was a number, and the groups lacked most of today's options."""
    params = parameters((3,), (4, 5))
    whole = reference(adam_pair[0], clones(params))
    expected = train(whole, 10)
    a = reference(adam_pair[0], clones(params))
    half = train(a, 5)
    old = copy.deepcopy(a.state_dict())
    for s in old["state"].values():
        s["step"] = int(s["step"])
    for g in old["param_groups"]:
        for key in (
            "maximize",
            "foreach",
            "capturable",
            "differentiable",
            "fused",
            "amsgrad",
            "decoupled_weight_decay",
        ):
            del g[key]
    b = adam_pair[1](clones(half))
    b.load_state_dict(old)
    assert_close(expected, train(b, 5, start=5))


def test_checkpoint_of_another_memory_format(adam_pair):
    params = [rand(8, 4, 3, 3)]
    whole = reference(adam_pair[0], [nn.Parameter(params[0].clone())])
    expected = train(whole, 6)
    a = adam_pair[0]([nn.Parameter(params[0].clone())])
    half = train(a, 3)
    b = adam_pair[1]([nn.Parameter(half[0].detach().clone(memory_format=torch.channels_last))])
    saved = a.state_dict()
    b.load_state_dict(saved)
    (state,) = b.state.values()
    assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    kept = saved["state"][0]["exp_avg"].clone()
    assert_close(expected, train(b, 3, start=3))
    assert torch.equal(saved["state"][0]["exp_avg"], kept)


def test_float64_default_dtype(pair):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        params = parameters()
        theirs, ours = reference(pair[0], params), pair[1](clones(params))
        assert_close(train(theirs, 5), train(ours, 5))
        assert [s.dtype for s in states(theirs, "step")] == [s.dtype for s in states(ours, "step")]
    finally:
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------ errors


def broken_gradient_dtype(o, p):
    p.grad = None
    p.grad_dtype = None
    p.grad = torch.ones(3, dtype=torch.float32)


def broken_state_shape(o, p):
    o.state[p]["exp_avg"] = torch.ones(4, dtype=torch.float64)


def broken_state_dtype(o, p):
    o.state[p]["exp_avg_sq"] = torch.ones(3, dtype=torch.float32)


def broken_step(o, p):
    o.state[p]["step"] = 3


def broken_sparse(o, p):
    p.grad = None
    p.grad = torch.ones(3, dtype=torch.float64).to_sparse()


def broken_lr(o, p):
    o.param_groups[0]["lr"] = "fast"


def broken_expanded(o, p):
    o.state[p]["exp_avg"] = torch.ones(1, dtype=torch.float64).expand(3)


def broken_missing(o, p):
    del o.state[p]["exp_avg_sq"]


def broken_inference(o, p):
    with torch.inference_mode():
        o.state[p]["exp_avg"] = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (broken_gradient_dtype, RuntimeError, "gradient"),
        (broken_state_shape, RuntimeError, "shape"),
        (broken_state_dtype, RuntimeError, "Float"),
        (
            broken_step,
            RuntimeError,
            "API has changed, `state_steps` argument must contain a list of singleton tensors",
        ),
        (
            broken_sparse,
            RuntimeError,
            "Adam does not support sparse gradients, please consider SparseAdam instead",
        ),
        (broken_lr, ValueError, "could not convert string to float"),
        (broken_expanded, RuntimeError, "more than one element of the written-to tensor"),
        (broken_missing, KeyError, "exp_avg_sq"),
        (
            broken_inference,
            RuntimeError,
            "Inplace update to inference tensor outside InferenceMode is not allowed",
        ),
    ],
)
def test_an_error_changes_nothing(adam_pair, damage, error, message):
    params = parameters((3,), (3,), (3,))
    o = adam_pair[1]([{"params": params[:1]}, {"params": params[1:]}])
    train(o, 2)
    o.add_param_group(
        {"params": parameters((2,))}
    )  # one whose states would be made in this very step
    o.param_groups[2]["params"][0].grad = torch.ones(2, dtype=torch.float64)
    damage(o, params[2])
    before = (
        [p.detach().clone() for p in params], [p._version for p in params],
        [{k: (v.clone(), v._version) for k, v in o.state[p].items() if isinstance(v, torch.Tensor) and not v.is_inference()}
         for p in params],
    )  # fmt: skip
    with pytest.raises(error, match=message):
        o.step()
    assert len(o.state) == 3
    assert [p._version for p in params] == before[1]
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    for p, kept in zip(params, before[2], strict=True):
        for k, (v, version) in kept.items():
            assert torch.equal(o.state[p][k], v) and o.state[p][k]._version == version


def test_expanded_parameter_is_refused(pair):
    p = nn.Parameter(torch.ones(1).expand(3))
    o = pair[1]([p])
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        o.step()
    assert torch.equal(p, torch.ones(3)) and not o.state


# ------------------------------------------------------------------------------------------------ the op


def op_arguments(amsgrad=False, **options):
    p, g, m, v = (rand(3, 5, dtype=torch.float32, seed=i) for i in range(4))
    lists = [[p], [g], [m], [v.abs()], *([[v.abs() * 2]] if amsgrad else []), [torch.tensor(4.0)]]
    return lists, {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        **options,
    }


@pytest.mark.parametrize("amsgrad", [False, True])
def test_op(amsgrad):
    op = torch.ops.fastops.adam_amsgrad_ if amsgrad else torch.ops.fastops.adam_
    lists, options = op_arguments(amsgrad)
    torch.library.opcheck(op.default, tuple(lists), options)
    versions = [[t._version for t in column] for column in lists]
    expected = copy.deepcopy(lists)
    op(*lists, **options)
    for k, column in enumerate(lists):
        assert [t._version for t in column] == [v + (k != 1) for v in versions[k]]
    torch._fused_adam_(
        *expected[: 4 + amsgrad], *([[]] if not amsgrad else []), [expected[-1][0].add_(1)],
        **options, amsgrad=amsgrad, maximize=False,
    )  # fmt: skip
    for column, other in zip(lists, expected, strict=True):
        torch.testing.assert_close(column, other, rtol=1e-6, atol=1e-6)


def test_op_compiles():
    lists, options = op_arguments()
    expected = copy.deepcopy(lists)
    torch.ops.fastops.adam_(*expected, **options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(lists):
        torch.ops.fastops.adam_(*lists, **options)
        return lists[0][0] * 2

    assert torch.equal(f(lists), expected[0][0] * 2)
    assert torch.equal(lists[2][0], expected[2][0])


def test_op_refuses_what_requires_grad_and_uneven_lists():
    lists, options = op_arguments()
    lists[0][0].requires_grad_()
    with pytest.raises(RuntimeError, match="torch.no_grad"):
        torch.ops.fastops.adam_(*lists, **options)
    with torch.no_grad(), pytest.raises(RuntimeError, match="1 params but 0 of exp_avg"):
        torch.ops.fastops.adam_(*lists[:2], [], *lists[3:], **options)


# ------------------------------------------------------------------------------------------------ other tensors


def test_compiled_step(pair):
    params = parameters((3,), (4, 4))
    theirs, ours = reference(pair[0], params), pair[1](clones(params))
    steps = [torch.compile(o.step, backend="eager") for o in (theirs, ours)]
    for s in range(3):
        for o, step in zip((theirs, ours), steps, strict=True):
            for k, p in enumerate(o.param_groups[0]["params"]):
                p.grad = gradient(p, s, k)
            step()
    assert_close(params, ours.param_groups[0]["params"])


def test_parameter_subclasses(pair):
    class Mine(nn.Parameter):
        pass

    ps = [nn.Parameter(rand(6)), Mine(rand(6)), nn.Parameter(rand(6, seed=4))]
    qs = [nn.Parameter(rand(6)), nn.Parameter(rand(6)), nn.Parameter(rand(6, seed=4))]
    assert_close(train(reference(pair[0], qs), 3), train(pair[1](ps), 3))


def test_meta_parameters(adam_pair):
    p = nn.Parameter(torch.ones(3, device="meta"))
    o = adam_pair[1]([p])
    p.grad = torch.ones(3, device="meta")
    o.step()
    assert o.state[p]["exp_avg"].device.type == "meta"


@pytest.fixture
def process_group(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no distributed package")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_dtensor_parameters(adam_pair, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    ps = [nn.Parameter(distribute_tensor(rand(6, 4, seed=i), mesh, [Shard(0)])) for i in range(2)]
    qs = [nn.Parameter(rand(6, 4, seed=i)) for i in range(2)]
    ps.append(nn.Parameter(rand(5)))
    qs.append(nn.Parameter(rand(5)))
    a, b = reference(adam_pair[0], qs), adam_pair[1](ps)
    for s in range(3):
        for k, (p, q) in enumerate(zip(ps, qs, strict=True)):
            q.grad = gradient(q, s, k)
            p.grad = (
                distribute_tensor(q.grad.clone(), mesh, [Shard(0)]) if k < 2 else q.grad.clone()
            )
        version = ps[0]._version
        a.step()
        b.step()
        assert ps[0]._version > version
    assert isinstance(b.state[ps[0]]["exp_avg"], DTensor)
    assert_close(qs, [p.full_tensor() if isinstance(p, DTensor) else p for p in ps])
