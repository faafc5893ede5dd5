"""What exactness buys, and what it does not: other squares beside the exact Fisher, and beside other examples.

    python -m benchmarks exactness --data FOLDER [--model FOLDER] [--encoder FOLDER]

On small real models (``subjects.py``) each estimator is compared with the exact per-example
empirical Fisher **of the same examples**: by relative L2 distance, as it comes and after the best scale (which a
selection does not see), and by the entries that ``GlobalTopK`` takes of both. Beside it stands the **noise floor**: two
exact Fishers of as many, but disjoint, examples. What differs by less than the floor cannot be told from having drawn
other examples. Last, ``others`` compares each selection with that of the exact Fisher of the largest number of disjoint
examples: how well does it find what matters on data that it has not seen?

A pair is two disjoint sets of rows; no row stands in two pairs, and draws have a seed for each set. Estimators run on
the first set of each pair. An estimator stands *beyond* the floor if each of its overlaps is below each of the floor's,
*closer* if each is above, else *within*: with three pairs, one in twenty such verdicts comes by chance. The figures are
of small models and short texts; they say nothing about how well a selection trains. Rows of *stories* have one length,
so that a sum over tokens differs from a mean by its scale alone there.

Overlap is the part of the k entries that two selections share; ``jaccard`` of the records is shared / selected by
either. The chance level is the density itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import fishkern as fk
from benchmarks.exactness.comparison import Measured, compared, estimates
from benchmarks.exactness.estimators import Arm, Setting, arms
from benchmarks.exactness.subjects import Loaded, Subject, subjects
from benchmarks.exactness.verdicts import FLOOR, table, verdicts
from benchmarks.provenance import machine, software


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, and print the tables and what they say."""
    given = _parser().parse_args(arguments)
    from benchmarks.glue.data import packaged_encoder

    setting = Setting(pairs=given.pairs)
    llama = given.model or given.data.parent / "models" / "stories260K"
    log = Log(given.results / machine()["machine"] / "exactness.jsonl", setting)
    found = subjects(given.data, llama, lambda: given.encoder or packaged_encoder())
    chosen = [subject for subject in found if subject.name in given.only]
    if given.sizes:
        chosen = [replace(subject, sizes=tuple(sorted(given.sizes))) for subject in chosen]
    for subject in chosen:
        measure(subject, setting, log)
    for subject in chosen:
        print(table(log.of(subject)) + "\n")
    for subject in chosen:
        print("\n".join(verdicts(log.of(subject))))
    return 0


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("stories", "cola", "sst2")
    found.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="GLUE: holds cola/train.parquet etc.")
    found.add_argument("--model", type=Path, metavar="FOLDER", help="stories260K; by default in ../models of the data")
    found.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT; by default the packaged MiniLM")
    found.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR")
    found.add_argument("--pairs", type=int, default=Setting.pairs, metavar="N", help="default: %(default)s")
    found.add_argument("--sizes", nargs="+", type=int, metavar="N", help="examples, instead of the subject's own")
    found.add_argument("--only", nargs="+", choices=names, default=names, metavar="SUBJECT", help="one of %(choices)s")
    return found


class Log:
    """One line for each measurement; what is there with the same setting is not measured again."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self._path = path
        self._setting = json.loads(json.dumps(asdict(setting)))
        lines = path.read_text().splitlines() if path.exists() else []
        self._records = [r for r in map(json.loads, lines) if r["setting"] == self._setting]

    def of(self, subject: Subject) -> list[dict[str, Any]]:
        """The records of a subject; which rows a set has depends on the largest of its sizes."""
        wanted = (subject.name, list(subject.sizes))
        return [record for record in self._records if (record["subject"], record["sizes"]) == wanted]

    def has(self, subject: Subject, label: str, examples: int, pair: int) -> bool:
        wanted = (label, examples, pair)
        return any((r["label"], r["examples"], r["pair"]) == wanted for r in self.of(subject))

    def add(self, record: dict[str, Any]) -> None:
        record = {"study": "exactness", "setting": self._setting, **record, **machine(), **software()}
        text = json.dumps(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(text + "\n")
        self._records.append(json.loads(text))


def measure(subject: Subject, setting: Setting, log: Log) -> None:
    """Measure what is missing of one subject, pair by pair."""
    largest = max(subject.sizes)
    exact = Arm("exact", lambda _: fk.DiagonalFisher(), setting.passes, subject.sizes)
    fewer = {f"exact, the first {n} of them": n for n in subject.sizes[:-1]}
    loaded = None
    for pair in range(setting.pairs):
        missing = [(label, largest) for label in fewer] + [(FLOOR, n) for n in subject.sizes]
        missing = [key for key in missing if not log.has(subject, *key, pair)]
        todo = [
            (arm, sizes)
            for arm in arms(subject, setting)
            if (sizes := [n for n in arm.sizes if not log.has(subject, arm.label, n, pair)])
        ]
        if not missing and not todo:
            continue
        if loaded is None:
            say(f"{subject.name}: loading")
            loaded = subject.load(2 * setting.pairs * largest, setting.seed)
            refuse_repeated(loaded)
        rows, others = (range(n * largest, (n + 1) * largest) for n in (2 * pair, 2 * pair + 1))
        say(f"{subject.name}, pair {pair + 1} of {setting.pairs}: exact, twice")
        ours = {n: found for n, found, _ in estimates(loaded, exact, rows, setting)}
        theirs = {n: found for n, found, _ in estimates(loaded, exact, others, setting)}

        place = {"subject": subject.name, "sizes": subject.sizes, "about": loaded.about, "pair": pair}
        add = partial(_add, log, place, theirs[largest])
        for label, n in missing:
            if label == FLOOR:
                add("floor", label, n, setting.passes, ours[n], theirs[n])
            else:
                add("fewer", label, n, setting.passes, ours[fewer[label]], ours[largest])
        for arm, sizes in todo:
            say(f"{subject.name}, pair {pair + 1} of {setting.pairs}: {arm.label}")
            for n, found, seconds in estimates(loaded, arm, rows, setting):
                if n in sizes:
                    add("estimator", arm.label, n, arm.batch_size, found, ours[n], seconds=round(seconds, 3))


def _add(
    log: Log,
    place: dict[str, Any],
    unseen: Measured,
    quantity: str,
    label: str,
    examples: int,
    batch_size: int,
    found: Measured,
    reference: Measured,
    **more: Any,
) -> None:
    """Record one estimate beside its reference, and beside the exact Fisher of examples that it has not seen."""
    what = {"quantity": quantity, "label": label, "examples": examples, "batch_size": batch_size, "pool": found.total}
    log.add({**place, **what, **more, **compared(found, reference), "others": compared(found, unseen)})


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def refuse_repeated(loaded: Loaded) -> None:
    distinct = {tuple(ids) for ids, _ in loaded.rows}
    if len(distinct) < len(loaded.rows):
        raise ValueError(f"{len(loaded.rows) - len(distinct)} rows stand twice: sets would not be disjoint.")
