"""The step that the optimizers share: what goes to the kernels, what goes to torch, and in which order, so that an error
leaves everything as it was. No optimizer by name."""

import functools
import inspect
import sys
import warnings

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _C
from .._core.by_torch import DISABLED

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # a torch without distributed
    DTensor = None  # type: ignore[assignment,misc]

ROWS = {name: row for row, (name, *_) in enumerate(_C.optimizer_kernels())}
STATES = [[sys.intern(s) for s in states.split()] for _, states, _, _ in _C.optimizer_kernels()]
NAMES = {name for names in STATES for name in names}
COUNTS = [counts for _, _, counts, _ in _C.optimizer_kernels()]


def _torch_step(optimizer):
    """step() of the torch.optim class that `optimizer` derives from, without the hooks around it."""
    steps = (c.step for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim."))
    step = next(steps)
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _dispatches(t):
    """Whether t's class sees the ops on it (__torch_dispatch__), so that its memory may not be its values."""
    return type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _is_dtensor(t):
    return DTensor is not None and isinstance(t, DTensor)


def _real(dtype):
    """What averages of parameters of this dtype are kept in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class _Exchanged:
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
            torch.optim.swa_utils.update_bn(batches, model, device)
        finally:
            for m, momentum in self._momenta:
                m.momentum = momentum
            for m, mode in training.items():
                m.training = mode


def _number(group, value):
    """An option as the kernels take it: a float, or a tensor on a GPU as it is where the host must not wait for it."""
    if (
        isinstance(value, Tensor)
        and value.is_cuda
        and (group.get("capturable") or group.get("fused"))
    ):
        return value
    return float(value)


def _check_options(group):
    """Of what a group has beyond torch's."""
    l1, mode = group.get("l1", 0.0), group.get("l1_mode", "subgradient")
    rounding = group.get("rounding", "nearest")
    if not l1 >= 0:
        raise ValueError(f"Invalid l1 value: {l1}; it must not be negative")
    if mode not in ("subgradient", "proximal"):
        raise ValueError(f"Invalid l1_mode: {mode!r}; it is 'subgradient' or 'proximal'")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"Invalid rounding: {rounding!r}; it is 'nearest' or 'stochastic'")


