"""Predictive distributions: a model's distribution over the labels of each example, and the losses from it.

Given the inputs, the label positions of an example are independent. A loss is ``weight * sum over positions of -log p``
(up to a constant), ``[N]``; the weight turns the sum into a mean if requested.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fishkern.layers import Documents
from fishkern.statistics.head_logits import HeadLogits, drawn
from fishkern.statistics.labels import class_labels, values_like, yes_or_no_like

_LEAST = 1e-7  # how far 2u - 1 must stay from -1 and 1, about the rounding of float32


class Predictive(ABC):
    """A distribution over the labels of ``N`` examples."""

    @abstractmethod
    def losses(self) -> Tensor:
        """Losses at the data's labels.

        Returns:
            ``[N]``, differentiable.
        """

    @property
    @abstractmethod
    def draws_per_example(self) -> int:
        """How many uniform numbers it takes to draw all labels of one example."""

    @abstractmethod
    def drawn_losses(self, uniform: Tensor) -> Tensor:
        """Losses at labels drawn from the distribution itself.

        Args:
            uniform: Uniform numbers in [0, 1), ``[N, draws_per_example]``.

        Returns:
            ``[N]``, differentiable.
        """

    @property
    @abstractmethod
    def label_passes(self) -> int:
        """How many backward passes the exact expectation over labels needs."""

    @abstractmethod
    def label_losses(self) -> Iterator[Tensor | None]:
        """Enumerate the labels, in an order that is the same for any rows of one batch.

        Yields:
            ``[N]``, differentiable, or ``None`` for a label of a position that counts in none of the examples. Their
            squared gradients add up to the expectation over labels of the loss's squared gradient. The positions' terms
            can be added because the score of each position has mean zero.
        """


@dataclass(frozen=True)
class Categorical(Predictive):
    """One of ``C`` classes at each of ``L`` positions.

    Args:
        logits: ``[N, L, C]``, float32 or float64; or what stands for them where they would be too large.
        labels: ``[N, L]``, integers of any width; ``None`` if the data has none: then every position counts.
        mean: Divide by the number of positions that count, else sum.
        ignore_index: Label of a position that does not count.

    Raises:
        ValueError: The logits are not ``[N, L, C]``; or the labels have another shape, are not integers, or are not
            among the classes.
    """

    logits: Tensor | HeadLogits
    labels: Tensor | None
    mean: bool
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if self.logits.ndim != 3:
            raise ValueError(f"the logits must be [N, L, C], got {tuple(self.logits.shape)}.")
        if self.labels is not None:
            N, L, C = self.logits.shape
            labels = class_labels(self.labels, (N, L), C, self.ignore_index)
            object.__setattr__(self, "labels", labels.to(self.logits.device))

    @property
    def num_examples(self) -> int:
        """The number of examples, ``N``."""
        return len(self.logits)

    @property
    def _labelled(self) -> Tensor:
        """Which positions of the logits count, ``[N, L]``, bool."""
        if self.labels is None:
            return torch.ones(self.logits.shape[:2], dtype=torch.bool, device=self.logits.device)
        return self.labels != self.ignore_index

    @property
    def _counted(self) -> Tensor:
        """Which positions of the examples count, ``[N, L]``, bool."""
        return self._labelled

    def _reduced(self, nll: Tensor) -> Tensor:
        counted = self._counted
        total = torch.where(counted, nll, 0.0).sum(1)
        return total / counted.sum(1) if self.mean else total

    def _at(self, labels: Tensor) -> Tensor:
        return self._reduced(self._by_example(self._nll(labels)))

    def _nll(self, labels: Tensor) -> Tensor:
        """Compute ``-log p`` of a label at each position of the logits; at those that do not count, anything."""
        if isinstance(self.logits, HeadLogits):
            return self.logits.losses(labels, self._labelled)
        rows = self.logits.flatten(0, 1)  # classes last: a transpose would copy the logits
        nll = F.cross_entropy(rows, labels.flatten(), ignore_index=self.ignore_index, reduction="none")
        return nll.view(labels.shape)

    def _by_example(self, values: Tensor) -> Tensor:
        """Arrange one value for each position by examples, ``[N, L]``."""
        return values

    def _logits_at(self, position: int) -> Tensor:
        """Take the logits of one position of each example, ``[N, C]``."""
        return self.logits[:, position]

    def _places_at(self, position: int) -> Tensor:
        """Find one position of each example in the flattened logits, ``[N]``."""
        N, L = self.logits.shape[:2]
        return torch.arange(N, device=self.logits.device) * L + position

    def _log_p_at(self, position: int) -> Iterator[Tensor]:
        """Compute log-probabilities at one position of each example.

        Yields:
            First all, ``[N, C]``, without a gradient; then those of each class in turn, ``[N]``, differentiable.
        """
        logits = self.logits
        if not isinstance(logits, HeadLogits):
            log_p = self._logits_at(position).log_softmax(-1)
            yield log_p.detach()
            yield from (log_p[:, label] for label in range(log_p.shape[-1]))
            return
        places = self._places_at(position)
        yield logits.at(places).log_softmax(-1)
        marked = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
        marked.view(-1)[places[self._counted[:, position]]] = True
        for label in range(logits.num_classes):
            yield -logits.losses(torch.full_like(marked, label, dtype=torch.int64), marked).flatten()[places]

    def losses(self) -> Tensor:
        return self._at(_given(self.labels))

    @property
    def draws_per_example(self) -> int:
        return self.logits.shape[1]

    def drawn_losses(self, uniform: Tensor) -> Tensor:
        if isinstance(self.logits, HeadLogits):
            nll = self.logits.drawn_losses(uniform.to(self.logits.device), self._labelled)
            return self._reduced(self._by_example(nll))
        return self._at(drawn(self.logits.detach(), uniform))

    @property
    def label_passes(self) -> int:
        return int(self._counted.any(0).sum()) * self.logits.shape[-1]

    def label_losses(self) -> Iterator[Tensor | None]:
        counted = self._counted
        weight = torch.ones(len(counted), dtype=self.logits.dtype, device=self.logits.device)
        if self.mean:
            weight = weight / counted.sum(1)  # in the logits' dtype: one over integers would be float32
        # at least one, so that examples without any label give NaN, which the pass refuses
        positions = counted.any(0).nonzero().flatten().tolist() or [0]
        for position in range(counted.shape[1]):
            if position not in positions:
                yield from [None] * self.logits.shape[2]
                continue
            values = self._log_p_at(position)
            # E (grad log p)^2 = sum_c p_c (grad log p_c)^2, so each term is the square of sqrt(p_c) grad log p_c
            root_p = torch.where(counted[:, position, None], (next(values) / 2).exp(), 0.0)
            for root, log_p in zip(root_p.unbind(-1), values, strict=True):
                yield -weight * root * log_p


@dataclass(frozen=True)
class PackedCategorical(Categorical):
    """One of ``C`` classes at each position of ``N`` documents in packed rows.

    What is small is padded to ``[N, L]``, ``L`` positions of the longest document; the logits stay where they are.

    Args:
        logits: ``[R, T, C]``, float32 or float64; or what stands for them where they would be too large.
        labels: ``[R, T]``, integers of any width.
        mean: Divide by the number of a document's positions that count, else sum.
        ignore_index: Label of a position that does not count.
        documents: The documents of the rows.

    Raises:
        ValueError: As for :class:`Categorical`.
    """

    documents: Documents = field(kw_only=True)

    @property
    def num_examples(self) -> int:
        return self.documents.count

    @property
    def _places(self) -> Tensor:
        """Index in the flattened rows of each position of each document, ``[N, L]``; the first one past its end."""
        R, T = self.documents.shape
        begins = torch.tensor([span.row * T + span.start for span in self.documents.spans])
        return (begins[:, None] + torch.arange(self.documents.longest)).clamp_max(R * T - 1).to(self.logits.device)

    @property
    def _inside(self) -> Tensor:
        """Whether a position is inside its document, ``[N, L]``, bool."""
        inside = torch.arange(self.documents.longest) < self.documents.lengths[:, None]
        return inside.to(self.logits.device)

    @property
    def _counted(self) -> Tensor:
        return (self._by_example(self.labels) != self.ignore_index) & self._inside

    def _by_example(self, values: Tensor) -> Tensor:
        return values.flatten()[self._places]  # past the end of a document comes what does not count

    def _logits_at(self, position: int) -> Tensor:
        return self.logits.flatten(0, 1)[self._places_at(position)]

    def _places_at(self, position: int) -> Tensor:
        return self._places[:, position]

    @property
    def draws_per_example(self) -> int:
        return self.documents.longest

    def drawn_losses(self, uniform: Tensor) -> Tensor:
        rows = uniform.new_zeros(self.labels.numel())
        inside = self._inside.to(uniform.device)
        rows[self._places.to(uniform.device)[inside]] = uniform[inside]
        return super().drawn_losses(rows.view(self.labels.shape))


@dataclass(frozen=True)
class Gaussian(Predictive):
    """``D`` independent values ``y_d ~ N(f_d, 1/2)``, so that the squared error is ``-log p`` up to a constant.

    Args:
        means: ``f [N, ...]``, which become ``[N, D]``.
        labels: Of the same shape, except for axes of length 1; or ``None``.
        mean: Divide by ``D``, else sum.

    Raises:
        ValueError: The labels have another shape.
    """

    means: Tensor
    labels: Tensor | None
    mean: bool

    def __post_init__(self) -> None:
        if self.labels is not None:
            object.__setattr__(self, "labels", _by_example(values_like(self.labels, self.means)))
        object.__setattr__(self, "means", _by_example(self.means))

    def _reduced(self, squares: Tensor) -> Tensor:
        return squares.mean(1) if self.mean else squares.sum(1)

    def losses(self) -> Tensor:
        return self._reduced((self.means - _given(self.labels)).square())

    @property
    def draws_per_example(self) -> int:
        return self.means.shape[1]

    def drawn_losses(self, uniform: Tensor) -> Tensor:
        # erfinv(2u - 1) is N(0, 1/2), and infinite at u = 0
        noise = torch.erfinv((2 * uniform.to(self.means) - 1).clamp(_LEAST - 1, 1 - _LEAST))
        return self._reduced((self.means - (self.means.detach() + noise)).square())

    @property
    def label_passes(self) -> int:
        return self.means.shape[1]

    def label_losses(self) -> Iterator[Tensor]:
        # E (grad (y - f)^2)^2 = 4 E (y - f)^2 (grad f)^2 = 2 (grad f)^2
        weight = 2**0.5 / (self.means.shape[1] if self.mean else 1)
        for column in self.means.unbind(1):
            yield weight * column


@dataclass(frozen=True)
class Bernoulli(Predictive):
    """``D`` independent yes-no labels.

    Args:
        logits: ``[N, ...]``, which become ``[N, D]``.
        labels: Of the same shape, except for axes of length 1, in [0, 1]; or ``None``.
        mean: Divide by ``D``, else sum.

    Raises:
        ValueError: The labels have another shape, or are outside [0, 1].
    """

    logits: Tensor
    labels: Tensor | None
    mean: bool

    def __post_init__(self) -> None:
        if self.labels is not None:
            object.__setattr__(self, "labels", _by_example(yes_or_no_like(self.labels, self.logits)))
        object.__setattr__(self, "logits", _by_example(self.logits))

    def _at(self, labels: Tensor) -> Tensor:
        nll = F.binary_cross_entropy_with_logits(self.logits, labels.to(self.logits), reduction="none")
        return nll.mean(1) if self.mean else nll.sum(1)

    def losses(self) -> Tensor:
        return self._at(_given(self.labels))

    @property
    def draws_per_example(self) -> int:
        return self.logits.shape[1]

    def drawn_losses(self, uniform: Tensor) -> Tensor:
        return self._at(uniform.to(self.logits) < self.logits.detach().sigmoid())

    @property
    def label_passes(self) -> int:
        return self.logits.shape[1]

    def label_losses(self) -> Iterator[Tensor]:
        # E (p - y)^2 (grad f)^2 = p (1 - p) (grad f)^2
        p = self.logits.detach().sigmoid()
        weight = (p * (1 - p)).sqrt() / (self.logits.shape[1] if self.mean else 1)
        for column, scale in zip(self.logits.unbind(1), weight.unbind(1), strict=True):
            yield scale * column


def _by_example(values: Tensor) -> Tensor:
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def _given(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(
            "the empirical Fisher needs the data's labels, and a batch has none: add 'labels' to each batch, or use "
            "fisher_type='mc' or 'type-2', which need none."
        )
    return labels
