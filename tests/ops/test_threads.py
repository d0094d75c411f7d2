"""Every op, forward, backward and in place, and every optimizer's step, give the same bits for 1, 2 and 3 threads, on
each of the CPU's instruction sets; and every mask is the same on all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import ISAS, available, need

import fastops
from fastops._core.registry import COMPOSED, OPS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
F = fastops.functional
THREADS = (1, 2, 3)
SHAPE = (23, 43, 67)  # more than three threads' grains, and no multiple of any vector


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def gradients(function, *tensors):
    """The result of a function and the gradients to its tensors."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    torch.manual_seed(7)  # of what drops
    y = function(*leaves)
    dy = randn(*y.shape, seed=3, dtype=y.dtype)
    free = [t for t in leaves if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, free, dy)]


def calls_of_kind(name, dtype):
    """(label, function, tensors) of an op; its kind says what it is called with."""
    function, kind = OPS[name].function, OPS[name].kind
    parameters = OPS[name].signature.parameters
    x, t = randn(*SHAPE, dtype=dtype), randn(*SHAPE, seed=1, dtype=dtype)
    if kind == "elementwise":
        yield "", function, (x,)
        if "approximate" in parameters:
            yield "tanh", lambda x: function(x, approximate="tanh"), (x,)
        if "inplace" in parameters:
            yield "inplace", lambda x: function(x * 1, inplace=True), (x,)
    elif kind == "gate":
        for dim in (0, 1, 2):
            yield str(dim), lambda x, d=dim: function(x, dim=d), (torch.cat((x, t), dim),)
    elif kind == "fused":
        yield "", function, (x, t[0, 0] if "bias" in parameters else t)
    elif kind == "loss":
        for reduction in ("none", "mean", "sum"):
            yield reduction, lambda x, t, r=reduction: function(x, t, reduction=r), (x.sigmoid(), t.sigmoid())  # fmt: skip
            if "pos_weight" in parameters:
                yield f"{reduction} pos_weight", lambda x, t, r=reduction: function(x, t, reduction=r, pos_weight=x[0, 0].detach()), (x, t)  # fmt: skip
    elif name == "bias_dropout_add":
        yield "", lambda x, b, r: function(x, b, r, 0.3), (x, t[0, 0], t)
    elif kind == "dropout":
        yield "", lambda x: function(x, 0.3), (x,)
        yield "permuted", lambda x: function(x.permute(1, 2, 0), 0.3), (x,)
        yield "inplace", lambda x: function(x * 1, 0.3, inplace=True), (x,)
    elif "dim" in parameters:
        for dim in (0, 1, 2):
            yield str(dim), lambda x, d=dim: function(x, d), (x,)
        yield "long", lambda x: function(x.flatten(), 0), (x,)
    else:
        assert name == "cross_entropy"
        labels = torch.arange(23 * 67).reshape(23, 67) % 43
        rows = randn(100, 701, dtype=dtype), torch.arange(100) % 701
        options = {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2, 43).to(dtype)}
        for reduction in ("none", "mean", "sum"):
            yield reduction, lambda x, t, r=reduction: function(x, t, reduction=r, **options), (x, labels)  # fmt: skip
            yield f"rows {reduction}", lambda x, t, r=reduction: function(x, t, reduction=r), rows
        yield "probabilities", function, (x, t.softmax(1))


