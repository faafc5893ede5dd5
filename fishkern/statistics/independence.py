"""Check that the loss of an example is its own: it must not depend on the other examples of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from fishkern.statistics.base import losses_of
from fishkern.statistics.batches import Examples
from fishkern.statistics.computed_dtypes import ComputedDtypes
from fishkern.statistics.packing import PackedExamples
from fishkern.statistics.predictive import Categorical, Predictive
from fishkern.statistics.separation import demand_separate
from fishkern.warning import warn_caller

# The allowed difference between the loss of an example in a batch and alone, relative to the larger of two losses.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
# A loss below this, in units of the dtype's rounding, may be nothing but the rounding of larger numbers. For float64
# that is 16 units of float32, in which float64 models compute some of their layers.
_ROUNDING = {torch.float64: 2**33, torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}
# Parts of class names of modules that choose (experts), or scale activations, by all tokens of a batch.
_CHOOSING = ("Router", "TopK", "MoE", "Moe", "MOE", "Expert")
_SCALING = ("Linear8bitLt", "DynamicActivation", "DynamicQuant", "ActivationQuantized", "FP8Linear", "Float8Linear")


class Independence:
    """Compare the losses of two examples together with those of each alone, once, before anything is counted.

    Args:
        model: In evaluation mode.
        answer: Runs it on examples.
        precision: The dtypes that it computes in, which set the tolerance.
        by_labels: Whether the estimator uses the losses at the data's labels.
        agreed: Gives the losses to compare, where several ranks run the same examples and must judge alike.

    Attributes:
        precision: As given.
        note: A difference that was accepted, with its reason; ``None`` if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        answer: Callable[[Examples], Predictive | Tensor],
        precision: ComputedDtypes,
        *,
        by_labels: bool,
        agreed: Callable[[list[float]], list[float]] = lambda losses: losses,
    ) -> None:
        self._agreed = agreed
        self._model = model
        self._answer = answer
        self._by_labels = by_labels
        self.precision = precision
        self._compared: set[Hashable] = set()  # kinds of batches
        self._together: list[float] = []
        self._alone: list[float] = []
        self._first: tuple[int, list[float]] | None = None
        self.note: str | None = None

    @property
    def learned(self) -> Hashable:
        """What changes when examples have been compared."""
        return len(self._compared), self.note

    def awaits(self, few: Examples) -> bool:
        """Tell whether examples of such a batch have yet to be compared.

        Args:
            few: Some examples.

        Returns:
            Whether they run beside others, and none of their kind has been compared.
        """
        return few.has_neighbours and few.kind not in self._compared

    def take_for_granted(self, few: Examples) -> None:
        """Take it that the losses of such a batch are those of its examples, as an earlier pass has found out.

        Args:
            few: Some examples of it.
        """
        if few.has_neighbours:
            self._compared.add(few.kind)

    def note_together(self, answer: Predictive | Tensor) -> None:
        """Note the losses of the examples in one batch; only those of the first run are kept.

        Args:
            answer: The model's answer for both.
        """
        self._together = self._together or self._values(answer)

    def note_alone(self, answer: Predictive | Tensor) -> None:
        """Note the loss of one of them alone, in order; :meth:`settle` runs them itself unless both are noted.

        Args:
            answer: The model's answer for it.
        """
        self._alone += self._values(answer)

    def note_first(self, place: int, answer: Predictive | Tensor) -> None:
        """Note the loss of an example that ran alone before; :meth:`settle` then need not run it.

        Args:
            place: Its index in the data.
            answer: The model's answer for it.
        """
        self._first = place, self._values(answer)

    def settle(self, two: Examples) -> None:
        """Compare the losses, and of packed rows what they depend on.

        Args:
            two: The two examples; of packed rows it may be one, beside documents that do not count.

        Raises:
            ValueError: The losses differ by more than rounding, and not because a module chooses or scales by the
                batch; or the documents of packed rows are not kept apart.
        """
        if isinstance(two, PackedExamples):
            demand_separate(self._model, self._answer, two)
        alone = self._alone if len(self._alone) == two.num_examples else self._complete_alone(two)
        self._compared.add(two.kind)
        together, self._together, self._alone = self._together, [], []
        # the pass itself refuses losses that are not finite, and names the example
        if all(map(math.isfinite, together)) and not self._equal(together, alone):
            self._judge(two, together, alone)

    def _complete_alone(self, two: Examples) -> list[float]:
        """Run each example alone, except for the first if that has run before."""
        first, self._first = self._first, None
        if first is None or first[0] != two.places[0] or two.documents is not None:
            return self._run_alone(two)
        return [*first[1], *(self._values(self._answer(one))[0] for one in islice(two.singly(), 1, None))]

    def _run_alone(self, two: Examples) -> list[float]:
        return [self._values(self._answer(one))[0] for one in two.singly()]

    def _judge(self, two: Examples, together: Sequence[float], alone: Sequence[float]) -> None:
        """Say why losses differ. A second run of each example alone tells random draws from interacting examples."""
        again = self._run_alone(two)
        if not self._equal(again, alone):
            n = _farthest(again, alone)
            raise ValueError(
                f"the loss of example {two.places[n]} is {alone[n]:.6g} and {again[n]:.6g} in two runs of it alone: "
                "the model or its loss draws random numbers in evaluation mode, or depends on earlier runs. Switch the "
                "draws off (a functional dropout needs training=self.training), or give each example its own draws "
                "with likelihood=fishkern.Drawn(function, seed=0); keep state in a buffer, which is restored before "
                "each run."
            )
        n = _farthest(together, alone)
        differs = (
            f"the loss of example {two.places[n]} is {together[n]:.6g} with another example and {alone[n]:.6g} alone"
        )
        if _is_divided(together, alone):
            raise ValueError(
                f"{differs}: the loss is divided by the batch (its number of examples or of tokens), so it would "
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
        """Return the losses at the data's labels, or else at labels that rounding cannot change."""
        if self._by_labels or isinstance(answer, Tensor):
            return self._agreed(
                (losses_of(answer) + 0.0).tolist()
            )  # + 0.0 turns -0.0, which prints differently, into 0.0
        if isinstance(answer, Categorical):
            # u = 0 draws the first class of non-zero probability, which rounding does not change
            draws = torch.zeros(answer.num_examples, answer.draws_per_example, dtype=torch.float64)
            return self._agreed(answer.drawn_losses(draws).tolist())
        return self._agreed(sum(values.abs() for values in answer.label_losses() if values is not None).tolist())

    def _equal(self, one: Sequence[float], other: Sequence[float]) -> bool:
        scale = max((abs(value) for value in (*one, *other) if math.isfinite(value)), default=0.0)
        dtype = _coarsest(self.precision.dtypes)
        allowed = _TOLERANCE[dtype] * scale + _ROUNDING[dtype] * torch.finfo(dtype).eps
        # compared as text as well, since NaN equals nothing
        return all(abs(a - b) <= allowed or str(a) == str(b) for a, b in zip(one, other, strict=True))


def _coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the coarsest dtype that a loss comes from; with quantised weights it is treated as 16 bits."""
    known = [dtype for dtype in _TOLERANCE if dtype in dtypes]
    return known[-1] if known and dtypes <= set(_TOLERANCE) else torch.bfloat16


def _farthest(one: Sequence[float], other: Sequence[float]) -> int:
    gaps = [abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(one, other, strict=True)]
    return gaps.index(max(gaps))


def _is_divided(together: Sequence[float], alone: Sequence[float]) -> bool:
    """Recognise losses divided by the batch: each is a fraction of the loss alone, and the fractions add up to one."""
    if not all(alone) or not all(map(math.isfinite, alone)):
        return False
    parts = [shared / own for shared, own in zip(together, alone, strict=True)]  # 1 / N, or tokens / all tokens
    return all(0 < part < 1 for part in parts) and abs(sum(parts) - 1) < 0.02


def _choosing(model: nn.Module) -> str | None:
    """Name a module that chooses or scales by the whole batch, so that a rounding error may change its choice."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if any(word in kind for word in _CHOOSING):
            return f"{path!r} ({kind}) chooses experts, and the rounding of a batch may change a choice"
        weight = type(getattr(module, "_parameters", {}).get("weight")).__name__
        if any(word in kind or word in weight for word in _SCALING):
            return f"{path!r} ({kind}) scales activations by the whole batch"
    return None
