"""The demo's model, a small LLaMA over bytes: made, trained, measured, and run on the fastest number of threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

CONFIG = dict(
    vocab_size=256,  # a token is a byte
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
WINDOW, WINDOWS = 64, 16  # bytes of a training row, and rows of a step
BATCH = 32  # paragraphs of a padded batch

Report = Callable[[float, str], None]


def make_model(seed: int) -> nn.Module:
    """Make the LLaMA with random weights.

    Args:
        seed: Seed of the weights.

    Returns:
        A ``LlamaForCausalLM``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def batches_of(rows: list[Tensor]) -> list[dict[str, Tensor]]:
    """Pad rows of unequal length on the right, as a collator does.

    Args:
        rows: Byte values, ``[T_n]`` each.

    Returns:
        Batches of at most :data:`BATCH` rows: ``input_ids``, ``attention_mask`` and ``labels`` (-100 at padding), each
        ``[N, T]``.
    """
    return [_collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw windows of a text.

    Args:
        text: Byte values ``[S]``.
        count: How many windows.
        generator: Draws where they begin.

    Returns:
        ``[count, WINDOW]``.
    """
    begin = torch.randint(len(text) - WINDOW, (count, 1), generator=generator)
    return text[begin + torch.arange(WINDOW)]


def train(model: nn.Module, text: bytes, seconds: float, seed: int, report: Report) -> int:
    """Train on random windows of the text until the time is up.

    Args:
        model: Changed in place.
        text: What to train on.
        seconds: How long.
        seed: Seed of the windows.
        report: Called with the fraction of the time that has passed, and the loss in words.

    Returns:
        The number of steps.
    """
    device = next(model.parameters()).device
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    steps, start = 0, time.perf_counter()
    while (done := (time.perf_counter() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (steps + 1) / 20) * (1 - done)
        ids = windows(data, WINDOWS, generator).long().to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        report(done, f"step {steps}, loss {loss.item():.2f}")
    return steps


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Measure how well the model predicts.

    Args:
        model: Left in evaluation mode.
        batches: Padded batches.

    Returns:
        Bits per byte.
    """
    model.eval()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    nats = sum(count * model(**batch).loss.item() for count, batch in zip(counts, batches, strict=True))
    return nats / sum(counts) / math.log(2)


@contextmanager
def fastest_threads(model: nn.Module) -> Iterator[str]:
    """Run on the number of threads that is fastest: for a small model not all of them, least on a busy machine.

    Args:
        model: What will run.

    Yields:
        Where it runs, in words.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        yield f"on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}"
        return
    available = torch.get_num_threads()
    try:
        counts = [*(count for count in (1, 2, 4, 8) if count < available), available]
        fastest = min(counts, key=lambda threads: _seconds_of_steps(model, threads))
        torch.set_num_threads(fastest)
        yield f"on the CPU, with the fastest number of threads: {fastest} of {available}"
    finally:
        torch.set_num_threads(available)


def _seconds_of_steps(model: nn.Module, threads: int) -> float:
    torch.set_num_threads(threads)
    ids = torch.zeros(WINDOWS, WINDOW, dtype=torch.long)
    times = [time.perf_counter()]
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        times.append(time.perf_counter())
    model.zero_grad()
    return times[-1] - times[1]  # without the first step, which warms up


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad(rows, batch_first=True, padding_value=-100)
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": mask, "labels": labels}
