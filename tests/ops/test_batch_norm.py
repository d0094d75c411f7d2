"""Batch norm, alone and with the addition and the activation after it, against torch's: values, gradients, running
statistics, modules, errors, and what is left to torch. test_opinfo.py has the database's samples of batch_norm."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_as_accurate, randn
from models import Spy
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db

import fastops
from fastops import functional as ours
from fastops.functional._batch_norm import ACTIVATIONS

pytestmark = pytest.mark.quick

KERNEL = "fastops.batch_norm_act.default"
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
INPUTS = {
    "(N,C)": lambda: randn(37, 5),
    "(N,C), wide": lambda: randn(9, 70),
    "(N,C,L)": lambda: randn(6, 5, 67),
    "(N,C,1,1)": lambda: randn(33, 19, 1, 1),
    "(N,C,H,W)": lambda: randn(5, 19, 9, 11),
    "one image": lambda: randn(1, 3, 20, 17),
    "channels_last": lambda: randn(5, 19, 9, 11).to(memory_format=LAST),
    "channels_last, few": lambda: randn(3, 3, 13, 11).to(memory_format=LAST),
    "(N,C,D,H,W)": lambda: randn(2, 6, 3, 5, 7),
    "channels_last_3d": lambda: randn(2, 6, 3, 5, 7).to(memory_format=LAST_3D),
    "strided": lambda: randn(4, 6, 10, 9)[:, ::2, 1:],
    "transposed": lambda: randn(17, 23).t(),
}
EVERY_INPUT = pytest.mark.parametrize("shape", INPUTS)


def torchs(x, mean, var, weight, bias, residual=None, *, activation="relu", negative_slope=0.01, **rest):  # fmt: skip
    y = F.batch_norm(x, mean, var, weight, bias, **rest)
    y = y if residual is None else y + residual
    return ACTIVATIONS[activation](y, negative_slope)


def tensors(shape, dtype, parameters=None, residual=False):
    """(input, mean, variance, weight, bias, residual); the vectors in the dtype `parameters`."""
    x = INPUTS[shape]() * 1.5 + 0.5
    c = x.shape[1]
    vectors = randn(c, seed=1), randn(c, seed=2).abs() + 0.5, randn(c, seed=3), randn(c, seed=4)
    r = torch.empty_like(x).copy_(randn(*x.shape, seed=5)) if residual else None
    vectors = [v.to(parameters or dtype) for v in vectors]
    return [x.to(dtype), *vectors, None if r is None else r.to(dtype)]


def ran(function, *args, **kwargs):
    """The result, and whether it is the kernels'."""
    with Spy() as spy:
        y = function(*args, **kwargs)
    return y, KERNEL in spy.ops


def step(function, given, dy=None, **options):
    """[output, gradients to input, weight, bias, residual, running mean and variance] of one training or evaluation step."""
    x, mean, var, weight, bias, residual = (t if t is None else t.detach().clone() for t in given)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y = function(x, mean, var, weight, bias, residual, **options)
    if dy is None:
        dy = torch.empty_like(y).copy_(randn(*y.shape, seed=6))
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return [y, *grads, *(t for t in (mean, var) if t is not None)]


def erf(x):
    """Of long doubles, by a series of terms of one sign."""
    total = term = x
    for n in range(1, 400):
        term = term * 2 * x * x / (2 * n + 1)
        total = total + term
    return (
        total
        * np.exp(-x * x)
        * 2
        / np.sqrt(np.longdouble(np.pi) + np.longdouble(1.2246467991473532e-16))
    )


def slopes(z, activation, slope):
    """An activation's values and derivatives, in long double."""
    one, zero = np.ones_like(z), np.zeros_like(z)
    s = 1 / (1 + np.exp(-z))
    t = np.tanh(np.log1p(np.exp(z)))
    if activation == "none":
        return z, one
    if activation == "relu":
        return np.maximum(z, 0), np.where(z > 0, one, zero)
    if activation == "relu6":
        return np.clip(z, 0, 6), np.where((z > 0) & (z < 6), one, zero)
    if activation == "leaky_relu":
        return np.where(z > 0, z, z * slope), np.where(z > 0, one, one * slope)
    if activation == "silu":
        return z * s, s * (1 + z * (1 - s))
    if activation == "mish":
        return z * t, t + z * s * (1 - t * t)
    if activation == "hardswish":
        inside = np.where(z < 3, z / 3 + np.longdouble(0.5), one)
        return z * np.clip(z + 3, 0, 6) / 6, np.where(z > -3, inside, zero)
    half = (1 + erf(z / np.sqrt(np.longdouble(2)))) / 2
    pi = np.longdouble(np.pi) + np.longdouble(1.2246467991473532e-16)
    return z * half, half + z * np.exp(-z * z / 2) / np.sqrt(2 * pi)


