"""Going on where an interrupted ``fishkern tune`` stood: one file with all that the rest of its training depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishkern.files import atomic_write, in_brief
from fishkern.integrations.examples import Example

FILE = "unfinished.pt"
HELD = ("data", "seconds", "before", "seen", "values", "buffers", "optimizer", "schedule", "generators", "epoch")

ADVICE = "choose another --out, or begin anew with --restart"

State = dict[str, Any]


@dataclass
class Checkpoint:
    """The file of an unfinished run: written whole every so often, gone when the run has ended.

    Attributes:
        path: The file.
        settings: What the run was asked to do, as plain values.
        every: Seconds between two writes.
        state: What the file held when it was opened, or ``None`` where there was none.
    """

    path: Path
    settings: Mapping[str, Any]
    every: float
    state: State | None = None
    _written: float = field(default=0.0, init=False)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], every: float, *, restart: bool = False) -> Checkpoint:
        """Look for an unfinished run.

        Args:
            folder: Where it would lie.
            settings: What is asked for.
            every: Seconds between two writes.
            restart: Begin anew, whatever there is.

        Returns:
            What a run with these settings goes on from.

        Raises:
            ValueError: There is one with other settings, or its file cannot be read.
        """
        path = folder / FILE
        made = cls(path, settings, every)
        if restart:
            made.remove()
        if not path.exists():
            return made
        with made.reading():
            stored = torch.load(path, map_location="cpu", weights_only=True)
            before, made.state = dict(stored["settings"]), {key: stored["state"][key] for key in HELD}
        if other := [key for key in {**before, **settings} if before.get(key) != settings.get(key)]:
            was, asked = (", ".join(f"{key} {given.get(key)}" for key in other) for given in (before, settings))
            was = in_brief(was)
            raise ValueError(f"{folder} holds an unfinished run with {was}, not {asked}: go on with its own, {ADVICE}.")
        return made

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say of a file that is none of ours, whatever torch and pickle raise about it, that it is none.

        Yields:
            Nothing.

        Raises:
            ValueError: It is none.
        """
        try:
            yield
        except Exception:
            raise ValueError(f"{self.path} is not what an interrupted tune leaves behind: {ADVICE}.") from None

    def demand_same_data(self, digest: str) -> None:
        """Make sure that the run goes on with the examples that it began with.

        Args:
            digest: Of the examples, see :func:`digest_of`.

        Raises:
            ValueError: They are others.
        """
        if self.state is not None and self.state["data"] != digest:
            raise ValueError(f"the data is not what the unfinished run in {self.path.parent} began with: {ADVICE}.")

    def keep(self, state: Callable[[], State], *, now: bool = False) -> None:
        """Write the file, where it is time.

        Args:
            state: Makes what shall be kept.
            now: Write it in any case.
        """
        if now or time.monotonic() - self._written >= self.every:
            with atomic_write(self.path) as file:
                torch.save({"settings": dict(self.settings), "state": state()}, file)
            self._written = time.monotonic()

    def remove(self) -> None:
        """Take the file away: the run has ended, or begins anew."""
        self.path.unlink(missing_ok=True)


def digest_of(examples: Sequence[Example]) -> str:
    """Tell examples apart from others.

    Args:
        examples: In their order.

    Returns:
        A digest of all that is in them.
    """
    digest = blake2b(digest_size=16)
    for example in examples:
        for key, value in example.items():
            digest.update(key.encode())
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()
