"""Whether fastops can run on a device of this machine."""

import torch

import fastops


def why_not(device: str) -> str | None:
    """What keeps fastops from running on "cpu" or "cuda" here; None where nothing does."""
    if device == "cpu":
        return None
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if not fastops._C.cuda_built():
        return "fastops was built without its CUDA kernels"
    return None
