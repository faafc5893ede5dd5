"""What all arms of a comparison of freezing share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Task, training and the times of the events.

    Args:
        task: Name in the records: the model, the data, and what is trained.
        rates: Learning rates that every arm tries.
        examples: Training rows.
        choosing: Training rows apart from those, on which the learning rate is chosen; no other figure comes from them.
        scored: At most so many rows of the validation part, which the figures come from.
        shock: Of those, how many are measured around each event.
        epochs: Passes over the training rows.
        batch_size: Rows in a step.
        every: Steps between events.
        read_every: Steps between readings of the probe.
        probe: Training rows in the probe, drawn by the seed of the run.
        after: Steps after an event until the model is measured again.
        spare: Names of parameters that no arm freezes, except the published code.
        size: Tokens in a row, or pixels along the side of an image.
    """

    task: str
    rates: tuple[float, ...]
    examples: int
    choosing: int
    scored: int
    shock: int
    epochs: int
    batch_size: int
    every: int
    read_every: int
    probe: int = 32
    after: int = 10
    spare: tuple[str, ...] = ()
    size: int = 64

    def is_event(self, step: int) -> bool:
        """Whether something may stop after this step, counted from 1."""
        return step % self.every == 0


SENTENCES = dict(
    examples=3000, choosing=500, scored=1100, shock=300, epochs=2, batch_size=16, every=100, read_every=20,
    spare=("*classifier*",),
)  # fmt: skip
SETTINGS = {
    "minilm-sst2": Setting("minilm-sst2", rates=(2e-5, 6e-5, 2e-4), **SENTENCES),
    "minilm-sst2-lora": Setting("minilm-sst2-lora", rates=(5e-4, 2e-3, 8e-3), **SENTENCES),
    "nuclei": Setting(
        "nuclei", rates=(3e-5, 1e-4, 3e-4), examples=48, choosing=16, scored=32, shock=32, epochs=8, batch_size=4,
        every=25, read_every=5, probe=16, after=4, size=140, spare=("decoder.final_conv*",),
    ),
}  # fmt: skip
