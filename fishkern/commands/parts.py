"""Parameters in parts by ``--memory``: how many passes over the data it needs, and at which an interrupted run is."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fishkern as fk
from fishkern.arguments import byte_count
from fishkern.commands.output import note, waiting
from fishkern.commands.workload import BATCH_SIZE, BATCH_SIZE_ELSEWHERE, Prepared
from fishkern.statistics.checkpoint import Place, unfinished
from fishkern.statistics.pass_plan import bytes_in_words


class Unfinished(NamedTuple):
    """Sums that an interrupted run has left.

    Args:
        file: Their file.
        number: Of the pass over the data, from 1; 0 where there is one alone.
        place: How far that pass is.
    """

    file: Path
    number: int
    place: Place


def unfinished_pass(part: Path) -> Unfinished | None:
    """Find what an interrupted run has left.

    Args:
        part: The file of unfinished sums; those of several passes have a suffix.

    Returns:
        The last pass; ``None`` if there is nothing.

    Raises:
        ValueError: A file is damaged, or holds something else.
    """
    numbers = [int(file.suffix.removeprefix(".pass-")) for file in _of_passes(part)]
    number = max(numbers, default=0)
    file = part.with_name(f"{part.name}.pass-{number}") if number else part
    place = unfinished(file)
    return None if place is None else Unfinished(file, number, place)


def discard(part: Path) -> None:
    """Remove what an interrupted run has left.

    Args:
        part: As for :func:`unfinished_pass`.
    """
    for file in (part, *_of_passes(part)):
        file.unlink(missing_ok=True)


def demand_same_passes(before: Unfinished | None, *, several: bool) -> None:
    """Refuse what an interrupted run has left if that took one pass and this one several, or the other way round.

    Args:
        before: What it has left.
        several: Whether this run takes several passes.

    Raises:
        ValueError: It does not fit.
    """
    if before is not None and (before.number > 0) != several:
        raise ValueError(f"{before.file} was made with another --memory: give it as then, or --restart.")


def divided(
    memory: str, prepared: Prepared, recipe: fk.Estimator, options: Mapping[str, Any], requested: int | None
) -> tuple[list[list[str]] | None, int]:
    """Divide the parameters, with the largest batch for which the memory suffices, and say so.

    Args:
        memory: The most bytes above the model, such as ``"8GB"``.
        prepared: Model and examples, longest first.
        recipe: The estimator.
        options: Other arguments of :func:`fishkern.plan`.
        requested: The user's batch size: no other is tried.

    Returns:
        Names of the parameters of each pass, ``None`` where an ordinary pass fits; and the batch size.

    Raises:
        ValueError: ``memory`` is no size, or not enough for the largest parameter and a batch of one example.
    """
    size = requested or min(BATCH_SIZE.get(prepared.device.type, BATCH_SIZE_ELSEWHERE), len(prepared.examples))
    with waiting("planning"):
        while True:
            planned = fk.plan(prepared.model, prepared.batches(size)[0], recipe, **options)
            try:
                parts = planned.parts(memory)
                break
            except ValueError:
                if requested or size == 1:
                    raise
                size //= 2
    passes = f"{len(parts)} pass{'es' * (len(parts) > 1)} over the data"
    note(
        f"{passes}: the sums take {bytes_in_words(sum(planned.state_bytes.values()))}, and a batch of {size} up to "
        f"{bytes_in_words(planned.beside_bytes)} beside them, above {bytes_in_words(planned.weight_bytes)} of weights"
    )
    fits = planned.peak_bytes <= byte_count(memory, "--memory")  # what is followed in a single pass as well
    return None if fits and len(parts) == 1 else parts, size


def _of_passes(part: Path) -> list[Path]:
    named = part.parent.glob(f"{glob.escape(part.name)}.pass-*") if part.parent.is_dir() else ()
    return [file for file in named if re.fullmatch(r"\.pass-\d+", file.suffix)]
