"""The device that a name stands for."""

import os

import torch

from . import processes
from .errors import ConfigError


def find_device(name: str) -> torch.device:
    """The torch device of a name; "auto" prefers a GPU. Each of several processes has its own GPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', processes.rank())}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from error
    return device
