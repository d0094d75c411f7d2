"""Every op under torch's transforms: opcheck, gradcheck, gradgradcheck, forward AD, compile, export, torch.func, vmap,
autocast, checkpointing, compiled autograd, and tensors that are not plain. From the table of ops."""

import itertools
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from cases import INPUTS, Case, cases, ids
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vjp, vmap

import fastops
from fastops._core.registry import KERNELS, OPS, overload

SMALL = [
    c
    for c in cases()
    if c.tensors[0].numel() in range(1, 200)
    and "large" not in c.name
    and "0-d" not in c.name
    and "uint8" not in c.name  # which torch itself does not differentiate twice
]
FEW = [
    next(iter(g))
    for _, g in itertools.groupby(SMALL, key=lambda c: (c.op.name, c.name.split(",")[1:]))
]


def differentiable(case: Case):
    """A function of the float tensors of a case alone, and those tensors."""
    case = case.to(torch.float64)
    fixed = {k: t for k, t in enumerate(case.tensors) if not t.is_floating_point()}
    free = [
        t.clone(memory_format=torch.preserve_format) for t in case.tensors if t.is_floating_point()
    ]

    def function(*xs):
        it = iter(xs)
        return case.op.function(
            *(fixed[k] if k in fixed else next(it) for k in range(len(case.tensors))), **case.kwargs
        )

    return function, free


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_gradcheck(case):
    function, xs = differentiable(case)
    xs = [x.requires_grad_() for x in xs]
    assert gradcheck(function, xs, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_a_gradient_carries_a_tangent_without_a_graph(case):
    """Forward over reverse: where nothing is recorded the kernels' short ways must not lose it."""
    function, xs = differentiable(case)
    directions = [torch.cos(x.detach() + 1) for x in xs]
    found = []
    for graph in (False, True):
        leaves = [
            x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in xs
        ]
        with fwAD.dual_level():
            y = function(*(fwAD.make_dual(x, d) for x, d in zip(leaves, directions, strict=True)))
            grads = torch.autograd.grad((y**2).sum(), leaves, create_graph=graph)
            found.append([fwAD.unpack_dual(g).tangent for g in grads])
    for without, recorded in zip(*found, strict=True):
        assert (without is None) == (recorded is None)
        if recorded is not None:
            torch.testing.assert_close(without, recorded)


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_gradgradcheck(case):
    function, xs = differentiable(case)
    assert gradgradcheck(function, [x.requires_grad_() for x in xs], check_fwd_over_rev=True)


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(case, backend):
    function, xs = differentiable(case.to(torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a) * 2, fullgraph=True, backend=backend)
    leaves = [x.clone().requires_grad_() for x in xs]
    plain = [x.clone().requires_grad_() for x in xs]
    y, z = compiled(*leaves), function(*plain) * 2
    torch.testing.assert_close(y, z)
    ours, expected = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z.sum(), plain)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_dynamic_shapes():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def f(x, t):
        h = fastops.functional.gelu(fastops.functional.relu(x))
        return fastops.functional.cross_entropy(h, t) + fastops.functional.mse_loss(h, x)

    for n in (3, 5, 8):
        x = torch.randn(n, 6, requires_grad=True)
        t = torch.randint(0, 6, (n,))
        (g,) = torch.autograd.grad(f(x, t), x)
        assert g.shape == x.shape


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_export(case):
    function, xs = differentiable(case)

    class Model(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    exported = torch.export.export(Model(), tuple(xs))
    torch.testing.assert_close(exported.module()(*xs), function(*xs))


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_torch_func(case):
    function, (x, *rest) = differentiable(case)
    exact = case.to(torch.float64)
    reference = lambda v: exact.op.exact(v, *exact.tensors[1:], **exact.kwargs)  # noqa: E731
    ours = lambda v: function(v, *rest)  # noqa: E731
    total = lambda f: lambda v: (f(v) ** 2).sum()  # noqa: E731
    v = torch.ones_like(x)
    torch.testing.assert_close(grad(total(ours))(x), grad(total(reference))(x))
    torch.testing.assert_close(jvp(ours, (x,), (v,)), jvp(reference, (x,), (v,)))
    torch.testing.assert_close(vjp(ours, x)[1](ours(x)), vjp(reference, x)[1](reference(x)))
    torch.testing.assert_close(hessian(total(ours))(x), hessian(total(reference))(x))
    nested = lambda f: grad(lambda u: (grad(total(f))(u) ** 2).sum())  # noqa: E731
    torch.testing.assert_close(nested(ours)(x), nested(reference)(x))


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap(case, dim):
    case = case.to(torch.float32)
    batch = [torch.stack([t, t.flip(0) if t.dim() else t, t], dim) for t in case.tensors]

    def call(function):
        return lambda *ts: function(*ts, **case.kwargs)

    def gradient(function):
        return grad(lambda x, *rest: function(x, *rest, **case.kwargs).sum())

    def one_by_one(function):  # torch itself has no vmap of some of these
        return torch.stack(
            [function(*ts) for ts in zip(*(b.unbind(dim) for b in batch), strict=True)]
        )

    dims = tuple(dim for _ in batch)
    ours, reference = case.op.function, case.op.reference
    torch.testing.assert_close(vmap(call(ours), dims)(*batch), one_by_one(call(reference)))
    torch.testing.assert_close(vmap(gradient(ours), dims)(*batch), one_by_one(gradient(reference)))


def parameters(row, weight):
    """What a row takes beside its inputs: `weight` where that is a tensor, else the defaults."""
    return (
        [weight]
        if "Tensor" in KERNELS[row][1]
        else [v for _, v in fastops._core.registry.parameters_of(row)]
    )


def opcheck_inputs():
    x, t = torch.randn(4, 6), torch.randn(4, 6)
    seed = torch.tensor(7)
    labels = torch.tensor([0, 5, 2, 1])
    weight = torch.rand(6)
    for row, (kind, _) in KERNELS.items():
        if kind == "elementwise":
            params = [v for _, v in fastops._core.registry.parameters_of(row)]
            yield row, (x, *params)
            yield f"{row}_", (x, *params)
            yield f"{row}_backward", (x, t, *params)
        elif kind == "loss" and row != "sum":
            params = parameters(row, weight)
            a, b = (v.sigmoid() if row in INPUTS else v for v in (x, t))
            for reduction in (0, 1, 2):
                yield row, (a, b, reduction, False, *params)
                grad = torch.ones(()) if reduction else t
                yield f"{row}_backward", (grad, a, b, reduction, *params, 0)
        elif kind == "softmax":
            yield row, (x, -1)
            yield f"{row}_backward", (t, x.softmax(-1), 1)
    for reduction in (0, 1, 2):
        yield "cross_entropy", (x, labels, None, reduction)
        yield "cross_entropy_forward", (x, labels, weight, reduction, 5, 0.1)
        yield (
            "cross_entropy_forward",
            (x, labels, weight, reduction, 5, 0.1, False, labels.flip(0), 0.3),
        )
    yield "cross_entropy_forward", (x.half(), labels, weight.half(), 1)  # with a factor
    yield "dropout", (x, 0.3, seed)
    yield "dropout_", (x, 0.3, seed)
    yield "relu_dropout_backward", (x.relu(), t, 0.3)
    for with_bias in (True, False):
        yield "bias_dropout_add_backward", (t, 0.3, seed, with_bias)
        for row in (r for r, (kind, params) in KERNELS.items() if kind == "fused" and params):
            yield f"{row}_backward", (t, x, x[0] + 1, with_bias)


@pytest.mark.parametrize(
    "name, args", list(opcheck_inputs()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name, args, requires_grad):
    inplace = name.endswith("_")
    if requires_grad and not inplace:
        args = tuple(
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and a.shape != (6,) else a
            for a in args  # but no weights, of shape (6)
        )  # fmt: skip
    elif requires_grad:
        return  # a leaf that requires grad cannot be written to: test_errors
    else:
        args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(overload(name), args)


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, dtype):
    """The dtypes that torch's autocast gives; elementwise ops keep their input's."""
    half = case.to(dtype).leaves()
    with torch.autocast("cpu", dtype=dtype):
        y = half()
    if case.op.kind in ("elementwise", "fused", "gate"):
        assert y.dtype == dtype
        return
    exact = case.to(dtype).to(torch.float64)(case.op.reference)
    with torch.autocast("cpu", dtype=dtype):
        assert y.dtype == half(half.op.reference).dtype
    torch.testing.assert_close(y.double(), exact.double(), rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert half.tensors[0].grad.dtype == dtype


# What is linear in `grad`, and the positions of what is differentiated.
BACKWARDS = {
    "bias_gelu_backward": lambda g, x, b: (g, x, b),
    "bias_gelu_tanh_backward": lambda g, x, b: (g, x, b),
    "bias_dropout_add_backward": lambda g, x, b: (g, 0.3, torch.tensor(7)),
    "relu_dropout_backward": lambda g, x, b: (x.relu(), g, 0.3),
}


@pytest.mark.parametrize("name", sorted(BACKWARDS))
@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 3, 4)], ids=str)
def test_backward_ops_are_differentiable(name, shape):
    """Both modes, batched, and under torch.func, as what they are the gradient of."""
    make = lambda *s: torch.randn(s, dtype=torch.float64, requires_grad=True)  # noqa: E731
    args = (make(*shape), make(*shape), make(shape[-1]))
    function = lambda *ts: overload(name)(*BACKWARDS[name](*ts))  # noqa: E731
    torch.autograd.gradcheck(
        function, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )  # fmt: skip
    found = function(*args)
    if isinstance(found, tuple):
        assert found[0].data_ptr() != found[1].data_ptr()
        torch.testing.assert_close(found[1], found[0].reshape(-1, shape[-1]).sum(0))


