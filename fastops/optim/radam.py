"""RAdam. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class RAdam(FusedStep, torch.optim.RAdam):
    """RAdam, which is Adam with a rectified step (`Liu et al., 2019 <https://arxiv.org/abs/1908.03265>`_), all parameters
    in one sweep over memory. As :class:`torch.optim.RAdam`, with what every optimizer here has beyond torch; see
    :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.RAdam(model.parameters(), lr=1e-3)
    """

    _no_sparse = "RAdam does not support sparse gradients"

    def _kernel(self, group):
        return "radam"
