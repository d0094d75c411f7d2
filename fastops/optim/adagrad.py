"""Adagrad. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class Adagrad(FusedStep, torch.optim.Adagrad):
    """Adagrad (`Duchi, Hazan and Singer, 2011 <https://jmlr.org/papers/v12/duchi11a.html>`_), all parameters in one
    sweep over memory. As :class:`torch.optim.Adagrad`, with what every optimizer here has beyond torch; see
    :class:`Adam`. Sparse gradients are stepped by torch.

    Example:
        >>> optimizer = fastops.optim.Adagrad(model.parameters(), lr=0.01)
    """

    def _kernel(self, group):
        return "adagrad"

    def _initial(self, group, name):
        return group["initial_accumulator_value"] if name == "sum" else 0.0
