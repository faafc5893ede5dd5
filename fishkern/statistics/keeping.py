"""Long passes over data: a checkpoint is written every so often, and the same call goes on from it to the same bits.

A sum depends on the batches before, in their order, and on what the first of them have shown: by which plan later ones
are captured. So a pass that goes on reads the batches that are in the checkpoint once more and compares them by their
digests. Those on which plans depend, mostly the first one alone, run once more as well, and what they add is replaced
by the sums of the checkpoint.

Ranks that step together (:mod:`fishkern.statistics.turns`) write at the same turns and go on from the same one.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from fishkern.files import in_brief
from fishkern.statistics.answering import Answering
from fishkern.statistics.autograd_pass import AutogradPass
from fishkern.statistics.base import sums
from fishkern.statistics.batches import Examples
from fishkern.statistics.captured_pass import CapturedPass
from fishkern.statistics.checkpoint import Checkpoint, Place, packed, unpacked
from fishkern.statistics.contents import bytes_of, leaves_of, name_of
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.following import Following
from fishkern.statistics.independence import Independence
from fishkern.statistics.kept_files import KeptFiles
from fishkern.statistics.randomness import OwnRandomness
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.structure import Facts, changes_in_words
from fishkern.statistics.turns import Turn, next_turn

_SIZE = 16  # bytes of a digest


@dataclass
class Running:
    """A pass that is under way.

    Args:
        one_pass: Adds batches to the states.
        independence: Compares examples in a batch with the same alone, before the first one.
        states: The sums.
        answering: Knows the likelihood, after the first batch.
        randomness: The pass's own stream of random numbers.
        units: Number of units counted so far.
        following: Follows entries of the states; ``None`` for none.
    """

    one_pass: AutogradPass | CapturedPass
    independence: Independence
    states: States
    answering: Answering
    randomness: OwnRandomness
    units: int = 0
    following: Following | None = None


class Keeper:
    """Write the checkpoint of one pass, and let the pass go on from it.

    Args:
        files: Of the pass.
        every: Seconds between two writes.
        facts: Of the call.
        together: The ranks that step together, and write at the same turns.
        keeps_end: Whether the file is written when the data has ended.
    """

    def __init__(self, files: KeptFiles, every: float, facts: Facts, together: Ranks, *, keeps_end: bool) -> None:
        self._files = files
        self._path = files.path
        self._every = every
        self._facts = facts
        self._together = together
        self._keeps_end = keeps_end
        self._turns = 0
        self._first = True
        self._digests: list[bytes] = []  # each of all batches up to one
        self._planned: dict[int, list[Tensor]] = {}  # states of the pass's own stream before these turns
        self._batch_size = 0
        self._state: dict[str, Tensor] = {}

    def over(self, data: Data, running: Running, report: Progress) -> Iterator[Turn]:
        """Read the data, and write the checkpoint every so often, also when the data raises.

        Args:
            data: This rank's batches.
            running: The pass, which is to run each turn that it gets before it asks for the next one.
            report: Is told where the pass goes on.

        Yields:
            The turns to run: those that the checkpoint lacks, after those on which their plans depend.

        Raises:
            ValueError: The checkpoint is of another call or of other data, or is damaged.
            TypeError: A batch contains something that has no bytes by which to recognise it.
            OSError: The file cannot be written; an older one is unchanged.
            RuntimeError: Another of the ranks that step together has failed.
        """
        batches = iter(data)
        stored = self._files.read()
        if stored is not None:
            with self._together.failing_together():
                self._demand_same_call(stored, running)
            restored = all(self._together.gathered(data.has_state and "loader" in stored.tensors))
            yield from self._again(stored, batches, running, restored=restored)
            batches = self._go_on(stored, batches, data, running, restored=restored)
            report.go_on(data.examples)
            if all(self._together.gathered(stored.place.ended)):
                self._demand_end(stored, batches, restored=restored)
                return
        saved = time.monotonic()
        learned = _learned(data, running)
        while (turn := self._next(batches, data, running)) is not None:
            before = running.randomness.now()
            yield turn
            with self._together.failing_together():
                changed = learned != (learned := _learned(data, running)) or self._turns == 0
                if self._batch_size == 0 and turn.batch is not None:
                    self._batch_size = turn.batch.num_examples
                self._state = _state_of(data)  # here, since the next batch may raise when the loader has moved on
            every = self._together.gathered((changed, time.monotonic() - saved >= self._every))
            if any(changed for changed, _ in every):
                self._planned[self._turns] = before
            self._turns += 1
            if every[0][1]:  # by the clock of the first rank
                self._save(data, running)
                saved = time.monotonic()
        if self._keeps_end and self._turns:
            self._save(data, running, ended=True)

    def _next(self, batches: Iterator[Examples], data: Data, running: Running) -> Turn | None:
        """Read a batch on each rank; if that raises, save what was counted first."""
        counted = (data.examples, data.batches, data.dropped)

        def read() -> Examples | None:
            batch = next(batches, None)
            if batch is not None:
                self._digests.append(self._digest(batch))
            return batch

        digests = len(self._digests)
        try:
            return next_turn(self._turns, read, self._together)
        except BaseException as error:
            data.examples, data.batches, data.dropped = counted
            del self._digests[digests:]
            # where ranks step together, an interrupt of one is not known to the others
            if self._turns and (self._together.count == 1 or isinstance(error, Exception)):
                try:
                    self._save(data, running)
                except (OSError, RuntimeError) as another:
                    error.add_note(f"The checkpoint was not written: {another}")
            raise

    def _again(
        self, stored: Checkpoint, batches: Iterator[Examples], running: Running, *, restored: bool
    ) -> Iterator[Turn]:
        """Read the batches of the checkpoint, compare them, and give those on which plans depend."""
        digests = stored.tensors["digests"].read().numpy()
        own = stored.place.batches  # of a rank whose data had ended, fewer than the turns

        def read() -> Examples | None:
            number = len(self._digests)
            batch = next(batches, None)
            if batch is None and number < own:
                raise ValueError(
                    f"{self._path} has counted {own} batches, and the data ends after {number}. {_advice(self._path)}"
                )
            if batch is None:
                return None
            if number >= own:
                raise ValueError(self._of_more_data(own))
            self._digests.append(self._digest(batch))
            if self._digests[-1] != digests[number].tobytes():
                raise ValueError(
                    f"batch {number} is not the one that {self._path} has counted there: the data comes in another "
                    "order, or is other data. Seed the sampler, as by DataLoader(..., generator=torch.Generator()"
                    f".manual_seed(0)). {_advice(self._path)}"
                )
            return batch

        # a loader with a state is set to its place afterwards
        for number in range(stored.planned[-1] + 1 if restored else stored.place.steps):
            turn = next_turn(number, read, self._together, again=True)
            if number in stored.planned:
                self._planned[number] = _generators(stored, f"planned {number}")
                running.randomness.go_on(self._planned[number])
                yield turn
            if number == 0:
                with self._together.failing_together():
                    self._demand_same_likelihood(stored, running)
        self._digests += [one.tobytes() for one in digests[len(self._digests) :]]

    def _go_on(
        self, stored: Checkpoint, batches: Iterator[Examples], data: Data, running: Running, *, restored: bool
    ) -> Iterator[Examples]:
        """Take over the sums, and the place in the data."""
        states, place, one_pass = running.states, stored.place, running.one_pass
        with self._together.failing_together():
            for name in states.names:
                for number, total in enumerate(sums(states[name])):
                    total.copy_(stored.tensors[_key(number, name)].read())
            if running.following is not None:
                for name, tensor in running.following.tensors.items():
                    tensor.copy_(stored.tensors[name].read())
            if "loss" in stored.tensors:
                one_pass.loss = stored.tensors["loss"].read().to(data.device)
        if running.following is not None:
            running.following.go_on()
        one_pass.connected = place.connected
        running.answering.go_on(place.logits)
        running.units, self._batch_size = place.units, place.batch_size
        running.randomness.go_on(_generators(stored, "own"))
        self._turns, self._first = place.steps, False
        if not restored:
            return batches
        with self._together.failing_together():
            batches.close()
            self._state = {name: stored.tensors[name].read() for name in ("loader", "users")}
            counted = {"examples": place.examples, "batches": place.batches, "dropped": place.dropped}
            data.go_on(unpacked(self._state["loader"]), self._state["users"], **counted)
            # a loader that has ended may begin anew
            return iter(()) if place.batches < place.steps else iter(data)

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
        digests = torch.tensor(bytearray(b"".join(self._digests)), dtype=torch.uint8)
        tensors["digests"] = digests.view(-1, _SIZE)
        for what, generators in [("own", running.randomness.now()), *self._named_generators()]:
            tensors |= {f"generator {number} {what}": state for number, state in enumerate(generators)}
        counted = (running.units, data.examples, data.batches, data.dropped)
        place = Place(*counted, self._batch_size, one_pass.connected, ended, running.answering.said_of_logits)
        if self._together.count > 1:
            place = place._replace(turns=self._turns, first=self._first)
        likelihood = running.answering.description
        tensors |= self._state
        self._files.write(Checkpoint(self._facts, likelihood, place, sorted(self._planned), tensors))
        self._first = False

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

    def _demand_same_likelihood(self, stored: Checkpoint, running: Running) -> None:
        if running.answering.description != stored.likelihood:
            raise ValueError(
                f"{self._path} is of the likelihood {stored.likelihood}, and this call has "
                f"{running.answering.description}. {_advice(self._path)}"
            )

    def _demand_end(self, stored: Checkpoint, batches: Iterator[Examples], *, restored: bool) -> None:
        """Refuse data that goes on where it has ended before; a loader with a state may begin anew there."""
        with self._together.failing_together():
            if not restored and next(batches, None) is not None:
                raise ValueError(self._of_more_data(stored.place.batches))

    def _of_more_data(self, batches: int) -> str:
        return (
            f"the data ended after {batches} batches when {self._path} was written, and goes on. {_advice(self._path)}"
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