def long_double(given, *, training, activation="relu", momentum=0.1, eps=1e-5, negative_slope=0.01):
    """What step() gives, computed in long double: float64 has no wider type in torch."""
    wide = lambda t: None if t is None else t.detach().numpy().astype(np.longdouble)  # noqa: E731
    x, mean, var, weight, bias, r = map(wide, given)
    axes = (0, *range(2, x.ndim))
    each = lambda v: v.reshape(1, -1, *(1,) * (x.ndim - 2))  # noqa: E731
    n = x.size // x.shape[1]
    m = x.mean(axes) if training else mean
    v = ((x - each(m)) ** 2).mean(axes) if training else var
    inverse = each(1 / np.sqrt(v + np.longdouble(eps)))
    normal = (x - each(m)) * inverse
    scale = inverse if weight is None else inverse * each(weight)
    z = normal * (1 if weight is None else each(weight)) + (0 if bias is None else each(bias))
    y, slope = slopes(z if r is None else z + r, activation, np.longdouble(negative_slope))
    dz = wide(randn(*x.shape, seed=6)) * slope
    centered = (
        dz - each(dz.mean(axes)) - normal * each((dz * normal).mean(axes)) if training else dz
    )
    found = [y, centered * scale]
    found += [] if weight is None else [(dz * normal).sum(axes)]
    found += [] if bias is None else [dz.sum(axes)]
    found += [] if r is None else [dz]
    if mean is not None:
        share = np.longdouble(momentum) if training else 0
        found += [mean * (1 - share) + share * m, var * (1 - share) + share * v * n / (n - 1)]
    return [torch.from_numpy(f.astype(np.float64)) for f in found]


def compare(given, dtype, **options):
    """The project's tolerance for all that a step gives."""
    mine = step(ours.batch_norm_act, given, **options)
    theirs = step(torchs, given, **options)
    wide = [t if t is None else t.double() for t in given]
    exact = (
        long_double(given, **options) if dtype == torch.float64 else step(torchs, wide, **options)
    )
    for m, t, e in zip(mine, theirs, exact, strict=True):
        assert (m.dtype, m.shape) == (t.dtype, t.shape)
        assert_as_accurate(m, t, e, dtype)


# ---------------------------------------------------------------------------------------------- values and gradients


@EVERY_INPUT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_values_gradients_and_statistics(shape, dtype, training):
    for residual in (False, True):
        given = tensors(shape, dtype, residual=residual)
        for activation in ("none", "relu"):
            compare(given, dtype, training=training, activation=activation)
    given = tensors(shape, dtype)
    options = {"training": training, "momentum": 0.3, "eps": 1e-3}
    y, by_kernels = ran(ours.batch_norm, *given[:5], **options)
    assert by_kernels and y.dtype == dtype
    theirs = F.batch_norm(*tensors(shape, dtype)[:5], **options)
    assert y.stride() == theirs.stride()
    compare(given, dtype, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(activation, dtype):
    for shape, residual, training in itertools.product(
        ("(N,C,H,W)", "channels_last"), (False, True), (True, False)
    ):
        given = tensors(shape, dtype, residual=residual)
        given[3] *= 3  # beyond 6
        compare(given, dtype, activation=activation, training=training)
        if activation == "leaky_relu":
            for slope in (0.3, 0.0, -0.2):
                compare(given, dtype, activation=activation, training=training, negative_slope=slope)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["(N,C)", "(N,C,H,W)", "channels_last"])
def test_float32_parameters_of_narrow_inputs(dtype, shape):
    for training, residual in itertools.product((True, False), repeat=2):
        given = tensors(shape, dtype, torch.float32, residual)
        assert ran(ours.batch_norm_act, *given, training=training)[1]
        for activation in ("none", "relu", "silu"):
            compare(given, dtype, training=training, activation=activation)