@pytest.mark.parametrize("name", ["bias_gelu", "relu_dropout", "bias_dropout_add"])
def test_compiled_models_run_the_backward_ops(name):
    """A backward that is an op of its own is what the compiler sees, and what export keeps."""
    seen = []

    def compiler(graph, _):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    x, b = torch.randn(5, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    calls = {
        "bias_gelu": lambda: fastops.functional.bias_gelu(x, b),
        "relu_dropout": lambda: fastops.functional.relu_dropout(x, 0.3),
        "bias_dropout_add": lambda: fastops.functional.bias_dropout_add(x, b, x, 0.3),
    }
    torch._dynamo.reset()
    compiled = torch.compile(
        calls[name], fullgraph=True, backend=aot_autograd(fw_compiler=compiler)
    )
    compiled().sum().backward()
    assert f"fastops.{name}_backward.default" in seen


def test_saved_tensor_hooks_and_checkpoint():
    x = torch.randn(5, 7, requires_grad=True)
    t = torch.tensor([1, 2, 3, 0, 6])

    def f(v):
        v = fastops.functional.dropout(fastops.functional.gelu(v), 0.4)
        return fastops.functional.cross_entropy(fastops.functional.relu(v), t)

    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(f(x), x)
    torch.manual_seed(3)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False), x)
    assert torch.equal(plain, again)
    torch.manual_seed(3)
    with torch.autograd.graph.save_on_cpu():
        y = f(x)
    assert torch.equal(plain, torch.autograd.grad(y, x)[0])


