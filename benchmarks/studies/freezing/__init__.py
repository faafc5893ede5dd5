"""Freezing while a model is trained: FisherAdapTune on a probe, as published, and controls that know less.

    python -m benchmarks freezing --data FOLDER [--task minilm-sst2 ...] [--encoder FOLDER]

*minilm-sst2*: MiniLM learns a classifier, whole; *minilm-sst2-lora*: the same by LoRA. *nuclei*: a small vision
transformer with a decoder learns to find nuclei of cells, and is also measured on inverted, blurred and noisy images,
which it has not seen. Something may stop at three events of a run. The controls keep as many entries as our arm
(*probe*) at the same events, in an order of their own: by chance, the lowest layers, the largest tensors, the least
Fisher information, the least change.

All arms see the same rows in the same order, and each chooses its learning rate among the same ones on a seed and on
training rows that nothing else uses. Then it runs with the same seeds. The seconds of a run include the readings; on a
CPU they are those of the process (user and system). Each run is one line in the results and written when it ends; an
interrupted comparison goes on where it stopped, the most important runs first. The figures are of small models, with
few rows.
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
from benchmarks.studies.freezing.arms import ARMS, arms_of
from benchmarks.studies.freezing.log import FreezingLog
from benchmarks.studies.freezing.run import run
from benchmarks.studies.freezing.setting import SETTINGS, Setting
from benchmarks.studies.freezing.tasks import Task, task_of
from benchmarks.studies.glue.data import encoder_name, packaged_encoder


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, and print a table for each task."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        return say_what_arms_are(ARMS)
    if given.data is None:
        parser.error("--data is needed: the folder that holds glue, vision and models")
    path = given.results / machine()["machine"] / "freezing.jsonl"
    parts = [FreezingPart(SETTINGS[name], path, given) for name in given.task]
    return carry_out(parts, given)


class FreezingPart(Part):
    """The comparison of one task.

    Args:
        setting: Training and the times of the events.
        path: Of the records.
        given: The options.
    """

    def __init__(self, setting: Setting, path: Path, given: argparse.Namespace) -> None:
        self._setting, self._given = setting, given
        name = images.MODEL if setting.task == "nuclei" else encoder_name(self._encoder())
        log = FreezingLog(path, "freezing", setting, name, given.revision)
        arms = [arm for arm in arms_of(setting.task) if not given.arms or arm in given.arms]
        super().__init__(setting.task, arms, given.seeds, log, self._make)

    def _encoder(self) -> Path:
        return self._given.encoder or packaged_encoder()

    @cached_property
    def _task(self) -> Task:
        return task_of(self._setting, self._given.data, encoder=self._encoder)

    def _make(self, arm: str, lr: float, seed: int, choosing: bool) -> Record:
        kept = self.log.kept(lr, seed) if ARMS[arm].follows else ()
        return run(arm, lr, seed, self._task, kept, choosing=choosing)

    def try_arms(self) -> list[str]:
        """Take three steps of each arm, with an event after the second, and record nothing.

        Returns:
            A line for each arm that failed.
        """
        few = 2 * self._setting.batch_size
        rows = dict(examples=few, choosing=few, scored=few, shock=few, probe=2)
        short = replace(self._setting, **rows, every=2, read_every=1, after=1)
        task = task_of(short, self._given.data, encoder=self._encoder)

        def once(arm: str) -> str:
            # a control is to stop half of what trains
            kept = [sum(p.numel() for p in task.fresh(0).parameters() if p.requires_grad) // 2]
            measured = run(arm, min(self._setting.rates), 0, task, kept, choosing=False, steps=3)
            return (
                f"{measured['seconds']:.2f} s, of which readings {measured['reading']:.2f} s, "
                f"{measured['kept']:,} of {measured['trained']:,} entries left"
            )

        return self.rehearse(once)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks freezing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="holds glue, vision and models")
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT; by default the packaged MiniLM")
    add_options(parser, tasks=list(SETTINGS), arms=ARMS, seeds=3)
    return parser