@pytest.mark.parametrize("absent", [(1, 2), (3, 4), (3,), (4,), (1, 2, 3, 4)], ids=str)
def test_without_parameters_or_statistics(absent):
    for shape, dtype in itertools.product(("(N,C,H,W)", "channels_last"), (torch.float32, torch.bfloat16)):  # fmt: skip
        given = [None if k in absent else t for k, t in enumerate(tensors(shape, dtype))]
        for training in (True, False):
            if training or 1 not in absent:
                compare(given, dtype, training=training, activation="relu")
                compare(given, dtype, training=training, activation="none")


def test_a_mean_that_is_large_beside_the_deviations():
    x = (randn(8, 6, 33, 31, scale=1.0) + 4096).float()
    for given in (x, x.to(memory_format=LAST)):
        vectors = tensors("(N,C,D,H,W)", torch.float32)[1:5]
        for activation in ("none", "relu"):
            compare([given, *vectors, None], torch.float32, training=True, activation=activation)


def test_many_positions():
    """More than one block, and more than one chunk of blocks."""
    x = randn(3, 4, 150, 211)
    for given in (x, x.to(memory_format=LAST)):
        given = [given.float(), *(t.float()[:4] for t in tensors("(N,C,L)", torch.float32)[1:5]), None]  # fmt: skip
        compare(given, torch.float32, training=True, activation="relu")


@pytest.mark.parametrize("which", ["input", "weight", "bias", "residual"])
def test_one_gradient_is_that_of_all(which):
    given = tensors("channels_last", torch.float32, residual=True)
    names = {"input": 0, "weight": 3, "bias": 4, "residual": 5}
    for activation in ("none", "relu", "gelu"):
        everything = step(ours.batch_norm_act, given, training=True, activation=activation)
        alone = [t.clone() for t in given]
        leaf = alone[names[which]].requires_grad_()
        y = ours.batch_norm_act(*alone, training=True, activation=activation)
        dy = torch.empty_like(y).copy_(randn(*y.shape, seed=6))
        (grad,) = torch.autograd.grad(y, leaf, dy)
        assert torch.equal(grad, everything[1 + list(names).index(which)])


# ---------------------------------------------------------------------------------------------- layouts and threads


def bits(given, **options):
    return [t.detach().contiguous() for t in step(ours.batch_norm_act, given, **options)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_layouts_and_threads_give_the_same_bits(dtype, activation):
    before = torch.get_num_threads()
    x = randn(6, 35, 23, 19)
    r, c = randn(*x.shape, seed=5), x.shape[1]
    vectors = [randn(c, seed=1), randn(c, seed=2).abs(), randn(c, seed=3), randn(c, seed=4)]
    results = []
    try:
        for threads, form in itertools.product((1, 2, 3), (torch.contiguous_format, LAST)):
            torch.set_num_threads(threads)
            given = [t.to(dtype) for t in (x, *vectors, r)]
            given[0], given[5] = (given[k].to(memory_format=form) for k in (0, 5))
            for residual in (given[5], None):
                found = bits([*given[:5], residual], training=True, activation=activation)
                results.append((residual is None, found))
    finally:
        torch.set_num_threads(before)
    for alone in (True, False):
        first, *others = [found for without, found in results if without is alone]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_gradients_and_residuals_in_the_other_layout():
    plain, last = (tensors(s, torch.float32, residual=True) for s in ("(N,C,H,W)", "channels_last"))  # fmt: skip
    expected = step(ours.batch_norm_act, plain, training=True)
    dy = randn(*plain[0].shape, seed=6).float()
    for given, grad in ((plain, dy.to(memory_format=LAST)), (last, dy)):
        for residual in (plain[5], last[5]):
            found = step(ours.batch_norm_act, [*given[:5], residual], grad, training=True)
            assert found[0].stride() == given[0].stride()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    expanded = step(ours.batch_norm_act, plain, torch.ones(()).expand(dy.shape), training=True)
    ones = step(ours.batch_norm_act, plain, torch.ones_like(dy), training=True)
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))


# ---------------------------------------------------------------------------------------------- autograd


