"""Every op of the table and every optimizer on tensors that nobody would think of: any shape and stride, odd offsets,
gaps, overlaps, special values. Inputs lie in larger buffers of canary bytes, of which no byte may change but those that
an in-place op is given. Results are compared by the project's rule (see `cases.assert_as_accurate`).

A small fixed set of examples; FASTOPS_FUZZ=N takes N random ones of each op (`make abuse`).
"""

import inspect
import os

import numpy as np
import pytest
import torch
from cases import DTYPES, INPUTS
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import fastops
from fastops._core.registry import OPS

pytestmark = pytest.mark.slow

BUDGET = int(os.environ.get("FASTOPS_FUZZ", 0))
FUZZ = settings(
    max_examples=BUDGET or 25, derandomize=not BUDGET, deadline=None, database=None,
    suppress_health_check=[*HealthCheck], print_blob=True,
)  # fmt: skip
CANARY = 0xA5
SIZES = [0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 130]
MAX_ELEMENTS = 3000
SPECIAL = [
    torch.inf,
    -torch.inf,
    torch.nan,
    -0.0,
    0.0,
    1e-42,
    -1e-42,
    3e38,
    -3e38,
    6e4,
    1.0,
    -1.0,
    88.8,
    -104.0,
]


# ------------------------------------------------------------------------------------------ tensors


class Fenced:
    """A tensor within a buffer of canaries: its strides, and where it starts, are as drawn."""

    def __init__(self, shape, strides, offset, dtype, values, negated):
        room = (
            sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
            if 0 not in shape
            else 0
        )
        size = dtype.itemsize
        self.bytes = torch.full(((offset + room + 40) * size,), CANARY, dtype=torch.uint8)
        view = self.bytes.view(dtype).as_strided(shape, strides, offset)
        if view.numel():
            overlapping = any(s == 0 and n > 1 for n, s in zip(shape, strides, strict=True))
            target = (
                view[tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)]
                if overlapping
                else view
            )
            target.copy_((-values if negated else values)[tuple(slice(0, n) for n in target.shape)])
        self.tensor = torch._neg_view(view) if negated else view
        self.view, self.before = view, self.bytes.clone()

    def untouched(self) -> bool:
        return torch.equal(self.bytes, self.before)

    def untouched_but_for_itself(self) -> bool:
        with torch.no_grad():
            self.view.copy_(self.before.view(self.view.dtype).as_strided(self.view.shape, self.view.stride(),
                                                                         self.view.storage_offset()))  # fmt: skip
        return self.untouched()


@st.composite
def strides_of(draw, shape, expandable=True):
    """Strides in any order of the dimensions, with gaps; one dimension may be expanded."""
    order = draw(st.permutations(range(len(shape))))
    plain = draw(st.booleans())
    strides, step = [0] * len(shape), 1
    for d in order:
        step *= 1 if plain else draw(st.sampled_from([1, 1, 1, 2, 3]))
        strides[d] = step
        step *= max(shape[d], 1)
    if expandable and shape and draw(st.integers(0, 5)) == 0:
        strides[draw(st.integers(0, len(shape) - 1))] = 0
    return tuple(strides)


@st.composite
def shapes(draw, least=0, most=5):
    shape = []
    for _ in range(draw(st.integers(least, most))):
        n = draw(st.sampled_from(SIZES))
        while n > 1 and n * torch.Size(shape).numel() > MAX_ELEMENTS:
            n //= 2
        shape.append(n)
    return tuple(shape)


@st.composite
def fenced(draw, shape, dtype, scale=2.0, special=(), within=None, expandable=True):
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=g) * scale
    if within:
        values = within(values)
    if special and values.numel():
        flat = values.view(-1)
        for value in draw(st.lists(st.sampled_from(special), min_size=1, max_size=4)):
            flat[int(torch.randint(flat.numel(), (), generator=g))] = value
    strides = draw(strides_of(shape, expandable))
    negated = draw(st.integers(0, 9)) == 0
    return Fenced(shape, strides, draw(st.integers(0, 9)), dtype, values.to(dtype), negated)


