"""Every op, every dtype, every layout: values, gradients, strides and dtypes are torch's. From the table of ops."""

from functools import partial

import pytest
import torch
from cases import (
    INPUTS,
    QUICK_DTYPES,
    Case,
    assert_as_accurate,
    cases,
    error,
    gradients,
    ids,
    roomy,
)

from fastops._core.registry import KERNELS, OPS, overload, parameters_of

ALL = cases()
ROOMY = [case for case in ALL if roomy(case)]


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_as_accurate_as_torch(case, dtype):
    rounded = case.to(dtype)
    exact = rounded.to(torch.float64).leaves()
    dy = torch.randn(exact(case.op.exact).shape, generator=torch.Generator().manual_seed(9)).to(
        dtype
    )
    true, true_grads = gradients(exact, case.op.exact, dy)
    theirs, their_grads = gradients(rounded.leaves(), case.op.reference, dy)
    ours, our_grads = gradients(rounded.leaves(), None, dy)
    assert ours.dtype == theirs.dtype
    # torch's strides; or the input's own, where torch (softmax) makes the result contiguous whatever it is given
    assert ours.stride() in (theirs.stride(), rounded.tensors[0].stride()) or ours.numel() <= 1
    assert_as_accurate(ours, theirs, true, dtype)
    with torch.no_grad():
        assert_as_accurate(
            rounded(), theirs, true, dtype
        )  # the path that keeps nothing for backward
    for mine, other, exactly in zip(our_grads, their_grads, true_grads, strict=True):
        assert mine.dtype == other.dtype
        assert_as_accurate(mine, other, exactly, dtype)


def second_derivative(function, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x, allow_unused=True) if slope.requires_grad else (None,)  # fmt: skip
    return torch.zeros_like(x) if curve is None else curve


