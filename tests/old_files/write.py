"""Writes the sample files of this revision's formats, for later revisions to be tested with::

    python -m tests.old_files.write 0.2

makes the folder ``0.2`` next to this file. Committed samples never change: whoever changes a format adds a folder. Who
adds a format adds its samples alone, ``python -m tests.old_files.write 0.1 inits``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when they are imported

import torch
from safetensors.torch import save_file
from transformers import Trainer

import fishkern as fk
from fishkern import adapters, cli
from fishkern.selection import save_start
from tests.support import samples, zoo


def write_statistics(folder: Path) -> None:
    for name, options in samples.STATISTICS.items():
        samples.statistics(name).save(folder / name, **options)
    specimen = samples.tied_llama()
    fk.estimate(specimen.model, [specimen.batch()]).save(folder / "tied")


def write_precision(folder: Path) -> None:
    samples.precise_statistics().save(folder / "statistics")


def write_selections(folder: Path) -> None:
    for name in samples.SELECTIONS:
        samples.selection(name).save(folder / name, max_shard_size=20 if name == "shards" else None)


def write_inits(folder: Path) -> None:
    samples.adapter_init().save(folder / "adapter_init")


def write_energies(folder: Path) -> None:
    samples.energies().save(folder / "energies")


def write_factored(folder: Path) -> None:
    samples.factored().save(folder / "factored")


def write_freezer(folder: Path) -> None:
    samples.freezer_state().save(folder / "freezer")


def write_tokens(folder: Path) -> None:
    samples.TOKEN_REDUCTION.save(folder / "token_reduction.json")


def write_values(folder: Path) -> None:
    """Deltas, starts and an adapter."""
    for name, dtype in samples.DELTAS.items():
        fk.delta(samples.moved(samples.small(dtype)), samples.selection()).save(folder / f"delta-{name}")
        save_start(samples.small(dtype), samples.selection("bound"), folder / f"start-{name}")
    model, adapter = samples.classifier(), adapters.BottleneckAdapter(width=2)
    adapters.attach(model, adapter)
    adapters.save(samples.filled(model), adapter, folder / "adapter")


def write_optimizers(folder: Path, trainings: Mapping[str, samples.Training] = samples.OPTIMIZERS) -> None:
    """The state after two steps, and beside it all tensors before and after the third."""
    for name, training in trainings.items():
        model, optimizer = training.begun()
        torch.save(optimizer.state_dict(), folder / f"{name}.pt")
        before = {f"before {key}": value for key, value in samples.tensors_of(model, optimizer).items()}
        samples.advance(model, optimizer, step=3)
        after = {f"after {key}": value for key, value in samples.tensors_of(model, optimizer).items()}
        save_file(before | after, folder / f"{name}.safetensors")


def write_ranges(folder: Path) -> None:
    """A selection of ranges, with its delta and optimizers."""
    selected = samples.ranged_selection()
    selected.save(folder / "selection")
    fk.delta(samples.moved(samples.small(), selected), selected).save(folder / "delta")
    write_optimizers(folder, samples.OPTIMIZERS_OF_RANGES)


def write_coded(folder: Path) -> None:
    """A delta whose entries are in the code of Elias and Fano."""
    selected = samples.coded_selection()
    fk.delta(samples.moved(samples.wide(), selected), selected).save(folder / "delta")


def write_updates(folder: Path) -> None:
    for name, update in zip(samples.UPDATES, samples.updates()[1], strict=True):
        update.save(folder / name)


def write_trainer(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = samples.adapted()
        selected = fk.fish_tuning(model, [zoo.class_batch(4, 7)], density=0.3)
        train_and_keep_checkpoint(samples.trainer(model, selected, Path(scratch)), folder)


def write_selecting_trainer(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        select = partial(fk.fish_tuning, density=0.3)
        train_and_keep_checkpoint(samples.selecting_trainer(samples.adapted(), select, Path(scratch)), folder)


def train_and_keep_checkpoint(trainer: Trainer, folder: Path) -> None:
    """The files of a checkpoint that training needs to go on, and the values after all steps."""
    trainer.train()
    left_out = shutil.ignore_patterns("README.md", "rng_state*", "training_args.bin")
    shutil.copytree(Path(trainer.args.output_dir) / samples.CHECKPOINT, folder / samples.CHECKPOINT, ignore=left_out)
    save_file(samples.trained_values(trainer.model), folder / "expected.safetensors")


def write_tune(folder: Path) -> None:
    """The folder of a run that was interrupted in its second epoch, and that of the same run without an interrupt."""
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        samples.write_tune_inputs(Path())
        run_tune()
        shutil.copytree("run", folder / "whole")
        shutil.rmtree("run")
        with interrupted_before(step=4):
            run_tune()
        shutil.copytree("run", folder / "run")


def run_tune() -> None:
    try:
        cli.main(samples.TUNE.split())
    except SystemExit as exit:
        if exit.code not in (None, 0, 130):
            raise


@contextmanager
def interrupted_before(step: int) -> Iterator[None]:
    """Let control-C be pressed at a step of the optimizer, counted from 0."""
    own, steps = fk.MaskedAdamW.step, iter(range(step))

    def pressed(self: fk.MaskedAdamW, *args: object) -> object:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return own(self, *args)

    fk.MaskedAdamW.step = pressed
    try:
        yield
    finally:
        fk.MaskedAdamW.step = own


WRITERS = {
    "statistics": write_statistics,
    "precision": write_precision,
    "selections": write_selections,
    "inits": write_inits,
    "energies": write_energies,
    "factored": write_factored,
    "freezer": write_freezer,
    "tokens": write_tokens,
    "values": write_values,
    "optimizers": write_optimizers,
    "ranges": write_ranges,
    "coded": write_coded,
    "updates": write_updates,
    "trainer": write_trainer,
    "selecting-trainer": write_selecting_trainer,
    "tune": write_tune,
}


def main(version: str, *names: str) -> None:
    """Write samples below the folder of a version: all of them, or those named; none may be there yet."""
    torch.set_num_threads(1)
    (samples.FOLDER / version).mkdir(exist_ok=bool(names))
    for name in names or WRITERS:
        (samples.FOLDER / version / name).mkdir()
        WRITERS[name](samples.FOLDER / version / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
