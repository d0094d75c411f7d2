"""What goes to torch, and that explain() says so: FASTOPS_DISABLE, the table of sizes, unsupported tensors."""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from cases import cases
from torch import nn

import fastops
import fastops.functional as F
from fastops._core import by_torch, explain
from fastops._core.registry import KERNELS, OPS
from fastops.memory import pool_info

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
SMALL, LARGE = torch.randn(4, 8), torch.randn(512, 512)
CLASSES = torch.zeros(512, dtype=torch.int64)


def said(*args, **kwargs):
    return fastops.explain(*args, **kwargs)


def test_explain_reads():
    text = str(said(F.gelu, LARGE, "tanh"))
    first, *rest = text.splitlines()
    assert first == "fastops.functional.gelu(float32 [512, 512], 'tanh')"
    assert (
        rest[0]
        == f"  runs     fastops: gelu_tanh (elementwise); CPU, {fastops._C.cpu_capability()}"
    )
    assert f"  threads  {torch.get_num_threads()}" in rest and "  pool     yes" in rest
    assert text == str(said(F.gelu, LARGE, approximate="tanh")).replace("approximate=", "")


CALLS = [
    (F.relu, (SMALL,), {}, [("elementwise", "relu")]),
    (F.relu, (SMALL,), {"inplace": True}, [("elementwise", "relu_")]),
    (F.softmax, (LARGE, -1), {}, [("softmax", "softmax")]),
    (
        F.cross_entropy,
        (LARGE, CLASSES),
        {"label_smoothing": 0.1},
        [("cross_entropy", "cross_entropy")],
    ),
    (F.mse_loss, (SMALL, SMALL), {}, [("loss", "mse_loss")]),
    (F.smooth_l1_loss, (SMALL, SMALL), {"beta": 0.0}, [("loss", "l1_loss")]),
    (F.dropout, (SMALL,), {}, [("dropout", "dropout")]),
    (F.add_relu, (SMALL, SMALL), {}, [("fused", "add_relu")]),
    (F.add_relu, (SMALL, SMALL[0]), {}, [("elementwise", "relu")]),
    (F.relu_dropout, (SMALL,), {"training": False}, [("elementwise", "relu")]),
    (F.bias_gelu, (SMALL.t(), SMALL[:, 0]), {}, [("elementwise", "gelu")]),
    (F.cross_entropy, (LARGE, CLASSES), {"return_lse": True}, [("cross_entropy", "cross_entropy")]),
    (
        F.mixup_cross_entropy,
        (LARGE, CLASSES, CLASSES, 0.3),
        {},
        [("cross_entropy", "cross_entropy")],
    ),
    (
        F.mixup_cross_entropy,
        (LARGE, CLASSES, CLASSES, torch.tensor(0.3)),
        {},
        [("cross_entropy", "cross_entropy")] * 2,
    ),
    (
        F.binary_cross_entropy_with_logits,
        (SMALL, SMALL),
        {"pos_weight": SMALL[0]},
        [("loss", "binary_cross_entropy_with_logits_pos_weight")],
    ),
    (fastops.nn.LeakyReLU(0.2), (SMALL,), {}, [("elementwise", "leaky_relu")]),
    (fastops.nn.CrossEntropyLoss(), (LARGE, CLASSES), {}, [("cross_entropy", "cross_entropy")]),
    (fastops.nn.Dropout2d(), (SMALL[None, None],), {}, [("dropout", "dropout")]),
    (F.batch_norm, (SMALL, None, None), {"training": True}, [("batch_norm", "batch_norm_act")]),
    (F.batch_norm_act, (SMALL, None, None), {"training": True}, [("batch_norm", "batch_norm_act")]),
    (fastops.nn.BatchNorm2d(3), (torch.ones(2, 3, 4, 4),), {}, [("batch_norm", "batch_norm_act")]),
    (F.layer_norm, (SMALL, SMALL.shape[1:]), {}, [("row_norm", "layer_norm")]),
    (F.rms_norm, (SMALL, SMALL.shape), {}, [("row_norm", "rms_norm")]),
    (F.add_layer_norm, (SMALL, SMALL, SMALL.shape[1:]), {}, [("row_norm", "layer_norm")]),
    (F.add_rms_norm, (SMALL, SMALL, SMALL.shape[1:]), {}, [("row_norm", "rms_norm")]),
    (fastops.nn.RMSNorm(SMALL.shape[1:]), (SMALL,), {}, [("row_norm", "rms_norm")]),
]


