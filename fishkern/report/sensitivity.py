"""What rounding the weights to few bits costs, by layer and type of module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import at_least, several
from fishkern.layers import UnsupportedModuleError, is_stored
from fishkern.names import listed
from fishkern.report.grouped import Grouped
from fishkern.statistics import Statistics

Quantise = Callable[[Tensor, int], Tensor]


@dataclass
class SensitivityPart:
    """What rounding one part of a model costs.

    Attributes:
        coordinates: Number of entries.
        costs: The expected rise of the loss by number of bits.
    """

    coordinates: int = 0
    costs: dict[int, float] = field(default_factory=dict)

    def add(self, other: SensitivityPart) -> None:
        """Add another part to this one.

        Args:
            other: The other part.
        """
        self.coordinates += other.coordinates
        for bits, cost in other.costs.items():
            self.costs[bits] = self.costs.get(bits, 0.0) + cost


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Round each row to ``2^bits - 1`` levels, symmetric around zero, with one scale for the row.

    Of the experts of a layer that are one tensor ``[E, O, I]``, each expert is a row.

    Args:
        weight: ``[O, ...]``, floating.
        bits: At least 2.

    Returns:
        The rounded values, in the same shape and dtype.
    """
    rows = weight.flatten(1)
    step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (rows / step).round() * step, rows).view_as(weight)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    statistics: Statistics | Mapping[str, Tensor],
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    quantise: Quantise = round_to_nearest,
) -> Grouped[SensitivityPart]:
    """Estimate what quantising each weight would cost, for deciding which layers get more bits.

        cost = 1/2 sum_p F[p] (w[p] - q(w)[p])^2

    the second-order change of the loss with the Fisher information as its curvature (with ``"type-2"``, the divergence
    of the predictions), computed in float64. Vectors are left out: nobody quantises them.

    Args:
        model: Whose weights.
        statistics: ``F`` of its matrices.
        bits: Numbers of bits, each at least 2.
        quantise: Called as ``quantise(weight, bits)`` with a float32 (or wider) copy, for the values that the quantised
            weight stands for. By default :func:`round_to_nearest`.

    Returns:
        Parts by parameter, with sums by layer and by type of module: ``.layers``, ``.modules``, ``.whole``,
        ``.to_dict()``, and :func:`fishkern.report.tables.sensitivity_table`.

    Raises:
        TypeError: A number of bits is no integer.
        UnsupportedModuleError: The model is sharded, or a weight is quantised.
        ValueError: The statistics are of other parameters or shapes, negative or not finite; there is no matrix among
            them, ``bits`` has a number below 2, or ``quantise`` gives another shape.
    """
    if reason := hosts.sharded(hosts.unwrap(model)):
        raise UnsupportedModuleError(f"{reason}.")
    bits = [at_least(2, one, "bits") for one in several(bits, "bits")]
    own = hosts.named_parameters(model, remove_duplicate=False)
    if missing := [name for name in statistics if name not in own]:
        raise ValueError(f"{type(model).__name__} has no parameter {listed(missing)}: give statistics of this model.")
    parts: dict[str, SensitivityPart] = {}
    for name in statistics:
        weight = own[name].detach()
        if is_stored(own[name]):
            raise UnsupportedModuleError(
                f"{name} is quantised and stored in another form: take the costs before it is quantised."
            )
        if weight.ndim < 2:
            continue
        fisher = statistics[name]
        if fisher.shape != weight.shape:
            raise ValueError(
                f"the statistics hold {name} with shape {tuple(fisher.shape)}, in the model it has "
                f"{tuple(weight.shape)}: they are of another model, or not of single entries."
            )
        if not bool(((fisher >= 0) & fisher.isfinite()).all()):
            raise ValueError(f"the statistics of {name} are negative or not finite: a cost needs numbers from 0 on.")
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        costs = {}
        for number in bits:
            rounded = quantise(weight.clone(), number)
            if rounded.shape != weight.shape:
                raise ValueError(f"quantise gave {tuple(rounded.shape)} for {name}, which is {tuple(weight.shape)}.")
            error = weight.double() - rounded.to(weight.device, torch.float64)
            costs[number] = (fisher.to(error) * error.square()).sum().item() / 2
        parts[name] = SensitivityPart(weight.numel(), costs)
    if not parts:
        raise ValueError("the statistics hold no matrix, and only matrices are quantised.")
    return Grouped(SensitivityPart, parts)
