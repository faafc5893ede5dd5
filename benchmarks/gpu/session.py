"""One call of ``python -m benchmarks gpu``: a plan, then case by case its tests and its parts, a table last.

What goes wrong costs its own part. The tests of a case gate this case alone. Its parts run in a process of their own,
and a part that ends it, or leaves the device without an answer, or takes far longer than planned, is left for the next
call, while another process takes up the parts after it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.engine import RESULTS, discover
from benchmarks.engine.origin import gpu_state, machine, software, sources
from benchmarks.engine.records import Record, Records, read
from benchmarks.gpu import Part
from benchmarks.gpu.device_tests import on_device
from benchmarks.gpu.limits import CLOSING, PATIENCE, Clock
from benchmarks.gpu.table import TESTS, table, tests_in_words
from benchmarks.gpu.worker import STARTS_IN, Worker

# The most decisive first: whether anything is right, what the machine can do, then the kernel of every pass.
ORDER = (
    "smoke", "roofs", "sum_grad_squared", "whole_pass", "trace", "variants", "streaming_topk", "masked_adamw",
    "group_sum_grad_squared", "expert_sum_grad_squared", "project_sum_squared", "log_histogram", "siblings",
)  # fmt: skip
TESTED_IN = 60.0

Key = tuple[str, str]  # case and part


class RefusedError(ValueError):
    """The request cannot be measured or recorded."""


def cases(package: str = discover.CASES) -> dict[str, ModuleType]:
    """Find the cases with parts on a GPU, in the order in which they run."""
    modules = discover.discover("gpu", package)
    order = sorted(modules, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: modules[name] for name in order}


def run(
    modules: dict[str, ModuleType],
    device: torch.device,
    results: Path,
    *,
    revision: str | None = None,
    only: Iterable[str] = (),
    seconds: float = 520,
    skip_tests: bool = False,
    patience: float = PATIENCE,
) -> int:
    """Measure what is requested and not recorded yet.

    Args:
        modules: By name, as :func:`cases` gives them.
        device: What to measure on.
        results: Folder of all machines' records.
        revision: Name of the sources, where there is no git.
        only: Cases, or parts as ``case/part``, of which ``case/tests`` is one; all where none is named.
        seconds: What the whole call may take; a later call takes up what does not fit.
        skip_tests: Whether the tests are left out; the records say that they were.
        patience: A part that takes so many times its planned seconds is stopped.

    Returns:
        Exit status: 0 when everything requested is recorded, 1 when a test or a part failed, 3 when parts are left.

    Raises:
        RefusedError: ``only`` has an unknown name, or the revision is unknown.
    """
    clock = Clock(seconds, patience)
    origin = {**machine(), **software(revision), **gpu_state(), "sources": sources(), "tested": not skip_tests}
    if not origin["commit"]:
        raise RefusedError("there is no git here: name the revision with --revision TEXT.")
    print(f"{origin['machine']}: " + ", ".join(f"{key} {value}" for key, value in origin.items() if key != "machine"))
    requested = selected(modules, device, set(only), skip_tests=skip_tests)
    folders = dict.fromkeys(folder.resolve() / origin["machine"] for folder in (results, RESULTS))
    records = [r for folder in folders for r in recorded(folder) if r.get("sources") == origin["sources"]]
    done = {_key(record) for record in records if not record.get("red")}
    left = {key: part for key, part in requested.items() if key not in done}
    print("\n".join(plan(left, seconds)), flush=True)

    journal = Journal(results / origin["machine"], origin)
    failed = _measure_all(modules, left, device, clock, journal)

    print("\n".join(table([r for r in records + journal.records if _key(r) in requested])))
    done |= {_key(record) for record in journal.records}
    if waiting := [key for key in left if key not in done and key not in failed]:
        print(f"Left for the next call, which finds what is recorded: {_listed(waiting)}.")
    if failed:
        lines = [f"  {'/'.join(key)}: {why}" for key, why in failed.items()]
        print("\n".join(["Failed, and nothing is recorded of these:", *lines]), file=sys.stderr)
        return 1
    return 3 if waiting else 0


def recorded(folder: Path) -> list[Record]:
    """All records of parts in a folder; those of ``run`` have none."""
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read(path) if "part" in record]


class Journal:
    """Appends records to a file of this call, those of a part at once.

    Args:
        folder: Of this machine's records.
        origin: Fields that tell where a record comes from.

    Attributes:
        records: All that were added.
    """

    def __init__(self, folder: Path, origin: Record) -> None:
        self._folder = folder
        self._stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        self._file = Records(folder / f"{self._stamp}.jsonl", origin=lambda: {**origin, "time": _now()})
        self.records: list[Record] = []

    def add(self, key: Key, measured: list[Record]) -> None:
        """Record a part; an interrupted one is not recorded, and measured again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.records += self._file.append(
            *({"op": key[0], "part": key[1], **self._with_files(key, record)} for record in measured)
        )

    def _with_files(self, key: Key, record: Record) -> Record:
        """Write values of ``bytes`` into files, and name these in their place."""
        written = {}
        for name, value in record.items():
            if isinstance(value, bytes):
                written[name] = "-".join([self._stamp, *key, name]).replace(" ", "-")
                (self._folder / written[name]).write_bytes(value)
        return {**record, **written}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _measure_all(
    modules: dict[str, ModuleType], left: dict[Key, Part], device: torch.device, clock: Clock, journal: Journal
) -> dict[Key, str]:
    """Test and measure case by case while there is time, and say why some parts have no record."""
    failed: dict[Key, str] = {}
    for name in dict.fromkeys(name for name, _ in left):
        parts = {key: part for key, part in left.items() if key[0] == name}
        if tests := parts.pop((name, TESTS), None):
            if not clock.fits(tests.seconds):
                break
            outcome = on_device(modules[name].TESTS["gpu"], clock.limit(tests.seconds))
            journal.add((name, TESTS), [outcome])
            print(f"  {name}/{TESTS}: {tests_in_words(outcome)}", flush=True)
            if outcome["red"]:
                failed |= dict.fromkeys([(name, TESTS), *parts], "tests of it are red")
                continue
        failed |= _measure(modules[name], parts, device, clock, journal)
    return failed


