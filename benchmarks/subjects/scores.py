"""Scores to select from, in memory and in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_READ = 2**22  # bytes at a time


@dataclass(frozen=True)
class TopK:
    """Scores like those of a model: layers whose squared gradients differ by orders of magnitude.

    Args:
        n: Number of scores, float32.
        density: Selected fraction.
        blocks: Number of tensors.
        zeros: Fraction of scores that are zero, as those of dead rows are.
    """

    n: int
    density: float = 0.005
    blocks: int = 200
    zeros: float = 0.0

    def __str__(self) -> str:
        zeros = f",zeros={self.zeros}" if self.zeros else ""
        return f"n={self.n:.1e},density={self.density},blocks={self.blocks}{zeros}"

    @property
    def k(self) -> int:
        return int(self.n * self.density)

    def block(self, number: int, device: torch.device | str = "cpu") -> Tensor:
        generator = torch.Generator(device).manual_seed(number)
        scores = torch.empty(self.n // self.blocks, device=device)
        scores.normal_(generator=generator).square_().mul_(10.0 ** -(number % 5))
        if self.zeros:
            scores[torch.rand(len(scores), device=device, generator=generator) < self.zeros] = 0.0
        return scores

    def scores(self, device: torch.device | str = "cpu") -> list[Tensor]:
        return [self.block(number, device) for number in range(self.blocks)]

    def write(self, path: Path) -> None:
        """Write them as ``.safetensors``, one block in memory at a time."""
        size = 4 * (self.n // self.blocks)
        header = {
            f"layers.{number}.weight": {
                "dtype": "F32",
                "shape": [self.n // self.blocks],
                "data_offsets": [number * size, (number + 1) * size],
            }
            for number in range(self.blocks)
        }
        text = json.dumps({"__metadata__": {"format": "scores", "format_version": "1"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for number in range(self.blocks):
                file.write(self.block(number).numpy())
            file.flush()
            os.fsync(file.fileno())  # only what is on the disk can be dropped from the page cache


def drop_from_cache(path: Path) -> None:
    """Advise the system to drop the file's pages (``POSIX_FADV_DONTNEED``)."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(path: Path) -> int:
    """Read a file from its first byte to its last, into one buffer."""
    buffer = bytearray(_READ)
    total = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total
