"""What exactness buys, and what it does not: other squares beside the exact Fisher, and beside other examples.

    python -m benchmarks exactness --data FOLDER [--model FOLDER] [--encoder FOLDER]

On small real models (``benchmarks/exactness_subjects.py``) each estimator is compared with the exact per-example
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
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fishkern as fk
from benchmarks.exactness_subjects import Loaded, Subject, subjects
from benchmarks.provenance import machine, software
from fishkern.layers import PerExampleGrads
from fishkern.statistics.base import Estimator

FLOOR = "exact, other examples"


@dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Args:
        pairs: Pairs of disjoint sets.
        batch_sizes: Of the squared batch gradient; size 1, which is exact, is measured beside them as a check.
        passes: Batch size of all other passes, which matters to the sketch alone.
        densities: Selected fractions.
        seed: Of rows and draws.
    """

    pairs: int = 3
    batch_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    passes: int = 32
    densities: tuple[float, ...] = (0.005, 0.05)
    seed: int = 0


@dataclass(frozen=True)
class Bfloat16Sums(Estimator):
    """The loop with batches of one, exact but for its accumulator, which is rounded to bfloat16 after each."""

    loop: Estimator = field(default_factory=lambda: fk.DiagonalFisher(unit="batch"))

    @property
    def per_example(self) -> bool:
        return self.loop.per_example

    @property
    def definition(self) -> dict[str, Any]:
        return {**self.loop.definition, "accumulator": "bfloat16"}

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def objectives(self, answer: Any, examples: range) -> Iterator[Tensor | None]:
        return self.loop.objectives(answer, examples)

    def units(self, num_examples: int) -> int:
        return self.loop.units(num_examples)

    def init(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    def update_(self, state: Tensor, grads: PerExampleGrads, backend: Any = None) -> None:
        squares = torch.zeros(state.shape, device=state.device)
        self.loop.update_(squares, grads, backend)
        state += squares

    def result(self, state: Tensor, count: int) -> Tensor:
        return state.float() / count


@dataclass(frozen=True)
class Arm:
    """One way to estimate.

    Args:
        label: In records and table.
        estimator: From a seed to the recipe.
        batch_size: Rows in a batch.
        sizes: Numbers of examples, ascending; a larger one continues the smaller.
        likelihood: ``None`` for the model's own loss.
    """

    label: str
    estimator: Callable[[int], Estimator]
    batch_size: int
    sizes: tuple[int, ...]
    likelihood: fk.Likelihood | None = None


def arms(subject: Subject, setting: Setting) -> list[Arm]:
    sizes, passes = subject.sizes, setting.passes
    found = [Arm("batch gradient, N = 1", _squared_batch, 1, sizes[:1])]
    for size in setting.batch_sizes:
        fits = tuple(n for n in sizes if n % size == 0)
        found.append(Arm(f"batch gradient, N = {size}", _squared_batch, size, fits))
    found += [
        Arm(f"sketch of 1 draw, N = {passes}", lambda seed: fk.SketchedFisher(1, seed), passes, sizes),
        Arm(f"sketch of 8 draws, N = {passes}", lambda seed: fk.SketchedFisher(8, seed), passes, sizes[:-1] or sizes),
        Arm("each position squared", lambda _: fk.DiagonalFisher(unit="position"), passes, sizes),
        Arm("drawn labels (mc)", lambda seed: fk.DiagonalFisher(fisher_type="mc", seed=seed), passes, sizes),
    ]
    if subject.language:
        summed = fk.CausalLM(reduction="sum")
        found.append(Arm("token-sum losses", lambda _: fk.DiagonalFisher(), passes, sizes, summed))
        found.append(Arm("sums in bfloat16, N = 1", lambda _: Bfloat16Sums(), 1, sizes[-1:]))
    return found


def _squared_batch(_: int) -> Estimator:
    return fk.DiagonalFisher(unit="batch")


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, and print the tables and what they say."""
    given = _parser().parse_args(arguments)
    from benchmarks.glue import packaged_encoder

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
    found.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
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


class Measured:
    """A statistic and what is selected by it, each selection made once."""

    def __init__(self, statistic: fk.Statistics, densities: tuple[float, ...]) -> None:
        self.statistic = statistic
        self.total = statistic.total
        self.selections = {d: fk.select(statistic, fk.GlobalTopK(density=d)) for d in densities}


def estimates(loaded: Loaded, arm: Arm, rows: range, setting: Setting) -> Iterator[tuple[int, Measured, float]]:
    """Estimate on the first ``n`` of the rows for each size of the arm, with the seconds of all passes that took."""
    done, whole, seconds = 0, None, 0.0
    for n in arm.sizes:
        part = rows[done:n]
        start = time.perf_counter()
        found = fk.estimate(
            loaded.model,
            loaded.batches(part, arm.batch_size),
            arm.estimator(setting.seed * 1_000_000 + part.start),  # each part of each set has a seed of its own
            likelihood=arm.likelihood,
            parameters=loaded.parameters,
            check=arm.label == "exact",
        )
        whole = found if whole is None else fk.merge(whole, found)
        seconds += time.perf_counter() - start
        done = n
        yield n, Measured(whole, setting.densities), seconds


def compared(one: Measured, reference: Measured) -> dict[str, Any]:
    """Distance and overlap; ``scale`` is the factor that brings ``one`` nearest to the reference."""
    sums = torch.zeros(4, dtype=torch.float64)
    for name in reference.statistic:
        a, b = one.statistic[name].double(), reference.statistic[name].double()
        sums += torch.stack([(a - b).square().sum(), a.square().sum(), (a * b).sum(), b.square().sum()])
    difference, own, product, size = sums.tolist()
    scale = product / own
    rest = sum(
        (scale * one.statistic[name].double() - reference.statistic[name].double()).square().sum().item()
        for name in reference.statistic
    )
    top = {}
    for density, selection in reference.selections.items():
        ours = one.selections[density]
        if ours.names != selection.names or ours.count != selection.count:
            raise ValueError("selections out of different pools, or of different sizes, say nothing of each other.")
        shared = (ours & selection).count
        top[str(density)] = {
            "k": selection.count,
            "overlap": shared / selection.count,
            "jaccard": ours.overlap(selection),
        }
    return {
        "relative_l2": (difference / size) ** 0.5,
        "scale": scale,
        "relative_l2_scaled": (rest / size) ** 0.5,
        "top": top,
    }


def grouped(records: list[dict[str, Any]], examples: int) -> dict[str, list[dict[str, Any]]]:
    """The records of one number of examples by label, the floor first."""
    found: dict[str, list[dict[str, Any]]] = {FLOOR: []}
    for record in records:
        if record["examples"] == examples:
            found.setdefault(record["label"], []).append(record)
    return found


def overlaps(records: list[dict[str, Any]], density: str) -> list[float]:
    return [record["top"][density]["overlap"] for record in records]


def standing(values: list[float], floor: list[float]) -> str:
    """Say where overlaps stand: every one below, or above, every one of the floor, or neither."""
    if max(values) < min(floor):
        return "beyond"
    return "closer" if min(values) > max(floor) else "within"


def table(records: list[dict[str, Any]]) -> str:
    """Every estimator beside the noise floor of its number of examples, medians and ranges over the pairs."""
    first = records[0]
    about, densities = first["about"], list(first["top"])
    lines = [f"{first['subject']}: {about['model']}; {about['text']}; pool of {first['pool']:,} entries"]
    tops = "".join(f"{f'top {float(d):.1%}':>23}" for d in densities)
    for examples in sorted({record["examples"] for record in records}):
        lines.append(f"\n{f'{examples} examples':28}{'rel. L2':>8}{'scale':>8}{'scaled':>8}{tops}{'others':>8}")
        groups = grouped(records, examples)
        for label, found in groups.items():
            middle = {key: _median(found, key) for key in ("relative_l2", "scale", "relative_l2_scaled")}
            line = f"{label:28}{middle['relative_l2']:8.3f}{middle['scale']:8.2g}{middle['relative_l2_scaled']:8.3f}"
            for density in densities:
                values = overlaps(found, density)
                place = "floor" if label == FLOOR else standing(values, overlaps(groups[FLOOR], density))
                spread = f"{100 * statistics.median(values):.1f} ({100 * min(values):.0f}-{100 * max(values):.0f})"
                line += f"{spread:>16}{place:>7}"
            unseen = [record["others"]["top"][densities[0]]["overlap"] for record in found]
            lines.append(f"{line}{100 * statistics.median(unseen):8.1f}")
    pairs, most = len({record["pair"] for record in records}), max(record["examples"] for record in records)
    lines.append(
        f"\nOverlaps in percent: median (range) of {pairs} pairs. scaled: rel. L2 after the best scale. others: of\n"
        f"the top {float(densities[0]):.1%} by the exact Fisher of {most} examples not seen, the part that is found."
    )
    return "\n".join(lines)


def _median(records: list[dict[str, Any]], key: str) -> float:
    return statistics.median(record[key] for record in records)


def verdicts(records: list[dict[str, Any]]) -> Iterator[str]:
    """Say for each number of examples which estimators differ from the exact Fisher by more than other examples do."""
    words = {
        "beyond": "differ by more than other examples do (below the floor)",
        "within": "cannot be told from other examples (within the floor)",
        "closer": "differ by less than other examples do (above the floor)",
    }
    for examples in sorted({record["examples"] for record in records}):
        groups = grouped(records, examples)
        floor = groups.pop(FLOOR)
        for density in floor[0]["top"]:
            head = f"{floor[0]['subject']}, {examples} examples, top {float(density):.1%}"
            noise = overlaps(floor, density)
            yield f"{head}: two exact Fishers share {_range(noise)}"
            places = {label: standing(overlaps(found, density), noise) for label, found in groups.items()}
            yield from _listed(words, places)
            unseen = {label: _unseen(found, density) for label, found in groups.items()}
            exact = _unseen(floor, density)
            yield f"{head}, of the selection by unseen examples: the exact Fisher finds {_range(list(exact.values()))}"
            signs = {label: _sign([found[pair] - exact[pair] for pair in found]) for label, found in unseen.items()}
            yield from _listed({"fewer": "fewer than it, in every pair", "more": "more than it, in every pair"}, signs)


def _unseen(records: list[dict[str, Any]], density: str) -> dict[int, float]:
    return {record["pair"]: record["others"]["top"][density]["overlap"] for record in records}


def _sign(gains: list[float]) -> str:
    if max(gains) < 0:
        return "fewer"
    return "more" if min(gains) > 0 else "neither"


def _range(values: list[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}"


def _listed(words: dict[Any, str], places: dict[str, Any]) -> Iterator[str]:
    for place, meaning in words.items():
        if labels := [label for label, where in places.items() if where == place]:
            yield f"    {meaning}: {'; '.join(labels)}"
