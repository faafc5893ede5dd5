"""Resuming an interrupted ``fishkern tune``: one file with everything that the rest of its training depends on."""

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
KEYS = ("data", "seconds", "before", "seen", "values", "buffers", "optimizer", "schedule", "generators", "epoch")
"""What the state in the file consists of."""
STOPPING = "stopping"
"""And with ``--method fisher-adaptune``."""

ADVICE = "choose another --out, or start over with --restart"

State = dict[str, Any]


@dataclass
class Checkpoint:
    """The file of an unfinished run: written whole every so often, removed when the run has ended.

    Attributes:
        path: The file.
        settings: The options of the run, as plain values.
        every: Seconds between two writes.
        state: The state in the file when it was opened, or ``None`` if there was no file.
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
            folder: The folder of the run.
            settings: The options of this run.
            every: Seconds between two writes.
            restart: Discard an unfinished run.

        Returns:
            The checkpoint that a run with these settings resumes from.

        Raises:
            ValueError: The unfinished run has other settings, or its file cannot be read.
        """
        checkpoint = cls(folder / FILE, settings, every)
        if restart:
            checkpoint.remove()
        if not checkpoint.path.exists():
            return checkpoint
        with checkpoint.reading():
            stored = torch.load(checkpoint.path, map_location="cpu", weights_only=True)
            # older versions had one method only
            before, state = {"method": "fish", **stored["settings"]}, stored["state"]
            keys = (*KEYS, STOPPING) if before["method"] == "fisher-adaptune" else KEYS
            checkpoint.state = {key: state[key] for key in keys}
        if other := [key for key in {**before, **settings} if before.get(key) != settings.get(key)]:
            was, requested = (", ".join(f"{key} {run.get(key)}" for key in other) for run in (before, settings))
            raise ValueError(
                f"{folder} holds an unfinished run with {in_brief(was)}, not {requested}: resume it with its own "
                f"options, {ADVICE}."
            )
        return checkpoint

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever torch and pickle raise about a foreign file into one message.

        Yields:
            Nothing.

        Raises:
            ValueError: The file is not that of an interrupted run.
        """
        try:
            yield
        except Exception:
            raise ValueError(f"{self.path} is not the file of an interrupted tune: {ADVICE}.") from None

    def demand_same_data(self, digest: str) -> None:
        """Check that the run resumes with the examples that it began with.

        Args:
            digest: Of the examples, see :func:`digest_of`.

        Raises:
            ValueError: They are others.
        """
        if self.state is not None and self.state["data"] != digest:
            raise ValueError(f"the data differs from that of the unfinished run in {self.path.parent}: {ADVICE}.")

    def keep(self, state: Callable[[], State], *, now: bool = False) -> None:
        """Write the file, if enough time has passed since the last write.

        Args:
            state: Gives the state; called only for a write.
            now: Write in any case.
        """
        if now or time.monotonic() - self._written >= self.every:
            with atomic_write(self.path) as file:
                torch.save({"settings": dict(self.settings), "state": state()}, file)
            self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the run has ended, or starts over."""
        self.path.unlink(missing_ok=True)


def digest_of(examples: Sequence[Example]) -> str:
    """Make a digest of examples, by which they are recognised.

    Args:
        examples: In their order.

    Returns:
        A digest of everything in them.
    """
    digest = blake2b(digest_size=16)
    for example in examples:
        for key, value in example.items():
            digest.update(key.encode())
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()
