"""TR-PTS: which connections of a vision transformer train, and which tokens it keeps.

    python -m benchmarks tr-pts --data FOLDER [--task cifar-84 ...]

A small pretrained vision transformer learns ten kinds of pictures from a few hundred of them. Three questions: do the
connections that TR-PTS chooses train better than as many by chance, by a simpler rule, or by LoRA? Does keeping fewer
tokens cost accuracy, and does it matter where? And what is saved, in counted FLOPs and in seconds? The paper's code was
not published: *contribution* and *tr-pts* are this library's reconstruction. The model is no plain DINOv2 and the
pictures are no official CIFAR-10, so no figure compares with a published one.

All arms see the same rows in the same order and take as many steps. Each chooses its learning rate among three, a
factor of three apart, on a seed and on training rows that nothing else uses; where these lie depends on what it trains.
The classifier, which starts at random, has a rate of its own, the same in all arms that train more. Then an arm runs
with the same seeds as the others. The seconds of a run include the ranking, for controls that of TR-PTS whose counts
they take; on a CPU they are those of the process (user and system). Each run is one line in the results and written
when it ends; an interrupted comparison goes on where it stopped, the most important runs first. *cifar-84* is made for
two cores, and runs unless ``--task`` says otherwise; *cifar-224* for a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from benchmarks.engine.origin import machine
from benchmarks.engine.records import Record
from benchmarks.studies.comparing import images
from benchmarks.studies.comparing.command import add_options, carry_out, say_what_arms_are
from benchmarks.studies.comparing.part import Part
from benchmarks.studies.tr_pts.arms import ARMS
from benchmarks.studies.tr_pts.log import TrPtsLog
from benchmarks.studies.tr_pts.pictures import Pictures
from benchmarks.studies.tr_pts.run import run
from benchmarks.studies.tr_pts.setting import SETTINGS, Setting


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, and print a table for each task."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        return say_what_arms_are(ARMS)
    if given.data is None:
        parser.error("--data is needed: the folder that holds vision and models")
    path = given.results / machine()["machine"] / "tr_pts.jsonl"
    parts = [TrPtsPart(SETTINGS[name], path, given) for name in given.task]
    return carry_out(parts, given)


class TrPtsPart(Part):
    """The comparison of one task.

    Args:
        setting: Data and training.
        path: Of the records.
        given: The options.
    """

    def __init__(self, setting: Setting, path: Path, given: argparse.Namespace) -> None:
        self._setting, self._given = setting, given
        log = TrPtsLog(path, "tr-pts", setting, images.MODEL, given.revision)
        arms = [arm for arm in ARMS if not given.arms or arm in given.arms]
        super().__init__(setting.task, arms, given.seeds, log, self._make)

    @cached_property
    def _task(self) -> Pictures:
        return Pictures(self._setting, self._given.data)

    def _make(self, arm: str, lr: float, seed: int, choosing: bool) -> Record:
        return run(arm, lr, seed, self._task, choosing=choosing)

    def try_arms(self) -> list[str]:
        """Take two steps of each arm with a few rows, and record nothing.

        Returns:
            A line for each arm that failed.
        """
        few = 2 * self._setting.batch_size
        task = Pictures(replace(self._setting, examples=few, choosing=few, scored=few), self._given.data)

        def once(arm: str) -> str:
            measured = run(arm, min(self.log.rates(arm)), 0, task, choosing=False, steps=2)
            reducing = measured["reducing"] or {"layers": "none"}
            return (
                f"ranking {measured['ranking']:.2f} s, all {measured['seconds']:.2f} s, {measured['trained']:,} "
                f"trained, {1e-9 * measured['flops']['forward']:.3f} GFLOP an image, reducing in {reducing['layers']}"
            )

        return self.rehearse(once)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tr-pts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="holds vision and models")
    add_options(parser, tasks=list(SETTINGS), arms=ARMS, seeds=3)
    parser.set_defaults(task=["cifar-84"])
    return parser
