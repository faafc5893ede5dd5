"""What all arms of the comparison of cheaper rivals share."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setting:
    """Sizes, training, and what every arm searches.

    Args:
        model: Name in the records.
        epochs: Of each training.
        lr: Of AdamW, in every training of all entries.
        examples: That an arm estimates on, of each task; as many others are what it is compared on. The models are
            trained on both.
        few: The first of these, for the exact Fisher at less cost.
        passes: Rows in a batch of a pass, on which the sketches and one of the batch gradients depend.
        small_passes: Rows in a batch of the other one.
        choosing: Rows of each task on which something is chosen.
        scored: Rows of each task that the figures come from.
        batch_size: Rows in a step.
        densities: Selected fractions.
        pruned: Fractions of weights that are set to zero.
        shares: Weights of the first model, of 1, that merging tries.
        penalties: Weights of the quadratic penalty that are tried, where the mean importance is 1.
        sparse: Fraction of entries in sparse fine-tuning.
        rates: Learning rates that sparse fine-tuning tries, see :func:`for_sparse`.
    """

    model: str
    epochs: int
    lr: float
    examples: int = 256
    few: int = 32
    passes: int = 32
    small_passes: int = 8
    choosing: int = 200
    scored: int = 400
    batch_size: int = 16
    densities: tuple[float, ...] = (0.005, 0.05)
    pruned: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    penalties: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    sparse: float = 0.005
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)


SETTINGS = {"llama": Setting("llama", epochs=1, lr=2e-3), "vit": Setting("vit", epochs=2, lr=1e-3)}
# With the three rates of the default some choosers take the smallest and others the largest.
WIDE_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def for_sparse(setting: Setting) -> Setting:
    """The setting of sparse fine-tuning, whose choosers find their best rates far from each other."""
    return replace(setting, rates=WIDE_RATES)
