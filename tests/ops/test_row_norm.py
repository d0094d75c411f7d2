"""Layer norm and RMS norm, alone and of a sum, against torch's: values, gradients, statistics of rows that are hard to take,
modules, patch, errors, and what is left to torch. test_opinfo.py has the database's samples."""

import copy
import itertools

import pytest
import row_norm_cases
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_as_accurate, randn
from models import Spy
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db

import fastops
from fastops import functional as ours

pytestmark = pytest.mark.quick

NAMES = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
INPUTS = {  # and the number of dimensions to normalize over
    "a row": (lambda: randn(70), 1),
    "short rows": (lambda: randn(1100, 3), 1),
    "odd rows": (lambda: randn(37, 67), 1),
    "whole vectors": (lambda: randn(3, 21, 64), 1),
    "more than a block": (lambda: randn(5, 5003), 1),
    "few and long": (lambda: randn(6, 20_011), 1),
    "two dimensions": (lambda: randn(5, 19, 9, 11), 2),
    "all dimensions": (lambda: randn(4, 3, 5), 3),
    "transposed": (lambda: randn(23, 17).t(), 1),
    "strided": (lambda: randn(4, 6, 20)[:, ::2, 1::2], 1),
    "batch second": (lambda: randn(6, 4, 33).transpose(0, 1), 1),
    "expanded": (lambda: randn(5, 1).expand(5, 9), 1),
}
EVERY_INPUT = pytest.mark.parametrize("shape", INPUTS)


def torchs(name, functions=F):
    """The same of torch's functions: (output, sum) of those that add."""
    plain = getattr(functions, name.removeprefix("add_"))
    if plain.__name__ == name:
        return plain

    def both(x, residual, *rest, **kwargs):
        total = x + residual
        return plain(total, *rest, **kwargs), total

    return both


def tensors(name, x, dims, dtype, parameters=None, affine=True):
    """(x, residual if there is one), (weight, bias if there is one)."""
    shape = x.shape[x.dim() - dims :]
    given = [x, torch.empty_like(x).copy_(randn(*x.shape, seed=5))][: 1 + name.startswith("add")]
    vectors = [randn(*shape, seed=1) + 1, randn(*shape, seed=2)][: 1 + ("layer" in name)]
    given = [t.to(dtype) for t in given]
    return given, [t.to(parameters or dtype) for t in vectors] if affine else []


def step(function, given, vectors, wide=None, grads=None, **options):
    """[outputs, gradients to all tensors] of one call."""
    leaves = [t.detach().to(wide or t.dtype).clone().requires_grad_() for t in given]
    own = [t.detach().to(wide or t.dtype).clone().requires_grad_() for t in vectors]
    shape = tuple(own[0].shape) if own else options.pop("shape")
    options.pop("shape", None)
    y = function(*leaves, shape, *own, **options)
    y = y if isinstance(y, tuple) else (y,)
    dy = [torch.empty_like(t).copy_(randn(*t.shape, seed=6 + k)).to(t.dtype) for k, t in enumerate(y)]  # fmt: skip
    return [*y, *torch.autograd.grad(y, leaves + own, grads or dy)]


def compare(name, given, vectors, dtype, **options):
    """The project's tolerance for all that a step gives."""
    mine = step(getattr(ours, name), given, vectors, **dict(options))
    theirs = step(torchs(name), given, vectors, **dict(options))
    wide = row_norm_cases if dtype == torch.float64 else F
    exact = step(torchs(name, wide), given, vectors, torch.float64, **dict(options))
    for m, t, e in zip(mine, theirs, exact, strict=True):
        assert (m.dtype, m.shape) == (t.dtype, t.shape)
        assert_as_accurate(m, t, e, dtype)
    outputs = 1 + name.startswith("add")
    assert [m.stride() for m in mine[:outputs]] == [t.stride() for t in theirs[:outputs]]


def by_kernels(name, *args, **kwargs):
    """Whether a call is the kernels'."""
    with Spy() as spy:
        getattr(ours, name)(*args, **kwargs)
    return f"fastops.{name.removeprefix('add_')}.default" in spy.ops


# ---------------------------------------------------------------------------------------------- values and gradients


