"""Checkpoints of the optimizers: state_dicts that interchange with torch's, copies and pickles."""

import torch
from torch import Tensor

from .averages import KeepsAverages, dtype_of_average
from .kernels import SCALAR_STATE_NAMES, STATE_NAMES


class Checkpoints(KeepsAverages):
    """How an optimizer's states and options beyond torch's are saved and loaded."""

    def __getstate__(self):
        state = super().__getstate__()
        return {
            **state,
            **{name: getattr(self, name) for name in self._of_all_groups},
            "_put_aside": self._put_aside,
            "_own_defaults": self._own_defaults,
        }

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault(
            "_own_defaults", {"l1": 0.0, "l1_mode": "subgradient", "rounding": "nearest"}
        )
        for group in self.param_groups:  # a state_dict of torch.optim's knows nothing of them
            for key, value in self._own_defaults.items():
                group.setdefault(key, value)
        # A checkpoint from a model of another memory format: its states take the parameters' order once, not at each step.
        for p, values in self.state.items():
            if type(p) not in (Tensor, torch.nn.Parameter) or not isinstance(values, dict):
                continue
            for key, t in values.items():
                if type(t) is Tensor and t.shape == p.shape and t.stride() != p.stride():
                    moved = torch.empty_like(p, dtype=t.dtype, device=t.device, requires_grad=False)
                    if moved.stride() == p.stride():
                        values[key] = moved.copy_(t)

    def state_dict(self):
        """As :meth:`torch.optim.Optimizer.state_dict`.

        Raises RuntimeError while the averages stand in (:meth:`swap_ema`): the parameters' own values would be in no
        checkpoint.
        """
        self._only_without_averages("state_dict()")
        try:
            if self.ema_decay is not None:
                for group in self.param_groups:
                    if (steps := self._steps_of(group["params"])) is not None:
                        group["ema_step"] = steps
            return super().state_dict()
        finally:
            for group in self.param_groups:
                group.pop("ema_step", None)

    def load_state_dict(self, state_dict):
        """As :meth:`torch.optim.Optimizer.load_state_dict`; states of a dtype of their own and
        averages keep it. Averages are left out, with a warning, where this optimizer keeps none, and where steps were
        taken without them since.

        Raises where torch does, and ValueError for states that no parameter of this optimizer could have had (torch
        takes them and fails at the next step). The optimizer is then as it was.
        """
        self._only_without_averages("load_state_dict()")
        before = {key: self.__dict__[key] for key in ("state", "param_groups")}
        try:
            self._load(state_dict)
        except BaseException:
            self.__dict__.update(before)
            raise

    def _check_loaded(self):
        for number, p in enumerate(p for g in self.param_groups for p in g["params"]):
            own = self.state.get(p, {})
            if not isinstance(own, dict):
                raise ValueError(
                    f"load_state_dict: the state of parameter {number} is a {type(own).__name__}, not a dict"
                )
            for key in {*STATE_NAMES, "ema"} & own.keys():
                t = own[key]
                if t is not None and getattr(t, "shape", None) != p.shape:
                    given = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                    raise ValueError(
                        f"load_state_dict: {key} of parameter {number} is {given}; the parameter has shape {tuple(p.shape)}"
                    )

    def _load(self, state_dict):
        seeds = [g.get("rounding_seed") for g in self.param_groups]
        super().load_state_dict(state_dict)
        self._check_loaded()
        self._check_averages()
        for group, seed in zip(self.param_groups, seeds, strict=True):
            if seed is not None:
                group.setdefault("rounding_seed", seed)
        for values in self.state.values():  # in the dtype of a parameter, or integers
            step = values.get("step")
            if isinstance(step, Tensor) and step.dtype not in (torch.float32, torch.float64):
                values["step"] = step.to(torch.float32)
        saved = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name in SCALAR_STATE_NAMES and name != "step" and isinstance(value, Tensor):
                    # torch would keep them in the parameter's dtype
                    there = self.state[p]["step"].device
                    self.state[p][name] = value.detach().to(there, copy=True)
                    continue
                if name == "ema":
                    dtype = dtype_of_average(p.dtype)
                elif self.state_dtype is None or name not in STATE_NAMES:
                    continue
                else:
                    dtype = self._dtype_of_states(p)
                now = self.state.get(p, {}).get(name)
                if isinstance(value, Tensor) and now is not None and now.dtype != dtype:
                    kept = torch.empty_like(now, dtype=dtype)
                    self.state[p][name] = kept.copy_(value)
