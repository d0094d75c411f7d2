"""Adamax. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class Adamax(FusedStep, torch.optim.Adamax):
    """Adamax, which is Adam with the infinity norm (`Kingma and Ba, 2014 <https://arxiv.org/abs/1412.6980>`_), all
    parameters in one sweep over memory. As :class:`torch.optim.Adamax`, with what every optimizer here has beyond torch;
    see :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.Adamax(model.parameters(), lr=2e-3)
    """

    _no_sparse = "Adamax does not support sparse gradients"

    def _kernel(self, group):
        return "adamax"