@EVERY_NAME
@EVERY_INPUT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(name, shape, dtype):
    make, dims = INPUTS[shape]
    x = make() * 1.5 + 0.5
    inner = tuple(x.shape[x.dim() - dims :])
    for affine in (True, False):
        given, vectors = tensors(name, x, dims, dtype, affine=affine)
        assert by_kernels(name, *given, inner, *vectors)
        compare(name, given, vectors, dtype, shape=inner)
    given, vectors = tensors(name, x, dims, dtype)
    compare(name, given, vectors, dtype, eps=1e-2)
    compare(name, given, vectors[:1], dtype)


@EVERY_NAME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["odd rows", "whole vectors", "transposed"])
def test_float32_parameters_of_narrow_inputs(name, dtype, shape):
    make, dims = INPUTS[shape]
    given, vectors = tensors(name, make(), dims, dtype, torch.float32)
    assert by_kernels(name, *given, vectors[0].shape, *vectors)
    compare(name, given, vectors, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_eps_of_rms_norm(dtype):
    x = randn(5, 40).to(dtype) * 1e-4
    for eps in (None, torch.finfo(torch.float32).eps, 0.0):
        compare("rms_norm", [x], [randn(40).to(dtype)], dtype, eps=eps)


@EVERY_NAME
@pytest.mark.parametrize("mean", [1e3, -1e3, 1e5])
def test_a_mean_that_is_large_beside_the_deviations(name, mean):
    for n in (5, 96, 3000):
        for dtype in (torch.float32, torch.float64):
            x = (randn(7, n) + mean).to(dtype)
            given, vectors = tensors(name, x, 1, dtype)
            compare(name, given, vectors, dtype)


@EVERY_NAME
def test_rows_of_one_value_and_of_one_outlier(name):
    x = randn(6, 300)
    x[0], x[1], x[2, 0], x[3, 7], x[4, 1:] = 3.7, 0.0, 1e6, -1e5, 0.0
    given, vectors = tensors(name, x, 1, torch.float32)
    compare(name, given, vectors, torch.float32)
    compare(name, [t * 1e-12 for t in given], vectors, torch.float32)


@EVERY_NAME
def test_rows_that_are_not_finite(name):
    x = randn(7, 40)
    x[0, 3], x[1, 39], x[2, 0], x[3, 5:7] = torch.inf, -torch.inf, torch.nan, torch.inf
    x[4, 1], x[4, 2] = torch.inf, torch.nan
    for dtype in DTYPES:
        given, vectors = tensors(name, x, 1, dtype)
        compare(name, given, vectors, dtype, eps=1e-5)


@EVERY_NAME
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_one_gradient_is_that_of_all(name, which):
    given, vectors = tensors(name, randn(37, 67), 1, torch.float32)
    count = len(given) + len(vectors)
    if which >= count:
        return
    everything = step(getattr(ours, name), given, vectors)[-count:]
    every = [t.clone() for t in given + vectors]
    leaf = every[which].requires_grad_()
    y = getattr(ours, name)(*every[: len(given)], (67,), *every[len(given) :])
    y = y if isinstance(y, tuple) else (y,)
    moved = [k for k, t in enumerate(y) if t.requires_grad]
    dy = [randn(37, 67, seed=6 + k).float() for k in range(len(y))]
    if which >= len(given) and len(y) == 2:
        assert not y[1].requires_grad or torch.autograd.grad(y[1].sum(), leaf, retain_graph=True, allow_unused=True)[0] is None  # fmt: skip
    (grad,) = torch.autograd.grad([y[k] for k in moved], leaf, [dy[k] for k in moved])
    assert torch.equal(grad, everything[which])


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_one_output_alone(name):
    given, vectors = tensors(name, randn(9, 30), 1, torch.float64)
    for output in (0, 1):
        results = []
        for function in (getattr(ours, name), torchs(name)):
            leaves = [t.clone().requires_grad_() for t in given + vectors]
            y = function(*leaves[:2], (30,), *leaves[2:])[output]
            results.append(torch.autograd.grad(y.pow(3).sum(), leaves, allow_unused=True))
        for mine, theirs in zip(*results, strict=True):
            mine = torch.zeros(()) if mine is None else mine
            torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


# ---------------------------------------------------------------------------------------------- layouts and threads


@EVERY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1200, 67), (70, 640), (3000, 5), (5, 20_011)], ids=str)
def test_threads_give_the_same_bits(name, dtype, shape):
    before, results = torch.get_num_threads(), []
    given, vectors = tensors(name, randn(*shape), 1, dtype)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(getattr(ours, name), given, vectors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@EVERY_NAME
def test_results_past_the_caches(name):
    """Aligned and not, as they are where they stay in the caches."""
    for n in (1024, 1020, 1021):
        rows = (25 << 20) // (4 * n) + 1
        given, vectors = tensors(name, randn(rows, n).float(), 1, torch.float32)
        large = step(getattr(ours, name), given, vectors)
        outputs = len(given) + 1 + name.startswith("add")  # of the rows
        small = [torch.cat(parts) for parts in zip(*(
            [t.detach() for t in getattr(ours, name)(*(g[a:b] for g in given), (n,), *vectors)] if len(given) == 2
            else [getattr(ours, name)(given[0][a:b], (n,), *vectors)]
            for a, b in itertools.pairwise([0, 100, rows // 2, rows])
        ), strict=True)]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(large, small, strict=False))
        dy = [torch.empty_like(t).copy_(randn(*t.shape, seed=6 + k)) for k, t in enumerate(large[: outputs - len(given)])]  # fmt: skip
        half = rows // 2
        part = step(getattr(ours, name), [g[:half] for g in given], vectors, grads=[d[:half] for d in dy])  # fmt: skip
        assert torch.equal(part[outputs - len(given)], large[outputs - len(given)][:half])


def test_gradients_that_are_expanded_or_strided():
    for name in ("layer_norm", "rms_norm"):
        given, vectors = tensors(name, randn(6, 5, 32), 1, torch.float64)
        for grad in (torch.ones(()).double().expand(6, 5, 32), randn(5, 6, 32).transpose(0, 1)):
            mine, theirs = (
                step(f, given, vectors, grads=[grad]) for f in (getattr(ours, name), torchs(name))
            )
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- autograd


@EVERY_NAME
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_gradients(name, affine):
    given, vectors = tensors(name, randn(3, 2, 5), 2, torch.float64, affine=affine)
    leaves = [t.requires_grad_() for t in given + vectors]

    def f(*t):
        return getattr(ours, name)(*t[: len(given)], (2, 5), *t[len(given) :])

    assert by_kernels(name, *given, (2, 5), *vectors)
    assert gradcheck(f, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, leaves, fast_mode=True, gen_non_contig_grad_outputs=True)


@EVERY_NAME
def test_gradients_of_gradients_of_narrow_dtypes(name):
    given, vectors = tensors(name, randn(19, 70), 1, torch.bfloat16, torch.float32)
    results = []
    for function, wide in ((getattr(ours, name), None), (torchs(name), None), (torchs(name), torch.float64)):  # fmt: skip
        leaves = [t.detach().to(wide or t.dtype).clone().requires_grad_() for t in given + vectors]
        y = function(*leaves[: len(given)], (70,), *leaves[len(given) :])
        y = y[0] if isinstance(y, tuple) else y
        dy = randn(*y.shape, seed=6).to(y.dtype)
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        loss = sum((g.double() * randn(*g.shape, seed=7)).sum() for g in grads)
        results.append(torch.autograd.grad(loss, leaves[: len(given) + 1]))
    for mine, theirs, exact in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert_as_accurate(mine, theirs, exact, torch.bfloat16)


@EVERY_NAME
def test_forward_mode_and_function_transforms_are_torchs(name):
    given, vectors = tensors(name, randn(4, 6), 1, torch.float64)
    rest = given[1:]
    functions = [
        lambda x, f=f: f(x, *rest, (6,), *vectors) for f in (getattr(ours, name), torchs(name))
    ]
    x, t = given[0], randn(4, 6, seed=9)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (t,)),
        lambda f: torch.func.vjp(f, x)[0],
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.vmap(f)(x[:, None]) if not rest else None,
        lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)(x),
    ):
        torch.testing.assert_close(*(transform(f) for f in functions))
    results = []
    for f in functions:
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, t))
            results.append(forward_ad.unpack_dual(y[0] if rest else y))
    torch.testing.assert_close(*map(tuple, results))


