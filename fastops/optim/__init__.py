"""Optimizers of torch.optim whose step is one sweep over memory."""

from .adam import Adam, AdamW
from .groups import param_groups
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "param_groups"]
