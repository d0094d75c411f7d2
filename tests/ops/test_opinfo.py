"""Every function against torch's own database of samples, references and errors (torch.testing's op_db): values to the
project's tolerance, dtypes, shapes, strides, gradients, gradients of gradients, and the exceptions that torch raises.
What the kernels do not take (integers, complex numbers, sparse tensors ...) has to come out as torch's own does."""

import inspect
import re
import warnings

import pytest
import row_norm_cases
import torch
from cases import DTYPES, assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastops import functional
from fastops._core.registry import COMPOSED, OPS

OTHER_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
                torch.complex128, torch.complex64, torch.float8_e4m3fn]  # fmt: skip
RANDOM = ["dropout", "dropout2d", "dropout3d", "alpha_dropout"]
NOT_IN_DATABASE = {"dropout1d"}  # torch has it, its database has not
OURS_ALONE = {"add_relu", "bias_gelu", "bias_dropout_add", "mixup_cross_entropy", "relu_dropout", "squareplus", "swiglu", "geglu", "reglu", "batch_norm_act", "add_layer_norm", "add_rms_norm"}  # fmt: skip

# Positions of float tensors that no gradient flows to: running statistics.
CONSTANT = {"batch_norm": (1, 2)}

# What is right in float64, where torch's own float64 is not much better than ours.
EXACT = {name: getattr(row_norm_cases, name) for name in ("layer_norm", "rms_norm")}

# Where ours is not torch's on purpose. A test counts them; nothing else may differ.
DIFFERENT = {
    "memory order is kept, torch makes the result contiguous": {"softmax", "log_softmax", "logsigmoid"},
    "the derivative at +-inf is its limit 0, torch's composite gives nan": {"softsign"},
}  # fmt: skip


class Entry:
    """One entry of the database, ours and torch's function of that name."""

    def __init__(self, name, info):
        self.name, self.info = name, info
        self.ours = getattr(functional, name)
        self.theirs = getattr(torch.nn.functional, name)
        self.id = f"{name} {info.variant_test_name}".strip().replace(" ", "-")

    def samples(self, dtype, references=True):
        found = list(self.info.sample_inputs("cpu", dtype, requires_grad=False))
        return found + list(self.info.reference_inputs("cpu", dtype)) if references else found

    def exact(self, sample):
        """What is right in float64: torch's function, or what the table names as better, if it takes the arguments."""
        better = OPS[self.name].exact if self.name in OPS else EXACT.get(self.name, self.theirs)
        try:
            takes = inspect.signature(better).parameters
        except ValueError:
            return better
        return better if sample.kwargs.keys() <= takes.keys() else self.theirs


ENTRIES = [
    Entry(name, info)
    for name in (*OPS, *COMPOSED)
    for info in op_db
    if info.name in (name, f"nn.functional.{name}")
]
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
SURE = [e for e in ENTRIES if e.name not in RANDOM]
FLOAT = [
    e for e in SURE if torch.float64 in e.info.dtypes
]  # the database has complex variants apart
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("size_average and reduce", "Using a target size", "Sparse", "The PyTorch API of nested", "Casting complex", "Implicit dimension")
]  # fmt: skip


def test_the_database_has_every_function():
    """A new function adds nothing here: it is found by its name."""
    assert {e.name for e in ENTRIES} == {*OPS, *COMPOSED} - NOT_IN_DATABASE - OURS_ALONE
    assert all(hasattr(torch.nn.functional, name) for name in NOT_IN_DATABASE)
    assert not any(hasattr(torch.nn.functional, name) for name in OURS_ALONE)
    assert sum(map(len, DIFFERENT.values())) == 4


def outcome(function, sample):
    """(result, None) or (None, exception) of a call with a sample."""
    try:
        return function(sample.input, *sample.args, **sample.kwargs), None
    except Exception as error:
        return None, error


def on_tensors(sample, f):
    return sample.transform(lambda v: f(v) if isinstance(v, torch.Tensor) else v)


def is_float(entry, position, value):
    """Whether gradients flow to an argument: to the float tensors given by position (torch's losses give none to their
    weights)."""
    if position in CONSTANT.get(entry.name, ()):
        return False
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def floats(entry, sample):
    given = (sample.input, *sample.args)
    return [t for k, t in enumerate(given) if is_float(entry, k, t)]


def assert_same_layout(entry, ours, theirs, sample):
    assert (ours.dtype, ours.shape, ours.layout) == (theirs.dtype, theirs.shape, theirs.layout)
    assert ours.device == theirs.device
    if ours.layout == torch.strided and ours.numel() > 1:
        first = DIFFERENT["memory order is kept, torch makes the result contiguous"]
        kept = entry.name in first and torch.empty_like(sample.input).stride()
        assert ours.stride() in (theirs.stride(), kept)


