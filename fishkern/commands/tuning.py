"""One run of ``fishkern tune``: prepared, selected or resumed, trained, saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fishkern as fk
from fishkern.adapters import Adapter
from fishkern.commands.adapted import adapted, held_out
from fishkern.commands.freezing import Stopping, selections_in
from fishkern.commands.output import Stopwatch, note, progress, waiting
from fishkern.commands.resuming import Checkpoint, State, digest_of
from fishkern.commands.tr_pts import method_of, without_adapter
from fishkern.commands.training import Loop, evaluate
from fishkern.commands.tune_options import DENSITY, FISHER_SAMPLES, Settings
from fishkern.commands.workload import Prepared, fitting, prepare
from fishkern.files import atomic_write
from fishkern.integrations.adapting import save_adapter
from fishkern.integrations.examples import Example
from fishkern.selection import check_start, save_start

BATCH_SIZE = 16


@dataclass
class Tuning:
    """A run of ``fishkern tune``, with all that it works on.

    Attributes:
        folder: Where everything is saved.
        settings: The options.
        checkpoint: Keeps the state of the training.
        prepared: Model and examples.
        held_out: Examples to measure on; may be none.
        model: The model with its adapter, if one is added.
        recipe: The recipe of an adapter of fishkern's, ``None`` for PEFT's.
        adapter: Which adapter it is, in words; empty where entries of the model itself train.
        digest: Of the examples.
        before: The measurements before training.
        stopwatch: Seconds of each part.
        stopping: What stops during training; ``None`` where nothing does.
        relevance: What of the model itself trains, and on which tokens; ``None`` where an adapter trains.
    """

    folder: Path
    settings: Settings
    checkpoint: Checkpoint
    prepared: Prepared
    held_out: list[Example]
    model: nn.Module
    recipe: Adapter | None
    adapter: str
    digest: str
    before: dict[str, float] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    stopping: Stopping | None = None
    relevance: fk.TaskRelevance | None = None

    @classmethod
    def prepare(cls, folder: Path, settings: Settings, checkpoint: Checkpoint) -> Tuning:
        """Load model and data, and add the adapter, if the method has one.

        Args:
            folder: Where everything will be saved.
            settings: The options.
            checkpoint: That of the folder.

        Returns:
            The run.

        Raises:
            ValueError: Options, model and data do not fit together, or the data is not that of the unfinished run.
            OSError: Model or data are not on this machine, and the hub does not have them or cannot be asked.
        """
        prepared = prepare(settings.work, settings.samples)
        if settings.freezes:
            settings.freezing.times(_steps(settings, len(prepared.examples)))  # raises where they do not fit
        digest = digest_of(prepared.examples)
        checkpoint.demand_same_data(digest)
        examples = held_out(prepared, settings)
        model, recipe, adapter = (adapted if settings.adapts else without_adapter)(prepared, settings)
        return cls(
            folder,
            settings,
            checkpoint,
            prepared=prepared,
            held_out=examples,
            model=model,
            recipe=recipe,
            adapter=adapter,
            digest=digest,
        )

    def select(self) -> fk.Selection:
        """Select the entries to train, save the selection and what belongs to it, and measure the model.

        Returns:
            The selection.
        """
        with self.stopwatch.adding("selecting"):
            if self.settings.adapts:
                selection = self._selected()
            else:
                self.relevance = self._relevance()
                selection = self.relevance.selection
        if self.settings.freezes:
            _ = self.settings.freezing.rule_for(selection.names)  # raises where a pattern names nothing
        self.folder.mkdir(exist_ok=True)
        (self.folder / "report.json").unlink(missing_ok=True)  # written last: a folder without one is not finished
        if self.relevance is not None:
            self.relevance.save(self.folder)
            self._reduce_tokens()
        else:
            selection.save(self.folder / "selection.safetensors")
            save_start(self.model, selection, self.folder / "start.safetensors")
        self.before = self._measured("before")
        return selection

    def resume(self, state: State) -> fk.Selection:
        """Load the selection of the unfinished run, and the measurements that it has made.

        Args:
            state: That of the checkpoint.

        Returns:
            The selection.

        Raises:
            ValueError: A file is damaged, or the model starts with other values than the selection's.
        """
        with self.checkpoint.reading():
            self.stopwatch.ended.update({str(part): float(seconds) for part, seconds in state["seconds"].items()})
            self.before = {str(quantity): float(value) for quantity, value in state["before"].items()}
            seen = int(state["seen"])
        total = self.settings.training.epochs * len(self.prepared.examples)
        note(f"resuming the unfinished run in {self.folder}: {seen:,} of {total:,} examples seen")
        if self.settings.freezes:
            with self.checkpoint.reading():
                selection, _ = selections_in(state["stopping"])
        elif not self.settings.adapts:
            self.relevance = fk.TaskRelevance.load(self.folder)
            self._reduce_tokens()
            selection = self.relevance.selection
        else:
            selection = fk.Selection.load(self.folder / "selection.safetensors")
        check_start(selection, self.model)
        return selection

    def train(self, selection: fk.Selection) -> dict[str, Any]:
        """Train the selected entries, and measure the model.

        Args:
            selection: Of this model.

        Returns:
            ``"loss"``, the mean loss of each epoch, and the measurements ``"before"`` and ``"after"``.

        Raises:
            ValueError: The loss is not finite.
        """
        options, state = self.settings.training, self.checkpoint.state
        present = selection if state is None or not self.settings.freezes else selections_in(state["stopping"])[1]
        optimizer = fk.MaskedAdamW(
            self.model, present, options.lr, weight_decay=options.weight_decay, max_grad_norm=options.max_grad_norm
        )
        if self.settings.freezes:
            self.stopping = self._stopping(optimizer)
        loop = Loop(
            self.model,
            optimizer,
            self.prepared.encoder,
            self.prepared.examples,
            epochs=options.epochs,
            batch_size=self.batch_size,
            seed=self.settings.work.seed,
            trained=selection,
            stopping=self.stopping,
        )
        begun = 0 if state is None else int(state["seen"])
        with _saying_how_to_resume():
            with self.stopwatch.adding("training"), progress("training", "examples", begun) as report:
                losses = loop.run(self.checkpoint, self._state, report)
            return {"loss": losses, "before": self.before, "after": self._measured("after")}

    def save(self, selection: fk.Selection, outcome: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """Save adapter, delta and report, and remove the checkpoint.

        Args:
            selection: The trained entries, those that have stopped included.
            outcome: What :meth:`train` returned.

        Returns:
            The report as plain values, and the adapter's folder or file, or the delta where there is none.
        """
        saved = fk.delta(self.model, selection).save(self.folder / "delta.safetensors")
        if self.settings.adapts:
            saved = save_adapter(self.model, self.recipe, self.folder)
        if self.stopping is not None:
            self.stopping.save(self.folder)
        report = self._report(selection, outcome)
        with atomic_write(self.folder / "report.json", "w") as file:
            file.write(json.dumps(report, indent=2) + "\n")
        self.checkpoint.remove()
        return report, saved

    @property
    def batch_size(self) -> int:
        """Examples in a step of training, and in a batch to measure on."""
        return self.settings.work.batch_size or BATCH_SIZE

    def _relevance(self) -> fk.TaskRelevance:
        few = self._few_examples()

        def run(size: int) -> fk.TaskRelevance:
            return fk.tr_pts(
                self.model,
                self._collated(few, size),
                density=self.settings.budget.density,
                **self.settings.connections.arguments,
                progress=lambda done, _: report(done, len(few)),
            )

        with progress("selecting", "examples") as report:
            return fitting(run, self.settings.work.batch_size, self.prepared.device, len(few))

    def _reduce_tokens(self) -> None:
        if self.relevance is not None and self.relevance.reduction is not None:
            fk.tokens.attach(self.model, self.relevance.reduction)

    def _selected(self) -> fk.Selection:
        if self.settings.freezes:  # everything: all of the adapter, in whatever order, and the head
            return fk.fish_tuning(self.model, [], density=1.0, order="magnitude")
        work, budget = self.settings.work, self.settings.budget
        few = self._few_examples()
        count = len(few)
        unset = (budget.k, budget.density, budget.trainable) == (None, None, None)

        def run(size: int) -> fk.Selection:
            return fk.fish_tuning(
                self.model,
                self._collated(few, size),
                k=budget.k,
                density=DENSITY if unset else budget.density,
                trainable=budget.trainable,
                order=budget.ranked,
                allow_zeros=budget.allow_zeros,
                max_examples=count,
                seed=work.seed,
                progress=lambda done, _: report(done, count),
            )

        with progress("selecting", "examples") as report:
            return fitting(run, work.batch_size, self.prepared.device, count)

    def _stopping(self, optimizer: fk.MaskedAdamW) -> Stopping:
        # Batches of the size of a training step fit, and are the same ones when the run is resumed.
        probe = self._collated(self._few_examples(), self.batch_size)
        steps = _steps(self.settings, len(self.prepared.examples))
        with self.stopwatch.adding("selecting"), waiting("reading the Fisher information"):
            return Stopping(self.model, probe, optimizer, self.settings.freezing, steps, self.stopwatch)

    def _few_examples(self) -> list[Example]:
        """Take as many examples as the Fisher information is read on."""
        examples = self.prepared.examples
        count = min(len(examples), self.settings.fisher_samples or FISHER_SAMPLES)
        # They are sorted by length: evenly spaced ones are of every length.
        return [examples[n * len(examples) // count] for n in range(count)]

    def _collated(self, examples: list[Example], size: int) -> list[dict[str, Tensor]]:
        collate = self.prepared.encoder.collate
        return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]

    def _measured(self, when: str) -> dict[str, float]:
        with self.stopwatch.adding("measuring"):
            if not self.held_out:
                return {}
            with progress(f"measuring {when}", "examples") as report:
                return evaluate(self.model, self.prepared.encoder, self.held_out, self.batch_size, report)

    def _state(self) -> State:
        """Return the part of a checkpoint's state that is not of the training."""
        state = {"data": self.digest, "seconds": self.stopwatch.seconds, "before": self.before}
        return state if self.stopping is None else {**state, "stopping": self.stopping.state()}

    def _report(self, selection: fk.Selection, outcome: dict[str, Any]) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "from": self.settings.work.model,
            **self.prepared.described,
            **({"adapter": self.adapter} if self.adapter else {}),
            "pool": selection.total,
            "trained": selection.count,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            **self._method(),
            "fisher_samples": self.settings.fisher_samples,
            **vars(self.settings.training),
            **outcome,
            "seconds": {part: round(seconds, 3) for part, seconds in self.stopwatch.seconds.items()},
        }

    def _method(self) -> dict[str, Any]:
        """Return what the report says of the selection, or of what has stopped."""
        settings = self.settings
        if self.relevance is not None:
            return method_of(self.relevance, settings, self.model, self.prepared.examples[0])
        if self.stopping is None:
            return {**vars(settings.budget), "order": settings.budget.ranked}
        rule = {"margin": settings.freezing.rule.margin, "most": settings.freezing.rule.most}
        return {"method": settings.method, **rule, "slices": settings.freezing.cut.count, **self.stopping.report()}


def _steps(settings: Settings, examples: int) -> int:
    """Count the steps of a training."""
    return settings.training.epochs * -(-examples // (settings.work.batch_size or BATCH_SIZE))


@contextmanager
def _saying_how_to_resume() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        note("the same command resumes from there")
        raise