class FusedStep(Optimizer):
    """An optimizer whose step() is one sweep over all parameters.

    Derive from this and from a class of torch.optim, in this order, and say in `_row` which row of the kernels' table a
    group takes. Everything else (options, checks, state_dict) is the torch class's. Parameters that the kernels cannot
    take (``differentiable=True``, sparse gradients, tensor subclasses with a ``__torch_dispatch__``, other devices) are
    stepped by the torch class.
    """

    _no_sparse: str | None = (
        None  # what torch says to a sparse gradient, or None where it takes one
    )
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    state_dtype: torch.dtype | None = None
    _of_all_groups = ("max_grad_norm", "ema_decay", "state_dtype")
    _put_aside: list | None = None  # (parameter, its own value), while the averages stand in
    grad_norm: Tensor | None = None  # of the last step, where max_grad_norm is given

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
        _check_options(own)
        self._own_defaults = own
        self.max_grad_norm = max_grad_norm
        super().__init__(*args, **kwargs)
        self.defaults.update(own)

    def __getstate__(self):
        state = super().__getstate__()
        return {
            **state,
            **{name: getattr(self, name) for name in self._of_all_groups},
            "_put_aside": self._put_aside,
            "_own_defaults": self._own_defaults,
        }

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
            _check_options({**self._own_defaults, **param_group})
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
        """(seed, step) that the group's rounding draws from, or None; the step is of rows that do not count their own."""
        if group.get("rounding", "nearest") == "nearest":
            return None
        _check_options(group)
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

    @staticmethod
    def _penalty(group):
        """The last two options of every row."""
        l1 = group.get("l1", 0.0)
        if not l1:
            return 0.0, 0.0
        _check_options(group)
        return float(l1), float(group.get("l1_mode") == "proximal")

    @torch.no_grad()
    def _clip(self, scale):
        """What the gradients are to be divided by, for their norm to be at most max_grad_norm; `scale` is GradScaler's."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return scale
        norm = torch.nn.utils.get_total_norm(grads)
        if _is_dtensor(norm):
            norm = norm.full_tensor()
        norm = norm.to(torch.float32)
        if scale is not None:
            norm = norm / scale.to(norm.device)
        self.grad_norm = norm
        excess = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)
        return excess if scale is None else excess * scale.to(norm.device)

    @torch.no_grad()
    def swap_ema(self, model=None, batches=None, device=None):
        """Exchanges the parameters for their averages (``ema_decay``), or back: at once, and back again at the end of a
        ``with`` block.

            with optimizer.swap_ema():
                evaluate(model)

        Within a ``with`` block the averages always stand in, whether or not they did before, and after it everything is
        as it was before it, so that blocks can be nested. Parameters without an average (they have had no gradient yet)
        stay as they are. In between, step(), state_dict() and load_state_dict() raise.

        Only parameters are averaged. The running statistics of batch norm are those of the parameters' own activations;
        with `model` and `batches` they are computed anew for the averages, and put back with the parameters.

        Args:
            model, batches, device: what :func:`torch.optim.swa_utils.update_bn` takes: the model, an iterable of its
                inputs (or of tuples that begin with them), and where to bring them.

        Raises:
            RuntimeError: the optimizer keeps no averages.
            TypeError: one of `model` and `batches` without the other.
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
            return _Exchanged(self, stood_in, renew)
        params = [p for g in self.param_groups for p in g["params"]]
        averages = [(p, self.state[p].get("ema")) for p in params if p in self.state]
        self._stand_in([(p, t) for p, t in averages if t is not None], renew)
        return _Exchanged(self, None, None)

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

    def _only_without_averages(self, what):
        if self._put_aside is not None:
            raise RuntimeError(
                f"{type(self).__name__}: the averages stand in for the parameters; call swap_ema() before {what}, or "
                "leave its block"
            )

    def _put_back(self):
        for p, own in self._put_aside:
            p.copy_(own)
        self._put_aside = None

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
        why = (
            "this optimizer keeps none" if self.ema_decay is None else "it was stepped without them"
        )
        warnings.warn(
            f"{type(self).__name__}.load_state_dict: the averages (ema_decay) in this checkpoint are left out, since "
            f"{why}; averages that are kept from here on begin with the parameters as they are",
            stacklevel=4,
        )

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
            for key in {*(name for names in STATES for name in names), "ema"} & own.keys():
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
        saved = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name == "ema":
                    dtype = _real(p.dtype)
                elif self.state_dtype is None or name not in NAMES:
                    continue
                else:
                    dtype = self._dtype_of_states(p)
                now = self.state[p].get(name)
                if isinstance(value, Tensor) and now is not None and now.dtype != dtype:
                    kept = torch.empty_like(now, dtype=dtype)
                    self.state[p][name] = kept.copy_(value)

    def _row(self, group):
        """(row, parameters, options): the number of the row, and its options as floats in the row's order."""
        raise NotImplementedError

    @functools.cached_property
    def _plan(self):
        return _C.OptimizerStepper()

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

    def step(self, closure=None):
        """One optimization step.

        Args:
            closure: a function that evaluates the model again and returns the loss, which is returned.

        Raises before anything is changed; no parameter, state or step count is left half done, by an interrupt
        (KeyboardInterrupt) either. Where torch steps all of the parameters, this is torch's step, and no more can be said.
        """
        self._only_without_averages("step()")
        if DISABLED or torch.compiler.is_compiling():
            self._only_torchs(self.param_groups)
            return _torch_step(self)(self, closure)
        if torch.cuda.is_initialized() and "capturable" in self.defaults:  # as in torch: not SGD
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sources, groups, for_torch = [], [], []
        for group in self.param_groups:
            if group["differentiable"] or (
                group.get("capturable") and not all(p.is_cuda for p in group["params"])
            ):
                for_torch.append(group)
            else:
                row = self._row(group)
                sources.append(group)
                groups.append((*row, self._noise(group, COUNTS[row[0]])))
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for name, given in (("grad_scale", scale), ("found_inf", found_inf)):
            if given is not None and given.numel() != 1:
                raise RuntimeError(
                    f"{type(self).__name__}: {name} must be one number, got {given.numel()} elements"
                )
        if found_inf is not None and groups and not found_inf.is_cuda and found_inf.item():
            sources, groups = [], []
        left, before = None, self._plan.steps
        try:
            if not for_torch:
                left = self._plan.step(
                    self.state, groups, scale, found_inf,
                    ema_weight=self._ema_weight, max_grad_norm=self.max_grad_norm,
                )  # fmt: skip
                if left is None:
                    if self.max_grad_norm is not None and groups:
                        self.grad_norm = self._plan.grad_norm
                    return loss
            if found_inf is not None and groups and found_inf.item():
                if not for_torch:
                    return loss
                sources, groups = [], []
            if self.max_grad_norm is not None:
                scale = self._clip(scale)
            self._step_apart(sources, groups, for_torch, scale, *(left or ()))
        finally:
            if self._plan.steps != before:
                self._count_roundings(sources)
        return loss

    @staticmethod
    def _count_roundings(groups):
        for group in groups:
            if "rounding_steps" in group:
                group["rounding_steps"] += 1

    @property
    def _ema_weight(self):
        """What of a new parameter goes into its average."""
        return None if self.ema_decay is None else 1 - self.ema_decay

    def _step_apart(self, sources, groups, for_torch, scale, missing=None, others=None):
        """The step of an optimizer some of whose parameters lack states or are not for the kernels."""
        made = {}  # what was in the state of the parameters that get one, before
        averaged, kept = [], []
        plan, before = self._plan, self._plan.steps
        step = functools.partial(plan.step, self.state, groups, ema_weight=self._ema_weight)
        try:
            if missing is None:
                missing, others = step(check_only=True) or ((), ())
            for k, p in missing:
                self._make_state(sources[k], groups[k][0], p, made, averaged)
            apart, wrapped = [], {}
            for k, p in others:
                if p.grad is None:
                    continue
                if p.grad.is_sparse and self._no_sparse:
                    raise RuntimeError(self._no_sparse)
                if (tensors := self._unwrap(sources[k], groups[k][0], p, made, averaged)) is None:
                    wrapped.setdefault(k, []).append(p)
                elif groups[k][3] is not None:
                    self._refuse('rounding="stochastic"', "DTensors")
                else:
                    apart.append((k, p, *tensors))
            step = functools.partial(
                step, scale, fresh=list(made), apart=apart, partial=True,
                started=[p for p, before in made.items() if before.get("ema") is None],
            )  # fmt: skip
            step(check_only=True)
            for_torch = for_torch + [{**sources[k], "params": ps} for k, ps in wrapped.items()]
            if for_torch:
                self._only_torchs(for_torch)
                theirs = {p for g in for_torch for p in g["params"]}
                if any(
                    p.grad is not None and p not in theirs for g in sources for p in g["params"]
                ):
                    kept = [self._keep(p) for p in theirs if p.grad is not None]
                self._step_by_torch(for_torch)
            step()
            torch.autograd.graph.increment_version([p for _, p, *_ in apart])
        except BaseException:
            if plan.steps == before:
                for undo in kept:
                    undo()
                for p, state in made.items():
                    self.state.pop(p, None)
                    if state:
                        self.state[p] = state
                for p in averaged:
                    if p in self.state:
                        self.state[p].pop("ema", None)
            raise

    @torch.no_grad()
    def _keep(self, p):
        """A function that undoes what torch's step does to a parameter and its state."""
        state = dict(self.state[p]) if p in self.state else None
        values = {k: v.clone() for k, v in (state or {}).items() if isinstance(v, Tensor)}
        rows, moved = None, [p.grad, *values.values()]
        if p.dim() > 0 and all(t.is_sparse for t in moved):  # an embedding's, which may be large
            rows = torch.cat([t.coalesce().indices()[0] for t in moved]).unique()
        own = p.detach().clone() if rows is None else p.detach().index_select(0, rows)

        @torch.no_grad()
        def undo():
            p.copy_(own) if rows is None else p.index_copy_(0, rows, own)
            self.state.pop(p, None)
            if state is not None:
                for key, value in values.items():
                    state[key].copy_(value)
                self.state[p] = state

        return undo

    def _make_average(self, p, averaged):
        """Starts the average of a parameter that has been stepped before from what it is now."""
        averaged.append(p)
        self.state[p]["ema"] = p.detach().clone().to(_real(p.dtype))

    def _make_state(self, group, row, p, made, averaged):
        """Makes the states that a parameter has before its first step, as torch does, or what a state_dict without
        averages lacks."""
        state = self.state[p]
        if (
            self.ema_decay is not None
            and state
            and all(state.get(n) is not None for n in STATES[row])
        ):
            return self._make_average(p, averaged)
        made[p] = dict(state)
        if self.ema_decay is not None and state.get("ema") is None:
            state["ema"] = torch.zeros_like(
                p, memory_format=torch.preserve_format, dtype=_real(p.dtype)
            )
        if COUNTS[row]:
            double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
            there = p.is_cuda and (group.get("capturable") or group.get("fused"))
            state["step"] = torch.zeros(
                (),
                dtype=torch.float64 if double else torch.float32,
                device=p.device if there else "cpu",
            )
        dtype = self._dtype_of_states(p)
        for name in STATES[row]:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format, dtype=dtype)

    def _only_torchs(self, groups):
        """Raises where a group that torch is to step asks for what torch has not."""
        if (
            self.max_grad_norm is not None
            or self.ema_decay is not None
            or self.state_dtype is not None
            or any(g.get("l1") or g.get("rounding", "nearest") != "nearest" for g in groups)
        ):
            self._refuse(
                "l1, max_grad_norm, ema_decay, state_dtype and rounding",
                "what torch steps: differentiable=True, capturable=True on other devices than CUDA, sparse gradients, "
                "tensor subclasses, and optimizers under torch.compile or FASTOPS_DISABLE",
            )

    def _refuse(self, what, where):
        raise RuntimeError(
            f"{type(self).__name__}: {what} {'are' if ', ' in what else 'is'} not available for {where}"
        )

    def _step_by_torch(self, groups):
        every = self.param_groups
        self.param_groups = groups
        try:
            _torch_step(self)(self)
        finally:
            self.param_groups = every

    @torch.no_grad()
    def _unwrap(self, group, row, p, made, averaged):
        """([parameter, gradient, states ..., step], average) as ordinary tensors that share the parameter's memory, or
        None."""
        grad = p.grad
        if _is_dtensor(p):
            if _is_dtensor(grad) and grad.placements != p.placements:
                grad = grad.redistribute(placements=p.placements)
        elif _dispatches(p):
            return None
        if (
            p.layout != torch.strided
            or grad.layout != torch.strided
            or p.device.type not in ("cpu", "cuda")
        ):
            return None
        names = STATES[row] + ["ema"] * (self.ema_decay is not None)
        state = self.state.get(p, {})
        lacking = [n for n in names if state.get(n) is None]
        # Where steps are counted, a state that lacks another than the average is broken.
        if lacking and (not state or not COUNTS[row] or lacking == ["ema"]):
            self._make_state(group, row, p, made, averaged)
            state = self.state[p]
        tensors = [p, grad, *(state[name] for name in STATES[row])]
        if COUNTS[row]:
            if not isinstance(state["step"], Tensor) or state["step"].device.type != "cpu":
                return None
            tensors.append(state["step"])
        average = None if self.ema_decay is None else state["ema"]
        *tensors, average = (t.to_local() if _is_dtensor(t) else t for t in (*tensors, average))
        if any(_dispatches(t) for t in tensors):
            return None
        return tensors, average
