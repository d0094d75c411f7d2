"""Inputs for what cross_entropy has beside torch's arguments, and the same in torch's ops."""

import torch

N, C = 6, 9


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x, target, z_loss=0.0, **kwargs):
    """loss and lse by torch."""
    dim = min(1, x.dim() - 1)
    lse, reduction = torch.logsumexp(x, dim), kwargs.pop("reduction", "mean")
    weight, ignore = kwargs.get("weight"), kwargs.get("ignore_index", -100)
    live = torch.ones_like(lse)
    if not target.is_floating_point():
        live = (target != ignore).to(x.dtype)
    lse = torch.where(live != 0, lse, torch.zeros_like(lse))
    rows = torch.nn.functional.cross_entropy(x, target, reduction="none", **kwargs)
    rows = rows + z_loss * lse**2
    if reduction == "none":
        return rows, lse
    if reduction == "sum":
        return rows.sum(), lse
    if target.is_floating_point():
        return rows.mean(), lse
    if weight is not None:
        live = live * weight[torch.where(live != 0, target, 0)]
    return rows.sum() / live.sum(), lse


LABELS = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(1))
IGNORED = LABELS.clone()
IGNORED[1::3] = 4
IMAGE = torch.randint(0, C, (2, 3, 5), generator=torch.Generator().manual_seed(2))
WEIGHT = randn(C, seed=3).abs() + 0.1
CASES = {
    "labels": (randn(N, C), LABELS, {}),
    "one row": (randn(C), LABELS[0], {}),
    "ignored": (randn(N, C), IGNORED, {"ignore_index": 4}),
    "weight, smoothing": (randn(N, C), IGNORED, {"ignore_index": 4, "weight": WEIGHT, "label_smoothing": 0.2}),
    "columns": (randn(2, C, 3, 5), IMAGE, {"weight": WEIGHT, "label_smoothing": 0.1}),
    "channels_last": (randn(2, C, 3, 5).to(memory_format=torch.channels_last), IMAGE, {"ignore_index": 4}),
    "many": (randn(2, 5003), torch.tensor([7, 5000]), {"label_smoothing": 0.1}),
    "probabilities": (randn(N, C), randn(N, C, seed=4).softmax(1), {"weight": WEIGHT, "label_smoothing": 0.1}),
    "probabilities, columns": (randn(2, C, 3, 5), randn(2, C, 3, 5, seed=4).softmax(1), {}),
}  # fmt: skip


def given(name, dtype=torch.float64):
    x, t, kwargs = CASES[name]
    to = lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
    return to(x), to(t), {k: to(v) for k, v in kwargs.items()}
