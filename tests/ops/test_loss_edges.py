"""Cross-entropy where it is odd: nothing to count, infinities, one class, no rows, layouts that must not be copied."""

import pytest
import torch
from cases import DTYPES, assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastops.functional as ours

pytestmark = pytest.mark.quick

inf, nan = float("inf"), float("nan")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(*values):
    return torch.tensor(values)


WEIGHT = torch.tensor([0.5, 2.0, 0.25, 1.0, 0.0])
ODD = torch.tensor([[inf, 1, 2], [1, 2, 3], [-inf, 1, 2], [nan, 1, 2], [-inf, -inf, -inf]])
HUGE = torch.tensor([[1e30, -1e30, 0], [3e38, 3e38, -3e38], [-1e30, -1e30, -1e30], [1e30, 1e30, 0]])
CASES = {
    "all ignored": (randn(4, 5), labels(*[-100] * 4), {}),
    "all ignored, weight": (randn(4, 5), labels(*[-100] * 4), {"weight": WEIGHT, "label_smoothing": 0.1}),
    "only weights of 0": (randn(2, 5), labels(4, 4), {"weight": WEIGHT}),
    "smoothing, weight, ignored": (
        randn(6, 5), labels(0, 1, 2, 1, 1, 4), {"label_smoothing": 0.3, "weight": WEIGHT, "ignore_index": 1},
    ),
    "inf and nan": (ODD, labels(0, 1, 0, 1, 2), {}),
    "inf and nan, smoothing": (ODD, labels(0, 1, 0, 1, 2), {"label_smoothing": 0.1}),
    "inf and nan, columns": (ODD.t()[None].contiguous(), labels(0, 1, 0, 1, 2)[None], {}),
    "inf against probabilities": (ODD[[0, 2, 4]], torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [1, 0, 0]]), {}),
    "huge": (HUGE, labels(0, 1, 2, 2), {}),
    "huge, smoothing": (HUGE[[0, 2, 3]], labels(0, 2, 2), {"label_smoothing": 0.1}),
    "one class": (randn(4, 1), labels(0, 0, 0, 0), {}),
    "no rows": (randn(0, 5), torch.empty(0, dtype=torch.int64), {}),
    "no rows (N,C,d)": (randn(0, 5, 2), torch.empty(0, 2, dtype=torch.int64), {}),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_as_torch(name, reduction):
    x, target, kwargs = CASES[name]
    results = []
    for function in (ours.cross_entropy, torch.nn.functional.cross_entropy):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = function(leaf, target, reduction=reduction, **kwargs)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(*results, equal_nan=True)
    if name.startswith("all ignored"):
        loss = results[0][0]
        assert loss.isnan() if reduction == "mean" else not loss.any()


@pytest.mark.parametrize("columns", [False, True])
def test_lse_of_a_row_of_nothing_but_minus_infinity(columns):
    x, t = torch.full((2, 3), -inf), labels(0, 2)
    if columns:
        x, t = x[..., None].expand(2, 3, 5).contiguous(), t[:, None].expand(2, 5)
    loss, lse = ours.cross_entropy(x, t, return_lse=True, reduction="none")
    assert loss.isnan().all() and torch.equal(lse, torch.logsumexp(x, 1))


@pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_second_derivative_to_the_target_is_zero_where_a_logarithm_is_not_finite(name):
    x = torch.tensor([0.0, 1, 0.5] if name == "binary_cross_entropy" else [-inf, inf, 0.5])
    t = torch.tensor([0.5, 0.5, 0.25], requires_grad=True)
    for extra in ({}, {"pos_weight": torch.tensor(2.0)})[: 1 + name.endswith("logits")]:
        (by_t,) = torch.autograd.grad(
            getattr(ours, name)(x, t, reduction="sum", **extra), t, create_graph=True
        )
        assert torch.equal(torch.autograd.grad(by_t.sum(), t)[0], torch.zeros(3))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "name", ["mse_loss", "l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"]
)
def test_sums_of_terms_that_are_alike_do_not_drift(name, reduction):
    """Adding the same number again and again rounds to the same side each time."""
    for n in (64, 1000, 1024, 16384, 100_000):
        for value in torch.linspace(0.05, 0.95, 19).tolist():
            x, t = torch.full((n,), value), torch.zeros(n)
            exact = getattr(torch.nn.functional, name)(x.double(), t.double(), reduction=reduction)
            mine, torchs = (
                getattr(module, name)(x, t, reduction=reduction)
                for module in (ours, torch.nn.functional)
            )
            assert_as_accurate(mine, torchs, exact, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivative_of_bce_near_the_ends(dtype):
    """t / x^2 + (1 - t) / (1 - x)^2, where the derivative of torch's first is the difference of two large terms."""
    small = torch.tensor([1e-6, 1e-3, 0.3])
    x = torch.cat([small, 1 - small]).to(dtype).requires_grad_()
    for t in (torch.zeros(6), torch.ones(6), torch.full((6,), 0.25)):
        loss = ours.binary_cross_entropy(x, t.to(dtype), reduction="sum")
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        wide, target = x.detach().double(), t.double()
        exact = target / wide**2 + (1 - target) / (1 - wide) ** 2
        torch.testing.assert_close(
            second.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0.0
        )


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("odd", [inf, nan])
def test_a_weight_that_no_target_asks_for_is_not_looked_at(odd, columns):
    weight, t = torch.tensor([1.0, odd, 2.0]), labels(0, 2)
    x = randn(2, 3)
    if columns:
        x, t = x[..., None].expand(2, 3, 5).contiguous(), t[:, None].expand(2, 5).contiguous()
    results = []
    for function in (ours.cross_entropy, torch.nn.functional.cross_entropy):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, t, weight=weight)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for mine, torchs in zip(*results, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, torchs)


