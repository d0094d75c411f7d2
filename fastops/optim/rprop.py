"""Rprop. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class Rprop(FusedStep, torch.optim.Rprop):
    """Resilient backpropagation (Riedmiller and Braun, 1993), all parameters in one sweep over memory. As
    :class:`torch.optim.Rprop`, with what every optimizer here has beyond torch; see :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.Rprop(model.parameters(), lr=0.01)
    """

    _no_sparse = "Rprop does not support sparse gradients"

    def _kernel(self, group):
        return "rprop"

    def _initial(self, group, name):
        return float(group["lr"]) if name == "step_size" else 0.0
