"""Ops that are fused with their neighbours: relu_dropout and bias_dropout_add against what they are fused of (same seed,
same mask), and what the fused forms do where torch's + broadcasts or promotes."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as TF
from cases import DTYPES, LAYOUTS, assert_as_accurate, randn
from torch.autograd import gradcheck, gradgradcheck

import fastops
from fastops._core.registry import overload

pytestmark = pytest.mark.quick

F = fastops.functional
SEED = torch.tensor(0x1234_5678_9ABC_DEF)
dropout, relu_dropout, bias_dropout_add = map(
    overload, ("dropout", "relu_dropout", "bias_dropout_add")
)


def leaf(x, dtype=torch.float64):
    return x.to(dtype).detach().clone(memory_format=torch.preserve_format).requires_grad_()


# ---------------------------------------------------------------------------------------------- relu_dropout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_dropout_is_dropout_of_relu(layout, dtype):
    x = LAYOUTS[layout]().to(dtype)
    y = relu_dropout(x, 0.3, SEED)
    assert torch.equal(y, dropout(TF.relu(x), 0.3, SEED)) and y.dtype == dtype
    a, b = leaf(x, dtype), leaf(x, dtype)
    dy = randn(*x.shape, seed=3).to(dtype)
    (da,) = torch.autograd.grad(relu_dropout(a, 0.3, SEED), a, dy)
    (db,) = torch.autograd.grad(dropout(TF.relu(b), 0.3, SEED), b, dy)
    assert torch.equal(da, db)
    inplace = x.clone(memory_format=torch.preserve_format)
    overload("relu_dropout_")(inplace, 0.3, SEED)
    assert torch.equal(inplace, y)


def test_relu_dropout_inplace_has_a_gradient_and_moves_the_version():
    x = leaf(randn(7, 13))
    h = x * 1
    before = h._version
    torch.manual_seed(5)
    y = F.relu_dropout(h, 0.4, inplace=True)
    assert y is h and h._version == before + 1
    torch.manual_seed(5)
    z = F.dropout(TF.relu(x), 0.4)
    dy = randn(7, 13, seed=2)
    assert torch.equal(y, z)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(z, x, dy)[0])


def test_relu_dropout_keeps_its_output_alone():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.relu_dropout(leaf(randn(64, 64)), 0.5)
    assert [t.data_ptr() for t in saved] == [y.data_ptr()]


@pytest.mark.parametrize(
    "training, p", [(False, 0.5), (True, 0.0), (True, 1.0)], ids=["eval", "p=0", "p=1"]
)
def test_nothing_to_draw(training, p):
    x, bias, residual = randn(5, 6), randn(6, seed=1), randn(5, 6, seed=2)
    state = torch.get_rng_state()
    dropped = p == 1 and training
    expected = torch.zeros(5, 6).double() if dropped else TF.relu(x)
    torch.testing.assert_close(F.relu_dropout(x, p, training), expected)
    joined = residual if dropped else residual + (x + bias)
    torch.testing.assert_close(F.bias_dropout_add(x, bias, residual, p, training), joined)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------- bias_dropout_add


@pytest.mark.parametrize(
    "shape", [(1,), (3, 1), (7, 13), (4, 5, 33), (2, 64), (0, 3), (40, 130)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_dropout_add_is_what_it_says(shape, dtype):
    tensors = randn(*shape), randn(shape[-1], seed=1), randn(*shape, seed=2)
    tensors = tuple(t.to(dtype) for t in tensors)
    dy = randn(*shape, seed=3).to(dtype)

    def run(function, kind):
        leaves = [leaf(t, kind) for t in tensors]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy.to(kind))

    plain = lambda x, b, r: r + dropout(x + b, 0.3, SEED)  # noqa: E731
    exact = run(plain, torch.float64)
    theirs = run(plain, dtype)
    ours = run(lambda x, b, r: bias_dropout_add(x, b, r, 0.3, SEED), dtype)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == other.shape
        assert_as_accurate(mine, other, true, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads):
    x, bias, residual = (
        randn(301, 257).float(),
        randn(257, seed=1).float(),
        randn(301, 257, seed=2).float(),
    )
    first = bias_dropout_add(x, bias, residual, 0.5, SEED), relu_dropout(x, 0.5, SEED)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = bias_dropout_add(x, bias, residual, 0.5, SEED), relu_dropout(x, 0.5, SEED)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bias_dropout_add_without_a_bias_or_of_several_dtypes():
    x, bias, residual = randn(5, 6), randn(6, seed=1), randn(5, 6, seed=2)
    torch.manual_seed(3)
    y = F.bias_dropout_add(x, None, residual, 0.5)
    torch.manual_seed(3)
    assert torch.equal(y, residual + F.dropout(x, 0.5))
    y = F.bias_dropout_add(x.bfloat16(), bias.float(), residual.float(), 0.5)
    assert y.dtype == torch.float32 and y.shape == x.shape


def test_bias_dropout_add_keeps_a_seed_alone():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.bias_dropout_add(leaf(randn(64, 64)), leaf(randn(64)), leaf(randn(64, 64)), 0.5)
    assert [(t.numel(), t.dtype) for t in saved] == [(1, torch.int64)]


# ---------------------------------------------------------------------------------------------- gradient of a bias


def test_the_gradient_of_relu_dropout_carries_a_tangent():
    x, direction, found = leaf(randn(6, 5)), randn(6, 5, seed=1), []
    with fwAD.dual_level():
        for function in (relu_dropout, lambda x, p, seed: dropout(TF.relu(x), p, seed)):
            y = function(fwAD.make_dual(x, direction), 0.3, SEED)
            found.append(fwAD.unpack_dual(torch.autograd.grad((y**2).sum(), x)[0]).tangent)
    torch.testing.assert_close(*found)


BIASED = {
    "bias_gelu": (F.bias_gelu, lambda x, b: TF.gelu(x + b)),
    "bias_gelu tanh": (
        lambda x, b: F.bias_gelu(x, b, "tanh"),
        lambda x, b: TF.gelu(x + b, approximate="tanh"),
    ),
    "bias_dropout_add": (
        lambda x, b: bias_dropout_add(x, b, x.detach(), 0.3, SEED),
        lambda x, b: x.detach() + dropout(x + b, 0.3, SEED),
    ),
}


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (3, 9001), (301, 257), (5000, 10), (70, 4129), (6, 7, 33), (2100, 64)], ids=str)  # fmt: skip
def test_gradient_to_a_bias_is_the_sum_over_rows(name, dtype, shape):
    """It is summed in the pass that writes the input's, few rows at a time: for any number of rows and columns, to the
    bit the same for any number of threads, and with the same gradient to the input as without it."""
    x, b, dy = (
        t.to(dtype) for t in (randn(*shape), randn(shape[-1], seed=1), randn(*shape, seed=2))
    )
    ours, plain = BIASED[name]

    def run(function, kind, of_bias=True):
        leaves = [leaf(x, kind), leaf(b, kind)]
        y = function(leaves[0], leaves[1] if of_bias else leaves[1].detach())
        return torch.autograd.grad(y, leaves if of_bias else leaves[:1], dy.to(kind))

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(ours, dtype))
    finally:
        torch.set_num_threads(before)
    dx, db = results[0]
    assert all(torch.equal(dx, a) and torch.equal(db, c) for a, c in results)
    assert torch.equal(dx, run(ours, dtype, of_bias=False)[0]) and db.shape == b.shape
    if dtype is torch.float64:  # of which torch's is no oracle: the sum of our own terms is
        theirs, exact = (
            dx.flatten(0, -2).sum(0),
            dx.flatten(0, -2).numpy().astype("longdouble").sum(0),
        )
        mine, torchs = (
            abs(t.numpy() - exact).max() / max(1, abs(exact).max()) for t in (db, theirs)
        )
        assert mine <= 2 * torchs + 4 * torch.finfo(dtype).eps
    else:
        assert_as_accurate(db, run(plain, dtype)[1], run(plain, torch.float64)[1], dtype)


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize(
    "shape", [(64, 1), (65, 1), (2049, 1), (2047, 3), (2048, 64), (65, 4097)], ids=str
)
def test_gradient_to_a_bias_of_rows_that_are_alike(name, shape):
    """Equal terms, of which a long sum would round every partial sum to the same side."""
    row = randn(1, shape[1]).abs() + 1
    x, b, dy = (t.float() for t in (row.expand(shape), randn(shape[1], seed=1), row.expand(shape)))
    ours, plain = BIASED[name]

    def run(function, kind):
        leaves = [leaf(x.contiguous(), kind), leaf(b, kind)]
        return torch.autograd.grad(function(*leaves), leaves[1], dy.to(kind))[0]

    assert_as_accurate(
        run(ours, torch.float32),
        run(plain, torch.float32),
        run(plain, torch.float64),
        torch.float32,
    )


@pytest.mark.parametrize("name", BIASED)
def test_gradient_to_a_bias_of_one_column_does_not_depend_on_threads(name):
    x, b, dy = (
        randn(700_001, 1).float(),
        randn(1, seed=1).float(),
        randn(700_001, 1, seed=2).float(),
    )
    ours, _ = BIASED[name]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            bias = leaf(b, torch.float32)
            results.append(torch.autograd.grad(ours(x, bias), bias, dy)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("name", BIASED)
def test_gradient_to_a_bias_carries_a_tangent(name):
    """Forward over reverse without create_graph, as torch's own ops have it."""
    x, b = leaf(randn(20, 3)), leaf(randn(3, seed=1))
    direction = randn(20, 3, seed=2)
    with fwAD.dual_level():
        found = []
        for function in BIASED[name]:
            y = function(fwAD.make_dual(x, direction), b)
            grads = torch.autograd.grad((y**2).sum(), [x, b])
            found.append([fwAD.unpack_dual(g).tangent for g in grads])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", BIASED)