def test_a_tangent_given_to_the_operator_is_not_lost():
    x = randn(4, 3)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dual = forward_ad.make_dual(x, x)
        torch.ops.fastops.layer_norm(dual, None, None, None, 1, 1e-5)


@EVERY_NAME
def test_what_was_overwritten_before_backward_is_noticed(name):
    given, vectors = tensors(name, randn(4, 6), 1, torch.float64)
    vectors[0].requires_grad_()
    y = getattr(ours, name)(*given, (6,), *vectors)
    y, kept = y if isinstance(y, tuple) else (y, given[0])
    y.mul_(2)  # is not kept
    y.sum().backward(retain_graph=True)
    kept.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EVERY_NAME
def test_nothing_is_recorded_without_gradients(name):
    given, vectors = tensors(name, randn(4, 6), 1, torch.float32)
    expected = getattr(ours, name)(*given, (6,), *vectors)
    given[0].requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = getattr(ours, name)(*given, (6,), *vectors)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        assert not (y if isinstance(y, torch.Tensor) else y[0]).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype):
    for name, narrow in itertools.product(NAMES, (True, False)):
        given, vectors = tensors(name, randn(4, 6), 1, torch.float32)
        given = [t.to(dtype) for t in given] if narrow else given
        with torch.autocast("cpu", dtype):
            mine, theirs = (f(*given, (6,), *vectors) for f in (getattr(ours, name), torchs(name)))
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype


