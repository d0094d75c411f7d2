"""SGD. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class SGD(FusedStep, torch.optim.SGD):
    """Stochastic gradient descent, with momentum, all parameters in one sweep over memory. As :class:`torch.optim.SGD`,
    with ``l1``, ``l1_mode`` and ``max_grad_norm`` as every optimizer here; see :class:`Adam` for the rest. Sparse
    gradients are stepped by torch.

    Example:
        >>> optimizer = fastops.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    """

    def _kernel(self, group):
        return "sgd_momentum" if group["momentum"] else "sgd"
