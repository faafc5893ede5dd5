"""The file of an unfinished pass over data: its sums, its place in the data, and by which call it was made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishkern.files import AnyTensor, Format, StoredTensor, in_brief, open_one, parsing, read_json, write_one
from fishkern.statistics.structure import Facts

FORMAT = Format("fishkern.checkpoint", version=1, saved_by="estimate(..., checkpoint=)")


class Place(NamedTuple):
    """How far a pass is, in what it has counted.

    Args:
        units: Number of units.
        examples: Number of examples.
        batches: Number of batches.
        dropped: Number of documents without a label.
        batch_size: Number of examples in the first batch.
        connected: Whether a loss depended on the parameters.
        ended: Whether the data has ended.
        logits: How large logits were computed, in words; ``None`` if none were large.
        turns: Of ranks that step together, the number of their turns; ``None`` where each goes on by itself.
        first: Whether no file was written before this one.
        of_all: A digest of the batches of all ranks that step together.
    """

    units: int
    examples: int
    batches: int
    dropped: int
    batch_size: int
    connected: bool
    ended: bool
    logits: str | None
    turns: int | None = None
    first: bool = False
    of_all: str = ""

    @property
    def steps(self) -> int:
        """Number of batches of this rank, or of turns with other ranks."""
        return self.batches if self.turns is None else self.turns


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What the file holds.

    Args:
        facts: Of the call, as text.
        likelihood: The likelihood in words.
        place: How far the pass is.
        planned: Numbers of the batches (or turns) on which the plans of later ones depend, ascending.
        tensors: The rest by name: sums, the digests of the batches, states of generators.
    """

    facts: Facts
    likelihood: str
    place: Place
    planned: list[int]
    tensors: Mapping[str, AnyTensor]

    @property
    def turn(self) -> tuple[int, str]:
        """By which files of ranks that step together are known to be of one turn."""
        return self.place.steps, self.place.of_all

    def write(self, path: Path) -> None:
        """Write the file, which replaces an older one in one step.

        Args:
            path: The file.

        Raises:
            OSError: As in :func:`fishkern.files.atomic_write`; an older file is then unchanged.
        """
        metadata = {
            "format": FORMAT.name,
            "format_version": str(FORMAT.version),
            "facts": json.dumps([[*fact, value] for fact, value in self.facts.items()]),
            "likelihood": self.likelihood,
            "place": json.dumps(self.place._asdict()),
            "planned": json.dumps(self.planned),
        }
        write_one(path, self.tensors, metadata)

    @classmethod
    def read(cls, path: Path) -> Checkpoint | None:
        """Read the file, except for the values of its tensors.

        Args:
            path: The file.

        Returns:
            What it holds; ``None`` if there is none.

        Raises:
            ValueError: It is damaged, or holds something else.
        """
        if not path.exists():
            return None
        try:
            metadata, tensors = open_one(path, FORMAT)
            with parsing(f"{path} has a damaged header"):
                facts = {(str(kind), str(name)): str(text) for kind, name, text in read_json(metadata["facts"])}
                place = Place(**read_json(metadata["place"]))
                planned = read_json(metadata["planned"])
                numbers = [*place[:5], place.steps, *planned]
                if not all(type(one) is int and one >= 0 for one in numbers) or planned != sorted(set(planned)):
                    raise ValueError("its numbers are no counts")
                _check_tensors(place, planned, tensors)
                return cls(facts, metadata["likelihood"], place, planned, tensors)
        except ValueError as error:
            raise ValueError(
                f"there is no unfinished estimate in {path}, which checkpoint= names: {error} Or give another name, to "
                "begin at the first batch."
            ) from None


def unfinished(path: Path) -> Place | None:
    """Say how far the pass of a checkpoint is.

    Args:
        path: As given to :func:`fishkern.estimate`, for an estimator that takes one pass in one process.

    Returns:
        How far; ``None`` if there is no file.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    stored = Checkpoint.read(path)
    return None if stored is None else stored.place


def packed(state: Any, whose: str) -> Tensor:
    """Turn the state of a loader into bytes that can be read without running code.

    Args:
        state: A nest of plain values and tensors.
        whose: Name of the loader's class, for the message.

    Returns:
        ``[B]``, uint8.

    Raises:
        TypeError: The state contains something else.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        unpacked(content := torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    except Exception as error:
        raise TypeError(
            f"checkpoint= keeps what {whose}.state_dict() gives, which must be plain values and tensors: "
            f"{in_brief(error)}"
        ) from None
    return content


def unpacked(content: Tensor) -> Any:
    """Read the state of a loader.

    Args:
        content: From :func:`packed`.

    Returns:
        The state.
    """
    return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def _check_tensors(place: Place, planned: list[int], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a file that lacks what it must have by its own header."""
    if not place.steps or not planned or planned[0] != 0 or planned[-1] >= place.steps:
        raise ValueError("it has counted nothing")
    if tensors["digests"].shape != (place.batches, 16) or tensors["digests"].dtype != torch.uint8:
        raise ValueError("it lacks digests of its batches")
    if any(f"generator 0 {what}" not in tensors for what in ("own", *(f"planned {number}" for number in planned))):
        raise ValueError("it lacks states of generators")
