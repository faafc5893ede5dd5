"""The setting of the demonstration: a LLaMA, its data, and the largest of them that fits a machine."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.engine.memory import GIB, available_memory
from benchmarks.subjects.transformers import LLAMA_1B, LLAMA_8B, LLAMA_32M, LLAMA_TINY, Shape

SHAPES = {
    "llama-3.1-8b": LLAMA_8B,
    "llama-3.2-1b": LLAMA_1B,
    "small": LLAMA_32M,
    "tiny": LLAMA_TINY,  # for a look at the command, and its test
}
SAVED_UP_TO = 8 * GIB  # of statistics


class RefusedError(ValueError):
    """The request cannot run, or cannot be recorded."""


@dataclass(frozen=True)
class Setting:
    """Everything that the figures depend on, except for machine and versions.

    Args:
        shape: Key of :data:`SHAPES`.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of the weights.
        examples: Examples that the Fisher is estimated on.
        batch_size: Examples in each batch.
        tokens: Tokens in each example; all rows are full, and the tokens are random.
        density: Selected fraction of all entries.
        steps: Training steps, all on the first batch.
        lr: Learning rate of these.
        rival_examples: Examples of the slower ways to the Fisher.
        accumulate_on: Device of the Fisher's float32 accumulators.
        save: Whether the statistics are saved, and selected from once more as a file.
    """

    shape: str
    device: str
    dtype: str
    examples: int
    batch_size: int
    tokens: int
    density: float
    steps: int
    lr: float
    rival_examples: int
    accumulate_on: str
    save: bool

    def model(self) -> nn.Module:
        return SHAPES[self.shape].model(self.device, getattr(torch, self.dtype))

    def batches(self, size: int, examples: int | None = None) -> list[dict[str, Tensor]]:
        """The first examples, all by default, in batches of this size."""
        shape = (self.examples, self.tokens)
        ids = torch.randint(0, SHAPES[self.shape].vocabulary, shape, generator=torch.Generator().manual_seed(1))
        return [{"input_ids": rows, "labels": rows} for rows in ids[:examples].to(self.device).split(size)]


def plan(options: argparse.Namespace, folder: Path) -> Setting:
    """Choose the largest setting that fits, and refuse where none does.

    Args:
        options: Of the command line.
        folder: Of the artefacts.

    Returns:
        The setting.

    Raises:
        RefusedError: The device, the host or the disk is too small, or a number is out of range.
    """
    for name in ("examples", "batch_size", "tokens", "steps", "rival_examples"):
        if getattr(options, name) < 1:
            raise RefusedError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    device = options.device
    shapes = [options.shape] if options.shape else ["small"]
    if not options.shape and device == "cuda":
        shapes = [name for name in SHAPES if name != "tiny"]
    places = [options.accumulate_on] if options.accumulate_on else dict.fromkeys([device, "cpu"])
    free = {"cpu": available_memory(), "disk": shutil.disk_usage(folder).free}
    if device == "cuda":
        free["cuda"] = torch.cuda.mem_get_info()[0]
    reasons = []
    for name in shapes:
        for accumulate_on in places:
            setting, needs = _settled(options, name, accumulate_on)
            amounts = [f"{needs[at] / GIB:.2f} GiB on the {at} ({free[at] / GIB:.2f} are free)" for at in needs]
            what = f"{name} in {setting.dtype} with float32 accumulators on the {accumulate_on}"
            reasons.append(f"{what} needs about {', '.join(amounts)}")
            if all(needs[at] <= free[at] for at in needs):
                print("\n".join([*(f"passed over: {reason}" for reason in reasons[:-1]), reasons[-1]]), file=sys.stderr)
                return setting
    raise RefusedError(f"{'; '.join(reasons)}. Take less: --shape, --batch-size, --tokens.")


def _settled(options: argparse.Namespace, shape: str, accumulate_on: str) -> tuple[Setting, dict[str, int]]:
    """One setting, and the bytes that it needs by place: ``"cuda"``, ``"cpu"``, ``"disk"``."""
    device = options.device
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    weights, accumulators, work = needs_of(SHAPES[shape], getattr(torch, dtype), options.batch_size * options.tokens)
    save = accumulators <= SAVED_UP_TO
    given = {key: value for key, value in vars(options).items() if key in Setting.__dataclass_fields__}
    setting = Setting(**{**given, "shape": shape, "dtype": dtype, "accumulate_on": accumulate_on, "save": save})
    needs = {device: weights + work, "disk": accumulators if save else 0}
    needs[accumulate_on] = needs.get(accumulate_on, 0) + accumulators
    if device != "cpu" and not save:  # then the statistics move to the host
        needs["cpu"] = accumulators
    return setting, needs


def needs_of(shape: Shape, dtype: torch.dtype, positions: int) -> tuple[int, int, int]:
    """Bytes of weights, of float32 accumulators, and of a batch's activations, logits and largest comparison."""
    sizes, itemsize = shape.sizes(), dtype.itemsize
    activations = (16 * shape.hidden + 5 * shape.intermediate) * shape.layers * itemsize
    logits = shape.vocabulary * (3 * 4 + itemsize)  # in float32 for the loss, with their gradient and softmax
    return itemsize * sum(sizes), 4 * sum(sizes), positions * (activations + logits) + 3 * 4 * max(sizes)