def double(shape=(5, 3, 2, 4)):
    x, r = randn(*shape), randn(*shape, seed=5)
    w, b = randn(shape[1], seed=3), randn(shape[1], seed=4)
    return [t.requires_grad_() for t in (x, w, b, r)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_gradients(activation, training):
    x, w, b, r = double()
    mean, var = randn(3, seed=1), randn(3, seed=2).abs() + 0.5

    def f(x, w, b, r=None):
        running = (mean.clone(), var.clone())
        return ours.batch_norm_act(x, *running, w, b, r, training=training, activation=activation)

    for inputs in ((x, w, b), (x, w, b, r)):
        assert ran(f, *inputs)[1]
        assert gradcheck(f, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, inputs, fast_mode=True, gen_non_contig_grad_outputs=True)


def test_gradients_of_gradients_of_narrow_dtypes():
    given = tensors("(N,C,H,W)", torch.bfloat16, torch.float32, residual=True)
    results = []
    for function, wide in ((ours.batch_norm_act, None), (torchs, None), (torchs, torch.float64)):
        x, mean, var, w, b, r = (t.detach().to(wide or t.dtype).clone() for t in given)
        leaves = [t.requires_grad_() for t in (x, w, b, r)]
        y = function(x, mean, var, w, b, r, training=True, activation="silu")
        dy = randn(*y.shape, seed=6).to(y.dtype)
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        loss = sum((g.double() * randn(*g.shape, seed=7)).sum() for g in grads)
        results.append(torch.autograd.grad(loss, (x, w, r)))
    for mine, theirs, exact in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert_as_accurate(mine, theirs, exact, torch.bfloat16)


def test_forward_mode():
    x, w, b, r = (t.detach() for t in double())
    tangents = [randn(*t.shape, seed=10 + k) for k, t in enumerate((x, w, b, r))]
    results = []
    for function in (ours.batch_norm_act, torchs):
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip((x, w, b, r), tangents, strict=True)]  # fmt: skip
            y = function(duals[0], mean, var, *duals[1:], training=True, activation="gelu")
            results.append((*forward_ad.unpack_dual(y), mean, var))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_tangent_given_to_the_operator_is_not_lost():
    x = randn(4, 3)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dual = forward_ad.make_dual(x, x)
        torch.ops.fastops.batch_norm_act(dual, None, None, None, None, None, True, 1e-5)


