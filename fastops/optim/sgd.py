"""SGD. Which row of the kernels' table a group takes, and nothing about how a step is made."""

import torch

from .step import ROWS, FusedStep, _number


class SGD(FusedStep, torch.optim.SGD):
    """Stochastic gradient descent, with momentum, all parameters in one sweep over memory. As :class:`torch.optim.SGD`,
    with ``l1``, ``l1_mode`` and ``max_grad_norm`` as every optimizer here; see :class:`Adam` for the rest. Sparse
    gradients are stepped by torch.

    Example:
        >>> optimizer = fastops.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    """

    def _row(self, group):
        momentum = float(group["momentum"])
        return (
            ROWS["sgd_momentum" if momentum else "sgd"],
            group["params"],
            (
                _number(group, group["lr"]),
                momentum,
                float(group["dampening"]),
                float(group["weight_decay"]),
                float(group["nesterov"]),
                float(group["maximize"]),
                *self._penalty(group),
            ),
        )
