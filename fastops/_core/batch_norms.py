"""What a module of batch norm gives to the function that computes it, alone or fused with what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .arguments import not_a_tensor


def normalized(
    module: Any, input: Tensor, function: Callable[..., Tensor], **kwargs: Any
) -> Tensor:
    """`function`, with batch_norm's arguments and `kwargs`, of a torch.nn.BatchNorm and its input. As in torch, but a batch
    is counted once it is in the averages: an error leaves the module as it was."""
    if not isinstance(input, Tensor):
        raise not_a_tensor(type(module).__name__, "input", 1, input)
    module._check_input_dim(input)
    tracks = module.training and module.track_running_stats
    counter = module.num_batches_tracked if tracks else None
    momentum = module.momentum
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    mean, variance = module.running_mean, module.running_var
    own = module.training or (mean is None and variance is None)
    if module.training and not module.track_running_stats:
        mean = variance = None
    output = function(
        input, mean, variance, module.weight, module.bias, training=own, momentum=momentum,
        eps=module.eps, **kwargs,
    )  # fmt: skip
    if counter is not None:
        counter.add_(1)
    return output
