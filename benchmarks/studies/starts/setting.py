"""What all arms of a comparison of starts share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Task, budget and training.

    Args:
        task: Name in the records: the model, and the texts that it is trained on.
        rates: Learning rates that every arm tries.
        texts: The GLUE task whose sentences these are.
        examples: Training rows, the first ones.
        choosing: Rows after those, on which the learning rate is chosen; no other figure comes from them.
        scored: At most so many rows of the validation part, which the figures come from.
        epochs: Passes over the training rows.
        batch_size: Rows in a step, of about the same length.
        max_length: Tokens in a row.
        rank: Rank of a matrix where all have the same one. Its parameters are the budget of every arm.
        deep_rank: Rank of the deep matrices where the shallow ones share the rest of the budget.
        shallow: The last shallow layer, counted from 0.
        statistic: Training rows that a start may look at, drawn by the seed of the run.
        measured: How often the model is measured, at equal distances, the last time at the end.
        stories: Texts drawn from the untrained model itself, on which forgetting is measured; 0 for a classifier.
        story_tokens: Tokens in each.
    """

    task: str
    rates: tuple[float, ...]
    texts: str
    examples: int = 3000
    choosing: int = 500
    scored: int = 1100
    epochs: int = 1
    batch_size: int = 16
    max_length: int = 64
    rank: int = 8
    deep_rank: int = 10
    shallow: int = 1
    statistic: int = 128
    measured: int = 1
    stories: int = 0
    story_tokens: int = 64

    def shallow_rank(self, layers: int) -> float:
        """The average rank of the shallow matrices that keeps the budget, in a model of so many layers."""
        deep = layers - self.shallow - 1
        return (self.rank * layers - self.deep_rank * deep) / (self.shallow + 1)


LANGUAGE = dict(examples=4000, rates=(1e-3, 3e-3, 1e-2, 3e-2), measured=4, stories=256)
CLASSES = dict(rates=(5e-4, 2e-3, 8e-3))
SETTINGS = {
    "stories-sst2": Setting("stories-sst2", texts="sst2", **LANGUAGE),
    "stories-cola": Setting("stories-cola", texts="cola", **LANGUAGE),
    "minilm-sst2": Setting("minilm-sst2", texts="sst2", **CLASSES),
    # after one epoch every arm answers the same to all rows
    "minilm-cola": Setting("minilm-cola", texts="cola", epochs=4, **CLASSES),
}
