"""Gated linear units: of two tensors, and of the halves of one."""

import pytest
import torch
from cases import DTYPES, assert_as_accurate, randn
from torch.func import hessian, jvp, vmap

import fastops.functional as F
from fastops import nn
from fastops._core.registry import KERNELS, overload

REFERENCES = {
    "glu": lambda a, b: a * b.sigmoid(),
    "swiglu": lambda a, b: torch.nn.functional.silu(a) * b,
    "geglu": lambda a, b: torch.nn.functional.gelu(a) * b,
    "geglu_tanh": lambda a, b: torch.nn.functional.gelu(a, approximate="tanh") * b,
    "reglu": lambda a, b: torch.nn.functional.relu(a) * b,
}
PACKED = {
    "glu": F.glu,
    "swiglu": lambda x, dim=-1: F.swiglu(x, dim=dim),
    "geglu": lambda x, dim=-1: F.geglu(x, dim=dim),
    "geglu_tanh": lambda x, dim=-1: F.geglu(x, dim=dim, approximate="tanh"),
    "reglu": lambda x, dim=-1: F.reglu(x, dim=dim),
}
LAYOUTS = {
    "row": (lambda: randn(10), -1),
    "rows": (lambda: randn(7, 66), -1),
    "odd": (lambda: randn(5, 2 * 37), 1),
    "first": (lambda: randn(6, 33), 0),
    "middle": (lambda: randn(3, 8, 35), 1),
    "channels_last": (lambda: randn(2, 6, 3, 5).to(memory_format=torch.channels_last), 1),
    "pixels of channels_last": (lambda: randn(2, 3, 4, 5).to(memory_format=torch.channels_last), 2),
    "transposed": (lambda: randn(16, 9).t(), 1),
    "strided": (lambda: randn(8, 60)[:, ::3], 1),
    "expanded": (lambda: randn(5, 1, 6).expand(5, 4, 6), 1),
    "two": (lambda: randn(4, 2), 1),
    "empty": (lambda: randn(0, 4), 1),
    "large": (lambda: randn(3, 40) * 1e4, 1),
}


def test_the_table_has_them():
    assert {r for r, (kind, _) in KERNELS.items() if kind == "gate"} == {
        *REFERENCES, *(f"{n}_packed" for n in REFERENCES)
    }  # fmt: skip


def packed_reference(name):
    return lambda x, dim: REFERENCES[name](*x.chunk(2, dim))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves(name, layout, dtype):
    make, dim = LAYOUTS[layout]
    x = make().to(dtype)
    if dtype == torch.float16:
        x = x.clamp(-100, 100) if layout == "large" else x  # whose products it can hold
    leaf, theirs, exact = (t.detach().requires_grad_() for t in (x, x, x.double()))
    y = PACKED[name](leaf, dim)
    reference = torch.nn.functional.glu if name == "glu" else packed_reference(name)
    torchs, oracle = reference(theirs, dim), packed_reference(name)(exact, dim)
    assert_as_accurate(y, torchs, oracle, dtype)
    if layout in ("channels_last", "rows"):
        assert y.stride() == torch.empty_like(torchs).stride()
    g = randn(*y.shape, seed=5).to(dtype)
    grads = [
        torch.autograd.grad(out, inp, g.to(out.dtype))[0]
        for out, inp in ((y, leaf), (torchs, theirs), (oracle, exact))
    ]
    assert_as_accurate(*grads, dtype)


