"""fastops: fused kernels for PyTorch.

fastops.functional   torch.nn.functional's functions, in fewer passes over memory
fastops.nn           the same as modules
fastops.autograd     the same as torch.autograd.Functions
fastops.optim        optimizers whose step is one kernel over all parameters
fastops.patch(model) puts them into a model that is already built
fastops.explain(f, x) says which kernel a call runs, and why
fastops.memory       the pool behind large CPU results, and behind all of torch's CPU tensors if asked

FASTOPS_DISABLE=1 in the environment sends everything to torch.
"""

import os as _os
import sys as _sys

import torch as _torch

from ._core import loader as _loader

__version__ = "0.1.0"  # the one place: pyproject.toml reads it here

try:
    _C = _loader.load(_torch.__version__)
except ImportError as _error:
    # `python -m fastops doctor` and `fastops doctor` are for what does not load, too.
    if [_os.path.basename(word) for word in _sys.orig_argv[-2:]] == ["fastops", "doctor"]:
        from .doctor import main as _doctor

        raise SystemExit(_doctor(_error)) from None
    raise

from . import autograd, functional, memory, nn, optim  # noqa: E402
from ._core import registrations as _registrations  # noqa: E402, F401
from ._core.by_torch import DISABLED, DISABLED_REASON  # noqa: E402
from ._core.explain import Explanation, explain  # noqa: E402
from .patching.api import PatchReport, patch, patched, unpatch  # noqa: E402

__all__ = [
    "Explanation",
    "PatchReport",
    "autograd",
    "explain",
    "functional",
    "memory",
    "nn",
    "optim",
    "patch",
    "patched",
    "show_config",
    "unpatch",
]


def show_config() -> str:
    """Versions, the instruction set that the CPU kernels were chosen for, what was built for CUDA, and the pool's
    state, as lines of text."""
    pool = memory.pool_info()
    built = _C.torch_version()
    lines = {
        "fastops": __version__,
        "torch": _torch.__version__
        + ("" if built == _torch.__version__ else f" (built for {built})"),
        "CPU kernels": f"{_C.cpu_capability()}, {_torch.get_num_threads()} threads",
        "CUDA kernels": "built" if _C.cuda_built() else "not built",
        "GPU": _torch.cuda.get_device_name() if _torch.cuda.is_available() else "none visible",
        "CPU pool": f"{pool['in_use'] >> 20} MiB in use, {pool['cached'] >> 20} MiB idle, limit {pool['limit'] >> 20} MiB"
        + (", serves torch" if pool["serves_torch"] else "")
        if pool["enabled"]
        else "off",
    }
    if DISABLED:
        lines["off"] = f"{DISABLED_REASON}: everything goes to torch"
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())
