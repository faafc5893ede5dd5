"""A small vision transformer with a decoder that finds the nuclei of cells in images."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.studies.comparing.images import PATCH, pixels_of

DICE = 0.65  # weight of the Dice loss beside the cross-entropy, as FisherAdapTune's authors have it
BLUR, NOISE = 3, 0.1  # pixels that are averaged along each side; standard deviation, where white is 1
SHIFTS = ("inverted", "blurred", "noisy")


@dataclass(frozen=True)
class Images:
    """Images and what is to be found in them.

    Args:
        pixels: ``[N, 3, S, S]`` in [0, 1].
        masks: ``[N, S, S]``, 1 where there is a nucleus.
    """

    pixels: Tensor
    masks: Tensor

    def rows(self, which: slice | list[int]) -> Images:
        return Images(self.pixels[which], self.masks[which])


def load(path: Path, size: int) -> Images:
    """Read images and masks of a parquet file, scaled to ``size`` pixels.

    Args:
        path: With the columns ``image`` and ``mask``.
        size: Pixels along a side.
    """
    from PIL import Image
    from pyarrow import parquet

    columns = parquet.read_table(path, columns=["image", "mask"]).to_pydict()
    masks = []
    for mask in columns["mask"]:
        truth = Image.open(io.BytesIO(mask["bytes"])).convert("L").resize((size, size), Image.NEAREST)
        masks.append(torch.frombuffer(bytearray(truth.tobytes()), dtype=torch.uint8).view(size, size) > 0)
    return Images(pixels_of((image["bytes"] for image in columns["image"]), size), torch.stack(masks).float())


def shifted(pixels: Tensor, shift: str) -> Tensor:
    """Images as another microscope might give them.

    Args:
        pixels: ``[N, 3, S, S]`` in [0, 1].
        shift: ``"inverted"``, ``"blurred"`` or ``"noisy"``.
    """
    if shift == "inverted":
        return 1 - pixels
    if shift == "blurred":
        return functional.avg_pool2d(pixels, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)
    draws = torch.Generator().manual_seed(0)
    return (pixels + NOISE * torch.randn(pixels.shape, generator=draws)).clamp(0, 1)


class Decoder(nn.Module):
    """Patch tokens to one map: three transposed convolutions, and a convolution of one pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 256, 128, 64)
        for n, (wide, narrow) in enumerate(itertools.pairwise(widths), 1):
            self.add_module(f"upconv{n}", nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            self.add_module(f"bn{n}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, 1, 8h, 8w]``."""
        for n in (1, 2, 3):
            up, norm = getattr(self, f"upconv{n}"), getattr(self, f"bn{n}")
            features = functional.relu(norm(up(features)))
        return self.final_conv(features)


class Segmenter(nn.Module):
    """Backbone and decoder.

    Batch norm of the decoder keeps its statistics, since in training mode the images of a batch would see each other.

    Args:
        backbone: A ``Dinov2Model``.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = Decoder(backbone.config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[N, 3, S, S]`` to logits ``[N, S, S]``."""
        patches = pixel_values.shape[-1] // PATCH
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state[:, 1:]
        features = tokens.transpose(1, 2).unflatten(2, (patches, patches))
        return functional.interpolate(self.decoder(features), pixel_values.shape[-2:], mode="bilinear")[:, 0]


def segmenter(folder: Path) -> Segmenter:
    """The pretrained network in float32, in evaluation mode; what the data never reach is frozen.

    Args:
        folder: Holds ``model.safetensors`` and ``decoder.safetensors``.
    """
    from safetensors.torch import load_file
    from transformers import Dinov2Model

    model = Segmenter(Dinov2Model.from_pretrained(folder, dtype=torch.float32))
    stored = {name: value.float() for name, value in load_file(folder / "decoder.safetensors").items()}
    missing, unexpected = model.decoder.load_state_dict(stored, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"{folder}: the decoder lacks {missing} and has {unexpected}, which is not expected.")
    model.backbone.embeddings.mask_token.requires_grad_(False)
    return model.eval()


def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy and Dice loss of each image alone ``[N]``.

    Dice is that of an image. Over a batch it would be no sum of losses of single images, and have no Fisher.
    """
    logits = model(batch["pixel_values"])
    masks = batch["masks"]
    entropy = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2))
    return entropy + DICE * (1 - dice(logits.sigmoid(), masks))


def dice(marked: Tensor, masks: Tensor) -> Tensor:
    """Twice what both share over what they have together ``[N]``; a pixel is added, so that an empty image has one."""
    shared = (marked * masks).sum((1, 2))
    return (2 * shared + 1) / (marked.sum((1, 2)) + masks.sum((1, 2)) + 1)