BCE = "binary_cross_entropy_with_logits"
SMOOTH = {
    **{
        op.name: (op, {}, ())
        for op in OPS.values()
        if op.kind == "elementwise" and op.name != "hardsigmoid"
    },
    "gelu tanh": (OPS["gelu"], {"approximate": "tanh"}, ()),
    "softplus negative": (OPS["softplus"], {"beta": -1.0}, ()),
    BCE: (OPS[BCE], {"reduction": "sum"}, (0.3,)),
    f"{BCE} pos_weight": (OPS[BCE], {"reduction": "sum", "pos_weight": 2.0}, (0.3,)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivative_at_zero_and_far_out(name, dtype):
    """Where a Dual would meet an infinity, or the kink of an abs() in a formula of a function that has none. torch has no
    second derivative of hardsigmoid, and of mish it has a NaN far out."""
    op, arguments, target = SMOOTH[name]
    x = torch.tensor([-1000.0, -100, -89, -30, -1, 0, 1, 30, 89, 100, 1000], dtype=dtype)
    if name in ("elu", "selu", "celu"):
        x = x[x != 0]  # a kink: the limits differ

    def calling(function):
        def call(x):
            given = {k: x.new_tensor(v) if k == "pos_weight" else v for k, v in arguments.items()}
            return function(x, *(torch.full_like(x, t) for t in target), **given)

        return call

    ours = second_derivative(calling(op.function), x)
    theirs = second_derivative(calling(op.reference), x)
    exact = second_derivative(calling(op.exact), x.double())
    known = exact.isfinite()
    assert ours.isfinite().all() and known.sum() >= len(x) - 1
    assert_as_accurate(ours[known], theirs[known], exact[known], dtype)


def magnitudes(dtype: torch.dtype) -> torch.Tensor:
    """Powers of ten up to the dtype's largest number, of either sign."""
    largest = torch.finfo(dtype).max
    x = [10.0**k for k in range(-6, 309) if 10.0**k < largest] + [largest]
    return torch.tensor([-v for v in reversed(x)] + x, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*SMOOTH, "hardsigmoid", "bias_gelu", "bias_gelu tanh"])
def test_every_magnitude(name, dtype):
    """Values and two derivatives where x^2 and x^3 overflow. An activation is a line there, or has an asymptote: what
    torch makes of the magnitudes that float64 holds in excess of float32 is left out, where it overflows too."""
    op, arguments, target = SMOOTH.get(name) or (
        OPS[name.split()[0]], {"approximate": "tanh"} if "tanh" in name else {}, ()
    )  # fmt: skip

    def derivatives(function, x):
        given = {k: x.new_tensor(v) if k == "pos_weight" else v for k, v in arguments.items()}
        rest = [torch.full_like(x, t) for t in target]
        if op.kind == "fused":
            rest = [x.new_zeros(1)]
        x = x.clone()[:, None].requires_grad_()
        rest = [t if op.kind == "fused" else t[:, None] for t in rest]
        y = function(x, *rest, **{**given, **({"reduction": "none"} if target else {})})
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        if not slope.requires_grad or name == "hardsigmoid":  # whose second derivative torch lacks
            return y.detach(), slope.detach(), torch.zeros_like(x)
        (curve,) = torch.autograd.grad(slope.sum(), x, allow_unused=True)
        return y.detach(), slope.detach(), torch.zeros_like(x) if curve is None else curve.detach()

    x = magnitudes(dtype)
    if dtype == torch.float64:
        small = x.abs() < 1e38
        far = derivatives(op.function, x[~small])
        below = x[~small, None].abs() < 1e308  # the largest of selu's values are infinite
        assert all((t.isfinite() | ~below).all() for t in far)
        # the slope does not change any more
        ends = derivatives(op.function, x.new_tensor([-1e30, 1e30]))[1][:, 0]
        expected = torch.where(x[~small] < 0, *ends)
        torch.testing.assert_close(far[1][:, 0], expected, rtol=1e-14, atol=1e-30)
        x = x[small]
    ours, theirs, exact = (
        derivatives(f, v) for f, v in ((op.function, x), (op.reference, x), (op.exact, x.double()))
    )
    size = x.double().abs().clamp(min=1)[:, None]
    narrow = (
        x.float()
    )  # torch's error in float64, where it is the oracle, is taken to be as many eps as in float32
    in_float32 = derivatives(op.reference, narrow) if dtype == torch.float64 else [None] * 3
    of_narrow = derivatives(op.exact, narrow.double()) if dtype == torch.float64 else [None] * 3
    for mine, other, exactly, by, rough, smooth in zip(
        ours, theirs, exact, (size, 1, 1), in_float32, of_narrow, strict=True
    ):
        largest = torch.finfo(dtype).max
        # Near the end of the range the terms of a sum may overflow, where they do in torch too.
        known = exactly.abs() <= largest * (1 - 0.5 * ~other.isfinite())
        assert known.any() and mine[known].isfinite().all()
        assert not mine.isnan().any()
        other = torch.where(other.isfinite(), other, exactly.to(dtype))
        scaled = [(t.double() / by)[known] for t in (mine, other, exactly)]
        if dtype == torch.float64:
            fine = rough.isfinite() & (smooth.abs() < torch.finfo(torch.float32).max)
            theirs_narrow = error((rough.double() / by)[fine], (smooth / by)[fine])
            eps, eps_of_float32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
            assert error(scaled[0], scaled[2]) <= (2 * theirs_narrow / eps_of_float32 + 4) * eps
        else:
            assert_as_accurate(*scaled, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gelu tanh", "squareplus"])
def test_far_out_is_a_line(name, dtype):
    """x and 0, slopes 1 and 0: x^3 overflows from 7e12 on, x^2 from 1.9e19, in float64 from 1e103 and 1e154."""
    op, arguments, _ = SMOOTH[name]
    far = [1e10, 1e14, 1e19, 2e19, 1e30, torch.finfo(dtype).max]
    x = torch.tensor([*far, *(1e103, 1e155)[: 2 * (dtype == torch.float64)]], dtype=dtype)
    for sign in (1, -1):
        leaf = (sign * x).requires_grad_()
        y = op.function(leaf, **arguments)
        (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), leaf)
        assert torch.equal(slope, torch.full_like(x, float(sign > 0)))
        assert not curve.abs().max() > 1e-20
        if sign > 0:
            assert torch.equal(y, x)
        else:
            assert not y.abs().max() > 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "row", [row for row, (kind, _) in KERNELS.items() if kind == "elementwise"]
)
def test_every_value_of_two_bytes(row, dtype):
    """Computed in float32 and rounded once to even, in whatever order the lanes are held: a NaN stays one."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.cat([x, x[:13]])  # a last group that is not full
    dy = torch.linspace(-3, 3, len(x)).to(dtype)
    parameters = [value for _, value in parameters_of(row)]
    for name, given in ((row, [x]), (f"{row}_backward", [x, dy])):
        function = overload(name)
        wide = function(*(t.float() for t in given), *parameters)
        narrow = function(*given, *parameters)
        torch.testing.assert_close(narrow, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_inputs_are_left_alone(case):
    case = case.to(torch.float32)
    before = [t.clone() for t in case.tensors]
    versions = [t._version for t in case.tensors]
    leaves = case.leaves()
    y = leaves()
    if y.requires_grad:
        y.sum().backward()
    for t, b, v in zip(case.tensors, before, versions, strict=True):
        torch.testing.assert_close(t, b, rtol=0, atol=0, equal_nan=True)
        assert t._version == v


@pytest.mark.parametrize("case", ROOMY, ids=ids(ROOMY))
def test_special_values(case):
    """inf, -inf, nan and huge values give what torch gives, in float32 or (where the two differ) in float64."""
    x = case.tensors[0].to(torch.float32).clone()
    flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
    values = [torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 0.0, -0.0, 1e-42]
    if case.op.name in INPUTS:  # the ends of what it takes, and what is next to them
        values = [0.0, -0.0, 1.0, 1e-42, 1e-38, 1 - 6e-8, 0.5, 1e-12]
    flat[:8] = torch.tensor(values)
    special = Case(case.op, case.name, (flat.reshape(x.shape), *case.to(torch.float32).tensors[1:]),
                   case.to(torch.float32).kwargs)  # fmt: skip
    ours, theirs = special(), special(case.op.reference)
    exact = special.to(torch.float64)(case.op.exact).to(torch.float32)
    close = partial(torch.isclose, equal_nan=True, rtol=1e-5, atol=1e-6)
    wrong = ~(close(ours, theirs) | close(ours, exact))
    assert not wrong.any(), (ours[wrong], theirs[wrong], exact[wrong])


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(2, 2049, 3), (2, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_thousands_of_equal_terms_do_not_drift(dtype, shape, probabilities):
    """Not in float64, where torch's own sum over columns is what drifts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    if probabilities:
        target = torch.full(shape, 1 / shape[1]).to(dtype)
    op = OPS["cross_entropy"]
    case = Case(op, "", (x, target), {"label_smoothing": 1.0, "reduction": "none"})
    dy = torch.ones(shape[0], *shape[2:], dtype=dtype)
    true, true_grads = gradients(case.to(torch.float64).leaves(), op.exact, dy)
    theirs, their_grads = gradients(case.leaves(), op.reference, dy)
    ours, our_grads = gradients(case.leaves(), None, dy)
    assert_as_accurate(ours, theirs, true, dtype)
    for mine, other, exactly in zip(our_grads, their_grads, true_grads, strict=True):
        assert_as_accurate(mine, other, exactly, dtype)


@pytest.mark.parametrize("shape", [(5000,), (5000, 3)], ids=str)
def test_gradients_that_cancel_in_a_sharp_log_softmax(shape):
    """Where one class has all the weight, its gradient is what thousands of others sum up to, of either sign."""
    op = OPS["log_softmax"]
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        x, dy = 100 * torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        case = Case(op, "", (x,), {"dim": 0})
        _, (exact,) = gradients(case.to(torch.float64).leaves(), op.exact, dy)
        _, (theirs,) = gradients(case.leaves(), op.reference, dy)
        _, (ours,) = gradients(case.leaves(), None, dy)
        assert_as_accurate(ours, theirs, exact, torch.float32)
