"""What an example is: its loss is its own, whatever stands beside it in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fishkern.statistics.base import losses_of
from fishkern.statistics.batches import Examples
from fishkern.statistics.precision import Precision
from fishkern.statistics.predictive import Categorical, Predictive
from fishkern.warning import warn_caller

# What the loss of an example may move by between a batch and alone, relative to the larger loss of the two examples.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
# Below this a loss is what rounding leaves of larger numbers, in units of the dtype's rounding.
_ROUNDING = {torch.float64: 2**33, torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}  # float64: that of float32
_CHOOSING = ("Router", "TopK", "MoE", "Moe", "MOE", "Expert")
_SCALING = ("Linear8bitLt", "DynamicActivation", "DynamicQuant", "ActivationQuantized", "FP8Linear", "Float8Linear")


class Independence:
    """Compares the losses of two examples together with those of each alone, once, before anything is counted.

    Args:
        model: In evaluation mode.
        answer: Runs it on examples.
        precision: What it computes in, which says how exact a loss is.
        by_labels: Whether the losses at the data's labels are what is asked for.

    Attributes:
        precision: As given.
        note: What was found and let pass.
    """

    def __init__(
        self,
        model: nn.Module,
        answer: Callable[[Examples], Predictive | Tensor],
        precision: Precision,
        *,
        by_labels: bool,
    ) -> None:
        self._model = model
        self._answer = answer
        self._by_labels = by_labels
        self.precision = precision
        self._pending = True
        self._beside: list[float] = []
        self._alone: list[float] = []
        self.note: str | None = None

    @property
    def pending(self) -> bool:
        """Whether no two examples have been compared yet."""
        return self._pending

    def note_beside(self, answer: Predictive | Tensor) -> None:
        """Note the losses of two examples in one batch; those of a first run count.

        Args:
            answer: What the model answers to both.
        """
        self._beside = self._beside or self._values(answer)

    def note_alone(self, answer: Predictive | Tensor) -> None:
        """Note the loss of one of them alone, the first one's first; :meth:`settle` runs those that are not noted.

        Args:
            answer: What the model answers to it.
        """
        self._alone += self._values(answer)

    def settle(self, two: Examples) -> None:
        """Compare what was noted.

        Args:
            two: The two examples.

        Raises:
            ValueError: The losses differ by more than rounding, and not because a module chooses or scales by the
                batch.
        """
        alone = self._alone if len(self._alone) == 2 else self._run_alone(two)
        self._pending = False
        beside = self._beside
        if all(map(math.isfinite, beside)) and not self._equal(beside, alone):  # the pass names what is not finite
            self._judge(two, beside, alone)

    def _run_alone(self, two: Examples) -> list[float]:
        return [self._values(self._answer(one))[0] for one in two.singly()]

    def _judge(self, two: Examples, beside: Sequence[float], alone: Sequence[float]) -> None:
        """Say why losses differ; each example runs alone once more, which tells random draws from the others' say."""
        again = self._run_alone(two)
        if not self._equal(again, alone):
            n = _farthest(again, alone)
            raise ValueError(
                f"the loss of example {two.places[n]} is {alone[n]:.6g} and {again[n]:.6g} in two runs of it alone: "
                "the model or its loss draws random numbers in evaluation mode, or goes by what it has kept of runs "
                "before. Switch the draws off (a functional dropout needs training=self.training), or give each "
                "example draws of its own with likelihood=fishkern.Drawn(function, seed=0); keep state in a buffer, "
                "which each run finds as it was."
            )
        n = _farthest(beside, alone)
        differs = (
            f"the loss of example {two.places[n]} is {beside[n]:.6g} beside another example and {alone[n]:.6g} alone"
        )
        if _is_divided(beside, alone):
            raise ValueError(
                f"{differs}: the loss is divided by the batch (its number of examples or of tokens), so that it would "
                "depend on the batch size. Divide by the example's own tokens, or by nothing (reduction='none', summed "
                "over its positions)."
            )
        if reason := _choosing(self._model):
            self.note = f"{differs}: {reason}"
            warn_caller(
                f"{self.note}. The statistics are those of the choices made in these batches; fishkern.verify says how "
                "far they are from those of examples alone."
            )
            return
        cut, _ = two.names
        raise ValueError(
            f"{differs}: the examples of a batch see each other (a contrastive loss with in-batch negatives, a "
            "normalisation over the batch), and none has a gradient of its own. DiagonalFisher(unit='batch') squares "
            f"the gradient of the batch's mean loss, which such a loss has. Where one of {', '.join(cut)} belongs "
            "to all examples, name it in shared=."
        )

    @torch.no_grad()
    def _values(self, answer: Predictive | Tensor) -> list[float]:
        """Losses at the data's labels; where these are not asked for, at one label that no rounding tips over."""
        if self._by_labels or isinstance(answer, Tensor):
            return (losses_of(answer) + 0.0).tolist()  # no -0
        if isinstance(answer, Categorical):
            rows = len(answer.logits)
            return answer.drawn_losses(torch.zeros(rows, answer.draws_per_example, dtype=torch.float64)).tolist()
        return sum(values.abs() for values in answer.label_losses() if values is not None).tolist()

    def _equal(self, one: Sequence[float], other: Sequence[float]) -> bool:
        scale = max((abs(value) for value in (*one, *other) if math.isfinite(value)), default=0.0)
        dtype = _coarsest(self.precision.dtypes)
        allowed = _TOLERANCE[dtype] * scale + _ROUNDING[dtype] * torch.finfo(dtype).eps
        return all(abs(a - b) <= allowed or str(a) == str(b) for a, b in zip(one, other, strict=True))  # str: NaN


def _coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    """Name the coarsest dtype that a loss comes from; behind quantised weights it is as coarse as 16 bits."""
    known = [dtype for dtype in _TOLERANCE if dtype in dtypes]
    return known[-1] if known and dtypes <= set(_TOLERANCE) else torch.bfloat16


def _farthest(one: Sequence[float], other: Sequence[float]) -> int:
    gaps = [abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(one, other, strict=True)]
    return gaps.index(max(gaps))


def _is_divided(together: Sequence[float], alone: Sequence[float]) -> bool:
    """Tell losses of which each batch gives every example a part, all parts being one: ``1/N``, or tokens of tokens."""
    if not all(alone) or not all(map(math.isfinite, alone)):
        return False
    parts = [beside / own for beside, own in zip(together, alone, strict=True)]
    return all(0 < part < 1 for part in parts) and abs(sum(parts) - 1) < 0.02


def _choosing(model: nn.Module) -> str | None:
    """Say which module chooses or scales by what else is in the batch, so that rounding may tip it over."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if any(word in kind for word in _CHOOSING):
            return f"{path!r} ({kind}) chooses experts, and a choice may tip over with the rounding of a batch"
        weight = type(getattr(module, "_parameters", {}).get("weight")).__name__
        if any(word in kind or word in weight for word in _SCALING):
            return f"{path!r} ({kind}) scales activations by what else is in the batch"
    return None