def assert_close_as_torch(ours, theirs, exact, also=None):
    """The project's tolerance; where torch, float64 or ours is not finite, ours is as the one or the other (or `also`)."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    rounded = exact.to(theirs.dtype)
    special = ~(theirs.isfinite() & rounded.isfinite() & ours.isfinite())
    equal = lambda a, b: (a == b) | (a.isnan() & b.isnan())  # noqa: E731
    same = equal(ours, theirs) | equal(ours, rounded)
    if also is not None:
        at, value = also
        special |= at
        same |= at & value
    assert same[special].all(), (ours[special], theirs[special], exact[special])
    ours, theirs, exact = (t[~special] for t in (ours, theirs, exact))
    assert_as_accurate(ours, theirs, exact, ours.dtype)


def torchs_slopes_at_nan(entry, sample, x):
    """torch's derivative at nan depends on where an element stands: within a vector, or in what is left after the last."""
    nans = torch.full((65,), torch.nan, dtype=x.dtype, requires_grad=True)
    y = entry.theirs(nans, *sample.args, **sample.kwargs)
    (slopes,) = torch.autograd.grad(y.sum(), nans)
    return slopes[0], slopes[-1]


def explained(entry, sample, x, dy, dx):
    """Where the derivative of an elementwise function need not be torch's, and whether it is one of those it may be."""
    at, fits = x.isnan(), torch.zeros_like(x, dtype=torch.bool)
    if at.any():
        for slope in torchs_slopes_at_nan(entry, sample, x):
            fits |= at & torch.isclose(dx, dy * slope, equal_nan=True)
    if entry.name in DIFFERENT["the derivative at +-inf is its limit 0, torch's composite gives nan"]:  # fmt: skip
        at = at | x.isinf()
        fits |= x.isinf() & (dx == 0)
    return at, fits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", FLOAT, ids=lambda e: e.id)
def test_samples_and_references(entry, dtype):
    generator = torch.Generator().manual_seed(1)
    count = 0
    for sample in entry.samples(dtype):
        small = sample.input.numel() <= 20_000
        if not small and dtype != torch.float32:
            continue  # the database's million elements differ from others in nothing but the time they take
        results, inputs = [], []
        for function, to in ((entry.ours, None), (entry.theirs, None), (entry.exact(sample), torch.float64)):  # fmt: skip
            own = on_tensors(sample, lambda t: t.detach().to(to if t.is_floating_point() else t.dtype).detach())  # noqa: B023, E501  # fmt: skip
            for t in floats(entry, own):
                t.requires_grad_(small)
            results.append(outcome(function, own))
            inputs.append(floats(entry, own))
        (ours, error), (theirs, expected), (exact, _) = results
        assert type(error) is type(expected), (sample, error, expected)
        if expected is not None:
            continue
        count += 1
        assert_same_layout(entry, ours, theirs, sample)
        assert_close_as_torch(ours, theirs, exact)
        if not theirs.requires_grad:
            continue
        dy = torch.randn(theirs.shape, generator=generator, dtype=torch.float64).to(theirs.dtype)
        grads = [torch.autograd.grad(y, xs, dy.to(y.dtype)) for (y, _), xs in zip(results, inputs, strict=True)]  # fmt: skip
        also = None
        if entry.name in OPS and OPS[entry.name].kind == "elementwise":
            also = explained(entry, sample, inputs[0][0].detach(), dy, grads[0][0])
        for mine, other, exactly in zip(*grads, strict=True):
            assert_close_as_torch(mine, other, exactly, also)
    assert count


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.info.error_inputs_func], ids=lambda e: e.id)  # fmt: skip
def test_errors_of_the_database(entry):
    for case in entry.info.error_inputs("cpu"):
        _, error = outcome(entry.ours, case.sample_input)
        _, expected = outcome(entry.theirs, case.sample_input)
        assert type(error) is type(expected) and isinstance(error, case.error_type)
        assert re.search(case.error_regex, str(error)), error


