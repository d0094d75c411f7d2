"""What cross_entropy has beside torch's arguments: return_lse, z_loss, inplace_backward. All against the same in torch ops."""

import pytest
import torch
import torch.nn.functional as NF
from cases import DTYPES, assert_as_accurate, kept
from cross_entropy_cases import CASES, LABELS, WEIGHT, C, N, given, randn, reference
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import fastops
from fastops._core.registry import overload
from fastops.functional import cross_entropy

every_case = pytest.mark.parametrize("name", CASES)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("inplace", [False, True])
@every_reduction
@every_case
def test_values_and_gradients(name, reduction, inplace, z_loss, dtype):
    """In the dtype, in torch's ops, and in float64."""
    x, t, kwargs = given(name, dtype)
    up = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
    exact_kwargs = {k: up(v) for k, v in kwargs.items()}
    results = []
    for kind in ("ours", "torch", "exact"):
        leaf = (x.double() if kind == "exact" else x).clone(memory_format=torch.preserve_format)
        leaf.requires_grad_()
        if kind == "ours":
            logits = leaf * 1
            pointer, version = logits.data_ptr(), logits._version
            loss, lse = cross_entropy(
                logits, t, reduction=reduction, return_lse=True, z_loss=z_loss, inplace_backward=inplace, **kwargs
            )  # fmt: skip
            assert logits.data_ptr() == pointer and logits._version == version + inplace
            assert torch.equal(logits, leaf) != inplace
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        else:
            loss, lse = reference(
                leaf,
                up(t) if kind == "exact" else t,
                z_loss,
                reduction=reduction,
                **(exact_kwargs if kind == "exact" else kwargs),
            )
        factor = torch.arange(1.0, loss.numel() + 1, dtype=torch.float64).view(loss.shape) / 4
        (g,) = torch.autograd.grad((loss * factor.to(loss.dtype)).sum(), leaf)
        results.append((loss, lse, g))
    for mine, theirs, exact in zip(*results, strict=True):
        assert_as_accurate(mine, theirs, exact, dtype)


@every_case
def test_the_same_bits_as_without_extras(name):
    x, t, kwargs = given(name, torch.float32)
    plain, other = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.clone(memory_format=torch.preserve_format).requires_grad_()  # fmt: skip
    loss = cross_entropy(plain, t, **kwargs)
    same, _ = cross_entropy(other, t, return_lse=True, **kwargs)
    assert torch.equal(loss, same)
    expected = torch.autograd.grad(loss, plain)[0]
    assert torch.equal(torch.autograd.grad(same, other)[0], expected)
    written = cross_entropy(other * 1, t, inplace_backward=True, **kwargs)
    assert torch.equal(written, loss)
    assert torch.equal(torch.autograd.grad(written, other)[0], expected)
    with torch.no_grad():
        assert torch.equal(cross_entropy(x, t, return_lse=True, **kwargs)[0], loss)


