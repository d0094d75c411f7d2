"""RMSprop. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class RMSprop(FusedStep, torch.optim.RMSprop):
    """RMSprop (Tieleman and Hinton, 2012), centered (`Graves, 2013 <https://arxiv.org/abs/1308.0850>`_) and with momentum
    where asked, all parameters in one sweep over memory. As :class:`torch.optim.RMSprop`, with what every optimizer
    here has beyond torch; see :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    """

    _no_sparse = "RMSprop does not support sparse gradients"

    def _kernel(self, group):
        return (
            "rmsprop"
            + "_centered" * bool(group["centered"])
            + "_momentum" * bool(group["momentum"])
        )
