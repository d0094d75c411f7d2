"""Running averages of the parameters, moved within the step: what stands in for what, and which averages outlive a
checkpoint."""

import warnings

import torch
from torch import Tensor

from .options import ExtraOptions


def dtype_of_average(dtype: torch.dtype) -> torch.dtype:
    """What averages of parameters of this dtype are kept in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class _StandIn:
    """What swap_ema() returns: a block in which the averages stand in for the parameters, and after which all is as it
    was before the call."""

    def __init__(self, optimizer, stood_in, renew):
        self._optimizer = optimizer
        self._stood_in = stood_in  # (tensor, value) where averages stood in before the call
        self._renew = renew  # computes batch norm's statistics anew, or None
        self._statistics = []

    @torch.no_grad()
    def __enter__(self):
        if self._stood_in is not None:  # a block within a block
            self._optimizer._stand_in(self._stood_in)
            if self._renew is not None:
                self._statistics = [(t, t.clone()) for t in self._renew.buffers]
                self._renew()
        return self._optimizer

    @torch.no_grad()
    def __exit__(self, *_):
        if self._stood_in is not None:
            if self._optimizer._put_aside is None:
                self._optimizer._stand_in(self._stood_in)
            for t, value in self._statistics:
                t.copy_(value)
        elif self._optimizer._put_aside is not None:
            self._optimizer._put_back()


class _Counted:
    """An iterable that counts what it gives."""

    def __init__(self, items):
        self._items, self.count = items, 0

    def __iter__(self):
        for item in self._items:
            self.count += 1
            yield item


class _BatchNormStatistics:
    """The running statistics of a model's batch norms, and how to compute them anew."""

    def __init__(self, model, batches, device):
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        buffers = [(m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
        self.buffers = [t for each in buffers for t in each if t is not None]
        self._of = model, batches, device
        self._momenta = [(m, m.momentum) for m in norms]

    def __call__(self):
        model, batches, device = self._of
        training = {m: m.training for m in model.modules()}
        try:
            batches = _Counted(batches)
            torch.optim.swa_utils.update_bn(batches, model, device)
            if self.buffers and batches.count == 0:
                raise ValueError(
                    "swap_ema: there was nothing in `batches` to take batch norm's statistics from; give a loader, or a "
                    "list: an iterator can be used once"
                )
        finally:
            for m, momentum in self._momenta:
                m.momentum = momentum
            for m, mode in training.items():
                m.training = mode


class KeepsAverages(ExtraOptions):
    """The averages of an optimizer: ``state[p]["ema"]``, where ``ema_decay`` is given."""

    _put_aside: list[tuple[Tensor, Tensor]] | None = (
        None  # (tensor, its own value), while averages stand in
    )

    @torch.no_grad()
    def swap_ema(self, model=None, batches=None, device=None):
        """Exchanges the parameters for their averages (``ema_decay``), or back. In a ``with`` statement, the end of the
        block exchanges them again.

            with optimizer.swap_ema():
                evaluate(model)

        Within a ``with`` block the averages always stand in, even if they did before, and after it everything is as it was
        before, so that blocks can be nested. Parameters without an average (they have had no gradient yet) stay as they
        are. While the averages stand in, step(), state_dict() and load_state_dict() raise.

        Only parameters are averaged. The running statistics of batch norm are not; they belong to the parameters' own
        activations. Pass `model` and `batches` to recompute them for the averages; they are put back with the parameters.

        Args:
            model, batches, device: what :func:`torch.optim.swa_utils.update_bn` takes: the model, an iterable of its
                inputs (or of tuples that begin with them), and where to bring them.

        Raises:
            RuntimeError: the optimizer keeps no averages.
            TypeError: one of `model` and `batches` without the other.
            ValueError: there is no batch in `batches`; nothing has changed.
        """
        if self.ema_decay is None:
            raise RuntimeError(
                f"{type(self).__name__} keeps no averages: construct it with ema_decay=0.999 or the like"
            )
        if (model is None) != (batches is None):
            raise TypeError("swap_ema: give both model and batches, or neither")
        renew = None if model is None else _BatchNormStatistics(model, batches, device)
        if self._put_aside is not None:
            stood_in = [(t, t.detach().clone()) for t, _ in self._put_aside]
            self._put_back()
            return _StandIn(self, stood_in, renew)
        params = [p for g in self.param_groups for p in g["params"]]
        averages = [(p, self.state[p].get("ema")) for p in params if p in self.state]
        self._stand_in([(p, t) for p, t in averages if t is not None], renew)
        return _StandIn(self, None, None)

    def _stand_in(self, averages, renew=None):
        """Puts the values of [(tensor, value), ...] in the tensors' place."""
        tensors = [t for t, _ in averages] + (renew.buffers if renew else [])
        self._put_aside = [(t, t.detach().clone()) for t in tensors]
        try:
            for t, value in averages:
                t.copy_(value)
            if renew:
                renew()
        except BaseException:
            self._put_back()
            raise

    def _put_back(self):
        for p, own in self._put_aside:
            p.copy_(own)
        self._put_aside = None

    def _only_without_averages(self, what):
        if self._put_aside is not None:
            raise RuntimeError(
                f"{type(self).__name__}: the averages stand in for the parameters; call swap_ema() before {what}, or "
                "leave its block"
            )

    @property
    def _ema_weight(self):
        """What of a new parameter goes into its average."""
        return None if self.ema_decay is None else 1 - self.ema_decay

    def _steps_of(self, params):
        """How many steps the parameters of a group have taken, where that is counted."""
        counts = (self.state[p].get("step") for p in params if p in self.state)
        return next((float(count) for count in counts if count is not None), None)

    def _check_averages(self):
        """Drops the averages of a checkpoint that has been stepped without them, with a warning."""
        stale = []
        for group in self.param_groups:
            then = group.pop("ema_step", None)
            params = [p for p in group["params"] if "ema" in self.state.get(p, {})]
            if self.ema_decay is None or then not in (None, self._steps_of(group["params"])):
                stale += params
        if not stale:
            return
        for p in stale:
            del self.state[p]["ema"]
            if not self.state[p]:
                del self.state[p]
        why = (
            "this optimizer keeps none" if self.ema_decay is None else "it was stepped without them"
        )
        warnings.warn(
            f"{type(self).__name__}.load_state_dict: the averages (ema_decay) in this checkpoint are left out, since "
            f"{why}; averages that are kept from here on begin with the parameters as they are",
            stacklevel=4,
        )

    def _make_average(self, p, averaged):
        """Starts the average of a parameter that has been stepped before from what it is now."""
        averaged.append(p)
        self.state[p]["ema"] = p.detach().clone().to(dtype_of_average(p.dtype))