@pytest.mark.parametrize("fn, args, kwargs, kernels", CALLS)
def test_explain_says_the_kernels_that_run(fn, args, kwargs, kernels):
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    rng = torch.get_rng_state()
    found = said(fn, *args, **kwargs)
    assert found.runs == "fastops" and list(found.kernels) == kernels
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    from models import Spy

    with Spy() as spy:
        fn(*[t.clone() for t in tensors], *args[len(tensors) :], **kwargs)
    ran = [o.split(".")[1] for o in spy.ops if o.startswith("fastops.")]
    assert [r.removesuffix("_forward").removesuffix("_lse") for r in ran] == [
        row for _, row in kernels
    ]


TORCHS = [
    (F.relu, (torch.arange(3),), {}, "int64"),
    (F.relu, (SMALL.to_sparse(),), {}, "sparse"),
    (F.sigmoid, (SMALL.to(torch.complex64),), {}, "complex64"),
    (F.relu, (SMALL.to("meta"),), {}, "meta"),
    (F.nll_loss, (LARGE, CLASSES), {}, "torch's to compute"),
    (
        F.binary_cross_entropy_with_logits,
        (SMALL, SMALL),
        {"pos_weight": SMALL[0].double()},
        "more than one dtype",
    ),
    (
        F.binary_cross_entropy_with_logits,
        (SMALL, SMALL),
        {"weight": SMALL, "pos_weight": SMALL[0]},
        "weight and pos_weight is torch's to compute",
    ),
    (TF.relu, (SMALL,), {}, "fastops.functional.relu is ours"),
    (torch.softmax, (SMALL, 1), {}, "fastops.functional.softmax is ours"),
    (nn.GELU(), (SMALL,), {}, "patch() makes it run fastops.nn.GELU"),
]


@pytest.mark.parametrize("fn, args, kwargs, why", TORCHS)
def test_explain_says_what_goes_to_torch_and_why(fn, args, kwargs, why):
    found = said(fn, *args, **kwargs)
    assert found.runs == "torch" and not found.kernels and not found.pool
    assert any(why in w for w in found.why), found.why


def test_explain_says_nothing_runs():
    assert said(F.dropout, SMALL, 0.5, False).runs == "nothing"
    assert said(F.dropout2d, SMALL[None], training=False).runs == "nothing"


@pytest.mark.parametrize("name", sorted(n for n, o in OPS.items() if o.kind != "dropout"))
def test_explain_knows_every_op(name):
    case = next(c for c in cases(OPS[name].kind) if c.op.name == name).to(torch.float32)
    found = said(OPS[name].function, *case.tensors, **case.kwargs)
    assert found.runs in ("fastops", "nothing")


def test_explained_threads_and_pool_are_what_happens():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert said(F.relu, LARGE).parallel and not said(F.relu, SMALL).parallel
        assert said(F.softmax, LARGE, 1).parallel and not said(F.softmax, LARGE[:9], 1).parallel
        torch.set_num_threads(1)
        assert not said(F.relu, LARGE).parallel
    finally:
        torch.set_num_threads(threads)
    for x in (LARGE, SMALL):
        before = pool_info()["in_use"]
        y = F.relu(x)
        assert (pool_info()["in_use"] > before) == said(F.relu, x).pool
        del y
    fastops.memory.disable()
    try:
        found = said(F.relu, LARGE)
        assert not found.pool and "the pool is switched off" in found.why
    finally:
        fastops.memory.enable()


def test_explain_refuses_what_is_not_ours():
    with pytest.raises(TypeError, match="expected a function of fastops.functional or a module"):
        said(len, SMALL)
    with pytest.raises(TypeError, match="expected a module of fastops.nn, got a Linear"):
        said(nn.Linear(2, 2), SMALL)
    with pytest.raises(TypeError):
        said(F.relu)
    with pytest.raises(ValueError, match="min_val cannot be greater"):
        said(F.hardtanh, SMALL, 2.0, 1.0)