def test_backward_twice():
    for case in FEW:
        leaves = case.to(torch.float32).leaves()
        y = leaves().sum()
        (first,) = torch.autograd.grad(y, leaves.tensors[:1], retain_graph=True)
        kept = first.clone()
        first.zero_()  # a caller may do as it likes with its gradient
        (second,) = torch.autograd.grad(y, leaves.tensors[:1])
        assert torch.equal(kept, second), case.name
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, leaves.tensors[:1])


def test_modified_after_forward_raises():
    x = torch.randn(4, requires_grad=True)
    y = x * 1
    z = fastops.functional.gelu(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_compiled_autograd():
    for case in FEW:
        function, xs = differentiable(case)
        eager = [x.clone().requires_grad_() for x in xs]
        function(*eager).sum().backward()
        torch._dynamo.reset()
        leaves = [x.clone().requires_grad_() for x in xs]
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            function(*leaves).sum().backward()
        for a, b in zip(leaves, eager, strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=case.name)


class Tagged(torch.Tensor):
    """A subclass that keeps itself through torch functions."""


def test_subclasses_and_modes():
    for case in FEW:
        case = case.to(torch.float32)
        tensors = [t.as_subclass(Tagged) if t.is_floating_point() else t for t in case.tensors]
        y = case.op.function(*tensors, **case.kwargs)
        assert isinstance(y, Tagged), case.name
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        fastops.functional.relu(torch.ones(2))
    assert fastops.functional.relu in seen


def test_meta_and_fake():
    for case in FEW:
        case = case.to(torch.float32)
        meta = Case(case.op, case.name, tuple(t.to("meta") for t in case.tensors),
                    {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.kwargs.items()})  # fmt: skip
        y, z = meta(), case()
        assert (y.shape, y.dtype) == (z.shape, z.dtype), case.name


@pytest.mark.parametrize("name", sorted(OPS))
def test_function_classes(name):
    """fastops.autograd's Functions give the gradients, and gradients of gradients, of fastops.functional."""
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    t = torch.randn(6, 7, dtype=torch.float64)
    labels = torch.tensor([1, 0, 6, 2, 3, 4])
    F, A = fastops.functional, fastops.autograd
    pairs = {
        "softmax": (lambda: A.SoftmaxFunction.apply(x, 1), lambda: F.softmax(x, 1)),
        "log_softmax": (lambda: A.LogSoftmaxFunction.apply(x, 1), lambda: F.log_softmax(x, 1)),
        "cross_entropy": (
            lambda: A.CrossEntropyFunction.apply(x, labels, None, 1, -100, 0.1),
            lambda: F.cross_entropy(x, labels, label_smoothing=0.1),
        ),
        "dropout": (
            lambda: A.DropoutFunction.apply(x, 0.5, torch.tensor(5)),
            lambda: overload("dropout")(x, 0.5, torch.tensor(5)),
        ),
    }
    seed = torch.tensor(5)
    pairs["relu_dropout"] = (
        lambda: A.ReLUDropoutFunction.apply(x, 0.5, seed),
        lambda: overload("relu_dropout")(x, 0.5, seed),
    )
    pairs["bias_dropout_add"] = (
        lambda: A.BiasDropoutAddFunction.apply(x, t[0], x * t, 0.5, seed),
        lambda: overload("bias_dropout_add")(x, t[0], x * t, 0.5, seed),
    )
    for row in OPS[name].kernels:
        if OPS[name].kind == "fused":
            other = t[0] if KERNELS[row][1] else t
            pairs[name] = (
                partial(getattr(A, A.class_name(row)).apply, x, other),
                partial(overload(row), x, other),
            )
        cls = getattr(A, A.class_name(row))
        params = parameters(row, t[0].abs())
        if OPS[name].kind == "gate":
            params = [0] if row.endswith("_packed") else [t]
        if OPS[name].kind == "loss":
            within = INPUTS.get(name, lambda v: v)
            given = {"pos_weight": t[0].abs()} if "Tensor" in KERNELS[row][1] else {}
            pairs[name] = (
                lambda: cls.apply(within(x), within(t), 1, *params),  # noqa: B023
                lambda: OPS[name].function(within(x), within(t), reduction="mean", **given),  # noqa: B023
            )
        ours, plain = pairs.get(name) or (
            partial(cls.apply, x, *params),
            partial(overload(row), x, *params),
        )
        y, z = ours(), plain()
        torch.testing.assert_close(y, z)
        (gy,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        (gz,) = torch.autograd.grad((z * z).sum(), x, create_graph=True)
        torch.testing.assert_close(gy, gz)
        torch.testing.assert_close(
            torch.autograd.grad(gy.sum(), x)[0], torch.autograd.grad(gz.sum(), x)[0]
        )


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_function_classes_under_torch_func(name):
    """There they are the op: its derivatives, batches and nesting."""
    kind, _ = KERNELS[name]
    if kind == "optimizer" or name == "sum":
        assert not hasattr(fastops.autograd, fastops.autograd.class_name(name))
        return
    x, t = torch.rand(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    params = parameters(name, torch.rand(6, dtype=torch.float64))
    seed = torch.tensor(5)
    rest = {
        "elementwise": params, "fused": [t[0] if KERNELS[name][1] else t], "loss": [t, 1, *params], "softmax": [1],
        "cross_entropy": [t, None, 1, -100, 0.1], "gate": [1] if name.endswith("_packed") else [t],
        "dropout": [t[0], t, 0.5, seed] if name == "bias_dropout_add" else [0.5, seed],
    }[kind]  # fmt: skip
    apply = getattr(fastops.autograd, fastops.autograd.class_name(name)).apply
    function = lambda x: apply(x, *rest)  # noqa: E731
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (expected,) = torch.autograd.grad((y**2).sum(), leaf, create_graph=True)
    total = lambda x: (function(x) ** 2).sum()  # noqa: E731
    torch.testing.assert_close(grad(total)(x), expected)
    (second,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(grad(lambda x: grad(total)(x).sum())(x), second)
    torch.testing.assert_close(jvp(total, (x,), (t,))[1], (expected * t).sum())
    if kind in ("elementwise", "loss"):
        each = torch.stack([total(row) if kind == "elementwise" else apply(row, t[k], *rest[1:]) for k, row in enumerate(x)])  # fmt: skip
        batched = vmap(total)(x) if kind == "elementwise" else vmap(lambda x, t: apply(x, t, *rest[1:]))(x, t)  # fmt: skip
        torch.testing.assert_close(batched, each)