SMALL = [name for name in CASES if name != "many"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives(name, reduction):
    """To the logits and to target, in both directions, of both outputs together, twice."""
    x, t, kwargs = given(name)
    tensors = [x.clone(memory_format=torch.preserve_format).requires_grad_()]
    if t.is_floating_point():
        tensors.append(t.clone().requires_grad_())

    def both(x, q=t):
        return cross_entropy(x, q, reduction=reduction, return_lse=True, z_loss=0.03, **kwargs)

    def loss_alone(x, q=t):
        return cross_entropy(x, q, reduction=reduction, z_loss=0.03, **kwargs)

    for f in (both, loss_alone):
        assert gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", SMALL)
def test_torch_func(name):
    x, t, kwargs = given(name)

    def total(f):
        def g(v):
            loss, lse = f(v)
            return (loss**2).sum() + (lse * lse.detach().cos()).sum()

        return g

    ours = lambda v: cross_entropy(v, t, return_lse=True, z_loss=0.03, **kwargs)  # noqa: E731
    torchs = lambda v: reference(v, t, 0.03, **kwargs)  # noqa: E731
    torch.testing.assert_close(grad(total(ours))(x), grad(total(torchs))(x))
    torch.testing.assert_close(hessian(total(ours))(x), hessian(total(torchs))(x))
    nested = lambda f: grad(lambda u: (grad(total(f))(u) ** 2).sum())  # noqa: E731
    torch.testing.assert_close(nested(ours)(x), nested(torchs)(x))
    v = torch.ones_like(x)
    torch.testing.assert_close(jvp(ours, (x,), (v,)), jvp(torchs, (x,), (v,)))
    batch = torch.stack([x, x * 2, x - 1])
    expected = [torch.stack(r) for r in zip(*map(torchs, batch), strict=True)]
    torch.testing.assert_close(vmap(ours)(batch), tuple(expected))
    torch.testing.assert_close(
        vmap(grad(total(ours)))(batch), torch.stack([grad(total(torchs))(b) for b in batch])
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["weight, smoothing", "probabilities"])
def test_compile(name, inplace, backend):
    x, t, kwargs = given(name, torch.float32)
    torch._dynamo.reset()

    def f(x):
        loss, lse = cross_entropy(
            x * 2, t, return_lse=True, z_loss=0.1, inplace_backward=inplace, **kwargs
        )
        return loss + lse.sum()

    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = torch.compile(f, fullgraph=True, backend=backend)(leaf)
    expected, lse = reference(other * 2, t, 0.1, **kwargs)
    torch.testing.assert_close(loss, expected + lse.sum())
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaf), torch.autograd.grad(expected + lse.sum(), other)
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("args", [(), (WEIGHT.float(), 0, 4, 0.1, True, None, 1.0, 0.1, True), (None, 2, 4, 0.0, False, None, 1.0, 0.1, False, False)])  # fmt: skip
def test_opcheck(args, requires_grad):
    x = randn(N, C).float().requires_grad_(requires_grad)
    torch.library.opcheck(overload("cross_entropy_forward"), (x, LABELS, *args))
    if not requires_grad:
        args = (*args[:5], *args[7:8])  # no second target
        torch.library.opcheck(overload("cross_entropy_"), (x, LABELS, *args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    leaf = randn(N, C).to(dtype).requires_grad_()
    for inplace in (False, True):
        with torch.autocast("cpu", dtype=dtype):
            loss, lse = cross_entropy(leaf * 1, LABELS, return_lse=True, z_loss=0.1, inplace_backward=inplace)  # fmt: skip
        assert loss.dtype == lse.dtype == torch.float32
        assert torch.autograd.grad(loss, leaf)[0].dtype == dtype


# ------------------------------------------------------------------------------------------ in place


def test_the_gradient_is_in_the_logits_memory():
    hidden, head = (
        randn(N, 4).float().requires_grad_(),
        randn(4, C, seed=1).float().requires_grad_(),
    )
    logits = hidden @ head
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    cross_entropy(logits, LABELS, inplace_backward=True).backward()
    assert seen == [logits.data_ptr()]
    plain = [t.detach().requires_grad_() for t in (hidden, head)]
    torch.nn.functional.cross_entropy(plain[0] @ plain[1], LABELS).backward()
    for mine, theirs in zip((hidden, head), plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_views_of_logits():
    x = randn(2, 3, C).requires_grad_()
    labels = LABELS.view(2, 3)
    y = x * 1
    loss = cross_entropy(y.view(-1, C), labels.view(-1), inplace_backward=True)
    expected = torch.nn.functional.cross_entropy(x.view(-1, C), labels.view(-1))
    torch.testing.assert_close(
        torch.autograd.grad(loss, x, retain_graph=True), torch.autograd.grad(expected, x)
    )
    with pytest.raises(RuntimeError, match="these logits hold their gradient"):
        y.sum().backward()


def test_backward_twice():
    x = randn(N, C).requires_grad_()
    loss = cross_entropy(x * 1, LABELS, inplace_backward=True)
    first = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)[
        0
    ]
    kept = first.clone()
    second = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(kept, 3 * second)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, x)


def test_what_inplace_backward_refuses():
    leaf = randn(N, C).requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        cross_entropy(leaf, LABELS, inplace_backward=True)
    with pytest.raises(RuntimeError, match="needs dense logits"):
        cross_entropy((leaf * 1)[:, ::2], LABELS // 2, inplace_backward=True)
    y = leaf * 1
    with pytest.raises(IndexError, match="target 9 at row 0"):
        cross_entropy(y, torch.full((N,), C), inplace_backward=True)
    assert torch.equal(leaf, before) and torch.equal(y, before)
    with pytest.raises(NotImplementedError, match="leave inplace_backward off"):
        cross_entropy(y, before.softmax(1).requires_grad_(), inplace_backward=True)
    y = leaf.exp()  # which is needed for its own gradient
    loss = cross_entropy(y, LABELS, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    y = leaf * 1
    loss, lse = cross_entropy(y, LABELS, return_lse=True, inplace_backward=True)
    with pytest.raises(RuntimeError, match="leave it off, or detach lse"):
        torch.autograd.grad(lse.sum(), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="for create_graph=True"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="these logits hold their gradient"):
        (y * 2).sum().backward(retain_graph=True)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|hold their gradient"):
        loss.backward()


def test_without_a_gradient_the_logits_are_left_alone():
    x = randn(N, C)
    kept, version = x.clone(), x._version
    cross_entropy(x, LABELS, inplace_backward=True)
    with torch.no_grad():
        cross_entropy(x.requires_grad_(), LABELS, inplace_backward=True)
    assert torch.equal(x, kept) and x._version == version


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_z_loss(bad):
    with pytest.raises(ValueError, match="z_loss must be a finite number and not negative"):
        cross_entropy(randn(N, C), LABELS, z_loss=bad)


def test_module():
    x = randn(N, C).requires_grad_()
    module = fastops.nn.CrossEntropyLoss(label_smoothing=0.1, return_lse=True, z_loss=0.1)
    torch.testing.assert_close(module(x, LABELS), reference(x, LABELS, 0.1, label_smoothing=0.1))
    loss = fastops.nn.CrossEntropyLoss(inplace_backward=True)(x * 1, LABELS)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, LABELS))


def test_bytes_kept():
    """z_loss keeps 4 bytes a row beside the gradient; inplace_backward nothing beside the logits."""
    x = torch.randn(64, 1000, requires_grad=True)
    t = torch.randint(0, 1000, (64,))

    def kept(**kwargs):
        saved = []
        logits = x * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = cross_entropy(logits, t, **kwargs)
        assert loss.grad_fn is not None
        return sorted(v.nbytes for v in saved if v.data_ptr() != logits.data_ptr())

    assert kept(z_loss=0.1) == [64 * 4, 64 * 8, 64 * 1000 * 4]
    assert kept(inplace_backward=True) == [64 * 8]


# ------------------------------------------------------------------------------------------ targets of another dtype


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weight": True}, {"reduction": "none"}, {"reduction": "sum"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(33, 70), (5, 19, 4, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_targets_beside_narrower_logits(dtype, shape, options):
    """The loss is float32, as torch promotes it, and the logits are read as they are: nothing is kept but their gradient."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g).to(dtype)
    target = torch.randn(shape, generator=g).softmax(1)
    weight = torch.rand(shape[1], generator=g) + 0.5
    results = []
    for function, up in ((cross_entropy, False), (NF.cross_entropy, False), (NF.cross_entropy, True)):  # fmt: skip
        x = (logits.double() if up else logits).detach().requires_grad_()
        t = (target.double() if up else target).detach().requires_grad_()
        given = dict(options)
        if given.pop("weight", False):
            given["weight"] = weight.double() if up else weight
        saved, loss = kept(lambda: function(x, t.detach(), **given))  # noqa: B023
        if function is cross_entropy:
            assert not [s for s in saved if s.dtype == torch.float32 and s.shape == shape and s.data_ptr() != t.data_ptr()]  # fmt: skip
        loss = function(x, t, **given)
        results.append((loss, *torch.autograd.grad(loss.sum(), (x, t))))
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_as_accurate(ours, theirs, exact, theirs.dtype)


def test_float32_targets_under_autocast_copy_no_logits():
    x = torch.randn(64, 1000, dtype=torch.bfloat16, requires_grad=True)
    t = torch.randn(64, 1000).softmax(1)
    with torch.autocast("cpu"):
        saved, loss = kept(lambda: cross_entropy(x, t))
    assert loss.dtype == torch.float32
    assert sorted(s.nbytes for s in saved if s.data_ptr() != t.data_ptr()) == [x.nbytes]
    torch.testing.assert_close(loss, NF.cross_entropy(x.float(), t))
    loss.backward()
    expected = x.detach().float().requires_grad_()
    NF.cross_entropy(expected, t).backward()
    torch.testing.assert_close(x.grad, expected.grad.bfloat16(), rtol=1e-2, atol=1e-6)
