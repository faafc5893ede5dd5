"""What all arms of a comparison of TR-PTS share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Data and training.

    Args:
        task: Name in the records.
        rates: Learning rates that an arm tries, by what it trains beside the classifier: as many for all.
        size: Pixels along the side of an image; a patch has 14.
        examples: Training images, the first ones. All of them are ranked by.
        choosing: Training images after those, on which the learning rate is chosen; no other figure comes from them.
        scored: At most so many test images, which the figures come from.
        epochs: Passes over the training images.
        batch_size: Images in a step.
        top: Fraction of the ranked entries that decides how many connections each layer gets.
        head_rate: Learning rate of the classifier in every arm that trains more than that.
    """

    task: str
    rates: Mapping[str, tuple[float, float, float]]
    size: int
    examples: int
    choosing: int
    scored: int
    epochs: int
    batch_size: int
    top: float = 0.2
    head_rate: float = 3e-3


# The classifier starts at random and learns best at about 3e-3 (of six rates tried on the rows for choosing). That is
# too fast for the rest of the model: a few of its weights at 3e-3 learn next to nothing, at 1e-3 they learn.
RATES = {
    "head": (1e-3, 3e-3, 1e-2),
    "whole": (1e-5, 3e-5, 1e-4),
    "few": (1e-4, 3e-4, 1e-3),
    "lora": (3e-4, 1e-3, 3e-3),
}
SETTINGS = {
    # 36 patches, the fewest of which 0.95 leaves out any, for two cores: a run of the whole model takes about two
    # minutes of one of them. The rows are few because the method is for few; each test image is 0.1 % of accuracy.
    "cifar-84": Setting("cifar-84", RATES, 84, examples=400, choosing=300, scored=1000, epochs=4, batch_size=16),
    # 256 patches, as the weights were trained on; for a GPU
    "cifar-224": Setting("cifar-224", RATES, 224, examples=700, choosing=300, scored=2000, epochs=10, batch_size=32),
}
