"""ema_decay: the averages that the optimizers keep within their step."""

import copy
import io
import pickle

import pytest
import torch
from optimizer_cases import CONFIGURATIONS, few_parameters, rand, set_gradients
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastops.optim

pytestmark = pytest.mark.quick

DECAY = 0.9


@pytest.fixture(params=CONFIGURATIONS)
def configured(request):
    name = request.param.split()[0]
    return getattr(torch.optim, name), getattr(fastops.optim, name), CONFIGURATIONS[request.param]


def averages(optimizer, params):
    return [optimizer.state[p]["ema"] for p in params]


def assert_close(a, b, tolerance=1e-12):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_equals_torchs_averaged_model(configured):
    theirs, ours, options = configured
    a, b = nn.ParameterList(few_parameters()), few_parameters()
    x, y = theirs(a, **options), ours(b, ema_decay=DECAY, **options)
    averaged = AveragedModel(a, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step in range(20):
        set_gradients(list(a), step)
        set_gradients(b, step)
        x.step()
        averaged.update_parameters(a)
        y.step()
        assert_close(list(a), b)
        assert_close(list(averaged.module), averages(y, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_reduced_parameters_in_float32(configured, dtype):
    _, ours, options = configured
    params = [nn.Parameter(rand(37, 29).to(dtype))]
    optimizer = ours(params, ema_decay=0.999, **options)
    for step in range(5):
        params[0].grad = rand(37, 29, seed=step).to(dtype)
        before = optimizer.state[params[0]].get("ema")
        before = None if before is None else before.clone()
        optimizer.step()
        (average,) = averages(optimizer, params)
        assert average.dtype == torch.float32
        value = params[0].detach().float()
        expected = value if before is None else before.lerp(value, 0.001)
        torch.testing.assert_close(
            average, expected, rtol=1e-2 if before is None else 1e-4, atol=1e-4
        )


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, configured):
    _, ours, options = configured
    a, b = nn.Parameter(rand(4, 3, 5, 7)), nn.Parameter(LAYOUTS[layout](rand(4, 3, 5, 7)))
    x, y = ours([a], ema_decay=DECAY, **options), ours([b], ema_decay=DECAY, **options)
    for step in range(4):
        a.grad = rand(4, 3, 5, 7, seed=step)
        b.grad = rand(4, 3, 5, 7, seed=step)
        x.step()
        y.step()
    assert torch.equal(a, b)
    assert torch.equal(x.state[a]["ema"], y.state[b]["ema"])


def stepped(ours=fastops.optim.AdamW, steps=3, **options):
    params = few_parameters()
    optimizer = ours(params, ema_decay=DECAY, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


def test_swap(configured):
    _, ours, options = configured
    params, optimizer = stepped(ours, **options)
    own, kept = (
        [p.detach().clone() for p in params],
        [t.clone() for t in averages(optimizer, params)],
    )
    with optimizer.swap_ema() as given:
        assert given is optimizer
        assert all(torch.equal(p, t) for p, t in zip(params, kept, strict=True))
        with pytest.raises(RuntimeError, match=r"swap_ema\(\) before step"):
            optimizer.step()
    assert all(torch.equal(p, t) for p, t in zip(params, own, strict=True))
    assert all(torch.equal(p, t) for p, t in zip(averages(optimizer, params), kept, strict=True))
    optimizer.swap_ema()
    assert torch.equal(params[2], kept[2])
    optimizer.swap_ema()
    assert torch.equal(params[2], own[2])
    set_gradients(params, 9)
    optimizer.step()
    with pytest.raises(ZeroDivisionError), optimizer.swap_ema():
        1 / 0  # noqa: B018
    assert not torch.equal(params[2], averages(optimizer, params)[2])
    with optimizer.swap_ema():
        optimizer.swap_ema()  # back before the end of the block
        current = params[2].detach().clone()
    assert torch.equal(params[2], current)


def test_nested_swaps_are_of_the_averages_too():
    params, optimizer = stepped()
    own, kept = ([t.detach().clone() for t in ts] for ts in (params, averages(optimizer, params)))

    def evaluate():
        with optimizer.swap_ema():
            assert all(map(torch.equal, params, kept))

    with optimizer.swap_ema():
        evaluate()
        assert all(map(torch.equal, params, kept))
        with pytest.raises(ZeroDivisionError), optimizer.swap_ema():
            1 / 0  # noqa: B018
        assert all(map(torch.equal, params, kept))
        with optimizer.swap_ema():
            optimizer.swap_ema()
            assert all(map(torch.equal, params, own))
        assert all(map(torch.equal, params, kept))
    assert all(map(torch.equal, params, own))
    set_gradients(params, 4)
    optimizer.step()


@pytest.mark.parametrize("call", ["state_dict", "load_state_dict"])
def test_no_checkpoint_while_the_averages_stand_in(call):
    params, optimizer = stepped()
    saved = optimizer.state_dict()
    own = [p.detach().clone() for p in params]
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match=rf"before {call}\(\)"):
        getattr(optimizer, call)(*[saved] * (call == "load_state_dict"))
    assert all(map(torch.equal, params, own))
    optimizer.load_state_dict(optimizer.state_dict())


def network_with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2))
    optimizer = fastops.optim.SGD(model.parameters(), lr=0.5, ema_decay=DECAY)
    batches = [rand(16, 5, seed=k).float() for k in range(4)]
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval(), optimizer, batches