def test_used_twice_before_backward():
    results = []
    for cls in (fastops.nn.BatchNorm2d, nn.BatchNorm2d):
        module = cls(19).double()
        a, b = (randn(3, 19, 4, 5, seed=s).requires_grad_() for s in (0, 1))
        y = module(a) * module(b).sin()
        module.eval()
        z = module(a)
        results.append(torch.autograd.grad((y + z).pow(2).sum(), [a, b, *module.parameters()]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_evaluation_keeps_the_statistics_that_it_used():
    x, mean, var, w, b, _ = tensors("(N,C,H,W)", torch.float64)
    y = ours.batch_norm_act(x.requires_grad_(), mean, var, w, b)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    mean.add_(100), var.mul_(9)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_what_was_overwritten_before_backward_is_noticed():
    x, mean, var, w, b, r = tensors("(N,C,H,W)", torch.float64, residual=True)
    w.requires_grad_()
    y = ours.batch_norm_act(x, mean, var, w, b, r, training=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = ours.batch_norm_act(x, mean, var, w, b, training=True)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_recorded_without_gradients():
    given = tensors("(N,C,H,W)", torch.float32)
    given[0].requires_grad_()
    expected = ours.batch_norm_act(*tensors("(N,C,H,W)", torch.float32), training=True).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, by_kernels = ran(ours.batch_norm_act, *given, training=True)
        assert by_kernels and not y.requires_grad and torch.equal(y, expected)
    assert ours.batch_norm_act(*given, training=True).requires_grad


# ---------------------------------------------------------------------------------------------- modules

DIMENSIONS = {1: (7, 4), 2: (3, 4, 5, 6), 3: (2, 4, 3, 5, 2)}
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
]


def pair(dims, options, dtype=torch.float64):
    mine = getattr(fastops.nn, f"BatchNorm{dims}d")(4, **options)
    theirs = getattr(nn, f"BatchNorm{dims}d")(4, **options)
    for module in (mine, theirs):
        for k, p in enumerate(module.parameters()):
            p.data = randn(4, seed=k).to(p.dtype)
    return mine.to(dtype), theirs.to(dtype)


def assert_same_modules(mine, theirs):
    states = mine.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    for a, b in zip(*(s.values() for s in states), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dims", DIMENSIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modules(dims, options):
    mine, theirs = pair(dims, options)
    for step, training in enumerate([True, True, False, True, False]):
        results = []
        for module in (mine, theirs):
            module.train(training)
            x = randn(*DIMENSIONS[dims], seed=step).requires_grad_()
            y = module(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert_same_modules(mine, theirs)
    if mine.track_running_stats:
        assert mine.num_batches_tracked == 3
    twin = copy.deepcopy(mine)
    theirs.load_state_dict(twin.state_dict())
    assert_same_modules(twin, theirs)


INFOS = {info.module_cls: info for info in module_db if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}  # fmt: skip


@pytest.mark.parametrize("cls", INFOS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_samples_of_torchs_database(cls, training):
    info, count = INFOS[cls], 0
    for sample in info.module_inputs_func(info, "cpu", torch.float64, True, training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        results, modules = [], []
        for made in (getattr(fastops.nn, cls.__name__), cls):
            module = made(*args, **kwargs).double().train(training)
            (x,) = sample.forward_input.args
            x = x.detach().clone().requires_grad_()
            y = module(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()])])
            modules.append(module)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert_same_modules(*modules)
        count += 1
    assert count >= 4


def outcome(f):
    try:
        return f(), None
    except Exception as error:
        return None, error


BAD = {
    "one value per channel": ((1, 4), {}),
    "one value per channel, many dimensions": ((1, 4, 1, 1), {}),
    "no batch": ((0, 4), {}),
    "other channels": ((3, 5), {}),
    "no positions": ((2, 4, 0), {}),
    "one dimension": ((4,), {}),
    "no dimension": ((), {}),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_errors_and_empty_batches(bad, training):
    shape, _ = BAD[bad]
    for parameters in (True, False):
        results, statistics = [], []
        for function in (ours.batch_norm, F.batch_norm):
            mean, var = torch.zeros(4), torch.ones(4)
            x = torch.ones(shape, requires_grad=True)
            w, b = (torch.ones(4, requires_grad=True), torch.zeros(4)) if parameters else (None, None)  # fmt: skip
            y, error = outcome(lambda: function(x, mean, var, w, b, training))  # noqa: B023
            grads = () if y is None else torch.autograd.grad(y.sum(), [t for t in (x, w) if t is not None])  # fmt: skip
            results.append(((y, *grads), error))
            statistics.append((mean, var))
        (mine, error), (theirs, expected) = results
        assert type(error) is type(expected) and str(error) == str(expected)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(*statistics, equal_nan=True)


def test_bad_arguments():
    x, vector = torch.ones(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match="activation must be one of none, relu.*got 'tanh'"):
        ours.batch_norm_act(x, vector, vector, activation="tanh")
    for function in (ours.batch_norm, F.batch_norm):
        with pytest.raises(RuntimeError, match="running_mean"):
            function(x, None, None)
        with pytest.raises(RuntimeError):
            function(x, vector, vector, torch.ones(5), torch.ones(5))
        with pytest.raises(RuntimeError):
            function(x, vector, vector.double(), vector)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        ours.batch_norm_act(x, vector, vector, None, None, torch.ones(5, 3))


@pytest.mark.parametrize("dims", DIMENSIONS)
def test_a_module_is_not_changed_by_what_it_refuses(dims):
    for cls in (getattr(fastops.nn, f"BatchNorm{dims}d"),):
        module = cls(4)
        before = copy.deepcopy(module.state_dict())
        for bad, says in ((torch.ones(2), "expected"), (torch.ones(1, 4, *[1] * (dims if dims > 1 else 0)), "more than 1 value")):  # fmt: skip
            with pytest.raises(ValueError, match=says):
                module(bad)
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key])


def test_the_operator_checks_what_it_is_given():
    x, v = torch.ones(3, 4), torch.ones(4)
    call = torch.ops.fastops.batch_norm_act
    with pytest.raises(RuntimeError, match="weight to be 4 values, one a channel, got shape"):
        call(x, None, torch.ones(5), v, v, v, True, 1e-5)
    with pytest.raises(RuntimeError, match="expected a residual of shape"):
        call(x, torch.ones(4, 3), v, v, v, v, True, 1e-5)
    with pytest.raises(ValueError, match=r"activation must be in \[0, 7\], got 8"):
        call(x, None, v, v, v, v, True, 1e-5, 8)
    with pytest.raises(RuntimeError, match="running statistics are needed"):
        call(x, None, v, v, None, None, False, 1e-5)
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        call(x.long(), None, None, None, None, None, True, 1e-5)


# ---------------------------------------------------------------------------------------------- what is torch's


def test_what_the_kernels_do_not_take_is_torchs():
    given = tensors("(N,C,H,W)", torch.float32)
    x, mean, var, w, b, _ = given
    calls = [
        (x, mean.double(), var.double(), w.double(), b.double()),
        (x.to(torch.complex64), None, None),
        (x, mean, None, w, b),
        (x[..., :0], mean, var, w, b),
    ]
    for args in calls:
        for training in (True, False):
            results = [outcome(lambda f=f: f(*args, training=training)) for f in (ours.batch_norm, F.batch_norm)]  # noqa: B023, E501  # fmt: skip
            assert type(results[0][1]) is type(results[1][1])
            torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
    residual = randn(1, 19, 1, 11).float()  # broadcasts
    y, by_kernels = ran(ours.batch_norm_act, x, mean, var, w, b, residual)
    assert not by_kernels
    torch.testing.assert_close(y, torchs(x, mean, var, w, b, residual, activation="relu"))


def test_autocast():
    """torch's autocast has no rule for batch norms: they take what convolutions give them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), fastops.nn.BatchNorm2d(8), nn.ReLU())
    theirs = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(8), nn.ReLU())
    x = randn(4, 3, 9, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        (y, by_kernels), expected = ran(model, x), theirs(x)
    assert by_kernels and y.dtype == expected.dtype == torch.bfloat16
    exact = torchs(model[0].bfloat16()(x.bfloat16()).double(), None, None, None, None, training=True, activation="relu")  # fmt: skip
    assert_as_accurate(y, expected, exact, torch.bfloat16)
    assert model[1].running_mean.dtype == torch.float32
    torch.testing.assert_close(model[1].running_var, theirs[1].running_var)


def step_of(module, x):
    y = module(x)
    return [y, *torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()])]


def test_compiled_and_exported():
    mine, theirs = pair(2, {})
    x = randn(3, 4, 5, 6).requires_grad_()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for a, b in zip(step_of(compiled, x), step_of(theirs, x), strict=True):
            torch.testing.assert_close(a, b)
    assert_same_modules(mine, theirs)
    act = torch.compile(ours.batch_norm_act, fullgraph=True, backend="aot_eager")
    given = tensors("channels_last", torch.float64, residual=True)
    torch.testing.assert_close(act(*given), torchs(*given, activation="relu"))
    for strict in (True, False):
        program = torch.export.export(mine.eval(), (x.detach(),), strict=strict)
        assert "fastops" not in str(program.graph)
        torch.testing.assert_close(program.module()(x), theirs.eval()(x))


def test_transforms_of_functions():
    x, mean, var, w, b, _ = tensors("(N,C)", torch.float64)
    batch = torch.stack([x, x * 2, x + 1])
    each = torch.vmap(lambda x: ours.batch_norm_act(x, None, None, w, b, training=True))(batch)
    for one, y in zip(batch, each, strict=True):
        torch.testing.assert_close(y, ours.batch_norm_act(one, None, None, w, b, training=True))
    loss = lambda f: lambda x, w: f(x, mean, var, w, b).pow(3).sum()  # noqa: E731
    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(*(transform(loss(f))(x[:4], w) for f in (ours.batch_norm, F.batch_norm)))  # fmt: skip
    _, tangent = torch.func.jvp(lambda x: ours.batch_norm(x, mean, var, w, b), (x,), (x,))
    torch.testing.assert_close(tangent, x * w / (var + 1e-5).sqrt())


def test_shapes_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for shape, dtype in itertools.product(INPUTS, (torch.float32, torch.bfloat16)):
        given = tensors(shape, dtype, residual=True)
        real = ours.batch_norm_act(*given, training=True)
        with FakeTensorMode() as mode:
            fake = ours.batch_norm_act(*map(mode.from_tensor, given), training=True)
        assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())
    results = torch.ops.fastops.batch_norm_act(given[0], None, None, None, None, None, True, 1e-5)
    with FakeTensorMode() as mode:
        fakes = torch.ops.fastops.batch_norm_act(mode.from_tensor(given[0]), None, None, None, None, None, True, 1e-5)  # fmt: skip
    for a, b in zip(results, fakes, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


@pytest.mark.parametrize("eps", [0.0, -1e-5])
@pytest.mark.parametrize("training", [True, False])
def test_epsilon_that_torch_refuses(eps, training):
    x, mean, var = torch.randn(4, 2), torch.zeros(2), torch.ones(2)
    found = []
    for function in (ours.batch_norm, F.batch_norm):
        try:
            found.append(function(x, mean.clone(), var.clone(), training=training, eps=eps))
        except ValueError as error:
            found.append(str(error))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(*found)