def test_what_explain_knows_of_the_kernels_is_what_they_are_compiled_with():
    rows = ("online_softmax.h", "kRowsGrain")
    files = {"softmax": rows, "cross_entropy": rows, "dropout": ("dropout.cpp", "kGrain")}
    files["batch_norm"] = ("batch_norm.cpp", "kGrain")
    files["row_norm"] = rows
    for kind, grain in explain.GRAIN.items():
        file, constant = files.get(kind, ("elementwise.h", "kElementwiseGrain"))
        (found,) = re.findall(rf"constexpr int64_t {constant} = (\d+);", (CPU / file).read_text())
        assert int(found) == grain, kind
    pool = (CPU.parent / "torch" / "pool.cpp").read_text()
    (kib,) = re.findall(r"kMinimum =\s*size_t\{(\d+)\} << 10", pool)
    assert int(kib) << 10 == explain.POOL_MINIMUM
    kinds = {kind for kind, _ in KERNELS.values()} | {*explain.OUTSIDE.values()}
    assert kinds == {*explain.GRAIN, "optimizer"}


def test_the_table_of_sizes_binds_a_check():
    calls = []
    bound = by_torch.above(16, lambda *a, **k: calls.append("ours"), lambda *a, **k: calls.append("torch"))  # fmt: skip
    for n in (15, 16):
        bound(torch.zeros(n))
        bound(input=torch.zeros(n), other=1)
    assert calls == ["torch", "torch", "ours", "ours"]
    assert set(by_torch.SMALLEST) <= set(OPS)
    assert (
        by_torch.bound("relu", F.relu, TF.relu) is F.relu
    )  # what is not in the table pays nothing


def test_the_table_of_sizes_is_explained(monkeypatch):
    monkeypatch.setitem(by_torch.SMALLEST, "relu", 1000)
    assert said(F.relu, SMALL).runs == "torch" and "fewer than 1000" in said(F.relu, SMALL).why[0]
    assert said(F.relu, LARGE).runs == "fastops"
    bound = by_torch.bound("relu", F.relu, TF.relu)
    assert bound is not F.relu and inspect.signature(bound) == inspect.signature(F.relu)
    assert torch.equal(bound(SMALL), TF.relu(SMALL))


