"""The step that the optimizers share: what goes to the kernels, what goes to torch, and in which order, so that an error
leaves everything as it was. No optimizer by name."""

import functools

import torch
from torch import Tensor

from .. import _C
from .._core.by_torch import DISABLED
from .averages import dtype_of_average
from .checkpoints import Checkpoints
from .kernels import KERNELS

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # a torch without distributed
    DTensor = None  # type: ignore[assignment,misc]


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


class FusedStep(Checkpoints):
    """An optimizer whose step() is one sweep over all parameters.

    Derive from this and from a class of torch.optim, in this order, and say in `_kernel` which kernel a group takes; its
    options are read from the group by their names (see kernels.py). Everything else (options, checks, state_dict) is the
    torch class's. Parameters that the kernels cannot take (``differentiable=True``, sparse gradients, tensor subclasses
    with a ``__torch_dispatch__``, other devices) are stepped by the torch class.
    """

    # What torch says to a sparse gradient, or None where it takes one.
    _no_sparse: str | None = None
    # Whether torch keeps the scalar states where the parameter is, capturable or not.
    _scalars_beside_parameters = False
    grad_norm: Tensor | None = None  # of the last step, where max_grad_norm is given

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

    def _kernel(self, group) -> str:
        """The name of the kernel that steps a group."""
        raise NotImplementedError

    def _initial(self, group, name):
        """What a state begins with."""
        return 0.0

    @functools.cached_property
    def _stepper(self):
        return _C.OptimizerStepper()

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
                kernel = KERNELS[self._kernel(group)]
                rounding = self._noise(group, counts=bool(kernel.scalar_states))
                sources.append((group, kernel))
                groups.append((kernel.index, group["params"], kernel.options_of(group), rounding))
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for name, given in (("grad_scale", scale), ("found_inf", found_inf)):
            if given is not None and given.numel() != 1:
                raise RuntimeError(
                    f"{type(self).__name__}: {name} must be one number, got {given.numel()} elements"
                )
        self._step_groups(sources, groups, for_torch, scale, found_inf)
        if scale is not None and not for_torch:
            self._unscale(scale, found_inf)
        return loss

    @torch.no_grad()
    def _unscale(self, scale, found_inf):
        """Leaves the gradients as torch's fused step leaves them: divided by the scale of a GradScaler, unless the step was
        skipped."""
        grads = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    grads.setdefault((p.grad.device, p.grad.layout), []).append(p.grad)
        for (device, _), of_device in grads.items():
            divisor = scale.to(device).reshape(())
            if found_inf is not None:
                divisor = torch.where(found_inf.to(device).reshape(()) != 0, 1.0, divisor)
            torch._foreach_div_(of_device, divisor)

    def _step_groups(self, sources, groups, for_torch, scale, found_inf):
        """The step of the groups: `sources` and `groups` are for the kernels."""
        if found_inf is not None and groups and not found_inf.is_cuda and found_inf.item():
            sources, groups = [], []
        left, before = None, self._stepper.steps
        try:
            if not for_torch:
                left = self._stepper.step(
                    self.state, groups, scale, found_inf,
                    ema_weight=self._ema_weight, max_grad_norm=self.max_grad_norm,
                )  # fmt: skip
                if left is None:
                    if self.max_grad_norm is not None and groups:
                        self.grad_norm = self._stepper.grad_norm
                    return
            if found_inf is not None and groups and found_inf.item():
                if not for_torch:
                    return
                sources, groups = [], []
            if self.max_grad_norm is not None:
                scale = self._clip(scale)
            self._step_apart(sources, groups, for_torch, scale, *(left or ()))
        finally:
            if self._stepper.steps != before:
                self._count_roundings(sources)

    @staticmethod
    def _count_roundings(groups):
        for group, _ in groups:
            if "rounding_steps" in group:
                group["rounding_steps"] += 1

    def _step_apart(self, sources, groups, for_torch, scale, missing=None, others=None):
        """The step of an optimizer some of whose parameters lack states or are not for the kernels."""
        made = {}  # what was in the state of the parameters that get one, before
        averaged, kept = [], []
        stepper, before = self._stepper, self._stepper.steps
        step = functools.partial(stepper.step, self.state, groups, ema_weight=self._ema_weight)
        try:
            if missing is None:
                missing, others = step(check_only=True) or ((), ())
            for k, p in missing:
                self._make_state(*sources[k], p, made, averaged)
            apart, wrapped = [], {}
            for k, p in others:
                if p.grad is None:
                    continue
                if p.grad.is_sparse and self._no_sparse:
                    raise RuntimeError(self._no_sparse)
                if (tensors := self._unwrap(*sources[k], p, made, averaged)) is None:
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
            for_torch = for_torch + [{**sources[k][0], "params": ps} for k, ps in wrapped.items()]
            if for_torch:
                self._only_torchs(for_torch)
                theirs = {p for g in for_torch for p in g["params"]}
                if any(
                    p.grad is not None and p not in theirs for g, _ in sources for p in g["params"]
                ):
                    kept = [self._keep(p) for p in theirs if p.grad is not None]
                self._step_by_torch(for_torch)
            step()
            torch.autograd.graph.increment_version([p for _, p, *_ in apart])
        except BaseException:
            if stepper.steps == before:
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

    def _make_state(self, group, kernel, p, made, averaged):
        """Makes the states that a parameter has before its first step, as torch does, or what a state_dict without
        averages lacks."""
        state = self.state[p]
        names = [*kernel.scalar_states, *kernel.states]
        complete = bool(state) and all(state.get(name) is not None for name in names)
        if complete and self._steps_of([p]) != 0:
            return self._make_average(p, averaged)
        made[p] = dict(state)
        if self.ema_decay is not None and state.get("ema") is None:
            state["ema"] = torch.zeros_like(
                p, memory_format=torch.preserve_format, dtype=dtype_of_average(p.dtype)
            )
        if complete:  # by torch's constructor
            return
        double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        there = p.is_cuda and (
            self._scalars_beside_parameters or group.get("capturable") or group.get("fused")
        )
        for name in kernel.scalar_states:
            state[name] = torch.full(
                (),
                self._initial(group, name),
                dtype=torch.float64 if double else torch.float32,
                device=p.device if there else "cpu",
            )
        dtype = self._dtype_of_states(p)
        for name in kernel.states:
            value = self._initial(group, name)
            state[name] = torch.full_like(
                p,
                complex(value, value) if p.is_complex() else value,
                memory_format=torch.preserve_format,
                dtype=dtype,
                requires_grad=False,
            )

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

    def _step_by_torch(self, groups):
        every = self.param_groups
        self.param_groups = groups
        try:
            _torch_step(self)(self)
        finally:
            self.param_groups = every

    @torch.no_grad()
    def _unwrap(self, group, kernel, p, made, averaged):
        """([parameter, gradient, states ..., scalar states ...], average) as ordinary tensors that share the parameter's memory, or
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
        names = kernel.states + ["ema"] * (self.ema_decay is not None)
        state = self.state.get(p, {})
        lacking = [n for n in names if state.get(n) is None]
        # Where steps are counted, a state that lacks another than the average is broken.
        if lacking and (not state or not kernel.scalar_states or lacking == ["ema"]):
            self._make_state(group, kernel, p, made, averaged)
            state = self.state[p]
        tensors = [p, grad, *(state[name] for name in kernel.states)]
        for name in kernel.scalar_states:
            if not isinstance(state[name], Tensor) or state[name].device.type != "cpu":
                return None
            tensors.append(state[name])
        average = None if self.ema_decay is None else state["ema"]
        *tensors, average = (t.to_local() if _is_dtensor(t) else t for t in (*tensors, average))
        if any(_dispatches(t) for t in tensors):
            return None
        return tensors, average
