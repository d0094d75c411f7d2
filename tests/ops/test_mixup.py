"""mixup_cross_entropy in one visit: torch's two cross-entropies, of every layout, derivative and odd input."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_as_accurate, randn, targets
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import fastops.functional as ours

pytestmark = pytest.mark.quick

LAM = 0.3
WEIGHT = randn(13, seed=4).abs() + 0.1
INPUTS = {
    "(N,C)": randn(9, 13),
    "many classes": randn(3, 5003),
    "(N,C,d)": randn(4, 13, 37),
    "channels_last": randn(2, 13, 5, 7).to(memory_format=torch.channels_last),
    "permuted": randn(5, 2, 13).permute(1, 2, 0),
    "strided": randn(9, 39)[:, ::3],
    "transposed": randn(13, 9).t(),
    "one class": randn(4, 1),
    "large": randn(9, 13) * 1e4,
    "no rows": randn(0, 13),
}


def by_torch(x, a, b, lam, **options):
    return lam * F.cross_entropy(x, a, **options) + (1 - lam) * F.cross_entropy(x, b, **options)


def by_two_of_ours(x, a, b, lam, **options):
    return lam * ours.cross_entropy(x, a, **options) + (1 - lam) * ours.cross_entropy(
        x, b, **options
    )


def classes(x, ignored=()):
    """Two targets, some of which are ignored in one, the other or both."""
    shape = (x.shape[0], *x.shape[2:])
    both = [targets(*shape, classes=x.shape[1], seed=seed) for seed in (3, 5)]
    for t, step in zip(both, ignored, strict=False):
        t.view(-1)[1::step] = -100
    return both


def with_options(dtype):
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            for weighted in (False, True):
                for ignored in ((), (3, 2)):
                    weight = WEIGHT.to(dtype) if weighted else None
                    options = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}  # fmt: skip
                    yield ignored, options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_as_accurate_as_two_of_torchs(name, dtype):
    x = INPUTS[name].to(dtype)
    for ignored, options in with_options(dtype):
        if options["weight"] is not None and x.shape[1] != 13:
            continue
        both = classes(x, ignored)
        exactly = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        results = []
        for function, kind, kwargs in (
            (ours.mixup_cross_entropy, dtype, options),
            (by_torch, dtype, options),
            (by_torch, torch.float64, exactly),
        ):
            leaf = x.to(kind, copy=True).requires_grad_()
            loss = function(leaf, *both, LAM, **kwargs)
            dy = torch.linspace(0.5, 1.5, loss.numel()).to(loss.dtype).reshape(loss.shape)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf, dy)))
            if function is ours.mixup_cross_entropy:
                assert loss.dtype == dtype and results[-1][1].stride() == leaf.stride()
                with torch.no_grad():
                    assert_as_accurate(function(x, *both, LAM, **kwargs), loss, loss, dtype)
        for mine, theirs, exact in zip(*results, strict=True):
            assert_as_accurate(mine, theirs, exact, dtype)


@pytest.mark.parametrize("lam", [0, 1, 0.0, 1.0, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_rows_and_parts_are_nothing(lam, reduction):
    """All ignored in one target or both, weights of 0, infinite losses, and the ends of lam: torch's numbers, NaN
    included."""
    x = randn(4, 5).float()
    x[1, 2], x[2, 0] = -torch.inf, torch.inf
    some, none = torch.tensor([0, 2, 1, 4]), torch.full((4,), -100)
    zero = torch.tensor([0.0, 0, 0, 0, 1])
    for a, b in ((some, some), (some, none), (none, some), (none, none), (some, some.flip(0))):
        for weight in (None, zero):
            for rows in (slice(0, 2), slice(3, 4), slice(0, 4)):
                options = {"reduction": reduction, "weight": weight}
                found = []
                for function in (ours.mixup_cross_entropy, by_torch, by_two_of_ours):
                    leaf = x[rows].clone().requires_grad_()
                    loss = function(leaf, a[rows], b[rows], lam, **options)
                    found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
                (mine, dx), (theirs, expected), (_, of_two) = found
                torch.testing.assert_close(mine, theirs, equal_nan=True)
                # torch's gradient of a row that is ignored is NaN where the row holds inf.
                finite = expected.isfinite()
                torch.testing.assert_close(dx[finite], expected[finite])
                torch.testing.assert_close(dx, of_two, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3)], ids=str)
def test_derivatives(shape, reduction):
    x, (a, b) = randn(*shape).requires_grad_(), classes(torch.empty(shape), (3, 2))
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": randn(5, seed=1).abs()}

    def mine(x):
        return ours.mixup_cross_entropy(x, a, b, LAM, **options)

    def theirs(x):
        return by_torch(x, a, b, LAM, **options)

    assert gradcheck(mine, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, x, check_fwd_over_rev=True)
    x = x.detach()
    torch.testing.assert_close(
        hessian(lambda x: (mine(x) ** 2).sum())(x), hessian(lambda x: (theirs(x) ** 2).sum())(x)
    )
    direction = randn(*shape, seed=7)
    torch.testing.assert_close(jvp(mine, (x,), (direction,)), jvp(theirs, (x,), (direction,)))
    batch = torch.stack([x, x * 2, -x])
    second = torch.stack([b, a, b.flip(0)])
    function = lambda f: vmap(lambda x, b: f(x, a, b, LAM, **options))  # noqa: E731
    one_by_one = torch.stack([by_torch(x, a, b, LAM, **options) for x, b in zip(batch, second, strict=True)])  # fmt: skip
    torch.testing.assert_close(function(ours.mixup_cross_entropy)(batch, second), one_by_one)
    torch.testing.assert_close(
        vmap(grad(lambda x: mine(x).sum()))(batch),
        torch.stack([grad(lambda x: theirs(x).sum())(x) for x in batch]),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_for_any_lam(backend):
    torch._dynamo.reset()
    f = torch.compile(lambda *a: ours.mixup_cross_entropy(*a) * 2, fullgraph=True, backend=backend)
    x, (a, b) = randn(9, 13).float(), classes(torch.empty(9, 13))
    for lam in (0.3, 0.8, 0.55):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss, expected = f(mine, a, b, lam), by_torch(theirs, a, b, lam) * 2
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs)
        )


def test_autocast_meta_and_hooks():
    x, (a, b) = randn(9, 13).bfloat16().requires_grad_(), classes(torch.empty(9, 13))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours.mixup_cross_entropy(x, a, b, LAM)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_torch(x.float(), a, b, LAM))
    meta = ours.mixup_cross_entropy(x.to("meta"), a.to("meta"), b.to("meta"), LAM, reduction="none")
    assert meta.shape == (9,) and meta.dtype == x.dtype and meta.is_meta
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((t, t.clone())) or t, lambda t: t
    ):
        loss = ours.mixup_cross_entropy(x, a, b, LAM)
    (loss * 3).backward()
    assert sorted(t.nbytes for t, _ in kept) == [9 * 8, 9 * 8, x.nbytes]
    assert all(torch.equal(t, before) for t, before in kept)


def test_a_tensor_for_lam_has_a_gradient():
    x, (a, b) = randn(9, 13), classes(torch.empty(9, 13))
    lam = torch.tensor(LAM, dtype=torch.float64, requires_grad=True)
    function = lambda lam: ours.mixup_cross_entropy(x, a, b, lam)  # noqa: E731
    assert gradcheck(function, lam)
    torch.testing.assert_close(function(lam), by_torch(x, a, b, lam))


def test_what_is_no_class_index_takes_two_visits():
    x = randn(9, 13)
    q, p = (randn(9, 13, seed=s).softmax(1) for s in (1, 2))
    torch.testing.assert_close(ours.mixup_cross_entropy(x, q, p, LAM), by_torch(x, q, p, LAM))
    t = torch.tensor(3)
    torch.testing.assert_close(ours.mixup_cross_entropy(x[0], t, t, LAM), by_torch(x[0], t, t, LAM))
    with pytest.raises(RuntimeError, match="not implemented for"):
        ours.mixup_cross_entropy(x.long(), *classes(x), LAM)


def test_bad_targets_are_refused_before_anything_is_computed():
    x, (a, b) = randn(9, 13), classes(torch.empty(9, 13))
    for first, second in ((a, b), (b, a)):
        wrong = second.clone()
        wrong[4] = 13
        with pytest.raises(IndexError, match="target 13 at row 4 is out of range for 13 classes"):
            ours.mixup_cross_entropy(x, first, wrong, LAM)
        with pytest.raises(ValueError, match="to match target batch_size"):
            ours.mixup_cross_entropy(x, first, second[:4], LAM)
        with pytest.raises(RuntimeError, match="int64 or uint8, got Int"):
            ours.mixup_cross_entropy(x, first, second.int(), LAM)
        with pytest.raises(RuntimeError, match="expected a target of size"):
            ours.mixup_cross_entropy(x, first, second[:, None], LAM)
    with pytest.raises(NotImplementedError, match="gradient to weight is not implemented"):
        w = WEIGHT.clone().requires_grad_()
        ours.mixup_cross_entropy(x.requires_grad_(), a, b, LAM, weight=w).backward()


@pytest.mark.parametrize("name", ["(N,C)", "(N,C,d)", "channels_last", "many classes"])
def test_one_target_twice_is_that_target(name):
    x = INPUTS[name].float()
    t, _ = classes(x, (3,))
    torch.testing.assert_close(ours.mixup_cross_entropy(x, t, t, LAM), ours.cross_entropy(x, t))