def test_batch_norm_statistics_of_the_averages():
    model, optimizer, batches = network_with_batch_norm()
    before = copy.deepcopy(model.state_dict())
    averaged = copy.deepcopy(model)
    for p, q in zip(averaged.parameters(), model.parameters(), strict=True):
        p.data.copy_(optimizer.state[q]["ema"])
    torch.optim.swa_utils.update_bn(batches, averaged)

    def same(a, b):
        return all(torch.equal(t, b[k]) for k, t in a.items())

    def assert_averaged():
        assert same(model.state_dict(), averaged.state_dict()) and not model.training
        assert all(m.momentum == 0.1 for m in model if isinstance(m, nn.BatchNorm1d))

    with optimizer.swap_ema(model, batches):
        assert_averaged()
        with optimizer.swap_ema(model, batches):
            assert_averaged()
        with optimizer.swap_ema():
            assert_averaged()
        assert_averaged()
    assert same(model.state_dict(), before)
    with optimizer.swap_ema():
        with optimizer.swap_ema(model, batches):
            assert_averaged()
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert same(model.state_dict(), before)
    with pytest.raises(RuntimeError):
        optimizer.swap_ema(model, [rand(16, 4).float()])
    assert same(model.state_dict(), before) and not model.training
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match="nothing in `batches`"):
            optimizer.swap_ema(model, empty)
        assert same(model.state_dict(), before) and not model.training
    for given in ({"model": model}, {"batches": batches}):
        with pytest.raises(TypeError, match="both model and batches"):
            optimizer.swap_ema(**given)


def test_averages_do_not_outlive_steps_without_them(configured):
    """Through an optimizer without averages, ours or torch's, and back."""
    theirs, ours, options = configured
    for between in (ours, theirs):
        params, optimizer = stepped(ours, **options)
        plain = between(params, **options)
        counts = any("step" in s for s in optimizer.state_dict()["state"].values())
        if between is theirs and not counts:
            continue  # nothing in torch's state tells of the steps
        if between is ours:
            with pytest.warns(UserWarning, match="averages .* are left out, since this optimizer"):
                plain.load_state_dict(round_trip(optimizer))
        else:
            plain.load_state_dict(round_trip(optimizer))
        for step in range(3, 6):
            set_gradients(params, step)
            plain.step()
        again = ours(params, ema_decay=DECAY, **options)
        if between is ours:
            again.load_state_dict(round_trip(plain))
        else:
            with pytest.warns(UserWarning, match="averages .* are left out, since it was stepped"):
                again.load_state_dict(round_trip(plain))
        before = [p.detach().clone() for p in params]
        set_gradients(params, 6)
        again.step()
        stateful = bool(plain.state_dict()["state"])
        for p, old, average in zip(params, before, averages(again, params), strict=True):
            expected = old.lerp(p.detach(), 1 - DECAY) if stateful else p.detach()
            torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


def test_a_group_added_while_the_averages_stand_in():
    params, optimizer = stepped()
    own, added = [p.detach().clone() for p in params], nn.Parameter(rand(3))
    with optimizer.swap_ema():
        optimizer.add_param_group({"params": [added]})
    assert all(map(torch.equal, params, own)) and torch.equal(added, rand(3))
    set_gradients([*params, added], 5)
    optimizer.step()
    assert torch.equal(optimizer.state[added]["ema"], added)


def test_an_error_within_the_swap_puts_everything_back():
    params, optimizer = stepped()
    own = [p.detach().clone() for p in params]
    optimizer.state[params[2]]["ema"] = rand(2, 3)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.swap_ema()
    assert all(map(torch.equal, params, own))
    optimizer.state[params[2]]["ema"] = own[2]
    optimizer.step()


def test_swap_of_reduced_parameters_loses_nothing():
    p = nn.Parameter(rand(64).bfloat16())
    optimizer = fastops.optim.SGD([p], lr=0.1, ema_decay=0.99)
    for step in range(3):
        p.grad = rand(64, seed=step).bfloat16()
        optimizer.step()
    own, average = p.detach().clone(), optimizer.state[p]["ema"].clone()
    with optimizer.swap_ema():
        assert torch.equal(p, average.bfloat16())
    assert torch.equal(p, own) and torch.equal(optimizer.state[p]["ema"], average)