def test_gradient_to_a_bias_of_zeros_that_are_nowhere(name):
    x, b = leaf(randn(20, 3)), leaf(randn(3, seed=1))
    y = BIASED[name][0](x, b)
    dx, db = torch.autograd.grad(y, [x, b], torch._efficientzerotensor(y.shape, dtype=y.dtype))
    assert not dx.any() and not db.any() and dx.shape == x.shape and db.shape == b.shape


@pytest.mark.parametrize("name", BIASED)
def test_gradient_to_a_bias_from_any_layout(name):
    x, b, dy = randn(96, 40), randn(40, seed=1), randn(40, 96, seed=2).t()
    ours, _ = BIASED[name]
    x, b = leaf(x), leaf(b)
    strided = torch.autograd.grad(ours(x, b), [x, b], dy)
    dense = torch.autograd.grad(ours(x, b), [x, b], dy.contiguous())
    assert all(torch.equal(a, c) for a, c in zip(strided, dense, strict=True))
    row = randn(40, seed=3)
    expanded = torch.autograd.grad(ours(x, b), [x, b], row.expand(96, 40))
    dense = torch.autograd.grad(ours(x, b), [x, b], row.expand(96, 40).contiguous())
    assert all(torch.equal(a, c) for a, c in zip(expanded, dense, strict=True))


