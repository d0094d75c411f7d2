"""The functions of torch.nn.functional in fewer passes over memory, and some that torch does not have. All other names are
torch's, so one import is enough: `fastops.functional.linear` is `torch.nn.functional.linear`.

Every function takes tensors of any dense layout and keeps it (channels_last stays channels_last). Tensors without kernels
(integers, complex numbers, sparse, quantized and nested tensors, other devices) go to torch's function of the same meaning,
which computes, promotes or refuses them. There is a file for each kind of kernel. The files are private, because some kinds
have the name of a function."""

import torch.nn.functional as _torchs

from . import _batch_norm, _cross_entropy, _dropout, _elementwise, _gate, _loss, _row_norm, _softmax
from ._batch_norm import *  # noqa: F403
from ._cross_entropy import *  # noqa: F403
from ._dropout import *  # noqa: F403
from ._elementwise import *  # noqa: F403
from ._gate import *  # noqa: F403
from ._loss import *  # noqa: F403
from ._row_norm import *  # noqa: F403
from ._softmax import *  # noqa: F403

__all__: list[str] = []
__all__ += _batch_norm.__all__
__all__ += _cross_entropy.__all__
__all__ += _dropout.__all__
__all__ += _elementwise.__all__
__all__ += _gate.__all__
__all__ += _loss.__all__
__all__ += _row_norm.__all__
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
