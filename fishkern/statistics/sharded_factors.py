"""The other way to add up a linear map's squares over ranks that hold rows of it: by the factors of its gradients.

With the factors ``x [N, T, I]`` and ``g [N, T, O]`` of every rank's examples (:class:`OuterProductGrads`), a rank can
compute the squares of its own rows by itself. So ``x`` is gathered, and of ``g`` each rank is sent the features that
are its rows (all-to-all). Nothing is summed in between, and the result is exact.

What all ranks together receive, of ``N T`` positions on each of ``R``, with ``e`` bytes for a number of the factors and
``a`` for one of the sums:

    squares   a O I (R - 1)                          reduce-scatter, see :mod:`fishkern.statistics.sharding`
    factors   e N T (R (R - 1) I + (R - 1) O)        ``I`` once for all maps that read the same ``x``

Factors are fewer where there are few positions. :func:`cheaper` says for which maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from fishkern import hosts
from fishkern.layers import OuterProductGrads, PerExampleGrads
from fishkern.statistics.ranks_plan import BLOCK_BYTES as _BLOCK
from fishkern.statistics.sharding import Part
from fishkern.statistics.shards import Ranks, gather_into

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of factors that are sent, by the numbers that ranks tell each other."""


class Offer(NamedTuple):
    """What a rank has to add to a parameter, in numbers that the ranks tell each other.

    Args:
        examples: ``N``; 0 where it has nothing, -1 where it has something else than the factors of one map.
        positions: ``T``.
        dtype: Place of the factors' dtype in :data:`DTYPES`.
        shares: Place of the first parameter whose map has the same input, in the order in which they are told.
    """

    examples: int = 0
    positions: int = 0
    dtype: int = -1
    shares: int = -1

    @property
    def tokens(self) -> int:
        """``N T``."""
        return self.examples * self.positions


def offer(grads: Sequence[PerExampleGrads], others: Sequence[Sequence[PerExampleGrads]], part: Part) -> Offer:
    """Say what this rank has to add to a parameter.

    Args:
        grads: What has been added to it.
        others: What has been added to each of the parameters, in order.
        part: The part of it that this rank holds.

    Returns:
        The offer.
    """
    if not grads:
        return Offer()
    if (one := _factors(grads)) is None or one.output_grads.shape[-1] != part.whole[0]:
        return Offer(-1)
    memory = _memory(one)
    shares = next(n for n, other in enumerate(others) if (f := _factors(other)) is not None and _memory(f) == memory)
    return Offer(*one.output_grads.shape[:2], DTYPES.index(one.output_grads.dtype), shares)


def sharing(
    parts: Mapping[str, Part], told: Sequence[Sequence[Sequence[int]]], ranks: Ranks
) -> list[tuple[dict[str, Part], list[Offer]]]:
    """Find the parameters of which all ranks have factors, or nothing, and put those of one input together.

    Args:
        parts: The parts of parameters that are sharded by rows.
        told: The offers of all ranks for each of them.
        ranks: These ranks.

    Returns:
        Parts of maps that read the same input on every rank of their group, and the offers of these ranks.
    """
    names, found = list(parts), {}
    for number, (name, part) in enumerate(parts.items()):
        offers = [Offer(*told[rank][number]) for rank in ranks.places(part.group)]
        if any(one.examples < 0 for one in offers) or len({one.dtype for one in offers if one.tokens}) != 1:
            continue
        shares = {one.shares for one in offers if one.tokens}
        first = min(shares) if len(shares) == 1 else number
        if first in found:
            others, of_others = found[first]
            alike = all(one[:3] == other[:3] for one, other in zip(offers, of_others, strict=True))
            if alike and part.group is others[names[first]].group:
                others[name] = part
                continue
        found[number] = ({name: part}, offers)
    return list(found.values())


def cheaper(parts: Sequence[Part], sums: Sequence[int], offers: Sequence[Offer]) -> list[bool]:
    """Choose the maps of one input whose factors are fewer bytes than their squares.

    Args:
        parts: Their weights, sharded by rows over the same ranks.
        sums: For each, the bytes of one number of its sums.
        offers: What each rank has.

    Returns:
        For each, whether its factors are to be sent; the same on every rank.
    """
    R, tokens = len(offers), [one.tokens for one in offers]
    itemsize = _dtype(offers).itemsize
    squares = [size * (R - 1) * R * part.chunk * part.width for part, size in zip(parts, sums, strict=True)]
    # of output gradients, all features but its own rows from every rank; of inputs, as many positions as the most
    own = [sum(n * (rows.stop - rows.start) for n, rows in zip(tokens, part.rows, strict=True)) for part in parts]
    grads = [itemsize * (sum(tokens) * part.whole[0] - n) for part, n in zip(parts, own, strict=True)]
    inputs = itemsize * (R - 1) * R * max(tokens) * parts[0].width
    wanted = [fewer < more for fewer, more in zip(grads, squares, strict=True)]
    saved = sum(other - one for one, other, want in zip(grads, squares, wanted, strict=True) if want)
    return wanted if inputs < saved else [False] * len(parts)


