"""Adadelta. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class Adadelta(FusedStep, torch.optim.Adadelta):
    """Adadelta (`Zeiler, 2012 <https://arxiv.org/abs/1212.5701>`_), all parameters in one sweep over memory. As
    :class:`torch.optim.Adadelta`, with what every optimizer here has beyond torch; see :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.Adadelta(model.parameters())
    """

    _no_sparse = "Adadelta does not support sparse gradients"

    def _kernel(self, group):
        return "adadelta"