def assert_as_torch(entry, sample, compare_values=True):
    """The same result, to the bit, or an exception of the same type; without changing what was given."""
    sample = on_tensors(sample, lambda t: t.detach())
    ours, error = outcome(entry.ours, on_tensors(sample, lambda t: t.clone()))
    theirs, expected = outcome(entry.theirs, on_tensors(sample, lambda t: t.clone()))
    assert type(error) is type(expected), (sample, error, expected)
    if expected is None:
        assert_same_layout(entry, ours, theirs, sample)
        if compare_values:
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@EVERY
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_other_dtypes_are_torchs(entry, dtype):
    """Computed, promoted or refused as by torch, out of place and in place."""
    samples = [
        on_tensors(s, lambda t: t.to(dtype) if t.is_floating_point() else t)
        for s in entry.samples(
            entry.info.dtypes & {torch.float32} and torch.float32 or torch.complex64, False
        )  # fmt: skip
    ]
    if dtype in entry.info.dtypes:
        samples += [s for s in entry.samples(dtype) if s.input.numel() < 10_000]
    for sample in samples:
        assert_as_torch(entry, sample, entry.name not in RANDOM)
        if "inplace" in inspect.signature(entry.ours).parameters:
            sample.kwargs["inplace"] = True
            assert_as_torch(entry, sample, entry.name not in RANDOM)


def test_gradients_of_complex_numbers_are_torchs():
    count = 0
    for entry in SURE:
        if torch.complex128 not in entry.info.dtypes:
            continue
        for sample in entry.samples(torch.complex128, references=False):
            grads = []
            for function in (entry.ours, entry.theirs):
                own = on_tensors(sample, lambda t: t.detach().clone().requires_grad_())
                y, error = outcome(function, own)
                if error is None:
                    grads.append(torch.autograd.grad(y.abs().sum(), own.input)[0])
            if error is None:  # torch has no gradient of a complex silu
                torch.testing.assert_close(*grads, equal_nan=True)
                count += 1
            else:
                assert grads == []
    assert count > 10


@EVERY
def test_gradients_of_gradients(entry):
    if torch.float64 not in entry.info.dtypes:
        assert entry.info.variant_test_name in ("complex", "without_cudnn")
        return
    count = 0
    for sample in entry.samples(torch.float64, references=False):
        if not 0 < sample.input.numel() <= 700:
            continue
        xs = [t.detach().clone().requires_grad_() for t in floats(entry, sample)]
        order = [is_float(entry, k, t) for k, t in enumerate(sample.args, 1)]

        def f(x, *rest):
            torch.manual_seed(5)  # of what drops
            rest = iter(rest)
            args = [next(rest) if flows else a for a, flows in zip(sample.args, order, strict=True)]  # noqa: B023  # fmt: skip
            return entry.ours(x, *args, **sample.kwargs)  # noqa: B023

        if not f(*xs).requires_grad:
            continue
        assert gradcheck(f, xs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        if entry.info.supports_gradgrad:
            assert gradgradcheck(f, xs, fast_mode=True, gen_non_contig_grad_outputs=True)
        count += 1
        if count == 8:
            break
    assert count


# ---------------------------------------------------------------------------------------------- dropouts


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.name in RANDOM], ids=lambda e: e.id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropouts(entry, dtype):
    """Samples of what is random: everything but the values, which are those of some mask."""
    for sample in entry.samples(dtype):
        ours, error = outcome(entry.ours, sample)
        theirs, expected = outcome(entry.theirs, sample)
        assert type(error) is type(expected), (sample, error, expected)
        if expected is None:
            assert_same_layout(entry, ours, theirs, sample)
            assert ours is sample.input or theirs is not sample.input
            if entry.name == "alpha_dropout":
                continue
            p = sample.kwargs.get("p", 0.5) if sample.kwargs.get("training", True) else 0.0
            scaled = sample.input / (1 - p) if p < 1 else sample.input * 0
            torch.testing.assert_close(ours, torch.where(ours == 0, 0, scaled))


# ---------------------------------------------------------------------------------------------- other tensors

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TENSORS = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 3, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t[:2], t[2:]]),
    "jagged": lambda t: torch.nested.nested_tensor([t[:2], t[2:]], layout=torch.jagged),
    "meta": lambda t: t.to("meta"),
    "meta integers": lambda t: t.to("meta", torch.int32),
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "negative bit": lambda t: torch.complex(t, t).conj().imag,
    "conjugate": lambda t: torch.complex(t, t).conj(),
}