def python(script, **environment):
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_disabled_everything_is_torchs():
    out = python(
        """
        import torch, fastops, fastops.functional as F
        from fastops._core.registry import OPS
        from fastops.nn import MODULES
        from cases import cases
        from models import Block, Spy

        def ran(f, *a, **k):
            with Spy() as spy:
                f(*a, **k)
            return [o for o in spy.ops if o.startswith("fastops")]

        for case in cases():
            case = case.to(torch.float32)
            assert not ran(case), case.name
            torch.manual_seed(0)
            ours = case()
            torch.manual_seed(0)
            torch.testing.assert_close(
                ours, case(case.op.reference), rtol=0, atol=0, equal_nan=True, msg=case.name
            )
        assert F.relu is torch.nn.functional.relu and F.mse_loss is torch.nn.functional.mse_loss

        import cross_entropy_cases as extras
        for name in extras.CASES:
            x, t, kwargs = extras.given(name)
            for reduction in ("none", "mean", "sum"):
                plain = F.cross_entropy(x, t, reduction=reduction, **kwargs)
                assert torch.equal(plain, torch.nn.functional.cross_entropy(x, t, reduction=reduction, **kwargs))
                mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
                both = F.cross_entropy(mine, t, reduction=reduction, return_lse=True, z_loss=0.1, inplace_backward=True, **kwargs)
                of_torch = extras.reference(theirs, t, 0.1, reduction=reduction, **kwargs)
                torch.testing.assert_close(both, of_torch)
                for a, b in zip(both, of_torch):
                    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), w, retain_graph=True)[0]
                                                 for v, w in ((a, mine), (b, theirs))))
        for bad in (-1.0, float("inf"), float("nan")):
            try:
                F.cross_entropy(x, t, z_loss=bad)
            except ValueError as e:
                assert "z_loss" in str(e), e
            else:
                raise AssertionError(bad)
        loss, lse = F.cross_entropy(torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([1, 2]), z_loss=1.0, return_lse=True)
        assert loss.dtype == torch.bfloat16 and lse.dtype == torch.float32
        x = torch.randn(4, 6)
        assert torch.equal(F.gelu(x, "tanh"), torch.nn.functional.gelu(x, approximate="tanh"))
        y = x.clone()
        assert F.add_relu(y, x, inplace=True) is y and torch.equal(y, torch.relu(2 * x))
        y = x.clone()
        F.relu_dropout(y, 0.0, inplace=True)
        assert torch.equal(y, x.relu())
        g = torch.Generator().manual_seed(1)
        a = F.dropout(x, 0.5, generator=g)
        assert torch.equal(a, F.dropout(x, 0.5, generator=g.manual_seed(1)))
        assert (a == 0).any() and torch.equal(a[a != 0], 2 * x[a != 0])
        assert torch.equal(F.dropout(x, 1.0, generator=g), 0 * x)

        seed = torch.tensor(5)
        w = x[0].clone().requires_grad_()
        A = fastops.autograd
        for function, given, theirs in (
            (A.GELUTanhFunction, (w,), lambda: torch.nn.functional.gelu(w, approximate="tanh")),
            (A.SoftmaxFunction, (w, 0), lambda: w.softmax(0)),
            (A.HuberLossFunction, (w, x[1], 2, 0.5), lambda: torch.nn.functional.huber_loss(w, x[1], "sum", 0.5)),
            (A.CrossEntropyFunction, (w, seed, None, 1, -100, 0.1),
             lambda: torch.nn.functional.cross_entropy(w, seed, label_smoothing=0.1)),
            (A.ReLUDropoutFunction, (w, 0.5, seed),
             lambda: F.relu_dropout(w, 0.5, generator=torch.Generator().manual_seed(5))),
        ):
            assert not ran(function.apply, *given), function
            y = function.apply(*given)
            assert torch.equal(y, theirs()) and y.requires_grad, function

        for native, cls in MODULES.items():
            options = {"Softmax2d": {}, "Softmax": {"dim": 1}, "Softmin": {"dim": 1}, "ropout": {"p": 0.0}, "BatchNorm": {"num_features": 4}, "Norm": {"normalized_shape": 6}}
            args = next((a for word, a in options.items() if word in cls.__name__), {})
            m = cls(**args)
            given = (x.sigmoid(),)
            if cls.__name__ in ("CrossEntropyLoss", "NLLLoss"):
                given = (x, torch.tensor([1, 0, 3, 5]))
            elif "Loss" in cls.__name__:
                given = (x.sigmoid(), x.sigmoid())
            elif "BatchNorm" in cls.__name__:
                given = (torch.randn(2, 4, *[3] * int(cls.__name__[-2])),)
            elif cls.__name__ == "Softmax2d":
                given = (torch.randn(2, 3, 4, 5),)
            elif cls.__name__ in ("Dropout2d", "Dropout3d"):
                given = (torch.randn(2, 3, 4, 2, 2)[..., 0] if "2d" in cls.__name__ else torch.randn(2, 3, 4, 2, 2),)
            assert not ran(m, *given), cls
            assert torch.equal(m(*given), native(**args)(*given)), cls

        m = torch.nn.Sequential(Block(), torch.nn.GELU())
        for functional in (False, True):
            report = fastops.patch(m, functional=functional)
            assert not report.replaced and len(report.left) == 3
            assert {why for *_, why in report.left} == {"FASTOPS_DISABLE is set"}
            assert type(m[0]) is Block and type(m[1]) is torch.nn.GELU

        for name in ("SGD", "Adam", "AdamW", "RMSprop"):
            ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
            kw = {"lr": 0.1, "weight_decay": 0.01} | ({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
            one, two = getattr(fastops.optim, name)([ours], **kw), getattr(torch.optim, name)([theirs], **kw)
            for _ in range(3):
                for p, o in ((ours, one), (theirs, two)):
                    p.grad = torch.arange(5.0)
                    o.step()
            assert torch.equal(ours, theirs), name
            assert "_stepper" not in vars(one)
            p = torch.nn.Parameter(torch.ones(2))
            p.grad = torch.ones(2)
            extra = getattr(fastops.optim, name)([p], lr=0.1, max_grad_norm=1.0)
            try:
                extra.step()
            except RuntimeError as error:
                assert "FASTOPS_DISABLE" in str(error) and torch.equal(p, torch.ones(2))
            else:
                raise AssertionError("max_grad_norm was ignored")
        print(fastops.explain(F.gelu, x))
        print(fastops.explain(fastops.nn.ReLU(), x))
        print(fastops.show_config())
        """,
        FASTOPS_DISABLE="1",
    )
    assert out.count("runs     torch") == 2 and out.count("FASTOPS_DISABLE is set") == 3


def test_0_does_not_disable():
    out = python("import fastops; print(fastops.functional.relu.__module__)", FASTOPS_DISABLE="0")
    assert out.strip() == "fastops.functional"