@dataclass(frozen=True)
class FactorExchange:
    """Sends the factors of maps that read the same input.

    Args:
        parts: Their weights, sharded by rows over the same ranks, by name.
        offers: What each of these ranks has.
        grads: What this rank has to add; empty if nothing.
    """

    parts: Mapping[str, Part]
    offers: Sequence[Offer]
    grads: Mapping[str, OuterProductGrads]

    def add_(self, states: Mapping[str, Tensor], update: Callable[[str, Tensor, PerExampleGrads], None]) -> None:
        """Add the squares of all ranks' examples to this rank's rows. A collective operation.

        Args:
            states: This rank's rows of the sums; changed in place.
            update: Adds squares to a block ``[rows, C]``: name, block, gradients of its shape.
        """
        first = next(iter(self.parts.values()))
        device, place = hosts.runs_on(first.parameter), dist.get_rank(first.group)
        output_grads = self._exchanged(device, place)
        most = max(one.tokens for one in self.offers)
        itemsize = _dtype(self.offers).itemsize
        longest = max(
            itemsize * len(self.offers) * most,
            *(part.chunk * states[name].element_size() for name, part in self.parts.items()),
        )
        step = min(max(1, _BLOCK // longest), first.width)
        for start in range(0, first.width, step):
            columns = slice(start, min(start + step, first.width))
            activations = self._gathered(columns, most, device)
            before = 0
            for name, part in self.parts.items():
                state, count = states[name], part.rows[place].stop - part.rows[place].start
                features, before = slice(before, before + count), before + count
                if not count:
                    continue
                block = torch.zeros(count, columns.stop - columns.start, dtype=state.dtype, device=device)
                for x, g in zip(activations, output_grads, strict=True):
                    if x.numel():
                        update(name, block, OuterProductGrads(x, g[..., features], block.shape))
                state.view(count, first.width)[:, columns] += block.to(state.device)

    def _exchanged(self, device: torch.device, place: int) -> list[Tensor]:
        """Give every rank the features of its rows, of all maps side by side: of each rank ``[N, T, rows]``."""
        parts, group = list(self.parts.items()), next(iter(self.parts.values())).group
        counts = [sum(p.rows[r].stop - p.rows[r].start for _, p in parts) for r in range(len(self.offers))]
        pieces = [
            torch.cat([self.grads[name].output_grads[..., part.rows[rank]] for name, part in parts], -1).flatten()
            for rank in (range(len(self.offers)) if self.grads else ())
        ]
        sent = torch.cat(pieces) if pieces else torch.empty(0, dtype=_dtype(self.offers), device=device)
        received = [one.tokens * counts[place] for one in self.offers]
        arrived = torch.empty(sum(received), dtype=_dtype(self.offers), device=device)
        dist.all_to_all_single(arrived, sent, received, [self.offers[place].tokens * n for n in counts], group=group)
        return [
            one.view(offer.examples, offer.positions, counts[place])
            for one, offer in zip(arrived.split(received), self.offers, strict=True)
        ]

    def _gathered(self, columns: slice, most: int, device: torch.device) -> list[Tensor]:
        """Gather some columns of the input: of each rank ``[N, T, C]``."""
        count, group = columns.stop - columns.start, next(iter(self.parts.values())).group
        mine = torch.zeros(most, count, dtype=_dtype(self.offers), device=device)
        if self.grads:
            activations = next(iter(self.grads.values())).activations[..., columns].flatten(0, 1)
            mine[: len(activations)] = activations
        every = torch.empty(len(self.offers) * most, count, dtype=_dtype(self.offers), device=device)
        gather_into(every, mine, group)
        return [
            rows[: offer.tokens].view(offer.examples, offer.positions, count)
            for rows, offer in zip(every.split(most), self.offers, strict=True)
        ]


def _dtype(offers: Sequence[Offer]) -> torch.dtype:
    return DTYPES[next(one.dtype for one in offers if one.tokens)]


def _factors(grads: Sequence[PerExampleGrads]) -> OuterProductGrads | None:
    """Give the factors, if what has been added is those of one map alone."""
    if len(grads) != 1 or not isinstance(grads[0], OuterProductGrads) or grads[0].counted is not None:
        return None
    dtype = grads[0].output_grads.dtype
    return grads[0] if dtype in DTYPES and grads[0].activations.dtype == dtype else None


def _memory(grads: OuterProductGrads) -> tuple[object, ...]:
    """Tell inputs that are one tensor from others that are equal."""
    x = grads.activations
    return x.data_ptr(), x.shape, x.stride(), x.device
