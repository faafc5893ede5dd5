"""Starts of low-rank adapters at equal budgets: FARSS, FILet, what PEFT has, and controls that know less.

    python -m benchmarks starts --data FOLDER [--task minilm-sst2 ...] [--model FOLDER] [--encoder FOLDER]

Two questions. *stories-sst2* and *stories-cola*: a small LLaMA learns sentences; how much of the stories that it knew
does each start cost? Forgetting is measured against the untrained model, on texts that it draws itself. *minilm-sst2*
and *minilm-cola*: MiniLM learns a classifier; does the start help? *statistics*: how much of what a start chooses is
the data's, and how much chance?

Every arm trains as many parameters, except *farss-published*, whose rounding misses the budget; its own number is in
the table. All see the same rows in the same order, and each chooses its learning rate among the same ones on a seed
and on training rows that nothing else uses. Then it runs with the same seeds, each of which also draws the examples
that an informed start looks at. The seconds of a run include the start; on a CPU they are those of the process (user
and system). Each run is one line in the results and written when it ends; an interrupted comparison goes on where it
stopped, the most important runs first. The figures are of small models, with few rows.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.engine.origin import machine
from benchmarks.engine.records import Record
from benchmarks.studies.comparing.command import add_options, complete, conclude, report, say_what_arms_are
from benchmarks.studies.comparing.limit import Limit
from benchmarks.studies.comparing.part import Part
from benchmarks.studies.comparing.runs import STAGES
from benchmarks.studies.glue.data import encoder_name, packaged_encoder
from benchmarks.studies.starts import statistic
from benchmarks.studies.starts.arms import ARMS, arms_of
from benchmarks.studies.starts.log import StartsLog
from benchmarks.studies.starts.run import run
from benchmarks.studies.starts.setting import SETTINGS, Setting
from benchmarks.studies.starts.tasks import Task, task_of

STATISTICS = "statistics"
STATISTICS_OF = ("stories-sst2", "minilm-sst2")


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, and print a table for each task."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        return say_what_arms_are(ARMS)
    if given.data is None:
        parser.error("--data is needed: the folder of GLUE, which holds sst2/train.parquet etc.")
    models = {"llama": given.model or given.data.parent / "models" / "stories260K"}
    models["encoder"] = (lambda: given.encoder) if given.encoder else packaged_encoder
    limit = Limit(given.seconds)
    path = given.results / machine()["machine"] / "starts.jsonl"
    parts = [StartsPart(SETTINGS[name], path, given, models) for name in given.task if name != STATISTICS]
    if given.dry_run:
        return report([line for part in parts for line in part.try_arms()])
    for stage in range(STAGES):
        complete(parts, stage, limit)
        if stage == 0 and STATISTICS in given.task:
            measure_statistics(path, given, limit, models)
    return conclude(parts, given.seeds, limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks starts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="GLUE: holds sst2/train.parquet etc.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="stories260K; by default in ../models of the data")
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT; by default the packaged MiniLM")
    add_options(parser, tasks=[*SETTINGS, STATISTICS], arms=ARMS, seeds=5)
    return parser


def measure_statistics(path: Path, given: argparse.Namespace, limit: Limit, models: dict[str, Any]) -> None:
    """Measure what is missing of the statistics, and print their tables."""
    for name in STATISTICS_OF:
        task = task_of(SETTINGS[name], given.data, **models)
        log = statistic.log_of(path, task, encoder_name(task.folder), given.revision)
        statistic.complete(task, log, limit)
        print(f"{name}, statistics\n{statistic.table(log)}\n")


class StartsPart(Part):
    """The comparison of one task.

    Args:
        setting: Budget and training.
        path: Of the records.
        given: The options.
        models: Where the models are.
    """

    def __init__(self, setting: Setting, path: Path, given: argparse.Namespace, models: dict[str, Any]) -> None:
        self._setting, self._data, self._models = setting, given.data, models
        arms = [arm for arm in arms_of(setting.task) if not given.arms or arm in given.arms]
        folder = models["llama"] if setting.stories else models["encoder"]()
        log = StartsLog(path, "starts", setting, encoder_name(folder), given.revision)
        super().__init__(setting.task, arms, given.seeds, log, self._make)

    @cached_property
    def _task(self) -> Task:
        return task_of(self._setting, self._data, **self._models)

    def _make(self, arm: str, lr: float, seed: int, choosing: bool) -> Record:
        return run(arm, lr, seed, self._task, choosing=choosing)

    def try_arms(self) -> list[str]:
        """Take one step of each arm with a few rows, and record nothing.

        Returns:
            A line for each arm that failed.
        """
        few = 2 * self._setting.batch_size
        short = dict(examples=few, choosing=few, scored=few, statistic=few, stories=min(few, self._setting.stories))
        task = task_of(replace(self._setting, **short), self._data, **self._models)

        def once(arm: str) -> str:
            measured = run(arm, max(self._setting.rates), 0, task, choosing=False, steps=1)
            return (
                f"start {measured['starting']:.2f} s, all {measured['seconds']:.2f} s, "
                f"{measured['trained']:,} trained, error at step 0 {measured['step_0_error']:.1e}"
            )

        return self.rehearse(once)