# ---------------------------------------------------------------------------------------------- both


RANDOM = {
    "relu_dropout": (lambda x: relu_dropout(x, 0.4, SEED), lambda: [leaf(randn(4, 5))]),
    "bias_dropout_add": (
        lambda x, b, r: bias_dropout_add(x, b, r, 0.4, SEED),
        lambda: [leaf(randn(4, 5)), leaf(randn(5, seed=1)), leaf(randn(4, 5, seed=2))],
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_derivatives(name):
    function, make = RANDOM[name]
    assert gradcheck(function, make(), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda *xs: function(*(x * x for x in xs)), make())


@pytest.mark.parametrize("name", RANDOM)
def test_opcheck(name):
    _, make = RANDOM[name]
    torch.library.opcheck(overload(name), (*make(), 0.4, SEED))
    if name == "relu_dropout":
        torch.library.opcheck(overload("relu_dropout_"), (make()[0].detach(), 0.4, SEED))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch._dynamo.reset()

    def block(x, bias, residual):
        h = F.bias_dropout_add(F.bias_gelu(x, bias), bias, residual, 0.5)
        return F.relu_dropout(F.add_relu(h, residual), 0.5)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    leaves = [leaf(randn(64, 32)), leaf(randn(32, seed=1)), leaf(randn(64, 32, seed=2))]
    y = compiled(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (64, 32) and all(g.isfinite().all() for g in grads)
    assert 0.6 < y.eq(0).double().mean() < 0.95


def test_vmap():
    x, bias, residual = randn(3, 4, 5), randn(3, 5, seed=1), randn(3, 4, 5, seed=2)
    f = lambda x, b, r: bias_dropout_add(x, b, r, 0.4, SEED)  # noqa: E731
    torch.testing.assert_close(
        torch.vmap(f)(x, bias, residual),
        torch.stack([f(*each) for each in zip(x, bias, residual, strict=True)]),
    )
    torch.testing.assert_close(torch.vmap(F.bias_gelu)(x, bias), TF.gelu(x + bias[:, None]))
    torch.testing.assert_close(
        torch.vmap(F.add_relu, in_dims=(0, None))(x, residual[0]), TF.relu(x + residual[0])
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_add_relu_broadcasts_and_promotes(inplace):
    x, row = randn(5, 6).float(), randn(6, seed=1)
    expected = TF.relu(x + row.to(x.dtype))
    torch.testing.assert_close(F.add_relu(x.clone(), row.float(), inplace=inplace), expected)
    if not inplace:
        assert F.add_relu(x, row).dtype == torch.float64


def test_add_relu_in_place():
    x, t = leaf(randn(5, 6)), leaf(randn(5, 6, seed=1))
    h = x * 1
    version = h._version
    y = F.add_relu(h, t, inplace=True)
    assert y is h and h._version == version + 1
    dy = randn(5, 6, seed=2)
    ours = torch.autograd.grad(y, [x, t], dy)
    theirs = torch.autograd.grad(TF.relu(x + t), [x, t], dy)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    same = randn(5, 6)
    expected = TF.relu(same + same)
    assert torch.equal(F.add_relu(same, same, inplace=True), expected)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        F.add_relu(leaf(randn(3)), randn(3), inplace=True)
    buffer = randn(10)
    with pytest.raises(RuntimeError, match="overlap|single memory location"):
        F.add_relu(buffer[:8], buffer[2:], inplace=True)
    with pytest.raises(RuntimeError, match="overlap|single memory location"):
        F.add_relu(randn(1).expand(4), randn(4), inplace=True)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: F.bias_gelu(randn(4, 5), randn(4)), RuntimeError, r"as many elements .* got \[4\]"),
        (lambda: F.bias_gelu(randn(4, 5), randn(1, 5)), RuntimeError, "as many elements"),
        (lambda: F.bias_gelu(randn(), randn(1)), RuntimeError, "as many elements"),
        (lambda: F.bias_gelu(randn(2, 2), randn(2), "sigmoid"), RuntimeError, "approximate"),
        (lambda: F.add_relu(randn(3), randn(4)), RuntimeError, "must match"),
        (lambda: F.bias_gelu(torch.ones(3).int(), torch.ones(3).int()), NotImplementedError, "'Int'"),
        (lambda: F.relu_dropout(randn(3), 1.5), ValueError, "between 0 and 1, but got 1.5"),
        (lambda: F.relu_dropout(randn(3), -0.1), ValueError, "between 0 and 1"),
        (lambda: F.bias_dropout_add(randn(2, 3), randn(3), randn(2, 3), 2.0), ValueError, "between 0 and 1"),
        (lambda: F.bias_dropout_add(randn(2, 3), randn(2), randn(2, 3)), RuntimeError, "as many elements"),
        (lambda: F.bias_dropout_add(randn(2, 3), randn(3), randn(3, 2)), RuntimeError, "residual"),
        (lambda: bias_dropout_add(randn(2, 3), randn(3).float(), randn(2, 3), 0.5, SEED), RuntimeError, "dtype"),
        (lambda: relu_dropout(randn(3), 1.0, SEED), ValueError, r"\[0, 1\)"),
        (lambda: relu_dropout(randn(3), 0.5, torch.tensor(1.0)), RuntimeError, "seed"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_integers_are_torchs():
    a, b = torch.tensor([1, -3, 2]), torch.tensor([1, 1, 1])
    assert torch.equal(F.add_relu(a, b), torch.relu(a + b))
    assert F.add_relu(a, b, inplace=True) is a and a.tolist() == [2, 0, 3]