def calls():
    for dtype in (torch.float32, torch.bfloat16):
        for name in OPS:
            for label, function, tensors in calls_of_kind(name, dtype):
                yield f"{name} {label} {dtype}", lambda f=function, t=tensors: gradients(f, *t)
    x = randn(32, 50, 43)
    for name in ("dropout1d", "dropout2d", "alpha_dropout"):
        yield name, lambda f=COMPOSED[name]: gradients(lambda x: f(x, 0.3, True), x)
    for dtype in (torch.float32, torch.bfloat16):
        for activation in ("none", "relu", "silu"):
            for form in (torch.contiguous_format, torch.channels_last):
                images, r = (randn(6, 35, 23, 19, seed=s, dtype=dtype).to(memory_format=form) for s in (0, 1))  # fmt: skip
                w, b = randn(35, seed=2, dtype=dtype), randn(35, seed=4, dtype=dtype)

                def norm(x, w, b, *r, activation=activation):
                    return F.batch_norm_act(x, None, None, w, b, *r, activation=activation, training=True)  # fmt: skip

                name = f"batch_norm_act {activation} {form} {dtype}"
                yield name, lambda f=norm, t=(images, w, b): gradients(f, *t)
                yield f"{name} add", lambda f=norm, t=(images, w, b, r): gradients(f, *t)
    yield "dropout3d", lambda: gradients(lambda x: F.dropout3d(x, 0.3), x.unsqueeze(3))


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"lr": 0.1, "weight_decay": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.1},
    "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True},
}
EXTRAS = [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1": 0.01}]


def stepped(name, options, dtype):
    """Parameters and state after three steps, over tensors of many sizes."""
    sizes = [(1,), (3,), (50_001,), (129, 130), *[(97,)] * 40, (2, 3, 5, 7)]
    parameters = [randn(*s, seed=k, dtype=dtype).requires_grad_() for k, s in enumerate(sizes)]
    optimizer = getattr(fastops.optim, name)(parameters, **options)
    for step in range(3):
        for k, p in enumerate(parameters):
            p.grad = randn(*p.shape, seed=100 * step + k, dtype=dtype)
        optimizer.step()
    state = [v for s in optimizer.state.values() for _, v in sorted(s.items())]
    return [*(p.detach() for p in parameters), *(v for v in state if isinstance(v, torch.Tensor))]


def steps():
    for dtype in (torch.float32, torch.bfloat16):
        for name, options in OPTIMIZERS.items():
            for extra in EXTRAS:
                yield f"{name} {extra} {dtype}", lambda a=(name, {**options, **extra}, dtype): stepped(*a)  # fmt: skip


def bits(t):
    return t.contiguous().view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)


def differing():
    """Names of what is not the same for every number of threads, and how much was compared."""
    before, wrong, compared = torch.get_num_threads(), [], 0
    for name, run in (*calls(), *steps()):
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(run())
        for other in results[1:]:
            compared += len(other)
            same = [torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True)]
            if not all(same):
                wrong.append((name, same))
    torch.set_num_threads(before)
    return wrong, compared


def masks():
    """What each function that drops has dropped of ones, as numbers."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for name in ("dropout", "relu_dropout", "alpha_dropout", "dropout1d", "dropout2d"):
            for layout in ((0, 1, 2), (2, 0, 1)):
                torch.manual_seed(11)
                y = getattr(F, name)(torch.ones(5, 61, 67, dtype=dtype).permute(layout), 0.3, True)
                kept = (y > 0).contiguous().flatten().long()
                found[f"{name} {dtype} {layout}"] = int((kept * torch.arange(1, len(kept) + 1)).sum())  # fmt: skip
        torch.manual_seed(11)
        x = torch.ones(61, 67, dtype=dtype)
        y = F.bias_dropout_add(x, x[0], x, 0.3) > 1
        found[f"bias_dropout_add {dtype}"] = int((y.flatten() * torch.arange(1, y.numel() + 1)).sum())  # fmt: skip
    return found


@pytest.fixture(scope="module")
def results():
    """isa -> (capability that ran, what differs, how much was compared, masks)"""
    found = {}

    def of(isa):
        if isa not in found:
            env = {**os.environ, "ATEN_CPU_CAPABILITY": isa, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}  # fmt: skip
            run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, cwd=ROOT)  # fmt: skip
            assert run.returncode == 0, run.stderr[-3000:]
            found[isa] = json.loads(run.stdout.splitlines()[-1])
        return found[isa]

    return of


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa, results):
    need(isa)
    capability, wrong, compared, _ = results(isa)
    assert capability == isa.upper()
    assert wrong == []
    assert compared > 300


def test_masks_are_those_of_every_instruction_set(results):
    found = [results(isa)[3] for isa in ISAS if available(isa)]
    assert len(found[0]) > 40
    assert all(m == found[0] for m in found)


if __name__ == "__main__":
    print(json.dumps([fastops._C.cpu_capability(), *differing(), masks()]))
