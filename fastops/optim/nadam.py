"""NAdam. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class NAdam(FusedStep, torch.optim.NAdam):
    """NAdam, which is Adam with Nesterov's momentum (`Dozat, 2016
    <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_), all parameters in one sweep over memory. As
    :class:`torch.optim.NAdam`, with what every optimizer here has beyond torch; see :class:`Adam`.

    Example:
        >>> optimizer = fastops.optim.NAdam(model.parameters(), lr=2e-3)
    """

    _no_sparse = "NAdam does not support sparse gradients"

    def _kernel(self, group):
        return "nadam"

    def _initial(self, group, name):
        return 1.0 if name == "mu_product" else 0.0
