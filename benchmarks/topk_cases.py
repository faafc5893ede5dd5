"""Scores of the top-k benchmarks, in memory and in a file, and the ways to the largest that people use today."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fishkern.files import StoredTensor
from fishkern.ops import streaming_topk

GIB = 2**30
_READ = 2**22  # bytes at a time


@dataclass(frozen=True)
class TopK:
    """Scores like those of a model: layers whose squared gradients differ by orders of magnitude.

    Args:
        n: Scores in all, float32.
        density: Which share is selected.
        blocks: Number of tensors.
        zeros: Share of scores that are zero, as those of dead rows are.
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


IN_MEMORY = [
    TopK(10**8, blocks=50),
    TopK(10**8, 0.0001, blocks=50),
    TopK(10**8, 0.1, blocks=50),
    TopK(10**8, 0.5, blocks=50),
    TopK(10**8, 0.5, blocks=50, zeros=0.9),
    TopK(10**9),
]
IN_FILE = [TopK(22 * 10**8), TopK(4 * 10**8, 0.5, blocks=40, zeros=0.9)]  # more than 2^31; most of them equal


def fishkern(scores: Sequence[Tensor | StoredTensor], k: int) -> list[Tensor]:
    return streaming_topk(scores, k)


def cat_topk(scores: list[Tensor], k: int) -> list[Tensor]:
    """As FISH's published code does."""
    return [torch.cat(scores).topk(k).indices]


def kthvalue(scores: list[Tensor], k: int) -> list[Tensor]:
    """The exact threshold, and everything at or above it: more than ``k`` where there are ties."""
    flat = torch.cat(scores)
    threshold = flat.kthvalue(len(flat) - k + 1).values
    return [(block >= threshold).nonzero().view(-1) for block in scores]


def sampled_threshold(scores: list[Tensor], k: int) -> list[Tensor]:
    """Twelve lines that a good programmer writes: a bound from a sample, and topk of what reaches it.

    Not exact where the sample misleads, and blind to NaN and to ties.
    """
    n = sum(map(len, scores))
    sample = torch.cat([block[torch.randint(len(block), (len(block) // 1000,))] for block in scores])
    rank = int(len(sample) * (1 - k / n) - 6 * (len(sample) * k / n) ** 0.5)
    bound = sample.kthvalue(rank).values
    found = [(block >= bound).nonzero().view(-1) for block in scores]
    values = torch.cat([block[places] for block, places in zip(scores, found, strict=True)])
    best = torch.zeros(len(values), dtype=torch.bool)
    best[values.topk(k).indices] = True
    kept = best.split([len(places) for places in found])
    return [places[keep] for places, keep in zip(found, kept, strict=True)]


PROVIDERS: dict[str, Callable[[list[Tensor], int], list[Tensor]]] = {
    "fishkern": fishkern,
    "sampled_threshold": sampled_threshold,
    "kthvalue": kthvalue,
    "cat_topk": cat_topk,
}
# Bytes that each takes for one score beside the scores: its copy, and what torch's CPU kernels allocate on top.
BYTES_PER_SCORE = {"fishkern": 0, "sampled_threshold": 1, "kthvalue": 16, "cat_topk": 20}


def drop_from_cache(path: Path) -> None:
    """Let the system forget the file's pages, as far as it takes advice (``POSIX_FADV_DONTNEED``)."""
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


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
