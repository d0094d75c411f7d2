"""ASGD. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class ASGD(FusedStep, torch.optim.ASGD):
    """Averaged stochastic gradient descent (`Polyak and Juditsky, 1992 <https://doi.org/10.1137/0330046>`_), all
    parameters in one sweep over memory. As :class:`torch.optim.ASGD`, with what every optimizer here has beyond torch;
    see :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.ASGD(model.parameters(), lr=0.01)
    """

    _no_sparse = "ASGD does not support sparse gradients"
    _scalars_beside_parameters = True

    def _kernel(self, group):
        return "asgd"

    def _initial(self, group, name):
        return {"eta": float(group["lr"]), "mu": 1.0}.get(name, 0.0)