# ------------------------------------------------------------------------------------------ the rule


def same_values(a, b):
    return (a == b) | (a.isnan() & b.isnan())


def assert_as_accurate(ours, theirs, exact, each, terms=None):
    """Where float64's result is a number in this dtype, the error is at most twice torch's, plus 4 eps, in units of
    that number (each) or of the largest (not each); elsewhere what float64 gives, or what torch gives. For float64 the
    reference is torch's float64, whose own error counts as none, but where `exact` is of a longer dtype. But a sum errs
    by as much as its terms, and by the order in which they are added: there the 4 eps are of `terms`, the sum of their
    absolute values."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (
        ours.shape,
        theirs.shape,
        ours.dtype,
        theirs.dtype,
    )
    if ours.numel() == 0:
        return
    e, o, t = (x.detach().double() for x in (exact, ours, theirs))
    in_dtype = exact.detach().to(ours.dtype).double()
    finite = in_dtype.isfinite()
    eps = torch.finfo(ours.dtype).eps
    # where float64 says nothing: torch's float64 itself has constants of float32 in places
    as_torch = same_values(o, t) | ((o - t).abs() <= max(8 * eps, 1e-6) * t.abs())
    assert (finite | same_values(o, in_dtype) | as_torch).all(), (o, t, in_dtype)
    assert (~finite | o.isfinite() | ~t.isfinite()).all(), (o, t, e)
    scale = (
        e.abs().clamp(min=1)
        if each
        else e[finite].abs().max().clamp(min=1)
        if finite.any()
        else torch.ones(())
    )
    if terms is not None and ours.dtype == torch.float64:
        scale = torch.maximum(scale, terms.detach())
    errors = [((x - e).abs() / scale)[finite & x.isfinite()] for x in (o, t)]
    mine, torchs = (x.max().item() if x.numel() else 0.0 for x in errors)
    allowed = 2 * torchs + 4 * eps
    assert mine <= allowed, f"error {mine:.3g}, torch's {torchs:.3g}"


def run(function, tensors, kwargs, dy=None):
    """(result, gradients); kwargs' tensors take none."""
    leaves = [
        t.detach().requires_grad_() if dy is not None and t.is_floating_point() else t
        for t in tensors
    ]
    y = function(*leaves, **kwargs)
    if dy is None:
        return y, []
    wanted = [t for t in leaves if t.requires_grad]
    return y, torch.autograd.grad(y, wanted, dy.to(y.dtype).reshape(y.shape))


def doubled(values):
    def convert(v):
        return v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v

    return (
        {k: convert(v) for k, v in values.items()}
        if isinstance(values, dict)
        else [convert(v) for v in values]
    )


def check(op, inputs, kwargs, each, extra=(), exactly=None):
    """`exactly(x, dy, **kwargs)`, where it is given, is the result and the gradients beside which both are judged."""
    tensors = [f.tensor if isinstance(f, Fenced) else f for f in inputs]
    note(
        f"{op.name} {[(tuple(t.shape), t.stride(), t.dtype, t.storage_offset()) for t in tensors]} {kwargs}"
    )
    plain = [t.resolve_neg() for t in tensors]
    exact, _ = run(op.exact, doubled(plain), doubled(kwargs))
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    if exactly:
        exact, exact_grads = exactly(*plain, dy, **kwargs)
    else:
        exact, exact_grads = run(op.exact, doubled(plain), doubled(kwargs), dy)
    theirs, their_grads = run(op.reference, plain, kwargs, dy)
    _, dense_grads = run(op.reference, [t.contiguous() for t in plain], kwargs, dy)
    ours, our_grads = run(op.function, tensors, kwargs, dy)
    assert_as_accurate(ours, theirs, exact, each)
    with torch.no_grad():
        alone = op.function(*tensors, **kwargs)
    assert_as_accurate(alone, theirs, exact, each)
    for of, mine, torchs, of_dense, truly in zip(
        plain, our_grads, their_grads, dense_grads, exact_grads, strict=False
    ):
        # at a NaN, torch's vectors and its scalars differ; and where it gives a NaN at an infinity, ours gives the limit
        tell = ~(of.isnan() | truly.isnan()) if each else torch.ones_like(of, dtype=torch.bool)
        assert mine.shape == of.shape
        # a bias' gradient is the sum of the input's, which torch adds in an order that the layout decides, and so does its
        # own error; ours adds as torch does in a contiguous layout
        if of.shape != plain[0].shape:
            further = (of_dense.double() - truly).abs() > (torchs.double() - truly).abs()
            torchs = torch.where(further, of_dense, torchs)
        terms = (
            exact_grads[0].abs().sum_to_size(of.shape)[tell] if of.shape != plain[0].shape else None
        )
        assert_as_accurate(mine[tell], torchs[tell], truly[tell], each, terms)
    for f in [*inputs, *extra]:
        assert not isinstance(f, Fenced) or f.untouched()
    return ours, theirs