def dense(t):
    if t.is_nested:
        return torch.cat([dense(a).flatten() for a in t.unbind()])
    return t.dequantize() if t.is_quantized else t if t.is_meta else t.to_dense() if t.layout != torch.strided or t.is_mkldnn else t  # fmt: skip


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS.keys())
@pytest.mark.parametrize("name", sorted({e.name for e in SURE} - {"cross_entropy", "nll_loss"}))
def test_other_tensors_are_torchs(name, make):
    loss = name in OPS and OPS[name].kind == "loss"
    options = {"dim": -1} if "softmax" in name else {}
    x = X.sigmoid() if name == "binary_cross_entropy" else X.repeat(1, 2) if name == "glu" else X
    results = []
    for function in (getattr(functional, name), getattr(torch.nn.functional, name)):
        try:
            t = make(x)
            y = function(t, make(x.flip(0).sigmoid())) if loss else function(t, **options)
            results.append((y, None))
        except Exception as error:
            results.append((None, error))
    (ours, error), (theirs, expected) = results
    if make is TENSORS["jagged"] and isinstance(expected, NotImplementedError) and name != "glu":
        # Jagged tensors take every elementwise op of ours, and not every one of torch's.
        torch.testing.assert_close(dense(ours), getattr(torch.nn.functional, name)(X).flatten())
        return
    assert type(error) is type(expected), (error, expected)
    if expected is None:
        assert (type(ours), ours.dtype, ours.layout) == (type(theirs), theirs.dtype, theirs.layout)
        assert ours.device == theirs.device
        if ours.is_meta:
            assert ours.shape == theirs.shape
        else:
            torch.testing.assert_close(dense(ours), dense(theirs))


def test_distributed_tensors_are_torchs():
    """DTensors know how torch's ops are sharded, and nothing of others: they are handed over."""
    dist = torch.distributed
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for name in ("relu", "gelu", "sigmoid", "softmax", "mse_loss"):
            x = DTensor.from_local(X, mesh, [Shard(0)], run_check=False).requires_grad_()
            args = {"softmax": (-1,), "mse_loss": (x.detach(),)}.get(name, ())
            results = []
            for module in (functional, torch.nn.functional):
                y = getattr(module, name)(x, *args)
                results.append((y, *torch.autograd.grad(y.sum(), x)))
            for ours, theirs in zip(*results, strict=True):
                assert isinstance(ours, DTensor) and ours.placements == theirs.placements
                torch.testing.assert_close(ours.to_local(), theirs.to_local())
    finally:
        dist.destroy_process_group()


def test_what_is_handed_over_can_be_compiled_and_exported():
    def f(x, z):
        y = functional.relu(x) + functional.sigmoid(x) + functional.softsign(z).abs()
        return y + functional.l1_loss(z, z * 2) + functional.softmax(x, 0, dtype=torch.float32)

    def g(x, z):
        F = torch.nn.functional
        y = F.relu(x) + F.sigmoid(x) + F.softsign(z).abs()
        return y + F.l1_loss(z, z * 2) + F.softmax(x, 0, dtype=torch.float32)

    args = torch.arange(-3, 4), torch.randn(7, dtype=torch.complex64)
    torch.testing.assert_close(f(*args), g(*args))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), g(*args))

    class Model(torch.nn.Module):
        def forward(self, x, z):
            return f(x, z)

    torch.testing.assert_close(torch.export.export(Model(), args).module()(*args), g(*args))
    torch.testing.assert_close(torch.vmap(f)(args[0].unsqueeze(1), args[1].unsqueeze(1)),
                               torch.vmap(g)(args[0].unsqueeze(1), args[1].unsqueeze(1)))  # fmt: skip


# ---------------------------------------------------------------------------------------------- losses' arguments

LOSSES = sorted(name for name, op in OPS.items() if op.kind == "loss")
MIXED = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.complex64]


def compare_with_warnings(name, *args, **kwargs):
    results = []
    for function in (getattr(functional, name), getattr(torch.nn.functional, name)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                y, error = function(*args, **kwargs), None
            except Exception as raised:
                y, error = None, raised
        results.append((y, error, [(w.category, str(w.message), w.filename) for w in seen]))
    (ours, error, warned), (theirs, expected, their_warnings) = results
    assert type(error) is type(expected), (error, expected)
    assert [w[:2] for w in warned] == [w[:2] for w in their_warnings]
    if expected is None:
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())  # fmt: skip
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    return warned


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("target", MIXED, ids=str)
@pytest.mark.parametrize("input", MIXED, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_two_dtypes(name, input, target, reduction):
    x, t = X.sigmoid().to(input), X.flip(1).sigmoid().to(target)
    compare_with_warnings(name, x, t, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((3, 4), ()), ((3, 4), (3,)), ((0, 4), (4,))], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_broadcast(name, shapes, reduction):
    compare_with_warnings(name, *(torch.rand(s) for s in shapes), reduction=reduction)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("name", [*LOSSES, "cross_entropy", "nll_loss"])
def test_deprecated_arguments_of_losses(name, size_average, reduce):
    if "size_average" not in inspect.signature(getattr(torch.nn.functional, name)).parameters:
        assert name == "huber_loss"
        return
    t = torch.arange(6) % 5 if name in ("cross_entropy", "nll_loss") else X.flip(0).sigmoid()
    compare_with_warnings(name, X.sigmoid(), t, size_average=size_average, reduce=reduce)