PAIRS = {
    "dense": lambda: (randn(6, 33), randn(6, 33, seed=1)),
    "0-d": lambda: (randn(), randn(seed=1)),
    "halves": lambda: randn(7, 66).chunk(2, 1),
    "halves of images": lambda: randn(2, 6, 3, 5).to(memory_format=torch.channels_last).chunk(2, 1),
    "one contiguous": lambda: (randn(33, 6).t(), randn(6, 33, seed=1)),
    "channels_last": lambda: (
        randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        randn(2, 3, 4, 5, seed=1).to(memory_format=torch.channels_last),
    ),
    "expanded": lambda: (randn(5, 1).expand(5, 4), randn(5, 4, seed=1)),
    "strided": lambda: (randn(8, 30)[:, ::3], randn(8, 10, seed=1)),
    "empty": lambda: (randn(0, 3), randn(0, 3)),
    "one": lambda: (randn(1, 1), randn(1, 1, seed=1)),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_tensors(name, layout, dtype):
    pair = [t.to(dtype) if t.is_contiguous() else t.to(dtype) for t in PAIRS[layout]()]
    ours, theirs = ([t.detach().requires_grad_() for t in pair] for _ in range(2))
    exact = [t.detach().double().requires_grad_() for t in pair]
    y, torchs, oracle = overload(name)(*ours), REFERENCES[name](*theirs), REFERENCES[name](*exact)
    assert_as_accurate(y, torchs, oracle, dtype)
    g = randn(*y.shape, seed=5).to(dtype)
    for grads in zip(
        torch.autograd.grad(y, ours, g), torch.autograd.grad(torchs, theirs, g),
        torch.autograd.grad(oracle, exact, g.double()), strict=True,
    ):  # fmt: skip
        assert_as_accurate(*grads, dtype)


@pytest.mark.parametrize("name", REFERENCES)
def test_derivatives_of_every_order(name):
    a, b = (randn(3, 4, seed=k).requires_grad_() for k in range(2))
    u, v = (randn(3, 4, seed=k).requires_grad_() for k in (2, 3))
    both = {"check_forward_ad": True, "check_batched_grad": True}
    for function, args in (
        (overload(name), (a, b)),
        (overload(f"{name}_backward"), (a, b, u)),
        (overload(f"{name}_tangent"), (a, b, u, v)),
        (lambda x: PACKED[name](x, 1), (a,)),
        (lambda x, g: overload(f"{name}_packed_backward")(x, g, 1), (a, u[:, :2])),
        (lambda x, w: overload(f"{name}_packed_tangent")(x, w, 1), (a, u)),
    ):
        torch.autograd.gradcheck(function, args, **both)
    torch.autograd.gradgradcheck(overload(name), (a, b))
    torch.autograd.gradgradcheck(lambda x: PACKED[name](x, 0), (randn(4, 3).requires_grad_(),))
    x, t = randn(3, 6), randn(3, 6, seed=4)
    f, g = (lambda x: PACKED[name](x, 1)), (lambda x: packed_reference(name)(x, 1))
    torch.testing.assert_close(jvp(f, (x,), (t,)), jvp(g, (x,), (t,)))
    torch.testing.assert_close(hessian(lambda x: f(x).sum())(x), hessian(lambda x: g(x).sum())(x))
    for dim in (0, 1, -1):
        torch.testing.assert_close(
            vmap(lambda x, dim=dim: PACKED[name](x, dim))(randn(3, 4, 6)),
            packed_reference(name)(randn(3, 4, 6), dim if dim < 0 else dim + 1),
        )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_opcheck(name, requires_grad):
    make = lambda *s: torch.randn(s).requires_grad_(requires_grad)  # noqa: E731
    a, b, u, v = (make(4, 6) for _ in range(4))
    torch.library.opcheck(overload(name), (a, b))
    torch.library.opcheck(overload(name), tuple(make(4, 8).chunk(2, 1)))
    torch.library.opcheck(overload(f"{name}_backward"), (a, b, u))
    torch.library.opcheck(overload(f"{name}_tangent"), (a, b, u, v))
    torch.library.opcheck(overload(f"{name}_packed"), (a, 1))
    torch.library.opcheck(overload(f"{name}_packed"), (make(2, 4, 3, 5).to(memory_format=torch.channels_last), 1))  # fmt: skip
    torch.library.opcheck(overload(f"{name}_packed_backward"), (a, make(4, 3), 1))
    torch.library.opcheck(overload(f"{name}_packed_tangent"), (a, u, 0))


def test_no_more_is_kept_than_the_inputs():
    x = torch.randn(8, 32, requires_grad=True)
    storages = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        F.glu(x)
        F.swiglu(*x.chunk(2, 1))
        F.swiglu(x)
    assert storages == {x.untyped_storage().data_ptr()}


def test_modules_and_compile():
    x = torch.randn(4, 6, requires_grad=True)
    torch.testing.assert_close(nn.GLU()(x), torch.nn.GLU()(x))
    torch.testing.assert_close(nn.SwiGLU()(x), nn.SwiGLU()(*x.chunk(2, 1)))
    assert "dim=0" in repr(nn.SwiGLU(0))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.glu(x) + F.swiglu(x) + F.swiglu(x[:, :3], x[:, 3:]), fullgraph=True)  # fmt: skip
    plain = F.glu(x) + 2 * F.swiglu(x)
    torch.testing.assert_close(compiled(x), plain)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(plain.sum(), x)
    )


def test_what_is_refused():
    x = torch.randn(3, 5)
    for function in (F.glu, F.swiglu):
        with pytest.raises(RuntimeError, match="must be even, but dimension 1 is size 5"):
            function(x)
        with pytest.raises(RuntimeError, match="0-dimensional"):
            function(torch.tensor(1.0))
        with pytest.raises(IndexError):
            function(x, dim=2)
    with pytest.raises(RuntimeError, match=r"one shape, dtype and device.*\[3, 5\].*\[3, 4\]"):
        F.swiglu(x, x[:, :4])
    with pytest.raises(RuntimeError, match="one shape, dtype and device"):
        F.swiglu(x, x.double())
    torch.testing.assert_close(F.glu(x[:, :4].to(torch.float32)), torch.nn.functional.glu(x[:, :4]))
