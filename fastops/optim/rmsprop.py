"""RMSprop. Which row of the kernels' table a group takes, and nothing about how a step is made."""

import torch

from .step import ROWS, FusedStep, _number


class RMSprop(FusedStep, torch.optim.RMSprop):
    """RMSprop (Tieleman and Hinton, 2012), centered (`Graves, 2013 <https://arxiv.org/abs/1308.0850>`_) and with momentum
    where asked, all parameters in one sweep over memory. As :class:`torch.optim.RMSprop`, with what every optimizer
    here has beyond torch; see :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    """

    _no_sparse = "RMSprop does not support sparse gradients"

    def _row(self, group):
        momentum = float(group["momentum"])
        name = "rmsprop" + "_centered" * bool(group["centered"]) + "_momentum" * bool(momentum)
        return (
            ROWS[name],
            group["params"],
            (
                _number(group, group["lr"]),
                float(group["alpha"]),
                float(group["eps"]),
                float(group["weight_decay"]),
                momentum,
                float(group["maximize"]),
                *self._penalty(group),
            ),
        )
