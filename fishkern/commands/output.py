"""Output of the commands: results on standard output, notes and progress on standard error."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.segment import Segment

from fishkern.files import check_target, files_of
from fishkern.selection import Selection
from fishkern.statistics import Energies, Statistics

Report = Callable[[int, int | None], None]

_LARGEST_REPORT = 100_000_000  # bytes


@dataclass
class Stopwatch:
    """Seconds that each part of a command takes.

    Attributes:
        ended: Seconds of what has ended, by part.
    """

    ended: dict[str, float] = field(default_factory=dict)
    _running: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far, by part."""
        now = time.perf_counter()
        running = {what: now - start for what, start in self._running.items()}
        return {what: self.ended.get(what, 0.0) + running.get(what, 0.0) for what in {**self.ended, **running}}

    @contextmanager
    def adding(self, what: str) -> Iterator[None]:
        """Add the seconds that a block takes.

        Args:
            what: The part.

        Yields:
            Nothing.
        """
        self._running[what] = time.perf_counter()
        try:
            yield
        finally:
            self.ended = {**self.ended, what: self.seconds[what]}
            del self._running[what]


class _ResultConsole(Console):
    """Prints control characters of a file as text, and raises when the reader of the output has closed it."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in segment.text)
            yield segment if segment.control or text == segment.text else segment._replace(text=text)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Make the console for results; lines are not wrapped, so that paths can be copied.

    Returns:
        A console on standard output; if that is no terminal, wide enough for every table.
    """
    results = _ResultConsole(highlight=False, soft_wrap=True, markup=False)
    if not results.is_terminal:
        results.width = 160
    return results


def note(text: str) -> None:
    """Say something that is not the result.

    Args:
        text: One line.
    """
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(f"note: {text}")


@contextmanager
def progress(what: str, unit: str, begun: int = 0, then: str = "") -> Iterator[Report]:
    """Show the progress, the rate and the time left; nothing if standard error is no terminal.

    Args:
        what: Such as ``"estimating"``.
        unit: Such as ``"examples"``.
        begun: How many were done before.
        then: What follows when all are done, of unknown length.

    Yields:
        A function of the number done and the total, if known.
    """
    stream = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(30), TextColumn("{task.description}"))
    start = time.monotonic()
    with Progress(*columns, console=stream, transient=True, disable=not stream.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def report(done: int, total: int | None) -> None:
            rate = (done - begun) / max(time.monotonic() - start, 1e-9)
            left = f", {(total - done) / rate:,.0f} s left" if total and rate else ""
            of = f" of {total:,}" if total else ""
            if then and done == total:
                bar.update(task, completed=done, total=None, description=f"{done:,} {unit} done, {then}")
                return
            bar.update(task, completed=done, total=total, description=f"{done:,}{of} {unit}, {rate:,.1f}/s{left}")

        yield report


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """Show that something of unknown length is under way; nothing if standard error is no terminal.

    Args:
        what: Such as ``"reading data"``.

    Yields:
        A function that says what comes next.
    """
    stream = Console(stderr=True)
    if not stream.is_terminal:
        yield lambda what: None
        return
    with stream.status(what) as status:
        yield status.update


def checked_file(path: str | os.PathLike[str], option: str, name: str) -> Path:
    """Check before the work that a file can be written.

    Args:
        path: The file; a string may end in a slash.
        option: The option that names it.
        name: What a file in a folder might be called, for the message.

    Returns:
        The path.

    Raises:
        FileNotFoundError: Its folder does not exist.
        PermissionError: Its folder may not be written to.
        OSError: It is a folder, or not a regular file.
    """
    check_target(path, name)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: create it, or choose another {option}.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent.absolute()} may not be written to: choose another folder with {option}.")
    return path


def checked_report(
    path: str | os.PathLike[str], option: str, keys: Iterable[str], *, name: str = "report.json", what: str = "report"
) -> Path:
    """Check before the work that a report can be written, and replaces nothing but an older report.

    Args:
        path: The file.
        option: The option that names it.
        keys: The keys of a report.
        name: What a file in a folder might be called, for the message.
        what: What the file holds, for the message.

    Returns:
        The path.

    Raises:
        FileExistsError: It holds something else.
        OSError: As in :func:`checked_file`.
    """
    path = checked_file(path, option, name)
    if path.is_file() and path.stat().st_size:
        try:
            content = json.loads(path.read_bytes()) if path.stat().st_size < _LARGEST_REPORT else None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise FileExistsError(f"{path} holds no {what} and is not overwritten: choose another name with {option}.")
    return path


def checked_path(
    path: str | os.PathLike[str], kind: type[Statistics | Selection | Energies] = Statistics, option: str = "--out"
) -> Path:
    """Check before the work that statistics, energies or a selection can be saved.

    Args:
        path: The file; a string may end in a slash.
        kind: Which of them.
        option: The option that names it.

    Returns:
        The path with its suffix.

    Raises:
        ValueError: The name is that of another kind of file.
        FileExistsError: It holds something else.
        OSError: As in :func:`checked_file`.
    """
    name = f"{kind.__name__.lower()}.safetensors"
    path = checked_file(path, option, name)
    if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) and path.suffix != ".safetensors":
        advice = path.with_suffix(".safetensors")
        raise ValueError(f"the output is a .safetensors file, and {path} names another kind: {option} {advice}.")
    path = checked_file(path.with_name(path.name.removesuffix(".safetensors") + ".safetensors"), option, name)
    if path.exists():
        try:
            kind.load(path, **({} if kind is Selection else {"lazy": True}))
        except ValueError as error:
            raise FileExistsError(f"{error} It is not overwritten: choose another name with {option}.") from None
    return path


def rows_in_words(rows: Any) -> str:
    """Say how many rows were read, and how.

    Args:
        rows: ``{"used": ..., "of": ..., "seed": ...}``; a sentence in files of older versions.

    Returns:
        A sentence.
    """
    if not isinstance(rows, Mapping):
        return str(rows)
    if rows["seed"] is None:
        return f"{rows['used']:,}, the first rows"
    return f"{rows['used']:,}, drawn at random with seed {rows['seed']} from {rows['of']:,} rows"


def next_command(*words: object) -> None:
    """Suggest what to do next, as a line that can be pasted into a shell.

    Args:
        words: The command and its arguments.
    """
    console().print(f"\nNext:  {shlex.join(map(str, words))}")


def size_on_disk(path: Path) -> str:
    """Say how large a save is.

    Args:
        path: What :meth:`Statistics.save` returned.

    Returns:
        Kilobytes or megabytes, with its index and its shards.
    """
    total = sum(file.stat().st_size for file in files_of(path))
    return f"{total / 1e6:,.1f} MB" if total >= 1e5 else f"{total / 1e3:.1f} kB"