@EVERY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_one_element(name, dtype):
    for x, dims in ((randn(7, 1), 1), (randn(3, 1, 1), 2)):
        given, vectors = tensors(name, x, dims, dtype)
        compare(name, given, vectors, dtype)


# ---------------------------------------------------------------------------------------------- what is left to torch


def outcome(f):
    try:
        return f(), None
    except Exception as error:
        return None, error


BAD = {
    "no rows": ((0, 4), (4,)),
    "no elements": ((3, 0), (0,)),
    "another shape": ((3, 4), (5,)),
    "no shape": ((3, 4), ()),
    "a number": ((3, 4), 4),
    "a float": ((3, 4), (4.0,)),
    "no dimension": ((), (1,)),
    "more dimensions": ((3, 4), (2, 3, 4)),
    "first dimensions": ((3, 4), (3,)),
    "a list": ((3, 4), [4]),
    "a size": ((3, 4), torch.Size([3, 4])),
}


@EVERY_NAME
@pytest.mark.parametrize("bad", BAD)
def test_errors_and_empty_tensors(name, bad):
    shape, inner = BAD[bad]
    for affine in (False, True):
        results = []
        for function in (getattr(ours, name), torchs(name)):
            given = [torch.ones(shape, requires_grad=True) for _ in range(1 + name.startswith("add"))]  # fmt: skip
            own = torch.ones(inner if isinstance(inner, tuple | list) and 4.0 not in inner[:1] or bad == "a list" else 4)  # fmt: skip
            y, error = outcome(lambda: function(*given, inner, *[own] * affine))  # noqa: B023
            grads = ()
            if y is not None:
                y = y if isinstance(y, tuple) else (y,)
                grads = torch.autograd.grad([t.sum() for t in y], given)
            results.append(((y, grads), error))
        (mine, error), (theirs, expected) = results
        assert type(error) is type(expected) and str(error) == str(expected)
        torch.testing.assert_close(mine, theirs)


@EVERY_NAME
def test_parameters_that_do_not_fit(name):
    given, vectors = tensors(name, randn(3, 4), 1, torch.float32)
    for w in (torch.ones(5), torch.ones(1, 4), torch.ones(4).bfloat16(), torch.ones(4).int()):
        for parameters in ([w, *vectors[1:]], [vectors[0], w][: len(vectors)]):
            (mine, error), (theirs, expected) = (
                outcome(lambda: f(*given, (4,), *parameters))  # noqa: B023
                for f in (getattr(ours, name), torchs(name))
            )
            assert type(error) is type(expected) and str(error) == str(expected)
            torch.testing.assert_close(mine, theirs)


def test_sums_that_torch_makes():
    x, w = randn(3, 4).float(), randn(4).float()
    for residual in (
        randn(4).float(),
        randn(3, 1),
        randn(4, 3).t().float(),
        randn(3, 4).bfloat16(),
    ):
        for name in ("add_layer_norm", "add_rms_norm"):
            mine, theirs = (f(x, residual, (4,), w.to(torch.result_type(x, residual))) for f in (getattr(ours, name), torchs(name)))  # fmt: skip
            for a, b in zip(mine, theirs, strict=True):
                assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
                torch.testing.assert_close(a, b)
    with pytest.raises(TypeError, match="argument 'residual' .* must be Tensor, not float"):
        ours.add_layer_norm(x, 1.0, (4,))


