"""Optimizers of torch.optim whose step is one sweep over memory."""

import torch

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .asgd import ASGD
from .groups import param_groups
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "param_groups",
]  # fmt: skip


def __getattr__(name: str):
    """torch.optim's own, of the names that are not here: `fastops.optim.lr_scheduler` is `torch.optim.lr_scheduler`."""
    if not name.startswith("__") and hasattr(torch.optim, name):
        return getattr(torch.optim, name)
    raise AttributeError(f"neither {__name__} nor torch.optim has {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for n in dir(torch.optim) if not n.startswith("_"))})