# ------------------------------------------------------------------------------------------ elementwise


def numbers(draw, op):
    """Values of an op's other arguments: its numbers, all moved by one factor, which keeps them in order."""
    factor = draw(st.sampled_from([1.0, 1.0, 0.25, 0.5, 2.0, 3.0]))
    kwargs = {}
    for p in op.signature.parameters.values():
        if isinstance(p.default, float):
            kwargs[p.name] = p.default * factor
        if p.name == "approximate":
            kwargs[p.name] = draw(st.sampled_from(["none", "tanh"]))
    return kwargs


def steps(t):
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def of_kind(*kinds):
    return pytest.mark.parametrize(
        "op", [op for op in OPS.values() if op.kind in kinds], ids=lambda op: op.name
    )


@of_kind("elementwise")
@FUZZ
@given(st.data())
def test_map(op, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    special = SPECIAL if data.draw(st.booleans()) else ()
    x = data.draw(fenced(data.draw(shapes()), dtype, special=special))
    kwargs = numbers(data.draw, op)
    ours, theirs = check(op, [x], kwargs, each=True)
    if ours.numel() > 1:  # torch's own log_sigmoid makes a contiguous result of everything
        assert steps(ours) in (steps(theirs), steps(torch.empty_like(x.view)))
    if "inplace" in op.signature.parameters and 0 not in x.view.stride():
        with torch.no_grad():
            y = op.function(x.tensor, **kwargs, inplace=True)
        assert y is x.tensor and same_values(y.double(), ours.detach().double()).all()
        assert x.untouched_but_for_itself()


@of_kind("fused")
@FUZZ
@given(st.data())
def test_fused(op, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    bias = "bias" in op.signature.parameters
    shape = data.draw(shapes(least=int(bias)))
    special = SPECIAL if data.draw(st.booleans()) else ()
    x = data.draw(fenced(shape, dtype, special=special))
    other = data.draw(fenced(shape[-1:] if bias else shape, dtype))
    kwargs = numbers(data.draw, op)
    ours, _ = check(op, [x, other], kwargs, each=True)
    if "inplace" in op.signature.parameters and 0 not in x.view.stride():
        with torch.no_grad():
            y = op.function(x.tensor, other.tensor, **kwargs, inplace=True)
        assert same_values(y.double(), ours.detach().double()).all()
        assert x.untouched_but_for_itself() and other.untouched()


@of_kind("loss")
@FUZZ
@given(st.data())
def test_reduce(op, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    within, shape = INPUTS.get(op.name), data.draw(shapes())
    special = ([0.0, 1.0, 1e-42, 0.5] if within else SPECIAL) if data.draw(st.booleans()) else ()
    x = data.draw(fenced(shape, dtype, special=special, within=within))
    t = data.draw(fenced(shape, dtype, within=within))
    kwargs = numbers(data.draw, op) | {
        "reduction": data.draw(st.sampled_from(["none", "mean", "sum"]))
    }
    extra = []
    if "weight" in inspect.signature(op.exact).parameters and data.draw(st.integers(0, 3)) == 0:
        weight = data.draw(fenced(shape, dtype, within=torch.abs))
        extra, kwargs["weight"] = [weight], weight.tensor.resolve_neg()
    elif "pos_weight" in op.signature.parameters and data.draw(st.booleans()):
        # of a shape that broadcasts
        first = data.draw(st.integers(0, len(shape)))
        ones = [data.draw(st.booleans()) for _ in shape[first:]]
        row = tuple(1 if one else n for one, n in zip(ones, shape[first:], strict=True))
        weight = data.draw(fenced(row, dtype, within=torch.abs))
        extra, kwargs["pos_weight"] = [weight], weight.tensor.resolve_neg()
    check(op, [x, t], kwargs, each=False, extra=extra)


# ------------------------------------------------------------------------------------------ rows


@st.composite
def row_shapes(draw, least=1):
    """Shapes and the dimension that is normalised, which may be long."""
    shape = list(draw(shapes(least=least)))
    dim = draw(st.integers(0, len(shape) - 1)) if shape else 0
    if shape and draw(st.integers(0, 4)) == 0 and 0 not in shape:
        others = torch.Size(shape).numel() // shape[dim]
        shape[dim] = max(shape[dim], 5000 // others)
    return tuple(shape), dim


def in_long_double(*tensors):
    """Arrays of x87's 64 bits, where numpy has them: torch's float64 cannot judge float64, for its own sums err as much as
    ours."""
    return [t.detach().numpy().astype(np.longdouble) for t in tensors]


def probabilities(v, dim):
    """The softmax of an array, and its logarithm."""
    shifted = v - v.max(dim, keepdims=True)
    total = np.exp(shifted).sum(dim, keepdims=True)
    return np.exp(shifted) / total, shifted - np.log(total)


def softmax_in_long_double(x, dy, dim, log):
    """The result and the gradient."""
    v, g = in_long_double(x, dy)
    with np.errstate(all="ignore"):
        p, log_p = probabilities(v, dim)
        dx = g - p * g.sum(dim, keepdims=True) if log else p * (g - (p * g).sum(dim, keepdims=True))
        return tuple(torch.from_numpy(np.asarray(a, np.float64)) for a in (log_p if log else p, dx))


@pytest.mark.parametrize("op", [OPS["softmax"], OPS["log_softmax"]], ids=lambda op: op.name)
@FUZZ
@given(st.data())
def test_softmax(op, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape, dim = data.draw(row_shapes(least=0))
    special = (
        [-torch.inf, torch.inf, torch.nan, 3e38, -3e38, 1e4] if data.draw(st.booleans()) else ()
    )
    x = data.draw(
        fenced(shape, dtype, special=special, scale=data.draw(st.sampled_from([2.0, 100.0])))
    )
    dim -= len(shape) if shape and data.draw(st.booleans()) else 0

    def exactly(x, dy, dim):
        y, dx = softmax_in_long_double(x, dy, dim, log=op.name == "log_softmax")
        return y, [dx]

    long = dtype == torch.float64 and shape and 0 not in shape
    check(op, [x], {"dim": dim}, each=False, exactly=exactly if long else None)


def cross_entropy_in_long_double(
    x, target, dy, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """The loss and the gradients to floats among its inputs, of finite logits."""
    dim = min(1, x.dim() - 1)
    v, g = in_long_double(x, dy)
    v = np.moveaxis(v, dim, -1)
    n = v.shape[-1]
    p, log_p = probabilities(v, -1)
    w = np.ones(n) if weight is None else weight.numpy()
    keep = 1 - np.longdouble(label_smoothing)
    if target.is_floating_point():
        t, divisor = np.moveaxis(target.detach().numpy(), dim, -1), np.longdouble(v.size // n)
        q = (t * keep + label_smoothing / np.longdouble(n)) * w
    else:
        t = target.numpy()
        live = (t != ignore_index)[..., None]
        hot = (t[..., None] == np.arange(n)) * live
        q = (hot * keep + label_smoothing / np.longdouble(n)) * w * live
        divisor = (hot * w.astype(np.longdouble)).sum()
    loss, of_x, of_q = -(q * log_p).sum(-1), p * q.sum(-1, keepdims=True) - q, -keep * w * log_p
    if reduction == "none":
        g = g[..., None]
    else:
        divisor = divisor if reduction == "mean" else 1
        loss, g = loss.sum() / divisor, g / divisor
    grads = [of_x * g, of_q * g][: 1 + target.is_floating_point()]
    return torch.from_numpy(np.asarray(loss, np.float64)), [
        torch.from_numpy(np.moveaxis(d, -1, dim).astype(np.float64)) for d in grads
    ]


@FUZZ
@given(st.data())
def test_cross_entropy(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = list(data.draw(shapes(least=1)))
    dim = min(1, len(shape) - 1)
    shape[dim] = data.draw(st.sampled_from([1, 2, 7, 16, 33, 130, 2100]))
    for d in range(len(shape)):
        while d != dim and torch.Size(shape).numel() > 3 * MAX_ELEMENTS:
            shape[d] //= 2
    rows = shape[:dim] + shape[dim + 1 :]
    # torch's gradient of an ignored row is a NaN where its logits are not finite; ours is 0
    ignoring = data.draw(st.booleans())
    special = (
        [-torch.inf, 3e38, -3e38, 1e4, torch.nan]
        if not ignoring and data.draw(st.booleans())
        else ()
    )
    x = data.draw(fenced(tuple(shape), dtype, special=special))
    kwargs = {"reduction": data.draw(st.sampled_from(["none", "mean", "sum"]))}
    kwargs["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    extra = []
    if data.draw(st.booleans()):
        weight = data.draw(fenced((shape[dim],), dtype, within=torch.abs))
        extra, kwargs["weight"] = [weight], weight.tensor.resolve_neg()
    if data.draw(st.booleans()):
        target = data.draw(
            fenced(tuple(shape), dtype, within=lambda v: v.softmax(dim), expandable=False)
        )
        inputs = [x, target]
    else:
        g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        index = torch.randint(shape[dim], rows, generator=g)
        if ignoring:
            kwargs["ignore_index"] = data.draw(st.sampled_from([-100, 0, 5]))
            index[torch.rand(rows, generator=g) < 0.3] = (
                kwargs["ignore_index"] if kwargs["ignore_index"] < 0 else 0
            )
        target = Fenced(
            tuple(rows), data.draw(strides_of(rows, False)), 3, torch.int64, index, False
        )
        inputs = [x, target]
    counts = inputs[1].tensor.is_floating_point() or bool(
        (index != kwargs.get("ignore_index", -100)).any()
    )
    long = dtype == torch.float64 and not special and 0 not in shape and counts
    exactly = cross_entropy_in_long_double if long else None
    check(OPS["cross_entropy"], inputs, kwargs, each=False, extra=extra, exactly=exactly)


# ------------------------------------------------------------------------------------------ dropout


@of_kind("dropout")
@FUZZ
@given(st.data())
def test_random(op, data):
    """The mask is that of a contiguous tensor of ones from the same seed; what is dropped is 0, whatever it was."""
    dtype = data.draw(st.sampled_from(DTYPES))
    bias = "bias" in op.signature.parameters
    shape = data.draw(shapes(least=int(bias)))
    p = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]))
    special = SPECIAL if p < 1 and not bias and data.draw(st.booleans()) else ()
    x = data.draw(fenced(shape, dtype, special=special))
    inputs = [x]
    if bias:
        inputs += [data.draw(fenced(shape[-1:], dtype)), data.draw(fenced(shape, dtype))]
    tensors = [f.tensor for f in inputs]
    note(
        f"{op.name} {[(tuple(t.shape), t.stride(), t.dtype, t.storage_offset()) for t in tensors]} p={p}"
    )
    seed = data.draw(st.integers(0, 2**62))
    torch.manual_seed(seed)
    kept = (
        fastops.functional.dropout(torch.ones(shape), p) != 0
        if 0 < p < 1
        else torch.full(shape, p == 0)
    )

    def exact(x, bias=None, residual=None):
        x = x if bias is None else x + bias
        x = x.relu() if op.name.startswith("relu") else x
        # as torch, which multiplies by a mask of 0 and 1 / (1 - p)
        y = torch.where(kept, x * (1 / (1 - p)), torch.zeros((), dtype=x.dtype)) if p < 1 else x * 0
        return y if residual is None else residual + y

    wide = doubled([t.resolve_neg() for t in tensors])
    narrow = [t.resolve_neg() for t in tensors]
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    true, true_grads = run(exact, wide, {}, dy)
    theirs, their_grads = run(exact, narrow, {}, dy)
    torch.manual_seed(seed)
    ours, our_grads = run(op.function, tensors, {"p": p}, dy)
    assert_as_accurate(ours, theirs, true, each=True)
    for mine, torchs, truly in zip(our_grads, their_grads, true_grads, strict=True):
        assert_as_accurate(mine, torchs, truly, each=False)
    assert all(f.untouched() for f in inputs)
    if "inplace" in op.signature.parameters and 0 not in x.view.stride():
        torch.manual_seed(seed)
        with torch.no_grad():
            y = op.function(x.tensor, p, inplace=True)
        assert same_values(y.double(), ours.detach().double()).all()
        assert x.untouched_but_for_itself()


# ------------------------------------------------------------------------------------------ optimizers

OPTIONS = {
    "SGD": {"momentum": [0.0, 0.9], "dampening": [0.0, 0.1], "weight_decay": [0.0, 0.1], "maximize": [False, True]},
    "Adam": {"amsgrad": [False, True], "weight_decay": [0.0, 0.1], "maximize": [False, True], "betas": [(0.9, 0.999), (0.0, 0.5)]},
    "AdamW": {"amsgrad": [False, True], "weight_decay": [0.0, 0.1], "eps": [1e-8, 1e-3]},
    "RMSprop": {"momentum": [0.0, 0.9], "centered": [False, True], "weight_decay": [0.0, 0.1], "alpha": [0.99, 0.5]},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@FUZZ
@given(st.data())
def test_optimizers(name, data):
    """Parameters and gradients of any layout, two steps; error as by the rule against torch's for-loop."""
    count = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    options = {k: data.draw(st.sampled_from(v)) for k, v in OPTIONS[name].items()}
    options["lr"] = data.draw(st.sampled_from([0.1, 0.003]))
    held, grads = [], []
    for _ in range(count):
        shape = data.draw(shapes(most=4))
        held.append(data.draw(fenced(shape, dtype, expandable=False)))
        grads.append([data.draw(fenced(shape, dtype)) for _ in range(2)])
    note(f"{options} {[(f.view.shape, f.view.stride(), f.view.storage_offset()) for f in held]}")
    start = [f.tensor.resolve_neg().clone() for f in held]

    def stepped(module, params, precision, **more):
        params = [torch.nn.Parameter(p, requires_grad=True) for p in params]
        optimizer = getattr(module, name)(params, **options, **more)
        for k in range(2):
            for p, g in zip(params, grads, strict=True):
                g = g[k].tensor
                p.grad = g if precision is None else g.resolve_neg().to(precision)
            optimizer.step()
        return [p.detach() for p in params]

    ours = stepped(fastops.optim, [f.tensor for f in held], None)
    theirs = stepped(torch.optim, [p.clone() for p in start], dtype, foreach=False)
    exact = stepped(torch.optim, [p.double() for p in start], torch.float64, foreach=False)
    for mine, torchs, truly in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(mine.resolve_neg(), torchs, truly, each=False)
    assert all(g.untouched() for pair in grads for g in pair)
    assert all(f.untouched_but_for_itself() for f in held)