def test_the_operator_refuses_what_it_cannot_take():
    op, x = torch.ops.fastops.layer_norm, torch.ones(3, 4)
    for dims in (0, 3):
        with pytest.raises(RuntimeError, match="expected 1 to 2 dimensions"):
            op(x, None, None, None, dims, 1e-5)
    with pytest.raises(RuntimeError, match="expected a weight of shape"):
        op(x, None, torch.ones(3), None, 1, 1e-5)
    with pytest.raises(RuntimeError, match="expected a residual"):
        op(x, x.double(), None, None, 1, 1e-5)
    y, _, statistics = op(x, None, None, None, 1, 1e-5)
    backward = torch.ops.fastops.layer_norm_backward
    with pytest.raises(RuntimeError, match="expected statistics of shape"):
        backward(y, None, x, None, statistics[:1], 1, True, True, True)
    with pytest.raises(RuntimeError, match="expected a grad of shape"):
        backward(y[:2], None, x, None, statistics, 1, True, True, True)


# ---------------------------------------------------------------------------------------------- modules

MODULES = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
OPTIONS = [{}, {"elementwise_affine": False}, {"eps": 0.1}]


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modules(cls, options):
    results, states = [], []
    for made in (getattr(fastops.nn, cls), MODULES[cls]):
        for shape in (6, (5, 6)):
            module = made(shape, **options).double()
            for k, p in enumerate(module.parameters()):
                p.data = randn(*p.shape, seed=k)
            x = randn(4, 5, 6).requires_grad_()
            y = copy.deepcopy(module)(x)
            y = y + module(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()])])
            states.append((list(module.state_dict()), repr(module)))
    for k in (0, 1):
        assert states[k] == states[k + 2]
        for a, b in zip(results[k], results[k + 2], strict=True):
            torch.testing.assert_close(a, b)


INFOS = {info.module_cls: info for info in module_db if info.module_cls in MODULES.values()}


@pytest.mark.parametrize("cls", INFOS, ids=lambda c: c.__name__)
def test_samples_of_torchs_database(cls):
    info, count = INFOS[cls], 0
    for sample in info.module_inputs_func(info, "cpu", torch.float64, True, True):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        results = []
        for made in (getattr(fastops.nn, cls.__name__), cls):
            module = made(*args, **kwargs).double()
            x = sample.forward_input.args[0].detach().clone().requires_grad_()
            y = module(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        count += 1
    assert count >= 2


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.rms(x + self.down(torch.tanh(self.up(self.norm(x)))))


def losses(model):
    model = copy.deepcopy(model)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for k in range(4):
        loss = model(randn(7, 3, 16, seed=k)).pow(2).mul(randn(16, seed=99)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def test_patch():
    torch.manual_seed(0)
    model, x = Residual().double(), randn(2, 16)
    expected = losses(model)
    report = fastops.patch(model)
    assert [w[1:] for w in report.replaced] == [("torch.nn.LayerNorm", "fastops.nn.LayerNorm"), ("torch.nn.RMSNorm", "fastops.nn.RMSNorm")]  # fmt: skip
    with Spy() as spy:
        model(x)
    assert [o for o in spy.ops if o.startswith("fastops")] == ["fastops.layer_norm.default", "fastops.rms_norm.default"]  # fmt: skip
    torch.testing.assert_close(losses(model), expected)
    fastops.unpatch(model)
    with Spy() as spy:
        model(x)
    assert not [o for o in spy.ops if o.startswith("fastops")]
    assert torch.equal(losses(model), expected)


class Calls(nn.Module):
    def forward(self, x):
        return F.rms_norm(F.layer_norm(x, (16,)), (16,))


def test_patch_replaces_calls():
    model, x = Calls(), randn(3, 16)
    expected = model(x)
    fastops.patch(model, functional=True)
    with Spy() as spy:
        torch.testing.assert_close(model(x), expected)
    assert [o for o in spy.ops if o.startswith("fastops")] == ["fastops.layer_norm.default", "fastops.rms_norm.default"]  # fmt: skip
