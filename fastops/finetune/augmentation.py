"""Training images varied at random: torchvision's transforms of one image, mixtures of two."""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .data import InMemory, OnDisk
from .pictures import InputFormat


def training_transform(level: str, format: InputFormat) -> v2.Transform | None:
    """The transform of uint8 images (C, H, W) to `format.size`; None for the level "none"."""
    if level == "none":
        return None
    crop: list[torch.nn.Module] = [
        v2.RandomResizedCrop(format.size, scale=(0.35, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if level == "strong":
        crop += [v2.RandAugment(), v2.RandomErasing(p=0.25)]
    return v2.Compose(crop)


class Augmented(Dataset):
    """Images that are transformed when asked for.

    An index is a pair: of the image, and of the random numbers for it. So an image is the same
    whichever process makes it, and after a break.
    """

    def __init__(self, images: InMemory | OnDisk, transform: v2.Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, labels = self.images.__getitems__([index for index, _ in pairs])
        varied = []
        with torch.random.fork_rng(devices=[]):
            for picture, (_, number) in zip(pictures, pairs, strict=True):
                # torch's generator of the CPU takes 32 bits of a seed.
                torch.manual_seed(zlib.crc32(struct.pack("<qq", self.seed, number)))
                varied.append(self.transform(picture))
        return torch.stack(varied), labels


@dataclass
class Mixture:
    """How a batch is mixed with itself in another order.

    Attributes:
        share: of each image's own pixels, and of its own label.
        others: the index of the image that the rest is of.
        box: rows and columns that are the other's (CutMix); None to add the two (MixUp).
    """

    share: float
    others: torch.Tensor
    box: tuple[slice, slice] | None = None

    def mix(self, images: torch.Tensor) -> torch.Tensor:
        """The mixed images (N, C, H, W)."""
        others = images[self.others.to(images.device)]
        if self.box is None:
            return self.share * images + (1 - self.share) * others
        mixed = images.clone()
        rows, columns = self.box
        mixed[:, :, rows, columns] = others[:, :, rows, columns]
        return mixed


def draw_mixture(mixup: float, cutmix: float, count: int, size: int) -> Mixture | None:
    """A mixture of `count` images of `size` x `size` pixels, drawn from torch's default generator.

    Args:
        mixup, cutmix: parameters of the Beta distribution that the share is of (Zhang et al. 2018,
            Yun et al. 2019); 0 for none. With both, one of them is drawn.
    """
    if not mixup and not cutmix:
        return None
    paste = bool(cutmix) and (not mixup or torch.rand(()).item() < 0.5)
    alpha = cutmix if paste else mixup
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    others = torch.randperm(count)
    if not paste:
        return Mixture(share, others)
    side = size * math.sqrt(1 - share)
    middle = torch.rand(2) * size
    low = (middle - side / 2).round().clamp(0, size).int().tolist()
    high = (middle + side / 2).round().clamp(0, size).int().tolist()
    area = (high[0] - low[0]) * (high[1] - low[1])
    box = slice(low[0], high[0]), slice(low[1], high[1])
    return Mixture(1 - area / size**2, others, box)
