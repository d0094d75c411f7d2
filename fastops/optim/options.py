"""Options beyond torch's, which every optimizer has: how they are given, checked, shown, and found in a group."""

import functools
import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from .kernels import STATE_NAMES, check_group


class ExtraOptions(Optimizer):
    """l1, l1_mode and rounding of each group, and what is one value for all groups."""

    max_grad_norm: float | None = None
    ema_decay: float | None = None
    state_dtype: torch.dtype | None = None
    _of_all_groups = ("max_grad_norm", "ema_decay", "state_dtype")
    _own_defaults: dict[str, Any]

    def __init_subclass__(cls):
        super().__init_subclass__()
        signature = inspect.signature(cls.__init__)
        base = next((c for c in cls.__mro__ if c.__module__.startswith("torch.optim.")), None)
        if base in (None, Optimizer) or "args" not in signature.parameters:
            return
        ours = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        theirs = inspect.signature(base.__init__).parameters.values()

        @functools.wraps(cls.__init__)
        def __init__(self, *args, **kwargs):
            super(cls, self).__init__(*args, **kwargs)

        __init__.__signature__ = signature.replace(parameters=[*theirs, *ours])
        cls.__init__ = __init__

    def __init__(
        self,
        *args,
        l1: float = 0.0,
        l1_mode: str = "subgradient",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        **kwargs,
    ):
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"Invalid ema_decay: {ema_decay}; it must be in [0, 1)")
        self.ema_decay = ema_decay
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}; it must be above 0")
        if state_dtype not in (None, torch.bfloat16, torch.float32):
            raise ValueError(
                f"Invalid state_dtype: {state_dtype}; it is torch.bfloat16, torch.float32 or None"
            )
        self.state_dtype = state_dtype
        own = {"l1": l1, "l1_mode": l1_mode, "rounding": rounding}
        check_group(own)
        self._own_defaults = own
        self.max_grad_norm = max_grad_norm
        super().__init__(*args, **kwargs)
        self.defaults.update(own)
        for p, state in self.state.items():  # which some classes of torch's make here
            for name in STATE_NAMES & state.keys():
                state[name] = state[name].to(self._dtype_of_states(p))

    def __repr__(self):
        values = {name: getattr(self, name) for name in self._of_all_groups}
        given = [f"    {name}: {value}\n" for name, value in values.items() if value is not None]
        return super().__repr__()[:-1] + "Every Group\n" * bool(given) + "".join(given) + ")"

    def add_param_group(self, param_group):
        """Adds a group, with ``l1``, ``l1_mode`` and ``rounding`` of its own where it has them; see
        :class:`torch.optim.Optimizer`."""
        if isinstance(param_group, dict):
            for name in self._of_all_groups:
                if name in param_group:
                    raise ValueError(
                        f"{name} is one value for all groups of {type(self).__name__}, but a parameter group has it: "
                        "give it to the constructor"
                    )
            check_group({**self._own_defaults, **param_group})
            for key, value in self._own_defaults.items():
                param_group.setdefault(key, value)
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                self._dtype_of_states(p)
        except ValueError:
            self.param_groups.pop()
            raise
        self._noise(self.param_groups[-1])

    def _dtype_of_states(self, p):
        """What the states of a parameter are kept in."""
        if self.state_dtype is None:
            return p.dtype
        known = {torch.bfloat16: (torch.float32, torch.bfloat16)}.get(
            self.state_dtype, (torch.float32, torch.bfloat16, torch.float16)
        )
        if p.dtype not in known:
            raise ValueError(
                f"state_dtype={self.state_dtype} is for parameters of {', '.join(map(str, known))}; one of shape "
                f"{tuple(p.shape)} is {p.dtype}"
            )
        return self.state_dtype

    @staticmethod
    def _noise(group, counts=True):
        """(seed, step) that the group's rounding draws from, or None; the step is of kernels that do not count their own."""
        if group.get("rounding", "nearest") == "nearest":
            return None
        check_group(group)
        if "rounding_seed" not in group:
            group["rounding_seed"] = torch.randint(2**63 - 1, ()).item()
        if counts:
            return group["rounding_seed"], 0
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'rounding="stochastic": this optimizer counts its steps on the host, so that a CUDA graph would replay '
                "the same rounding; use Adam, AdamW or RMSprop with capturable=True"
            )
        return group["rounding_seed"], group.setdefault("rounding_steps", 0) & 0x7FFFFFFF

    def _refuse(self, what, where):
        raise RuntimeError(
            f"{type(self).__name__}: {what} {'are' if ', ' in what else 'is'} not available for {where}"
        )
