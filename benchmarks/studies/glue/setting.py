"""What all arms of the comparison on GLUE share."""

from __future__ import annotations

from dataclasses import dataclass

TIMES = (1, 3, 10)  # the smallest learning rate, of which each arm takes the best


@dataclass(frozen=True)
class Setting:
    """Task, budget and training.

    Args:
        task: Name of a GLUE task.
        layers: Adapted layers of the original arm, whose size is the budget.
        pool: Adapted layers of the others.
        examples: Training examples, the first ones.
        rate: The smallest learning rate that is tried.
        epochs: At most so many.
        patience: Stop after so many epochs without a better score on the validation part.
        batch_size: Rows in a step, of about the same length.
        max_length: Tokens in a row.
        fisher_examples: Examples that the selection looks at.
    """

    task: str = "cola"
    layers: int = 2
    pool: int = 5
    examples: int = 2000
    rate: float = 5e-5
    epochs: int = 6
    patience: int = 2
    batch_size: int = 32
    max_length: int = 128
    fisher_examples: int = 128

    @property
    def rates(self) -> list[float]:
        return [times * self.rate for times in TIMES]
