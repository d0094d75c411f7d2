"""One picture file as the pixels that a network takes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from .errors import DataError

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class InputFormat:
    """What a network takes: images (channels, size, size), normalized by `mean` and `std`.

    Pictures are kept as squares of `resize` pixels; the middle of them is tested, and training
    crops them at random. None for `size`.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None

    @property
    def stored(self) -> int:
        """The side of the squares that pictures are kept as."""
        return max(self.size, self.resize or 0)

    def center(self, images: torch.Tensor) -> torch.Tensor:
        """The middle of images (N, C, H, W) that are larger than the network's."""
        if images.shape[-1] <= self.size:
            return images
        return transforms.center_crop(images, [self.size, self.size])

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W) to float32, zero mean and unit variance over the data set."""
        mean = images.new_tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = images.new_tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std


def read_picture(path: Path, format: InputFormat) -> torch.Tensor:
    """Decode a picture file to uint8, a square of `format.stored`: upright, resized, center kept.

    Gray, palette, CMYK and transparent pictures are converted; 16 bits become 8.

    Raises:
        DataError: the file cannot be decoded, is truncated or too large to be a picture.
    """
    try:
        # Opening a pipe would wait for whoever writes into it.
        if path.exists() and not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
        with Image.open(path) as picture:
            # Pillow only warns up to twice this limit, and warnings are the process's to filter.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and picture.width * picture.height > limit:
                raise ValueError(
                    f"{picture.width} x {picture.height} pixels could be a decompression bomb"
                )
            picture.load()  # raises; what is read of it afterwards would be what came before the damage
            upright = turn_upright(picture)
            colors = reduce_to_8_bits(upright).convert("L" if format.channels == 1 else "RGB")
        # Of a picture longer than 8 : 1 only the middle is taken: scaling 1 x 30000 pixels up to
        # the network's size would need gigabytes.
        sides = [min(side, 8 * min(colors.size)) for side in reversed(colors.size)]
        pixels = transforms.center_crop(transforms.pil_to_tensor(colors), sides)
        pixels = transforms.resize(pixels, format.stored, antialias=True)
        return transforms.center_crop(pixels, [format.stored, format.stored])
    # Pillow's decoders raise whatever their format's parser meets, SyntaxError included.
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read picture {path}: {reason}") from error


def turn_upright(picture: Image.Image) -> Image.Image:
    """The picture as its camera was held.

    PIL.ImageOps.exif_transpose also writes the other tags again, and fails on one that is odd.
    """
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # the pixels do not depend on it
        orientation = 1
    turn = TRANSPOSITIONS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def reduce_to_8_bits(picture: Image.Image) -> Image.Image:
    """Gray pictures of 16 or 32 bits scaled to 8; Pillow's own convert() clips them at 255.

    16 bits are divided by 257. The range of 32-bit values is told by their maximum: floating point
    up to 1, up to 255, or up to 65535.

    Raises:
        ValueError: values outside of these ranges.
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM"):
        top = 65535
    elif picture.mode == "F" and high <= 1:
        top = 1
    else:
        top = 255 if high <= 255 else 65535
    if not (low >= 0 and high <= top):
        raise ValueError(f"its values go from {low} to {high}: save it with 8 or 16 bits")
    return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))
