"""Long passes over data: a checkpoint is written every so often, and the same call goes on from it to the same bits.

A sum depends on the batches before, in their order, and on what the first of them have shown: by which plan later ones
are captured. So a pass that goes on reads the batches that are in the checkpoint once more and compares them by their
digests. Those on which plans depend, mostly the first one alone, run once more as well, and what they add is replaced
by the sums of the checkpoint.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from fishkern import arguments
from fishkern.files import check_target, in_brief, remove_leftovers
from fishkern.statistics.answering import Answering
from fishkern.statistics.autograd_pass import AutogradPass
from fishkern.statistics.base import sums
from fishkern.statistics.batches import Examples
from fishkern.statistics.call_facts import facts_of_constants
from fishkern.statistics.captured_pass import CapturedPass
from fishkern.statistics.checkpoint import Checkpoint, Place, packed, unpacked
from fishkern.statistics.contents import bytes_of, leaves_of, name_of
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.following import Following
from fishkern.statistics.randomness import OwnRandomness
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.structure import Facts, changes_in_words

_SIZE = 16  # bytes of a digest


@dataclass
class Running:
    """A pass that is under way.

    Args:
        one_pass: Adds batches to the states.
        states: The sums.
        answering: Knows the likelihood, after the first batch.
        randomness: The pass's own stream of random numbers.
        units: Number of units counted so far.
        following: Follows entries of the states; ``None`` for none.
    """

    one_pass: AutogradPass | CapturedPass
    states: States
    answering: Answering
    randomness: OwnRandomness
    units: int = 0
    following: Following | None = None


class LongRun:
    """The checkpoints of a call, one for each pass and rank.

    Args:
        path: As ``checkpoint`` of :func:`fishkern.estimate`.
        every: As ``save_every``.
        passes: Number of passes over the data.
        ranks: The ranks that take part.

    Raises:
        OSError: The path cannot name a file, or its folder is missing.
        ValueError: ``every`` is below 0 or not finite.
        TypeError: ``every`` is not a number.
    """

    def __init__(self, path: str | os.PathLike[str], every: float, passes: int, ranks: Ranks) -> None:
        seconds = arguments.number(every, "save_every")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"save_every must be a number of seconds, at least 0, got {seconds:g}.")
        check_target(path, "fisher.part")
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder {path.parent} of checkpoint={str(path)!r} does not exist: create it.")
        of_rank = f".rank-{ranks.rank}" if ranks.count > 1 else ""
        of_pass = [f".pass-{number + 1}" if passes > 1 else "" for number in range(passes)]
        self._every = seconds
        self._paths = [path.with_name(f"{path.name}{one}{of_rank}") for one in of_pass]
        # a pass that has ended is kept as long as others may fail
        self._keeps_end = passes > 1 or ranks.count > 1

    def keeper(self, number: int, facts: Facts, states: States) -> Keeper:
        """Make the keeper of a pass.

        Args:
            number: Number of the pass, from 0.
            facts: Of the call.
            states: The states of the pass, before its first batch.

        Returns:
            The keeper.
        """
        facts = facts | facts_of_constants(states)
        return Keeper(self._paths[number], self._every, facts, keeps_end=self._keeps_end)

    def remove(self) -> None:
        """Remove the files: the call has ended."""
        for path in self._paths:
            path.unlink(missing_ok=True)


class Keeper:
    """Write the checkpoint of one pass, and let the pass go on from it.

    Args:
        path: The file.
        every: Seconds between two writes.
        facts: Of the call.
        keeps_end: Whether the file is written when the data has ended.
    """

    def __init__(self, path: Path, every: float, facts: Facts, *, keeps_end: bool) -> None:
        self._path = path
        self._every = every
        self._facts = facts
        self._keeps_end = keeps_end
        self._digests: list[bytes] = []  # each of all batches up to one
        self._planned: dict[int, list[Tensor]] = {}  # states of the pass's own stream before these batches
        self._batch_size = 0
        self._state: dict[str, Tensor] = {}

    def over(self, data: Data, running: Running, report: Progress) -> Iterator[Examples]:
        """Read the data, and write the checkpoint every so often, also when the data raises.

        Args:
            data: This rank's batches.
            running: The pass, which is to run each batch that it gets before it asks for the next one.
            report: Is told where the pass goes on.

        Yields:
            The batches to run: those that the checkpoint lacks, after those on which their plans depend.

        Raises:
            ValueError: The checkpoint is of another call or of other data, or is damaged.
            TypeError: A batch contains something that has no bytes by which to recognise it.
            OSError: The file cannot be written; an older one is unchanged.
        """
        batches = iter(data)
        remove_leftovers(self._path)  # each may be as large as the checkpoint
        stored = Checkpoint.read(self._path)
        if stored is not None:
            self._demand_same_call(stored, running)
            yield from self._again(stored, batches, data, running)
            batches = self._go_on(stored, batches, data, running)
            report.go_on(data.examples)
            if stored.place.ended:
                self._demand_end(stored, batches, data)
                return
        saved = time.monotonic()
        learned = _learned(data, running)
        while (batch := self._next(batches, data, running)) is not None:
            digest, before = self._digest(batch), running.randomness.now()
            yield batch
            self._digests.append(digest)
            if learned != (learned := _learned(data, running)) or data.batches == 1:
                self._planned[data.batches - 1] = before
            if data.batches == 1:
                self._batch_size = batch.num_examples
            self._state = _state_of(data)  # here, since the next batch may raise when the loader has moved on
            if time.monotonic() - saved >= self._every:
                self._save(data, running)
                saved = time.monotonic()
        if self._keeps_end and data.batches:
            self._save(data, running, ended=True)

    def _next(self, batches: Iterator[Examples], data: Data, running: Running) -> Examples | None:
        """Read a batch; if that raises, save what was counted first."""
        counted = (data.examples, data.batches, data.dropped)
        try:
            return next(batches, None)
        except BaseException as error:
            data.examples, data.batches, data.dropped = counted
            if data.batches:
                try:
                    self._save(data, running)
                except OSError as another:
                    error.add_note(f"The checkpoint was not written: {another}")
            raise

    def _again(
        self, stored: Checkpoint, batches: Iterator[Examples], data: Data, running: Running
    ) -> Iterator[Examples]:
        """Read the batches of the checkpoint, compare them, and give those on which plans depend."""
        digests = stored.tensors["digests"].read().numpy()
        # a loader with a state is set to its place afterwards
        count = stored.planned[-1] + 1 if _is_restored(data, stored) else stored.place.batches
        for number in range(count):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"{self._path} has counted {stored.place.batches} batches, and the data ends after {number}. "
                    f"{_advice(self._path)}"
                )
            self._digests.append(self._digest(batch))
            if self._digests[-1] != digests[number].tobytes():
                raise ValueError(
                    f"batch {number} is not the one that {self._path} has counted there: the data comes in another "
                    "order, or is other data. Seed the sampler, as by DataLoader(..., generator=torch.Generator()"
                    f".manual_seed(0)). {_advice(self._path)}"
                )
            if number in stored.planned:
                self._planned[number] = _generators(stored, f"planned {number}")
                running.randomness.go_on(self._planned[number])
                yield batch
            if number == 0 and running.answering.description != stored.likelihood:
                raise ValueError(
                    f"{self._path} is of the likelihood {stored.likelihood}, and this call has "
                    f"{running.answering.description}. {_advice(self._path)}"
                )
        self._digests += [one.tobytes() for one in digests[count:]]

    def _go_on(
        self, stored: Checkpoint, batches: Iterator[Examples], data: Data, running: Running
    ) -> Iterator[Examples]:
        """Take over the sums, and the place in the data."""
        states, place, one_pass = running.states, stored.place, running.one_pass
        for name in states.names:
            for number, total in enumerate(sums(states[name])):
                total.copy_(stored.tensors[_key(number, name)].read())
        if running.following is not None:
            for name, tensor in running.following.tensors.items():
                tensor.copy_(stored.tensors[name].read())
            running.following.go_on()
        if "loss" in stored.tensors:
            one_pass.loss = stored.tensors["loss"].read().to(data.device)
        one_pass.connected = place.connected
        running.answering.go_on(place.logits)
        running.units, self._batch_size = place.units, place.batch_size
        running.randomness.go_on(_generators(stored, "own"))
        if _is_restored(data, stored):
            batches.close()
            self._state = {name: stored.tensors[name].read() for name in ("loader", "users")}
            counted = {"examples": place.examples, "batches": place.batches, "dropped": place.dropped}
            data.go_on(unpacked(self._state["loader"]), self._state["users"], **counted)
            return iter(data)
        return batches

    def _save(self, data: Data, running: Running, *, ended: bool = False) -> None:
        """Write the file."""
        one_pass = running.one_pass
        states = running.states
        tensors = {
            _key(number, name): total for name in states.names for number, total in enumerate(sums(states[name]))
        }
        tensors |= {} if running.following is None else running.following.tensors
        if isinstance(one_pass.loss, Tensor):
            tensors["loss"] = one_pass.loss
        digests = torch.frombuffer(bytearray(b"".join(self._digests)), dtype=torch.uint8)
        tensors["digests"] = digests.view(-1, _SIZE)
        for what, generators in [("own", running.randomness.now()), *self._named_generators()]:
            tensors |= {f"generator {number} {what}": state for number, state in enumerate(generators)}
        counted = (running.units, data.examples, data.batches, data.dropped)
        place = Place(*counted, self._batch_size, one_pass.connected, ended, running.answering.said_of_logits)
        likelihood = running.answering.description
        tensors |= self._state
        Checkpoint(self._facts, likelihood, place, sorted(self._planned), tensors).write(self._path)

    def _named_generators(self) -> Iterator[tuple[str, list[Tensor]]]:
        return ((f"planned {number}", states) for number, states in self._planned.items())

    def _digest(self, batch: Examples) -> bytes:
        """Compute the digest of all batches up to this one."""
        hashed = blake2b(self._digests[-1] if self._digests else b"", digest_size=_SIZE)
        for part in bytes_of(batch.content):
            if part is None:
                raise TypeError(
                    f"checkpoint= recognises batches by their values, and {_unreadable(batch)}: give dense tensors, "
                    "arrays, strings and numbers, or estimate without checkpoint=."
                )
            hashed.update(part)
        return hashed.digest()

    def _demand_same_call(self, stored: Checkpoint, running: Running) -> None:
        if stored.facts != self._facts:
            changes = in_brief(changes_in_words(stored.facts, self._facts), 600)
            raise ValueError(f"{self._path} is the checkpoint of another call: {changes}. {_advice(self._path)}")
        states, following = running.states, {} if running.following is None else running.following.tensors
        expected = [
            *(
                (_key(number, name), total, name)
                for name in states.names
                for number, total in enumerate(sums(states[name]))
            ),
            *((name, tensor, "followed entries") for name, tensor in following.items()),
        ]
        for key, total, of in expected:
            kept = stored.tensors.get(key)
            if kept is None or (kept.shape, kept.dtype) != (total.shape, total.dtype):
                raise ValueError(f"{self._path} is damaged: it lacks sums of {of}. {_advice(self._path)}")

    def _demand_end(self, stored: Checkpoint, batches: Iterator[Examples], data: Data) -> None:
        """Refuse data that goes on where it has ended before; a loader with a state may begin anew there."""
        if not _is_restored(data, stored) and next(batches, None) is not None:
            raise ValueError(
                f"the data ended after {len(self._digests)} batches when {self._path} was written, and goes on. "
                f"{_advice(self._path)}"
            )


def _key(number: int, name: str) -> str:
    return f"sum {number} {name}"


def _generators(stored: Checkpoint, what: str) -> list[Tensor]:
    """Read the states of all generators."""
    names = sorted(name for name in stored.tensors if name.startswith("generator ") and name.endswith(f" {what}"))
    return [stored.tensors[name].read() for name in names]


def _state_of(data: Data) -> dict[str, Tensor]:
    """Return the state of a loader that has one, and that of the generator from which it may draw."""
    return {"loader": packed(data.state(), "the loader"), "users": torch.get_rng_state()} if data.has_state else {}


def _is_restored(data: Data, stored: Checkpoint) -> bool:
    """Tell whether a loader with a state takes its place from the file; the loader of then may have had none."""
    return data.has_state and "loader" in stored.tensors


def _learned(data: Data, running: Running) -> Hashable:
    return data.learned, running.answering.learned, running.one_pass.learned


def _unreadable(batch: Examples) -> str:
    """Name the entry of a batch that has no bytes."""
    for place, leaf in leaves_of((), batch.content):
        if None in list(bytes_of(leaf)):
            return f"{name_of(place, batch.content)} is a {type(leaf).__name__} whose values cannot be read"
    return "an entry's values cannot be read"


def _advice(path: Path) -> str:
    return f"Make the call that {path.name} is of, or delete it to begin at the first batch."
