"""Whole models of torchvision's, patched beside unpatched: those whose forwards hold most that patch(functional=True) has to
look at and little that it wins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch

import fastops
from fastops.selfcheck import compare

from .cases import FORWARD, Case

MODEL = "model"
SHAPE = (1, 3, 64, 64)
# The parameters of each, which forward reads once, in millions.
MODELS = {"densenet121": 8.0, "swin_t": 28.3, "googlenet": 6.6}


def model_cases() -> Iterator[Case]:
    for name, millions in MODELS.items():
        yield Case(
            op="patch",
            kind=MODEL,
            size="x".join(map(str, SHAPE)),
            shapes=(SHAPE,),
            dtype=torch.float32,
            mode=FORWARD,
            floor=int(millions * 1e6) * torch.float32.itemsize,
            variant=name,
        )


def _models(case: Case, device: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """The model unpatched and patched, and its input.

    Raises:
        ImportError: there is no torchvision.
    """
    import torchvision

    named = {"init_weights": False} if case.variant == "googlenet" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(torchvision.models, case.variant)(weights=None, **named).eval().to(device)
    patched = copy.deepcopy(model)
    fastops.patch(patched, functional=True)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    return model, patched, x


def model_calls(case: Case, device: str) -> tuple[Callable, Callable]:
    """Our call and torch's."""
    model, patched, x = _models(case, device)
    return lambda: patched(x), lambda: model(x)


@torch.no_grad()
def verify_model(case: Case, device: str) -> None:
    """The result of the patched model against the unpatched one in float64.

    Raises:
        Wrong: it is not as near as the unpatched one's.
    """
    model, patched, x = _models(case, device)
    native, ours = model(x), patched(x)
    compare("value", ours, native, model.double()(x.double()))
