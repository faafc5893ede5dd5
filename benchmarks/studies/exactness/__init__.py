"""What exactness buys, and what it does not: other squares against the exact Fisher, and against other examples.

    python -m benchmarks exactness --data FOLDER [--model FOLDER] [--encoder FOLDER]

On small real models (``subjects.py``) each estimator is compared with the exact per-example
empirical Fisher **of the same examples**: by relative L2 distance, unscaled and after the best scale (which a
selection does not see), and by the entries that ``GlobalTopK`` takes of both. The **noise floor** is the same between
two exact Fishers of as many, but disjoint, examples. A difference below the floor could as well be one of the examples.
Last, ``others`` compares each selection with that of the exact Fisher of the largest number of disjoint examples: how
well does it find what matters on data that it has not seen?

A pair is two disjoint sets of rows; no row is in two pairs, and each set has a seed for its draws. Estimators run on
the first set of each pair. An estimator is *beyond* the floor if each of its overlaps is below each of the floor's,
*closer* if each is above, else *within*: with three pairs, one in twenty such verdicts is chance. The figures are
of small models and short texts; they do not tell how well a selection trains. Rows of *stories* have one length,
so a sum over tokens differs from a mean only by its scale there.

Overlap is the part of the k entries that two selections share; ``jaccard`` of the records is shared / selected by
either. The chance level is the density itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fishkern as fk
from benchmarks.engine import RESULTS
from benchmarks.engine.origin import machine
from benchmarks.engine.records import Record, Records
from benchmarks.studies.comparing.limit import say
from benchmarks.studies.exactness.comparison import Measured, compared, estimates
from benchmarks.studies.exactness.estimators import Arm, Setting, arms
from benchmarks.studies.exactness.subjects import Loaded, Subject, subjects
from benchmarks.studies.exactness.verdicts import FLOOR, table, verdicts


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, and print tables and verdicts."""
    given = _parser().parse_args(arguments)
    from benchmarks.studies.glue.data import packaged_encoder

    setting = Setting(pairs=given.pairs)
    llama = given.model or given.data.parent / "models" / "stories260K"
    log = log_of(given.results / machine()["machine"] / "exactness.jsonl", setting)
    every = subjects(given.data, llama, lambda: given.encoder or packaged_encoder())
    requested = [subject for subject in every if subject.name in given.only]
    if given.sizes:
        requested = [replace(subject, sizes=tuple(sorted(given.sizes))) for subject in requested]
    for subject in requested:
        measure(subject, setting, log)
    for subject in requested:
        print(table(of(log, subject)) + "\n")
    for subject in requested:
        print("\n".join(verdicts(of(log, subject))))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("stories", "cola", "sst2")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="GLUE: holds cola/train.parquet etc."
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="stories260K; by default in ../models of the data")
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT; by default the packaged MiniLM")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--pairs", type=int, default=Setting.pairs, metavar="N", help="default: %(default)s")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="examples, instead of the subject's own")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SUBJECT", help="one of %(choices)s")
    return parser


def log_of(path: Path, setting: Setting) -> Records:
    """The records of this setting; a measurement that is there is not repeated."""
    return Records(path, study="exactness", setting=asdict(setting))


def of(log: Records, subject: Subject, **fields: Any) -> list[Record]:
    """The records of a subject; which rows a set has depends on the largest of its sizes."""
    return log.find(subject=subject.name, sizes=subject.sizes, **fields)


def measure(subject: Subject, setting: Setting, log: Records) -> None:
    """Measure what is missing of one subject, pair by pair."""
    largest = max(subject.sizes)
    loaded = None
    for pair in range(setting.pairs):

        def missing(label: str, sizes: Iterable[int], pair: int = pair) -> list[int]:
            return [n for n in sizes if not of(log, subject, label=label, examples=n, pair=pair)]

        floor = missing(FLOOR, subject.sizes)
        fewer = [n for n in subject.sizes[:-1] if missing(_first(n), [largest])]
        todo = [(arm, sizes) for arm in arms(subject, setting) if (sizes := missing(arm.label, arm.sizes))]
        if not (floor or fewer or todo):
            continue
        if loaded is None:
            say(f"{subject.name}: loading")
            loaded = subject.load(2 * setting.pairs * largest, setting.seed)
            refuse_repeated(loaded)
        measured = Pair(subject, setting, loaded, log, pair)
        for n in floor:
            measured.add("floor", Estimate(FLOOR, n, setting.passes, measured.ours[n]), measured.theirs[n])
        for n in fewer:
            label = _first(n)
            measured.add("fewer", Estimate(label, largest, setting.passes, measured.ours[n]), measured.ours[largest])
        for arm, sizes in todo:
            measured.add_arm(arm, sizes)


def _first(n: int) -> str:
    return f"exact, the first {n} of them"


@dataclass(frozen=True)
class Estimate:
    """One statistic: by which label, of how many examples, in batches of which size."""

    label: str
    examples: int
    batch_size: int
    measured: Measured


class Pair:
    """Two disjoint sets of rows, and the exact Fishers of both by number of examples: ``ours`` and ``theirs``."""

    def __init__(self, subject: Subject, setting: Setting, loaded: Loaded, log: Records, number: int) -> None:
        self._setting, self._loaded, self._log = setting, loaded, log
        self._name = f"{subject.name}, pair {number + 1} of {setting.pairs}"
        self._about = {"subject": subject.name, "sizes": subject.sizes, "about": loaded.about, "pair": number}
        largest = max(subject.sizes)
        self._rows, others = (range(n * largest, (n + 1) * largest) for n in (2 * number, 2 * number + 1))
        say(f"{self._name}: exact, twice")
        exact = Arm("exact", lambda _: fk.DiagonalFisher(), setting.passes, subject.sizes)
        self.ours = {n: measured for n, measured, _ in estimates(loaded, exact, self._rows, setting)}
        self.theirs = {n: measured for n, measured, _ in estimates(loaded, exact, others, setting)}
        self._unseen = self.theirs[largest]

    def add(self, quantity: str, estimate: Estimate, reference: Measured, **more: Any) -> None:
        """Record an estimate compared with a reference, and with the exact Fisher of examples that it has not seen."""
        measured = estimate.measured
        record = {"quantity": quantity, "label": estimate.label, "examples": estimate.examples}
        record |= {"batch_size": estimate.batch_size, "pool": measured.total, **more}
        record |= {**compared(measured, reference), "others": compared(measured, self._unseen)}
        self._log.append({**self._about, **record})

    def add_arm(self, arm: Arm, sizes: list[int]) -> None:
        """Estimate by an arm, and record it at these sizes."""
        say(f"{self._name}: {arm.label}")
        for n, measured, seconds in estimates(self._loaded, arm, self._rows, self._setting):
            if n in sizes:
                estimate = Estimate(arm.label, n, arm.batch_size, measured)
                self.add("estimator", estimate, self.ours[n], seconds=round(seconds, 3))


def refuse_repeated(loaded: Loaded) -> None:
    distinct = {tuple(ids) for ids, _ in loaded.rows}
    if len(distinct) < len(loaded.rows):
        raise ValueError(f"{len(loaded.rows) - len(distinct)} rows appear twice: sets would not be disjoint.")
