"""Adam and AdamW. Which kernel steps a group, and nothing about how a step is made."""

import torch

from .step import FusedStep


class _AdamKernels(FusedStep):
    _no_sparse = "Adam does not support sparse gradients, please consider SparseAdam instead"

    def _kernel(self, group):
        return "adam_amsgrad" if group["amsgrad"] else "adam"


class Adam(_AdamKernels, torch.optim.Adam):
    """Adam (`Kingma and Ba, 2014 <https://arxiv.org/abs/1412.6980>`_), all parameters in one sweep over memory.

    The arguments, defaults, errors and state_dict are those of :class:`torch.optim.Adam`, and the results are those of its
    for-loop, for any memory layout, complex parameters, and several dtypes in one group. Parameters of float16 and bfloat16
    are updated in float32 and rounded once.

    Beyond torch, off by default, by keyword, in every optimizer here:

    Args:
        l1: strength of an L1 penalty, per group; with ``weight_decay`` an elastic net.
        l1_mode: ``"subgradient"`` adds l1 sign(p) to the gradient; ``"proximal"`` thresholds the parameter softly after
            the step, by lr l1 over the step's own scale per element, which gives exact zeros.
        max_grad_norm: the gradients are scaled so that their norm over all groups is at most this, as
            :func:`torch.nn.utils.clip_grad_norm_` would, within the step: ``.grad`` is left as it is. The norm before
            that is in ``grad_norm`` after the step.
        ema_decay: keep an exponential moving average of every parameter in ``state[p]["ema"]`` (float32 for reduced
            dtypes), moved in the same sweep: after the first step it is the parameter, after each other one
            ema_decay of itself and 1 - ema_decay of the parameter, as
            :func:`torch.optim.swa_utils.get_ema_multi_avg_fn` has it. A parameter that is not stepped keeps its average.
            :meth:`swap_ema` puts the averages in the parameters' place. They are part of the state_dict. Buffers, batch
            norm's running statistics among them, are not averaged; see :meth:`swap_ema`.

        state_dtype: ``torch.bfloat16`` keeps the moments of float32 parameters in half the memory; ``torch.float32`` keeps
            those of bfloat16 and float16 parameters in full. The computation is in float32 either way.
        rounding: ``"stochastic"``, per group: parameters and states in bfloat16 are rounded up or down at random, to the
            nearer value with the higher probability. Updates too small for bfloat16 then count on average, and a second
            moment in bfloat16 decays (otherwise 0.999 of it rounds to itself). An element's random bits are Philox
            4x32-10 of the group's ``rounding_seed``, the step, the parameter's number in the group and the element's place
            in memory: the same for any number of threads, instruction set and device, and after a checkpoint. The seed is
            drawn from torch's default generator where the optimizer is constructed; where several processes keep copies
            of the parameters (DistributedDataParallel), give their groups the same one.

    ``foreach`` and ``fused`` are accepted and change nothing but what torch documents beside speed: with ``fused=True`` or
    ``capturable=True`` step counts are on the GPU, learning rate and betas may be tensors there, and a step, AMP's skipped
    ones too, waits for nothing. ``differentiable`` groups are stepped by torch.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastops.optim.Adam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """


class AdamW(_AdamKernels, torch.optim.AdamW):
    """AdamW (`Loshchilov and Hutter, 2017 <https://arxiv.org/abs/1711.05101>`_): Adam with the weight decay apart from
    the gradient. As :class:`torch.optim.AdamW`; see :class:`Adam` for the rest.

    Example:
        >>> optimizer = fastops.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    """