def test_parameters_without_gradients_keep_theirs():
    params = few_parameters()
    optimizer = fastops.optim.Adam(params, ema_decay=DECAY)
    params[0].grad = rand(5)
    optimizer.step()
    assert "ema" not in optimizer.state.get(params[1], {})
    before = params[1].detach().clone()
    with optimizer.swap_ema():
        assert torch.equal(params[1], before)


def test_together_with_clipping_and_l1():
    params = few_parameters()
    plain = few_parameters()
    x = fastops.optim.SGD(
        params, lr=0.1, l1=0.05, l1_mode="proximal", max_grad_norm=0.5, ema_decay=DECAY
    )
    y = fastops.optim.SGD(plain, lr=0.1, l1=0.05, l1_mode="proximal", max_grad_norm=0.5)
    expected = None
    for step in range(6):
        set_gradients(params, step)
        set_gradients(plain, step)
        x.step()
        y.step()
        now = [p.detach().clone() for p in plain]
        expected = (
            now
            if expected is None
            else [e.lerp(p, 1 - DECAY) for e, p in zip(expected, now, strict=True)]
        )
    assert_close(params, plain)
    assert_close(averages(x, params), expected)


def test_a_skipped_step_leaves_the_average():
    params, optimizer = stepped()
    before = [t.clone() for t in averages(optimizer, params)]
    optimizer.found_inf = torch.tensor(1.0)
    set_gradients(params, 9)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(averages(optimizer, params), before, strict=True))


def round_trip(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict(configured):
    theirs, ours, options = configured
    params, optimizer = stepped(ours, **options)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    other = ours(again, ema_decay=DECAY, **options)
    other.load_state_dict(round_trip(optimizer))
    for step in range(5, 8):
        for ps, o in ((params, optimizer), (again, other)):
            set_gradients(ps, step)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    assert all(map(torch.equal, averages(optimizer, params), averages(other, again)))
    theirs([p.detach().clone().requires_grad_() for p in params], **options).load_state_dict(
        round_trip(optimizer)
    )


def test_state_dict_of_reduced_parameters_keeps_precision():
    p = nn.Parameter(rand(64).bfloat16())
    optimizer = fastops.optim.AdamW([p], ema_decay=0.999)
    for step in range(3):
        p.grad = rand(64, seed=step).bfloat16()
        optimizer.step()
    q = nn.Parameter(p.detach().clone())
    other = fastops.optim.AdamW([q], ema_decay=0.999)
    other.load_state_dict(round_trip(optimizer))
    assert torch.equal(other.state[q]["ema"], optimizer.state[p]["ema"])
    q.grad = rand(64).bfloat16()
    other.step()


def test_a_checkpoint_without_averages_starts_them_from_the_parameters(configured):
    theirs, ours, options = configured
    params = few_parameters()
    native = theirs(params, **options)
    set_gradients(params, 0)
    native.step()
    mine = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = ours(mine, ema_decay=DECAY, **options)
    optimizer.load_state_dict(round_trip(native))
    before = [p.detach().clone() for p in mine]
    for ps, o in ((params, native), (mine, optimizer)):
        set_gradients(ps, 1)
        o.step()
    assert_close(params, mine)
    stateful = bool(
        native.state_dict()["state"]
    )  # plain SGD's checkpoint has nothing: this is its first step
    for p, old, average in zip(mine, before, averages(optimizer, mine), strict=True):
        expected = old.lerp(p.detach(), 1 - DECAY) if stateful else p.detach()
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


def test_copies():
    params, optimizer = stepped()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.ema_decay == DECAY
        copied = other.param_groups[0]["params"]
        assert all(map(torch.equal, averages(other, copied), averages(optimizer, params)))
        set_gradients(copied, 5)
        other.step()


def test_an_error_leaves_everything_as_it_was(configured):
    _, ours, options = configured
    params, optimizer = stepped(ours, **options)
    before = copy.deepcopy([optimizer.state_dict()["state"], [p.detach() for p in params]])
    set_gradients(params, 7)
    optimizer.state[params[1]]["ema"] = optimizer.state[params[1]]["ema"].float()
    with pytest.raises(RuntimeError, match="average of parameter .* is Float"):
        optimizer.step()
    optimizer.state[params[1]]["ema"] = optimizer.state[params[1]]["ema"].double()
    after = [optimizer.state_dict()["state"], [p.detach() for p in params]]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, -0.1, 1.5, float("nan")])
def test_invalid_decay(value):
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        fastops.optim.SGD(few_parameters(), lr=0.1, ema_decay=value)


def test_swap_without_averages():
    with pytest.raises(RuntimeError, match="keeps no averages"):
        fastops.optim.SGD(few_parameters(), lr=0.1).swap_ema()


def test_refused_for_what_torch_steps():
    params = few_parameters()
    optimizer = fastops.optim.Adam(params, capturable=True, ema_decay=DECAY)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="not available for what torch steps"):
        optimizer.step()
