"""Preference pairs as plain token lists, and batches of them: without any code of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fishkern as fk
from tests.support import zoo

LENGTHS = ((3, 2, 4), (2, 5, 1), (4, 3, 3), (1, 6, 2), (3, 4, 5), (2, 1, 1), (5, 2, 3))


class Wide(fk.DiagonalFisher):
    """The same sums, as they are: statistics are float32."""

    def result(self, state, count):
        return state / count

    def collect(self, model, results, **described):
        return results


@dataclass(frozen=True)
class Pair:
    """A prompt, two answers, and the log-probabilities of both by a reference model."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float]


def pairs(lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> list[Pair]:
    """Prompts and answers of unequal lengths."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for each in lengths:
        texts = [torch.randint(3, zoo.V, (length,), generator=generator).tolist() for length in each]
        reference = (-12 * torch.rand(2, generator=generator)).tolist()
        made.append(Pair(*texts, tuple(reference)))
    return made


def rows_alone(model: nn.Module, pair: Pair) -> list[Tensor]:
    """Log-probabilities of both answers, each by a forward pass of its own, token for token."""
    return [_logp(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]


def _logp(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + answer], device=device)
    logits = model(input_ids=ids).logits[0, -ids.shape[1] :].log_softmax(-1)
    return sum(logits[len(prompt) + n - 1, token] for n, token in enumerate(answer))


def collated(data: Sequence[Pair], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All chosen answers, then all rejected ones, padded on the right, as TRL's collator makes them."""
    texts = [(one.prompt, one.chosen) for one in data] + [(one.prompt, one.rejected) for one in data]
    T = max(len(prompt) + len(answer) for prompt, answer in texts)
    batch = {
        key: torch.zeros(len(texts), T, dtype=torch.long) for key in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (prompt, answer) in enumerate(texts):
        length = len(prompt) + len(answer)
        batch["input_ids"][row, :length] = torch.tensor(prompt + answer)
        batch["attention_mask"][row, :length] = 1
        batch["completion_mask"][row, len(prompt) : length] = 1
    references = torch.tensor([one.reference for one in data], dtype=dtype)
    return {**batch, "ref_chosen_logps": references[:, 0], "ref_rejected_logps": references[:, 1]}


def interleaved(data: Sequence[Pair], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Each chosen answer, and after it its rejected one."""
    batch = collated(data, dtype)
    order = torch.arange(2 * len(data)).view(2, -1).mT.flatten()
    return {key: value if "logps" in key else value[order] for key, value in batch.items()}