def _measure(
    module: ModuleType, parts: dict[Key, Part], device: torch.device, clock: Clock, journal: Journal
) -> dict[Key, str]:
    """Measure parts of one case, and say why some have no record."""
    failed: dict[Key, str] = {}
    waiting = list(parts.items())
    while waiting and clock.fits(STARTS_IN + waiting[0][1].seconds):
        with Worker(module.__name__, device) as worker:
            usable = True
            while usable and waiting and clock.fits(waiting[0][1].seconds):
                key, part = waiting.pop(0)
                outcome = worker.measure(part.name, clock.limit(part.seconds))
                usable = outcome.usable
                if outcome.failed:
                    failed[key] = outcome.failed
                    print(f"  {'/'.join(key)}: FAILED, {outcome.failed}", flush=True)
                else:
                    journal.add(key, outcome.records)
                    print(f"  {'/'.join(key)}: {len(outcome.records)} records", flush=True)
    return failed


def selected(
    modules: dict[str, ModuleType], device: torch.device, only: set[str], *, skip_tests: bool = False
) -> dict[Key, Part]:
    """The parts that are requested, each with the tests of its case."""
    every: dict[Key, Part] = {}
    for name, module in modules.items():
        if module.TESTS["gpu"]:
            every[name, TESTS] = Part(TESTS, lambda: iter(()), getattr(module, "TESTED_IN", TESTED_IN))
        every |= {(name, part.name): part for part in module.parts(device)}
    if unknown := only - {"/".join(key) for key in every} - modules.keys():
        raise RefusedError(f"there is nothing called {', '.join(sorted(unknown))}; there are {', '.join(modules)}.")
    named = {key for key in every if not only or key[0] in only or "/".join(key) in only}
    gates = {(name, TESTS) for name, _ in named}
    gated = (named - gates) if skip_tests else (named | gates)
    return {key: part for key, part in every.items() if key in gated}


def plan(left: dict[Key, Part], seconds: float) -> Iterator[str]:
    """The minutes that each case should take; parts that do not fit are last."""
    planned, later, lines = CLOSING, [], []
    for name in dict.fromkeys(name for name, _ in left):
        own = {key: part for key, part in left.items() if key[0] == name}
        starts = 0.0 if set(own) == {(name, TESTS)} else STARTS_IN
        fits, took = [], 0.0
        for key, part in own.items():
            if not later and planned + took + part.seconds + starts <= seconds:
                took += part.seconds
                fits.append(key[1])
            else:
                later.append(key)
        if fits:
            planned += took + starts
            number = len(fits) - (TESTS in fits)
            counted = [f"{number} part{'s' if number > 1 else ''}"] if number else []
            what = " and ".join([*([TESTS] if TESTS in fits else []), *counted])
            lines.append(f"  {(took + starts) / 60:4.1f}  {name}: {what}")
    yield f"Planned: {planned / 60:.1f} of {seconds / 60:.1f} minutes."
    yield from lines
    if later:
        yield f"  does not fit: {_listed(later)}"


def _key(record: Record) -> Key:
    return record["op"], record["part"]


def _listed(keys: Iterable[Key]) -> str:
    return ", ".join("/".join(key) for key in keys)