def test_lse_and_z_loss_of_rows_that_are_odd():
    loss, lse = ours.cross_entropy(ODD, labels(0, 1, 0, 1, 2), return_lse=True, reduction="none")
    expected = ODD.logsumexp(1)
    expected[0] = nan  # like the loss: of a row with an inf
    torch.testing.assert_close(lse, expected, equal_nan=True)
    none = ours.cross_entropy(randn(4, 5), labels(*[-100] * 4), return_lse=True, z_loss=0.1)
    assert none[0].isnan() and not none[1].any()
    for x in (randn(0, 5), randn(0, 5, 3)):
        target = torch.empty(0, *x.shape[2:], dtype=torch.int64)
        loss, lse = ours.cross_entropy(x, target, return_lse=True, z_loss=0.1, reduction="sum")
        assert loss == 0 and lse.shape == target.shape


class Large(TorchDispatchMode):
    """Results of an op that are as large as the logits."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.seen = nbytes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}  # fmt: skip
        result = func(*args, **(kwargs or {}))
        self.seen += [
            str(func)
            for t in tree_leaves(result)
            if isinstance(t, torch.Tensor)
            and t.nbytes >= self.nbytes
            and t.untyped_storage().data_ptr() not in given
        ]
        return result


LAYOUTS = {
    "contiguous": randn(2, 12, 16, 8),
    "channels_last": randn(2, 12, 16, 8).to(memory_format=torch.channels_last),
    "rows": randn(64, 48),
    "transposed": randn(48, 64).t(),
}


@pytest.mark.parametrize("mixup", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_copy_of_the_logits(name, smoothing, mixup):
    """Nothing of their size is made forward but the gradient, and without one nothing at all: no copy, no one-hot."""
    x = LAYOUTS[name]
    shape = (x.shape[0], *x.shape[2:])
    first, second = (
        torch.randint(0, x.shape[1], shape, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )  # fmt: skip

    def call(x):
        if mixup:
            return ours.mixup_cross_entropy(x, first, second, 0.3, label_smoothing=smoothing)
        return ours.cross_entropy(x, first, label_smoothing=smoothing)

    with Large(x.nbytes) as forward:
        call(x)
    assert forward.seen == []
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with Large(x.nbytes) as both:
        loss = call(leaf)
    assert both.seen == ["fastops.cross_entropy_forward.default"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        (g,) = torch.autograd.grad(loss, leaf)
    assert g.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_half_under_autocast_is_read_as_it_is(name, dtype):
    x = LAYOUTS[name].to(dtype)
    target = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.int64)
    with torch.autocast("cpu", dtype=dtype), Large(x.nbytes) as mode:
        loss = ours.cross_entropy(x, target)
    assert loss.dtype == torch.float32 and mode.seen == []
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x.float(), target))


def test_what_hooks_keep_of_a_loss_stays_as_it_was():
    """saved_tensors_hooks may keep what backward reads: it is not the gradient's memory then."""
    kept = []

    def pack(t):
        kept.append((t, t.clone()))
        return t

    x, target = torch.randn(9, 13, requires_grad=True), torch.arange(9)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = ours.cross_entropy(x, target)
    (loss * 3).backward()
    assert any(t.is_floating_point() and t.numel() == x.numel() for t, _ in kept)
    for t, before in kept:
        assert torch.equal(t, before)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_target_of_one_for_one_example(reduction):
    """torch takes a target of shape (1,) beside logits of shape (C)."""
    x, target = torch.randn(5, requires_grad=True), torch.tensor([2])
    loss = ours.cross_entropy(x, target, reduction=reduction)
    expected = torch.nn.functional.cross_entropy(x, target, reduction=reduction)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected)
    # torch's own backward refuses that target
    of_0d = torch.nn.functional.cross_entropy(x, target[0], reduction=reduction)
    (mine,), (torchs,) = torch.autograd.grad(loss, x), torch.autograd.grad(of_0d, x)
    torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("weight", [*DTYPES, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_of_another_dtype(dtype, weight, kind, autocast):
    """With class indices it is refused, with probabilities it takes part in the promotion, as in torch."""
    x, w = randn(4, 5).to(dtype), (randn(5, seed=1).abs() * 2 + 1).to(weight)
    target = labels(0, 4, 2, 1) if kind == "indices" else randn(4, 5, seed=2).softmax(1).to(dtype)
    results = []
    for f in (ours.cross_entropy, torch.nn.functional.cross_entropy):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                results.append(f(x, target, w))
            except RuntimeError as e:
                results.append(type(e))
    mine, torchs = results
    if isinstance(torchs, type):
        assert mine is torchs
    else:
        t = target.double() if target.is_floating_point() else target
        exact = torch.nn.functional.cross_entropy(x.double(), t, w.double())
        allowed = 2 * (torchs - exact).abs() + 4 * torch.finfo(mine.dtype).eps * exact
        assert mine.dtype == torchs.dtype and (mine - exact).abs() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_targets(dtype):
    """The sum of their weights does not depend on the threads, and the first that is out of range is named."""
    rows, classes = 100_003, 5
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, classes, generator=g).to(dtype)
    t = torch.randint(classes, (rows,), generator=g)
    t[torch.rand(rows, generator=g) < 0.1] = -100
    weight = torch.rand(classes, generator=g).to(dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ours.cross_entropy(x, t, weight=weight))
            found.append(ours.cross_entropy(x, t))
        assert all(torch.equal(a, b) for a, b in zip(found[:-2], found[2:], strict=True))
        for mine, w in zip(found, (weight, None), strict=False):
            exact = torch.nn.functional.cross_entropy(
                x.double(), t, weight=None if w is None else w.double()
            )
            torchs = torch.nn.functional.cross_entropy(x, t, weight=w)
            assert_as_accurate(mine, torchs, exact, dtype)
        t[99_999], t[70_001], t[70_002] = -1, classes, -2
        for reduction in ("none", "sum", "mean"):
            with pytest.raises(IndexError, match="target 5 at row 70001 is out of range"):
                ours.cross_entropy(x, t, reduction=reduction)
        second = t.clamp(0)
        with pytest.raises(IndexError, match="target 5 at row 70001 is out of range"):
            ours.mixup_cross_entropy(x, second.clamp(max=classes - 1), t, 0.3)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n", [1, 7, 40, 100_001])
def test_inputs_that_are_no_probabilities(n, reduction):
    """Each is seen, in the target as well, and at the end of a vector too."""
    x, t = torch.full((n,), 0.25), torch.full((n,), 0.5)
    for dtype in DTYPES:
        for at in (0, n // 2, n - 1):
            for value in (-0.125, 1.125, inf, -inf, nan):
                wrong = x.to(dtype, copy=True)
                wrong[at] = value
                with pytest.raises(RuntimeError, match="of input should be between 0 and 1"):
                    ours.binary_cross_entropy(wrong, t.to(dtype), reduction=reduction)
                with pytest.raises(RuntimeError, match="of target should be between 0 and 1"):
                    ours.binary_cross_entropy(t.to(dtype), wrong, reduction=reduction)


AUTOCAST = [
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits",
]  # fmt: skip


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_unreduced_losses_under_autocast_are_not_rounded(name, dtype, grad):
    """Their dtype is float32, and so is what they are computed in: 300 squared is too large for float16."""
    x = torch.tensor([300.0, -7.3, 0.1]).to(dtype).requires_grad_(grad)
    t = torch.tensor([0.0, 1.0, 0.7]).to(dtype)
    with torch.autocast("cpu", dtype):
        y, expected = (
            getattr(m, name)(x, t, reduction="none") for m in (ours, torch.nn.functional)
        )
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected)
    if grad:
        gradients = [torch.autograd.grad((v * 0.5).sum(), x)[0] for v in (y, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize(
    "weight", [torch.ones(4, 5).double(), torch.ones(4, 5), torch.ones(5), torch.ones(4, 1), torch.ones(3, 4, 5), torch.ones(7)],
    ids=lambda w: f"{w.dtype} {tuple(w.shape)}",
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_weight_gives_what_it_gives_in_torch(name, weight, dtype, rows):
    x, t = (
        torch.rand(rows, 5, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(2)
    )
    found = []
    for module in (ours, torch.nn.functional):
        try:
            found.append(getattr(module, name)(x, t, weight, reduction="none"))
        except (RuntimeError, ValueError) as error:
            found.append(type(error))
    if isinstance(found[1], type):
        assert found[0] is found[1]
    else:
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("upcast", [False, True])
def test_slopes_without_values(dtype, reduction, upcast):
    x, t = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    op = torch.ops.fastops.l1_loss_with_slope
    real = op(x, t, reduction, upcast)
    with FakeTensorMode() as mode:
        fake = op(mode.from_tensor(x), mode.from_tensor(t), reduction, upcast)
    for a, b in zip(real, fake, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
