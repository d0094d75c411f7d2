"""A network on its device, cut where its training starts: inputs, cached outputs, predictions."""

import torch
from torch import nn

from . import processes
from .augmentation import Mixture
from .data import InMemory, OnDisk, iterate
from .freezing import split
from .networks import evaluating
from .pictures import InputFormat

CACHE_LIMIT = 2 << 30
"""Outputs of frozen stages are kept when they take fewer bytes than this."""

EVALUATION_BATCH = 250


class CutNetwork:
    """A network cut where its training starts (see model.split), on a device.

    What goes into the trained part is made of uint8 pixels, or was kept from an earlier time: then
    it is floating point. Of what is computed without gradients for many images, each of several
    processes computes a share.
    """

    def __init__(self, model: nn.Module, mode: str, format: InputFormat, amp: str):
        cut = split(model, mode)
        self.frozen, self.trained, self.pieces = cut.frozen, cut.trained, cut.pieces
        self.format = format
        self.amp = amp
        self.device = next(model.parameters()).device

    def autocast(self) -> torch.autocast:
        """bfloat16 where it is asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")

    def inputs(self, images: torch.Tensor, mixture: Mixture | None = None) -> torch.Tensor:
        """What the trained part takes: the frozen stages' output without gradients.

        Args:
            images: uint8 (N, C, H, W), or outputs that were kept.
            mixture: how the images are mixed before anything else sees them.
        """
        images = images.to(self.device, non_blocking=True)
        if images.dtype != torch.uint8:
            return images
        pixels = self.format.normalize(self.format.center(images))
        if mixture is not None:
            pixels = mixture.mix(pixels)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self.frozen is None:
            return pixels
        with torch.no_grad(), self.autocast():
            return self.frozen(pixels)

    def keep_outputs(self, images: InMemory | OnDisk) -> InMemory | None:
        """The frozen stages' outputs for all images; None without such stages or if too large."""
        if self.frozen is None:
            return None
        example = self.inputs(images[0][0].unsqueeze(0))
        if example.nbytes * len(images) > CACHE_LIMIT:
            return None
        outputs = [self.inputs(pixels).cpu() for pixels, _ in iterate(images, in_order(images))]
        return InMemory(torch.cat(sum(processes.gather(outputs), [])), images.labels)

    def predict(self, images: InMemory | OnDisk, trained: nn.Module | None = None) -> torch.Tensor:
        """Softmax probabilities, float32 (N, classes) on the CPU, with the network in eval.

        Args:
            trained: takes the place of the trained part.
        """
        trained = trained or self.trained
        with evaluating(trained), self.autocast():
            logits = [
                trained(self.inputs(pixels)).float().cpu()
                for pixels, _ in iterate(images, in_order(images))
            ]
        return torch.cat(sum(processes.gather(logits), [])).softmax(1)


def in_order(images: InMemory | OnDisk) -> list[list[int]]:
    """Batches for evaluation: every image of this process's part once, in order."""
    indices = list(range(len(images)))[processes.part(len(images))]
    return [indices[i : i + EVALUATION_BATCH] for i in range(0, len(indices), EVALUATION_BATCH)]
