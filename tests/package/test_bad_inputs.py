"""Bad input: one table. Every row says what is done, which exception it must raise and what the message must say; after
each, everything in sight (tensors, their versions, optimizers with their states, modules, the pool's settings) has to be
as before. Rows of functions that torch has too are run on torch's, which must raise the same type."""

import copy
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import bench.__main__ as bench_command
import fastops
from fastops._core.registry import OPS, overload

F, N, M = fastops.functional, fastops.nn, fastops.optim
NAN = float("nan")


class World:
    """What the rows are about. `extra` is what a row's preparation adds, watched like the rest."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(4, 6, generator=g)  # logits, inputs
        self.q = self.x.softmax(1)  # probabilities
        self.t = torch.tensor([0, 5, 2, 1])
        self.i = torch.arange(24).reshape(4, 6)
        self.w = torch.rand(6, generator=g) + 0.5
        self.bias = torch.randn(6, generator=g)
        self.leaf = torch.randn(4, 6, generator=g, requires_grad=True)
        self.expanded = torch.randn(4, 1, generator=g).expand(4, 6)
        self.meta = torch.empty(4, 6, device="meta")
        self.model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
        self.optimizers: list[torch.optim.Optimizer] = []
        self.extra: dict[str, torch.Tensor] = {}

    def fresh(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]

    @property
    def o(self) -> torch.optim.Optimizer:
        return self.optimizers[0]

    @property
    def p(self) -> nn.Parameter:
        return self.o.param_groups[0]["params"][
            1
        ]  # not the first: what comes before it must not be changed either

    def snapshot(self):
        tensors = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
        tensors += [*self.extra.values(), *self.model.state_dict().values()]
        seen = []
        for t in tensors:
            values = None if t.is_meta or t.is_sparse else t.detach().clone()
            seen.append((values, t._version, t.stride(), t.requires_grad, t.grad))
        for o in self.optimizers:
            for group in o.param_groups:
                options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
                seen.append((options, [id(p) for p in group["params"]]))
                for p in group["params"]:
                    state = {k: copy.deepcopy(v) for k, v in o.state.get(p, {}).items()}
                    seen.append((p.detach().clone(), p._version, state))
        pool = fastops.memory.pool_info()
        seen.append((pool["enabled"], pool["limit"]))
        seen.append(
            [(type(m), sorted(vars(m))) for m in self.model.modules()]
        )  # and forwards of their own
        seen.append([m.training for m in self.model.modules()])
        return seen


def same(a, b) -> bool:
    """Whether two snapshots are equal, to the bit; NaNs are equal to themselves."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
            if a.dim()
            else torch.equal(a.reshape(1).view(torch.uint8), b.reshape(1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@dataclass
class Bad:
    name: str
    call: Callable  # of (the module of functions, the world), or of the world alone
    error: type[BaseException]
    message: str
    torchs: bool = True  # whether torch's function of the same name must raise the same
    prepare: Callable | None = None


B = Bad
FUNCTIONS = [
    # ---------------------------------------------------------------------------------------- activations
    B("relu of None", lambda F, w: F.relu(None), TypeError, "relu"),
    B("relu of a number", lambda F, w: F.relu(1.0), TypeError, "relu"),
    B("relu of a list", lambda F, w: F.relu([1.0]), TypeError, "relu"),
    B("relu of complex", lambda F, w: F.relu(w.x + 0j), RuntimeError, "(?i)complex"),
    B("gelu of bool", lambda F, w: F.gelu(w.x > 0), NotImplementedError, "'Bool'"),
    B("gelu of integers", lambda F, w: F.gelu(w.i), NotImplementedError, "'Long'"),
    B("gelu of complex", lambda F, w: F.gelu(w.x + 0j), NotImplementedError, "Complex"),
    B("gelu sparse", lambda F, w: F.gelu(w.x.to_sparse()), NotImplementedError, "SparseCPU"),
    B("gelu approximate", lambda F, w: F.gelu(w.x, approximate="erf"), RuntimeError, "none or tanh"),
    B("gelu TANH", lambda F, w: F.gelu(w.x, approximate="TANH"), RuntimeError, "none or tanh"),
    B("elu alpha text", lambda F, w: F.elu(w.x, alpha="1"), TypeError, "elu"),
    B("elu alpha None", lambda F, w: F.elu(w.x, alpha=None), TypeError, "elu"),
    B("celu 0", lambda F, w: F.celu(w.x, 0.0), RuntimeError, "alpha cannot be 0"),
    B("leaky_relu text", lambda F, w: F.leaky_relu(w.x, "steep"), TypeError, "leaky_relu"),
    B("hardtanh bounds", lambda F, w: F.hardtanh(w.x, 2.0, 1.0), ValueError, "min_val cannot be greater"),
    B("softplus text", lambda F, w: F.softplus(w.x, "soft"), TypeError, "softplus"),
    B("silu of bool", lambda F, w: F.silu(w.x > 0), RuntimeError, "Bool"),
    B("mish of integers", lambda F, w: F.mish(w.i), RuntimeError, "Long"),
    B("glu odd", lambda F, w: F.glu(w.x[:, :5]), RuntimeError, "Halving dimension must be even, but dimension 1 is size 5"),
    B("glu 0-d", lambda F, w: F.glu(w.x[0, 0]), RuntimeError, "glu does not support"),
    B("glu dim", lambda F, w: F.glu(w.x, 2), IndexError, r"Dimension out of range.*got 2"),
    B("glu dim text", lambda F, w: F.glu(w.x, "rows"), TypeError, "glu|int"),
    B("glu of integers", lambda F, w: F.glu(w.i), NotImplementedError, "'Long'"),
    B("in place on a leaf", lambda F, w: F.relu(w.leaf, inplace=True), RuntimeError, "leaf Variable that requires grad"),
    B("in place on a view of a leaf", lambda F, w: F.elu(w.leaf[1:], inplace=True), RuntimeError,
      "view of a leaf Variable that requires grad"),
    B("in place on expanded", lambda F, w: F.relu(w.expanded, inplace=True), RuntimeError,
      "single memory location"),
    B("in place on expanded, hardtanh", lambda F, w: F.hardtanh(w.expanded, inplace=True), RuntimeError,
      "single memory location"),
    # ---------------------------------------------------------------------------------------- softmax
    B("softmax of integers", lambda F, w: F.softmax(w.i.int(), 0), NotImplementedError, "'Int'"),
    B("softmax of bool", lambda F, w: F.softmax(w.x > 0, 0), NotImplementedError, "'Bool'"),
    B("softmax dim", lambda F, w: F.softmax(w.x, 2), IndexError, r"Dimension out of range.*got 2"),
    B("softmax dim of 0-d", lambda F, w: F.softmax(w.x[0, 0], 1), IndexError, r"Dimension out of range.*got 1"),
    B("log_softmax dim", lambda F, w: F.log_softmax(w.x, -3), IndexError, r"Dimension out of range.*got -3"),
    B("log_softmax huge dim", lambda F, w: F.log_softmax(w.x, 2**40), IndexError, "Dimension out of range"),
    B("softmax dim text", lambda F, w: F.softmax(w.x, "rows"), TypeError, "softmax"),
    B("softmax dim 1.0", lambda F, w: F.softmax(w.x, 1.0), TypeError, "softmax"),
    B("softmax dtype", lambda F, w: F.softmax(w.x, 1, dtype=torch.int64), NotImplementedError, "'Long'"),
    B("softmax dtype text", lambda F, w: F.softmax(w.x, 1, dtype="float32"), TypeError, "dtype|to()"),
    B("log_softmax of integers", lambda F, w: F.log_softmax(w.i, 1), NotImplementedError, "'Long'"),
    # ---------------------------------------------------------------------------------------- elementwise losses
    B("mse reduction", lambda F, w: F.mse_loss(w.x, w.q, reduction="avg"), ValueError, "avg is not a valid value"),
    B("mse reduction None", lambda F, w: F.mse_loss(w.x, w.q, reduction=None), ValueError, "None is not a valid"),
    B("mse shapes", lambda F, w: F.mse_loss(w.x, w.q[:3]), RuntimeError, r"size of tensor a \(4\) must match"),
    B("mse weight", lambda F, w: F.mse_loss(w.x, w.q, weight=w.w), ValueError, "must have the same size"),
    B("mse integers", lambda F, w: F.mse_loss(w.i, w.i), NotImplementedError, "'Long'"),
    B("mse target None", lambda F, w: F.mse_loss(w.x, None), (AttributeError, TypeError), "NoneType"),
    B("mse on two devices", lambda F, w: F.mse_loss(w.x, w.meta), RuntimeError, "device.*cpu|cpu.*device"),
    B("mse on two devices, other", lambda F, w: F.mse_loss(w.meta, w.x), RuntimeError, "device.*meta|meta.*device"),
    B("l1 shapes", lambda F, w: F.l1_loss(w.x, w.q[:, :5]), RuntimeError, r"size of tensor a \(6\) must match"),
    B("l1 reduction", lambda F, w: F.l1_loss(w.x, w.q, reduction="x"), ValueError, "x is not a valid value"),
    B("l1 weight", lambda F, w: F.l1_loss(w.x, w.q, weight=w.w), ValueError, "must have the same size"),
    B("smooth_l1 beta", lambda F, w: F.smooth_l1_loss(w.x, w.q, beta=-1.0), RuntimeError, "negative values for beta"),
    B("smooth_l1 nan", lambda F, w: F.smooth_l1_loss(w.x, w.q, beta=NAN), RuntimeError, "negative values for beta"),
    B("smooth_l1 text", lambda F, w: F.smooth_l1_loss(w.x, w.q, beta="1"), TypeError, "str"),
    B("huber 0", lambda F, w: F.huber_loss(w.x, w.q, delta=0.0), RuntimeError, "non-positive values for delta"),
    B("huber negative", lambda F, w: F.huber_loss(w.x, w.q, delta=-2.0), RuntimeError, "non-positive values for delta"),
    B("huber nan", lambda F, w: F.huber_loss(w.x, w.q, delta=NAN), RuntimeError, "non-positive values for delta"),
    B("huber weight", lambda F, w: F.huber_loss(w.x, w.q, weight=w.w), ValueError, "must have the same size"),
    B("huber reduction", lambda F, w: F.huber_loss(w.x, w.q, reduction="sums"), ValueError, "sums is not a valid value"),
    B("bce above 1", lambda F, w: F.binary_cross_entropy(w.q + 3, w.q), RuntimeError, "between 0 and 1"),
    B("bce below 0", lambda F, w: F.binary_cross_entropy(-w.q, w.q), RuntimeError, "between 0 and 1"),
    B("bce nan", lambda F, w: F.binary_cross_entropy(w.q * NAN, w.q), RuntimeError, "between 0 and 1"),
    B("bce one bad", lambda F, w: F.binary_cross_entropy(w.extra["almost"], w.q, reduction="none"), RuntimeError,
      "between 0 and 1", prepare=lambda w: w.extra.update(almost=w.q.index_fill(0, torch.tensor(3), 1.0001))),
    B("bce shapes", lambda F, w: F.binary_cross_entropy(w.q, w.q[:3]), ValueError, r"\[3, 6\].*\[4, 6\]"),
    B("bce dtypes", lambda F, w: F.binary_cross_entropy(w.q, w.q.double()), RuntimeError, "Double"),
    B("bce integers", lambda F, w: F.binary_cross_entropy(w.i, w.i), RuntimeError, "Long"),
    B("bce weight", lambda F, w: F.binary_cross_entropy(w.q, w.q, weight=w.w[:5]), RuntimeError, "6.*5|5.*6"),
    B("bce reduction", lambda F, w: F.binary_cross_entropy(w.q, w.q, reduction=""), ValueError, "is not a valid value"),
    B("bce logits shapes", lambda F, w: F.binary_cross_entropy_with_logits(w.x, w.q[0]), ValueError, r"\[6\].*\[4, 6\]"),
    B("bce logits weight", lambda F, w: F.binary_cross_entropy_with_logits(w.x, w.q, w.w[:5]), RuntimeError, "must match"),
    B("bce logits pos_weight", lambda F, w: F.binary_cross_entropy_with_logits(w.x, w.q, pos_weight=w.w[:5]),
      RuntimeError, "must match"),
    B("bce logits reduction", lambda F, w: F.binary_cross_entropy_with_logits(w.x, w.q, reduction="x"), ValueError,
      "x is not a valid value"),
    # ---------------------------------------------------------------------------------------- cross_entropy
    B("ce range", lambda F, w: F.cross_entropy(w.x, w.t + 1), IndexError, "(?i)target 6"),
    B("ce negative", lambda F, w: F.cross_entropy(w.x, w.t - 1), IndexError, "(?i)target -1"),
    B("ce largest", lambda F, w: F.cross_entropy(w.x, w.t * 0 + 2**63 - 1), IndexError, "(?i)target 9223372036854775807"),
    B("ce smallest", lambda F, w: F.cross_entropy(w.x, w.t * 0 - 2**63), IndexError, "(?i)target -9223372036854775808"),
    B("ce uint8 range", lambda F, w: F.cross_entropy(w.x, (w.t + 250).to(torch.uint8)), IndexError, "(?i)target 25"),
    B("ce range, with grad", lambda F, w: F.cross_entropy(w.leaf, w.t + 1), IndexError, "(?i)target 6"),
    B("ce (C) range", lambda F, w: F.cross_entropy(w.x[0], w.t[1] + 4), IndexError, "(?i)target 9"),
    B("ce batch", lambda F, w: F.cross_entropy(w.x, w.t[:3]), ValueError, r"batch_size \(4\) to match target batch_size \(3\)"),
    B("ce batch of probabilities", lambda F, w: F.cross_entropy(w.x, w.q[:3]), ValueError,
      r"batch_size \(4\) to match target batch_size \(3\)"),
    B("ce classes of probabilities", lambda F, w: F.cross_entropy(w.x, w.q[:, :5]), RuntimeError,
      r"\[4, 5\]|multi-target not supported"),
    B("ce target dims", lambda F, w: F.cross_entropy(w.x, w.i), RuntimeError, "Long|target of size"),
    B("ce int32", lambda F, w: F.cross_entropy(w.x, w.t.int()), RuntimeError, "Int"),
    B("ce int16", lambda F, w: F.cross_entropy(w.x, w.t.short()), RuntimeError, "Short"),
    B("ce bool", lambda F, w: F.cross_entropy(w.x, w.t > 1), RuntimeError, "Bool"),
    B("ce complex target", lambda F, w: F.cross_entropy(w.x, w.t + 0j), RuntimeError, "Complex"),
    B("ce target None", lambda F, w: F.cross_entropy(w.x, None), TypeError, "target.*NoneType"),
    B("ce target list", lambda F, w: F.cross_entropy(w.x, [0, 1, 2, 3]), TypeError, "target.*list"),
    B("ce weight size", lambda F, w: F.cross_entropy(w.x, w.t, weight=w.w[:5]), RuntimeError, "all 6 classes.*5"),
    B("ce weight dims", lambda F, w: F.cross_entropy(w.x, w.t, weight=w.w[None]), RuntimeError, r"all 6 classes.*\[1, 6\]"),
    B("ce weight integers", lambda F, w: F.cross_entropy(w.x, w.t, weight=w.w.long()), RuntimeError, "Long"),
    B("ce weight of another dtype", lambda F, w: F.cross_entropy(w.x, w.t, weight=w.w.double()), RuntimeError, "Float.*Double"),
    B("ce weight complex", lambda F, w: F.cross_entropy(w.x, w.t, weight=w.w + 0j), RuntimeError, "Complex"),
    B("ce weight list", lambda F, w: F.cross_entropy(w.x, w.t, weight=[1.0] * 6), TypeError, "weight|list|cross_entropy"),
    B("ce weight device", lambda F, w: F.cross_entropy(w.x, w.t, weight=w.meta[0]), RuntimeError, "device.*meta|meta.*device"),
    B("ce target device", lambda F, w: F.cross_entropy(w.meta, w.t), RuntimeError, "device.*meta|meta.*device"),
    B("ce smoothing", lambda F, w: F.cross_entropy(w.x, w.t, label_smoothing=1.5), RuntimeError, "between 0.0 and 1.0. Got: 1.5"),
    B("ce smoothing negative", lambda F, w: F.cross_entropy(w.x, w.t, label_smoothing=-1e-3), RuntimeError, "Got: -0.001",
      torchs=False),
    B("ce smoothing huge", lambda F, w: F.cross_entropy(w.x, w.t, label_smoothing=1e300), RuntimeError, "Got: 1e"),
    B("ce smoothing nan", lambda F, w: F.cross_entropy(w.x, w.t, label_smoothing=NAN), RuntimeError, "Got: nan", torchs=False),
    B("ce smoothing text", lambda F, w: F.cross_entropy(w.x, w.t, label_smoothing="0.1"), TypeError, "cross_entropy"),
    B("ce ignore_index 1.5", lambda F, w: F.cross_entropy(w.x, w.t, ignore_index=1.5), TypeError, "cross_entropy"),
    B("ce ignore_index of probabilities", lambda F, w: F.cross_entropy(w.x, w.q, ignore_index=2), RuntimeError,
      "ignore_index is not supported for floating point target"),
    B("ce reduction", lambda F, w: F.cross_entropy(w.x, w.t, reduction="sums"), ValueError, "sums is not a valid value"),
    B("ce 0-d", lambda F, w: F.cross_entropy(w.x[0, 0], w.t[0]), (ValueError, RuntimeError), "Long|dimensions"),
    B("ce int logits", lambda F, w: F.cross_entropy(w.i, w.t), NotImplementedError, "'Long'"),
    B("ce no classes", lambda F, w: F.cross_entropy(w.x[:, :0], w.t), (RuntimeError, IndexError), "no classes|out of bounds"),
    B("nll range", lambda F, w: F.nll_loss(w.x, w.t + 1), IndexError, "Target 6"),
    B("nll reduction", lambda F, w: F.nll_loss(w.x, w.t, reduction="a"), ValueError, "a is not a valid value"),
    # ---------------------------------------------------------------------------------------- dropout
    B("dropout p", lambda F, w: F.dropout(w.x, 1.5), ValueError, "between 0 and 1, but got 1.5"),
    B("dropout p negative", lambda F, w: F.dropout(w.x, -0.1), ValueError, "but got -0.1"),
    B("dropout p nan", lambda F, w: F.dropout(w.x, NAN), (ValueError, RuntimeError), "but got nan"),
    B("dropout p text", lambda F, w: F.dropout(w.x, "half"), TypeError, "str|dropout"),
    B("dropout p None", lambda F, w: F.dropout(w.x, None), TypeError, "None|dropout"),
    B("dropout of integers", lambda F, w: F.dropout(w.i, 0.5), RuntimeError, "Long"),
    B("dropout in place on a leaf", lambda F, w: F.dropout(w.leaf, 0.5, True, True), RuntimeError, "leaf Variable"),
    B("dropout in place on expanded", lambda F, w: F.dropout(w.expanded, 0.5, True, True), RuntimeError,
      "single memory location"),
    B("dropout1d dims", lambda F, w: F.dropout1d(w.x[0]), RuntimeError, "1D input"),
    B("dropout1d p", lambda F, w: F.dropout1d(w.x, 2), ValueError, "but got 2"),
    B("dropout2d dims", lambda F, w: F.dropout2d(w.x[0]), RuntimeError, "at least 2 dimensions"),
    B("dropout3d dims", lambda F, w: F.dropout3d(w.x[0, 0]), RuntimeError, "at least 2 dimensions"),
    B("dropout3d p", lambda F, w: F.dropout3d(w.x.expand(1, 2, 3, 4, 6), -1), ValueError, "but got -1"),
    B("alpha_dropout p", lambda F, w: F.alpha_dropout(w.x, 2.0, True), ValueError, "but got 2.0"),
]  # fmt: skip

OURS = [  # functions that torch has not, the ops below them, modules
    B("add_relu shapes", lambda w: F.add_relu(w.x, w.q[:3]), RuntimeError, r"size of tensor a \(4\) must match"),
    B("add_relu shapes in place", lambda w: F.add_relu(w.x, w.q[:3], inplace=True), RuntimeError, "must match"),
    B("add_relu devices", lambda w: F.add_relu(w.x, w.meta), RuntimeError, "one device, got cpu and meta"),
    B("add_relu devices, other", lambda w: F.add_relu(w.meta, w.x), RuntimeError, "one device, got cpu and meta"),
    B("add_relu leaf", lambda w: F.add_relu(w.leaf, w.x, inplace=True), RuntimeError, "leaf Variable"),
    B("add_relu overlap", lambda w: F.add_relu(w.x[:3], w.x[1:], inplace=True), RuntimeError, "partially overlap|memory"),
    B("add_relu expanded", lambda w: F.add_relu(w.expanded, w.x, inplace=True), RuntimeError, "single memory location"),
    B("swiglu shapes", lambda w: F.swiglu(w.x, w.q[:3]), RuntimeError, r"\[4, 6\].*\[3, 6\]"),
    B("swiglu dtypes", lambda w: F.swiglu(w.x, w.q.double()), RuntimeError, "Double|dtype"),
    B("swiglu devices", lambda w: F.swiglu(w.x, w.meta), RuntimeError, "device"),
    B("swiglu odd", lambda w: F.swiglu(w.x[:, :5]), RuntimeError, "must be even, but dimension 1 is size 5"),
    B("swiglu dim", lambda w: F.swiglu(w.x, dim=-3), IndexError, "got -3"),
    B("swiglu of None", lambda w: F.swiglu(None), TypeError, "gate.*NoneType"),
    B("swiglu up a number", lambda w: F.swiglu(w.x, 2.0), TypeError, "up.*float"),
    B("bias_gelu bias", lambda w: F.bias_gelu(w.x, w.bias[:5]), RuntimeError, r"\[5\] for an input of \[4, 6\]"),
    B("bias_gelu bias dims", lambda w: F.bias_gelu(w.x, w.q), RuntimeError, r"\[4, 6\] for an input of \[4, 6\]"),
    B("bias_gelu, other layout", lambda w: F.bias_gelu(w.x.t(), w.q.t()), RuntimeError, r"\[6, 4\] for an input of \[6, 4\]"),
    B("bias_gelu, other dtype", lambda w: F.bias_gelu(w.x, w.q.double()), RuntimeError, r"\[4, 6\] for an input of \[4, 6\]"),
    B("bias_gelu 0-d", lambda w: F.bias_gelu(w.x[0, 0], w.bias[:1]), RuntimeError, r"\[1\] for an input of \[\]"),
    B("bias_gelu approximate", lambda w: F.bias_gelu(w.x, w.bias, "erf"), RuntimeError, "none or tanh, got 'erf'"),
    B("bias_gelu devices", lambda w: F.bias_gelu(w.x, w.meta[0]), RuntimeError, "one device, got cpu and meta"),
    B("bias_dropout_add bias", lambda w: F.bias_dropout_add(w.x, w.bias[:5], w.q), RuntimeError, r"\[5\] for an input"),
    B("bias_dropout_add bias, eval", lambda w: F.bias_dropout_add(w.x, w.q, w.q, training=False), RuntimeError,
      r"\[4, 6\] for an input"),
    B("bias_dropout_add residual", lambda w: F.bias_dropout_add(w.x, w.bias, w.q[:1]), RuntimeError, r"\[4, 6\], got \[1, 6\]"),
    B("bias_dropout_add residual, eval", lambda w: F.bias_dropout_add(w.x, w.bias, w.q[:1], training=False), RuntimeError,
      r"\[4, 6\], got \[1, 6\]"),
    B("bias_dropout_add residual, no bias", lambda w: F.bias_dropout_add(w.x, None, w.q[:1]), RuntimeError,
      r"\[4, 6\], got \[1, 6\]"),
    B("bias_dropout_add p", lambda w: F.bias_dropout_add(w.x, w.bias, w.q, p=2), ValueError, "but got 2"),
    B("bias_dropout_add nan", lambda w: F.bias_dropout_add(w.x, w.bias, w.q, p=NAN), ValueError, "but got nan"),
    B("bias_dropout_add devices", lambda w: F.bias_dropout_add(w.x, w.bias, w.meta), RuntimeError, "cpu and meta"),
    B("relu_dropout p", lambda w: F.relu_dropout(w.x, -1), ValueError, "but got -1"),
    B("relu_dropout integers", lambda w: F.relu_dropout(w.i), RuntimeError, "Long"),
    B("relu_dropout leaf", lambda w: F.relu_dropout(w.leaf, inplace=True), RuntimeError, "leaf Variable"),
    B("dropout generator", lambda w: F.dropout(w.x, generator=3), TypeError, "dropout"),
    B("mixup lam", lambda w: F.mixup_cross_entropy(w.x, w.t, w.t, 1.5), ValueError, "between 0 and 1, but got 1.5"),
    B("mixup nan", lambda w: F.mixup_cross_entropy(w.x, w.t, w.t, NAN), ValueError, "but got nan"),
    B("mixup lams", lambda w: F.mixup_cross_entropy(w.x, w.t, w.t, w.w[:4]), ValueError, r"\(4,\) needs reduction"),
    B("mixup second target", lambda w: F.mixup_cross_entropy(w.x, w.t, w.t + 1, 0.5), IndexError,
      r"target 6 at row 1 is out of range for 6 classes \(ignore_index=-100\)"),
    B("class weights that require grad", lambda w: F.cross_entropy(w.x.requires_grad_(False), w.t,
      weight=w.w.clone().requires_grad_()).backward(), NotImplementedError, "gradient to weight"),
    B("op reduction", lambda w: overload("mse_loss")(w.x, w.x, 7), ValueError, "reduction 7"),
    B("op ce reduction", lambda w: overload("cross_entropy")(w.x, w.t, None, -1), ValueError, "reduction -1"),
    B("op backward shapes", lambda w: overload("relu_backward")(w.x, w.x[:2]), RuntimeError, r"one shape.*\[4, 6\].*\[2, 6\]"),
    B("op backward dtypes", lambda w: overload("gelu_backward")(w.x, w.x.double()), RuntimeError, "one shape, dtype"),
    B("op backward integers", lambda w: overload("gelu_backward")(w.i, w.i), RuntimeError, "dtype"),
    B("op softmax_backward", lambda w: overload("softmax_backward")(w.x[:2], w.x, 1), RuntimeError, "expected grad like output"),
    B("op loss backward", lambda w: overload("mse_loss_backward")(w.x, w.x, w.x, 1, 0), RuntimeError, "does not fit reduction 1"),
    B("op loss backward to what", lambda w: overload("mse_loss_backward")(w.x[0, 0], w.x, w.x, 1, 2), RuntimeError, "got 2"),
    B("op dropout seed", lambda w: overload("dropout")(w.x, 0.5, w.w), RuntimeError, "seed must be one int64"),
    B("op dropout p", lambda w: overload("dropout")(w.x, 1.0, w.t[0]), ValueError, r"\[0, 1\), got 1"),
    B("op relu devices", lambda w: overload("relu_backward")(w.x, w.meta), RuntimeError, "one device, got cpu and meta"),
    B("op sgd without no_grad", lambda w: overload("sgd_")([w.leaf], [w.x], lr=1.0, momentum=0.0, dampening=0.0,
      weight_decay=0.0, nesterov=False, maximize=False, l1=0.0, proximal=False), RuntimeError, "torch.no_grad"),
    B("nn.Hardtanh", lambda w: N.Hardtanh(2, 1), AssertionError, r"max_val \(1\) must be greater"),
    B("nn.Dropout", lambda w: N.Dropout(1.5), ValueError, "but got 1.5"),
    B("nn.Dropout nan", lambda w: N.Dropout(NAN)(w.x), ValueError, "but got nan"),
    B("nn.Softmax", lambda w: N.Softmax(dim=5)(w.x), IndexError, "got 5"),
    B("nn.GELU", lambda w: N.GELU("erf")(w.x), RuntimeError, "none or tanh, got 'erf'"),
    B("nn.HuberLoss", lambda w: N.HuberLoss(delta=0)(w.x, w.q), RuntimeError, "delta, got 0"),
    B("nn.CrossEntropyLoss", lambda w: N.CrossEntropyLoss(label_smoothing=2)(w.x, w.t), RuntimeError, "Got: 2"),
    B("nn.MSELoss", lambda w: N.MSELoss(reduction="avg")(w.x, w.q), ValueError, "avg is not a valid value"),
    # ---------------------------------------------------------------------------------------- patch, memory
    B("patch text", lambda w: fastops.patch("model"), TypeError, "torch.nn.Module, got str"),
    B("patch functional", lambda w: fastops.patch(nn.ReLU(), functional="yes"), TypeError, "True or False, got 'yes'"),
    B("patched functional", lambda w: fastops.patched(nn.ReLU(), functional=1), TypeError, "True or False, got 1"),
    B("patch a class", lambda w: fastops.patch(nn.ReLU), TypeError, "torch.nn.Module, got type"),
    B("unpatch", lambda w: fastops.unpatch(None), TypeError, "torch.nn.Module, got NoneType"),
    B("pool limit", lambda w: fastops.memory.set_limit(-1), ValueError, "0 or more, got -1"),
    B("pool limit text", lambda w: fastops.memory.set_limit("1"), TypeError, "str"),
    B("pool limit 1.5", lambda w: fastops.memory.set_limit(1.5), TypeError, "pool_set_limit"),
    B("pool limit huge", lambda w: fastops.memory.set_limit(2**70), TypeError, "pool_set_limit"),
]  # fmt: skip


@pytest.mark.parametrize("bad", FUNCTIONS, ids=lambda b: b.name)
def test_functions(bad):
    functions = (F, nn.functional) if bad.torchs else (F,)
    for module in functions:
        check(lambda w: bad.call(module, w), bad)  # noqa: B023


@pytest.mark.parametrize("bad", OURS, ids=lambda b: b.name)
def test_ours(bad):
    check(bad.call, bad)


def check(call, bad: Bad) -> None:
    world = World()
    if bad.prepare:
        bad.prepare(world)
    before = world.snapshot()
    with pytest.raises(bad.error, match=bad.message), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that broadcast, of dimensions: torch's
        call(world)
    assert same(before, world.snapshot())


def test_the_check_sees_changes():
    """Of a value, a sign of zero, a version, a state, an option, a class: the table proves nothing without this."""
    for change in (
        lambda w: w.x.view(-1)[3:4].add_(1),
        lambda w: w.bias.data.neg_(),
        lambda w: w.x.add_(0),
        lambda w: w.o.state[w.p]["exp_avg"].data.mul_(2),
        lambda w: w.o.state[w.p]["step"].data.add_(1),
        lambda w: w.o.param_groups[0].update(lr=3.0),
        lambda w: w.p.data.mul_(1.5),
        lambda w: fastops.patch(w.model),
        lambda w: w.model.eval(),
    ):
        world = World()
        stepped(M.Adam)(world)
        before = world.snapshot()
        assert same(before, world.snapshot())
        change(world)
        assert not same(before, world.snapshot())


# ------------------------------------------------------------------------------------------ optimizers


def stepped(cls, change=None, **options):
    """A preparation: an optimizer after one step, with new gradients, and `change` made to it."""

    def prepare(w: World):
        params = [nn.Parameter(torch.randn(n, 3)) for n in (2, 3, 4)]
        o = cls(params, **options)
        w.optimizers.append(o)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            if not o.state:
                o.step()
        if change:
            change(w)

    return prepare


def option(**values):
    return lambda w: w.o.param_groups[0].update(values)


def state(key, make):
    def change(w):
        w.o.state[w.p][key] = make(w.o.state[w.p][key])

    return change


def grad(make):
    def change(w):
        w.p.grad = w.extra["grad"] = make(w.p)

    return change


def integer_parameter(w):
    w.o.param_groups[0]["params"][1] = p = nn.Parameter(
        torch.ones(3, 3, dtype=torch.int64), requires_grad=False
    )
    p.grad = torch.ones_like(p)


STEP = lambda w: w.o.step()  # noqa: E731
CONSTRUCTED = [
    B("lr", lambda M, w: M.Adam(w.fresh(), lr=-1), ValueError, "Invalid learning rate: -1"),
    B("lr nan", lambda M, w: M.Adam(w.fresh(), lr=NAN), ValueError, "Invalid learning rate: nan"),
    B("lr text", lambda M, w: M.Adam(w.fresh(), lr="fast"), TypeError, "str"),
    B("lr of two", lambda M, w: M.Adam(w.fresh(), lr=torch.ones(2)), ValueError, "1-element"),
    B("beta 1", lambda M, w: M.Adam(w.fresh(), betas=(1.0, 0.9)), ValueError, "index 0: 1.0"),
    B("beta 2", lambda M, w: M.AdamW(w.fresh(), betas=(0.9, -1)), ValueError, "index 1: -1"),
    B("one beta", lambda M, w: M.Adam(w.fresh(), betas=(0.9,)), IndexError, "index"),
    B("eps", lambda M, w: M.Adam(w.fresh(), eps=-1), ValueError, "Invalid epsilon value: -1"),
    B("weight_decay", lambda M, w: M.AdamW(w.fresh(), weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    B("momentum", lambda M, w: M.SGD(w.fresh(), momentum=-1), ValueError, "Invalid momentum value: -1"),
    B("nesterov", lambda M, w: M.SGD(w.fresh(), nesterov=True), ValueError, "Nesterov momentum requires"),
    B("alpha", lambda M, w: M.RMSprop(w.fresh(), alpha=-1), ValueError, "Invalid alpha value: -1"),
    B("fused and foreach", lambda M, w: M.Adam(w.fresh(), fused=True, foreach=True), RuntimeError, "cannot be `True` together"),
    B("no parameters", lambda M, w: M.Adam([]), ValueError, "empty parameter list"),
    B("a tensor", lambda M, w: M.Adam(torch.ones(3)), TypeError, "iterable of Tensors or dicts"),
    B("not a leaf", lambda M, w: M.SGD([w.fresh()[0] * 2]), ValueError, "non-leaf"),
    B("text", lambda M, w: M.SGD(["a"]), TypeError, "one of the params is str"),
    B("unknown option", lambda M, w: M.Adam(w.fresh(), momentum_decay=1), TypeError, "momentum_decay"),
    B("group without parameters", lambda M, w: M.Adam([{"lr": 1}]), KeyError, "params"),
    B("group twice", lambda M, w: M.Adam([{"params": (p := w.fresh())}, {"params": p}]), ValueError,
      "appear in more than one parameter group"),
    B("l1", lambda M, w: M.Adam(w.fresh(), l1=-1), ValueError, "Invalid l1 value: -1", torchs=False),
    B("l1 nan", lambda M, w: M.SGD(w.fresh(), l1=NAN), ValueError, "Invalid l1 value: nan", torchs=False),
    B("l1 of a group", lambda M, w: M.SGD([{"params": w.fresh(), "l1": -1}]), ValueError, "Invalid l1 value: -1", torchs=False),
    B("l1_mode", lambda M, w: M.RMSprop(w.fresh(), l1_mode="lasso"), ValueError, "Invalid l1_mode: 'lasso'", torchs=False),
    B("max_grad_norm", lambda M, w: M.Adam(w.fresh(), max_grad_norm=0), ValueError, "Invalid max_grad_norm: 0", torchs=False),
    B("max_grad_norm nan", lambda M, w: M.Adam(w.fresh(), max_grad_norm=NAN), ValueError, "max_grad_norm: nan", torchs=False),
    B("ema_decay", lambda M, w: M.Adam(w.fresh(), ema_decay=1), ValueError, "Invalid ema_decay: 1", torchs=False),
    B("param_groups", lambda M, w: M.param_groups(w.model, weight_decay=-1), ValueError, "negative, got -1", torchs=False),
    B("param_groups of text", lambda M, w: M.param_groups("model"), TypeError, "torch.nn.Module, got str", torchs=False),
    B("param_groups of nothing", lambda M, w: M.param_groups(nn.ReLU()), ValueError, "no parameter", torchs=False),
]  # fmt: skip

Adam, SGD, RMSprop = M.Adam, M.SGD, M.RMSprop
STEPS = [
    B("group that is none", lambda w: w.o.add_param_group(3), TypeError, "must be a dict", prepare=stepped(Adam)),
    B("group with a bad l1", lambda w: w.o.add_param_group({"params": w.fresh(), "l1": -2}), ValueError, "l1 value: -2",
      prepare=stepped(Adam)),
    B("group of a parameter it has", lambda w: w.o.add_param_group({"params": [w.p]}), ValueError, "more than one",
      prepare=stepped(SGD)),
    B("lr became text", STEP, ValueError, "fast", prepare=stepped(Adam, option(lr="fast"))),
    B("lr became two", STEP, (RuntimeError, ValueError), "2 elements|one element", prepare=stepped(Adam, option(lr=torch.ones(2)))),
    B("lr is gone", STEP, KeyError, "lr", prepare=stepped(SGD, lambda w: w.o.param_groups[0].pop("lr"))),
    B("betas became one", STEP, (TypeError, ValueError), "float|unpack", prepare=stepped(Adam, option(betas=0.9))),
    B("l1_mode became bad", STEP, ValueError, "Invalid l1_mode: 'lasso'", prepare=stepped(Adam, option(l1_mode="lasso"), l1=0.1)),
    B("l1 became negative", STEP, ValueError, "Invalid l1 value: -1", prepare=stepped(SGD, option(l1=-1))),
    B("state of another shape", STEP, RuntimeError, r"parameter 1 has shape \[3, 3\] but a state has shape \[2, 2\]",
      prepare=stepped(Adam, state("exp_avg_sq", lambda s: torch.ones(2, 2)))),
    B("state of another dtype", STEP, RuntimeError, "states of parameter 1 are Float and Double",
      prepare=stepped(Adam, state("exp_avg_sq", lambda s: s.double()))),
    B("states of another dtype", STEP, RuntimeError, "parameter 1 is Float but its states are Double",
      prepare=stepped(RMSprop, state("square_avg", lambda s: s.double()))),
    B("state expanded", STEP, RuntimeError, "single memory location",
      prepare=stepped(SGD, state("momentum_buffer", lambda s: torch.ones(3, 1).expand(3, 3)), momentum=0.9)),
    B("state is gone", STEP, KeyError, "exp_avg", prepare=stepped(Adam, lambda w: w.o.state[w.p].pop("exp_avg"))),
    B("step of another dtype", STEP, RuntimeError, "one float32 or float64",
      prepare=stepped(Adam, state("step", lambda s: s.long()))),
    B("step of two", STEP, RuntimeError, "step count must be one", prepare=stepped(Adam, state("step", lambda s: torch.ones(2)))),
    B("step is a number", STEP, RuntimeError, "singleton tensors", prepare=stepped(Adam, state("step", lambda s: 1))),
    B("closure raises", lambda w: w.o.step(lambda: 1 / 0), ZeroDivisionError, "division", prepare=stepped(Adam)),
    B("closure is none", lambda w: w.o.step(3), TypeError, "not callable", prepare=stepped(Adam)),
    B("hook raises", STEP, ZeroDivisionError, "division",
      prepare=stepped(Adam, lambda w: w.o.register_step_pre_hook(lambda *a: 1 / 0))),
    B("scale of two", STEP, RuntimeError, "2 elements|elements",
      prepare=stepped(Adam, lambda w: setattr(w.o, "grad_scale", torch.ones(2)), max_grad_norm=1.0)),
    B("found_inf of two", STEP, RuntimeError, "2 elements|elements",
      prepare=stepped(Adam, lambda w: setattr(w.o, "found_inf", torch.ones(2)))),
    B("sparse gradient", STEP, RuntimeError, "sparse", prepare=stepped(Adam, grad(lambda p: torch.ones(3, 3).to_sparse()))),
    B("sparse gradient, clipped", STEP, RuntimeError, "not available|sparse|Sparse",
      prepare=stepped(SGD, grad(lambda p: torch.ones(3, 3).to_sparse()), max_grad_norm=1.0)),
    B("step while swapped", STEP, RuntimeError, r"call swap_ema\(\) before step",
      prepare=stepped(Adam, lambda w: w.o.swap_ema(), ema_decay=0.9)),
    B("no averages", lambda w: w.o.swap_ema(), RuntimeError, "Adam keeps no averages", prepare=stepped(Adam)),
    B("average of another shape", STEP, RuntimeError, r"its average has shape \[2\]",
      prepare=stepped(Adam, state("ema", lambda s: torch.ones(2)), ema_decay=0.9)),
    B("average of another dtype", STEP, RuntimeError, "average of parameter 1 is Double",
      prepare=stepped(Adam, state("ema", lambda s: s.double()), ema_decay=0.9)),
    B("integer parameter", STEP, NotImplementedError, "parameter 1 is Long", prepare=stepped(SGD, integer_parameter)),
    B("expanded parameter", STEP, RuntimeError, "single memory location",
      prepare=stepped(SGD, lambda w: setattr(w.p, "data", torch.ones(3, 1).expand(3, 3)))),
    B("first step, state of the next bad", STEP, RuntimeError, "parameter 1|a state has shape",
      prepare=stepped(Adam, lambda w: (w.o.state.pop(w.o.param_groups[0]["params"][0]),
      w.o.state[w.p].update(exp_avg=torch.ones(1))))),
]  # fmt: skip


@pytest.mark.parametrize("bad", CONSTRUCTED, ids=lambda b: b.name)
def test_constructing_optimizers(bad):
    for module in (M, torch.optim) if bad.torchs else (M,):
        check(lambda w: bad.call(module, w), bad)  # noqa: B023


@pytest.mark.parametrize("bad", STEPS, ids=lambda b: b.name)
def test_optimizers(bad):
    check(bad.call, bad)


# ------------------------------------------------------------------------------------------ bench


def bench(*arguments):
    options = bench_command.make_parser().parse_args(arguments)
    bench_command.check(options)
    bench_command.select(options)


BENCH = [
    B("time 0", lambda w: bench("--time", "0"), bench_command.UsageError, "--time 0.0: give seconds above 0"),
    B("time nan", lambda w: bench("--time", "nan"), bench_command.UsageError, "--time nan"),
    B("time text", lambda w: bench("--time", "long"), bench_command.UsageError, "invalid float value: 'long'"),
    B("threads", lambda w: bench("--threads", "0"), bench_command.UsageError, "--threads 0: give 1 or more"),
    B("threads 1.5", lambda w: bench("--threads", "1.5"), bench_command.UsageError, "invalid int value: '1.5'"),
    B("device", lambda w: bench("--device", "tpu"), bench_command.UsageError, "invalid choice: 'tpu'"),
    B("filter", lambda w: bench("--filter", "no such row"), bench_command.UsageError, "no row has it"),
    B("json", lambda w: bench("--json", "/no/such/folder/x.json"), bench_command.UsageError, "no file can be written there"),
    B("unknown", lambda w: bench("--fast"), bench_command.UsageError, "--fast"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BENCH, ids=lambda b: b.name)
def test_bench(bad):
    check(bad.call, bad)


# ------------------------------------------------------------------------------------------ the environment


def test_pool_limit_of_the_environment():
    """Refused where the pool is first wanted, and a fork afterwards finds a process in order."""
    script = """
import os
from fastops import memory
for value in ("1 GB", "-5", "+5", "1e9", "", "99999999999999999999999"):
    os.environ["FASTOPS_CPU_POOL_LIMIT"] = value
    try:
        memory.pool_info()
    except RuntimeError as error:
        assert f"number of bytes, got '{value}'" in str(error), error
    else:
        raise SystemExit(f"accepted {value!r}")
pid = os.fork()
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_table_is_large_and_covers_every_op():
    rows = [*FUNCTIONS, *OURS, *CONSTRUCTED, *STEPS, *BENCH]
    assert len(rows) >= 100 and len({(b.name, b.call) for b in rows}) == len(rows)
    source = inspect.getsource(sys.modules[__name__])
    kinds = {op.kind for op in OPS.values() if f".{op.name}(" in source}
    assert kinds == {op.kind for op in OPS.values()}
