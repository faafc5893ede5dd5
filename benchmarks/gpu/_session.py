"""One call of ``python -m benchmarks gpu``: a plan, then file by file its tests and its parts, a table last.

What goes wrong costs its own part. The tests of a file gate this file alone; parts run in a process of their own, one
for each file, and a part that ends it, or leaves the device without an answer, or takes far longer than planned, is
left for the next call, while another process takes up the parts after it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.gpu import Part, Record
from benchmarks.gpu._device_tests import on_device, tests_of
from benchmarks.gpu._limits import CLOSING, PATIENCE, Clock
from benchmarks.gpu._table import TESTS, table, tests_in_words
from benchmarks.gpu._worker import STARTS_IN, Worker
from benchmarks.provenance import gpu_state, machine, software, sources

RECORDED = Path(__file__).resolve().parents[1] / "results"
# What decides most comes first: whether anything is right, what the machine can do, then the kernel that all stands on.
ORDER = (
    "smoke", "roofs", "sum_grad_squared", "whole_pass", "trace", "variants", "streaming_topk", "masked_adamw",
    "group_sum_grad_squared", "siblings",
)  # fmt: skip
TESTED_IN = 60.0

Key = tuple[str, str]


class RefusedError(ValueError):
    """What was asked for cannot be measured or recorded."""


def discover(package: str = "benchmarks.gpu") -> dict[str, ModuleType]:
    """Find every file of measurements, in the order in which they run."""
    folder = Path(import_module(package).__path__[0])
    names = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    order = sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: import_module(f"{package}.{name}") for name in order}


def recorded(folder: Path) -> list[Record]:
    """All records of parts in a folder; those of pytest's benchmarks have none."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if "part" in record]


def run(
    modules: dict[str, ModuleType],
    device: torch.device,
    results: Path,
    revision: str | None,
    only: Iterable[str] = (),
    seconds: float = 520,
    skip_tests: bool = False,
    patience: float = PATIENCE,
) -> int:
    """Measure what is asked for and not recorded yet.

    Args:
        modules: By name, as :func:`discover` gives them.
        device: What to measure on.
        results: Folder of all machines' records.
        revision: What the sources are, where git does not say it.
        only: Files, or parts as ``file/part``, of which ``file/tests`` is one; all where none is named.
        seconds: What the whole call may take; a later call takes up what does not fit.
        skip_tests: Whether the tests are left out; the records say that they were.
        patience: A part that takes so many times its planned seconds is stopped.

    Returns:
        Exit status: 0 when all that was asked for is recorded, 1 when a test or a part failed, 3 when parts are left.

    Raises:
        RefusedError: ``only`` names what there is not, or the revision is unknown.
    """
    clock = Clock(seconds, patience)
    origin = {**machine(), **software(revision), **gpu_state(), "sources": sources(), "tested": not skip_tests}
    if not origin["commit"]:
        raise RefusedError("there is no git here: name the revision with --revision TEXT.")
    print(f"{origin['machine']}: " + ", ".join(f"{key} {value}" for key, value in origin.items() if key != "machine"))
    wanted = _chosen(modules, device, set(only), skip_tests)
    folders = dict.fromkeys((results / origin["machine"], RECORDED / origin["machine"]))
    records = [r for folder in folders for r in recorded(folder) if r.get("sources") == origin["sources"]]
    done = {_key(record) for record in records if not record.get("red")}
    left = {key: part for key, part in wanted.items() if key not in done}
    print("\n".join(_plan(left, seconds)), flush=True)

    journal = Journal(results / origin["machine"], origin)
    failed: dict[Key, str] = {}
    for name in dict.fromkeys(name for name, _ in left):
        parts = {key: part for key, part in left.items() if key[0] == name}
        if tests := parts.pop((name, TESTS), None):
            if not clock.fits(tests.seconds):
                break
            found = on_device(tests_of(name, modules[name]), clock.limit(tests.seconds))
            journal.add((name, TESTS), [found])
            print(f"  {name}/{TESTS}: {tests_in_words(found)}", flush=True)
            if found["red"]:
                failed |= dict.fromkeys([(name, TESTS), *parts], "tests of it are red")
                continue
        failed |= _measure(modules[name], parts, device, clock, journal)

    print("\n".join(table([r for r in records + journal.records if _key(r) in wanted])))
    done |= {_key(record) for record in journal.records}
    if waiting := [key for key in left if key not in done and key not in failed]:
        print(f"Left for the next call, which finds what is recorded: {_listed(waiting)}.")
    if failed:
        lines = [f"  {'/'.join(key)}: {why}" for key, why in failed.items()]
        print("\n".join(["Failed, and nothing is recorded of these:", *lines]), file=sys.stderr)
        return 1
    return 3 if waiting else 0


class Journal:
    """Appends records to a file of this call, those of a part at once.

    Args:
        folder: Of this machine's records.
        origin: What every record says of where it comes from.

    Attributes:
        records: What was added.
    """

    def __init__(self, folder: Path, origin: Record) -> None:
        self._folder, self._origin = folder, origin
        self._stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        self.records: list[Record] = []

    def add(self, key: Key, found: list[Record]) -> None:
        """Record a part; an interrupted one is not recorded, and measured again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        kept = [{"op": key[0], "part": key[1], **self._with_files(key, record), **self._origin} for record in found]
        with (self._folder / f"{self._stamp}.jsonl").open("a") as file:
            file.writelines(json.dumps({**record, "time": stamp}) + "\n" for record in kept)
        self.records += kept

    def _with_files(self, key: Key, record: Record) -> Record:
        """Write what is bytes into files, and name them in its place."""
        written = {}
        for name, value in record.items():
            if isinstance(value, bytes):
                written[name] = "-".join([self._stamp, *key, name]).replace(" ", "-")
                (self._folder / written[name]).write_bytes(value)
        return {**record, **written}


def _measure(
    module: ModuleType, parts: dict[Key, Part], device: torch.device, clock: Clock, journal: Journal
) -> dict[Key, str]:
    """Measure parts of one file, and say why some could not be."""
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


def _chosen(modules: dict[str, ModuleType], device: torch.device, only: set[str], skip_tests: bool) -> dict[Key, Part]:
    every: dict[Key, Part] = {}
    for name, module in modules.items():
        if tests_of(name, module):
            every[name, TESTS] = Part(TESTS, lambda: iter(()), getattr(module, "TESTED_IN", TESTED_IN))
        every |= {(name, part.name): part for part in module.parts(device)}
    if unknown := only - {"/".join(key) for key in every} - modules.keys():
        raise RefusedError(f"there is nothing called {', '.join(sorted(unknown))}; there are {', '.join(modules)}.")
    chosen = {key for key in every if not only or key[0] in only or "/".join(key) in only}
    gates = {(name, TESTS) for name, _ in chosen}
    gated = (chosen - gates) if skip_tests else (chosen | gates)
    return {key: part for key, part in every.items() if key in gated}


def _plan(left: dict[Key, Part], seconds: float) -> Iterator[str]:
    """What the call will do, by the minutes that each file should take; what does not fit comes last."""
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
