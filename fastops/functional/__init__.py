"""torch.nn.functional's functions in fewer passes over memory, and some of our own. What fastops has no kernel for is
torch's: `fastops.functional.linear` is `torch.nn.functional.linear`, so that one import is enough.

Every function takes tensors of any dense layout and keeps it (channels_last stays channels_last). What has no kernels
(integers, complex numbers, sparse, quantized and nested tensors, other devices) is computed, promoted or refused by torch's
function of the same meaning. The files are one for each kind of kernel, private since a kind is called as its function is."""

import torch.nn.functional as _torchs

from . import _batch_norm, _cross_entropy, _dropout, _elementwise, _gate, _loss, _softmax
from ._batch_norm import *  # noqa: F403
from ._cross_entropy import *  # noqa: F403
from ._dropout import *  # noqa: F403
from ._elementwise import *  # noqa: F403
from ._gate import *  # noqa: F403
from ._loss import *  # noqa: F403
from ._softmax import *  # noqa: F403

__all__: list[str] = []
__all__ += _batch_norm.__all__
__all__ += _cross_entropy.__all__
__all__ += _dropout.__all__
__all__ += _elementwise.__all__
__all__ += _gate.__all__
__all__ += _loss.__all__
__all__ += _softmax.__all__


def __getattr__(name: str):
    """torch.nn.functional's own, of the names that are not here."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(_torchs, name)
    except AttributeError:
        raise AttributeError(f"neither {__name__} nor torch.nn.functional has {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for n in dir(_torchs) if not n.startswith("_"))})
