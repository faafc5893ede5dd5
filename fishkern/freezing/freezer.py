"""What stops training while a model trains: readings, decisions, and their effect on the optimizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fishkern.arguments import at_least
from fishkern.files import is_sharded
from fishkern.freezing.drift import JensenShannon, Track
from fishkern.freezing.event import Freezing
from fishkern.freezing.readings import Reading, is_zero, reading_of
from fishkern.freezing.resuming import demand_fits
from fishkern.freezing.rule import FreezeRule
from fishkern.freezing.saved import FreezerState, Read
from fishkern.freezing.sliced_pool import SlicedPool
from fishkern.freezing.slices import Key, Slices
from fishkern.freezing.sources import Source
from fishkern.freezing.trained import masked, named
from fishkern.names import listed
from fishkern.optim import MaskedOptimizer
from fishkern.selection import Selection
from fishkern.selection.base import exactly, matching
from fishkern.statistics.held import Held
from fishkern.statistics.shards import Ranks


class Freezer:
    """Reads a statistic now and then, and freezes for good the slices of which it has stopped changing.

    Made by :func:`fishkern.fisher_adaptune`. :meth:`step` belongs after every ``optimizer.step()``. A slice that stops
    leaves the optimizer's selection: its entries are neither moved nor decayed, and have no state. A parameter of which
    nothing stays loses ``requires_grad``.

    It keeps a reference for each slice in training: with ``reference="values"`` a number for each entry, on the device
    of the readings.

    Args:
        source: Gives the readings.
        optimizer: Its selection says what is in training.
        every: Steps from one decision to the next.
        read_every: Steps from one reading to the next.
        slices: How parameters are cut.
        drift: How the change of a slice is measured.
        rule: Which slices stop.

    Attributes:
        initial: What was trained before the first event. A :func:`fishkern.delta` of the training is of this selection.
        count: Steps that were counted.
        number: Events that have happened.
        history: Every reading: step, entries in training, and the score of each slice, which it keeps for good.

    Raises:
        TypeError: The optimizer is not a masked one, or a number of steps is not an integer.
        ValueError: A number of steps is below 1, or a pattern of the rule's ``spare`` matches no name of the pool; or
            FSDP2 shards the parameters.
    """

    def __init__(
        self,
        source: Source,
        optimizer: MaskedOptimizer,
        *,
        every: int,
        read_every: int,
        slices: Slices,
        drift: JensenShannon,
        rule: FreezeRule,
    ) -> None:
        self._optimizer = masked(optimizer)
        self._source, self._slices, self._drift, self._rule = source, slices, drift, rule
        self.every, self.read_every = at_least(1, every, "every"), at_least(1, read_every, "read_every")
        self.initial = self._optimizer.selection
        _refuse_shards(self._optimizer)
        self.count = self.number = 0
        self.history: list[Read] = []
        self._pool = SlicedPool(slices, self.initial.shapes)
        self._spared = frozenset(matching(rule.spare, self.initial.names, "spare"))
        self._tracks: dict[Key, Track] = {}
        self._read_before = 1  # readings up to the last event, or the first one
        self._statistic: str | None = None

    @property
    def selection(self) -> Selection:
        """What is in training. To resume, make the optimizer on it."""
        return self._optimizer.selection

    @property
    def optimizer(self) -> MaskedOptimizer:
        """The optimizer that it acts on."""
        return self._optimizer

    def __repr__(self) -> str:
        stay = len(self._pool.sizes(self.selection))
        return (
            f"{type(self).__name__}({stay:,} of {len(self._pool.pieces):,} slices in training, {self.number} events in "
            f"{self.count:,} steps, every={self.every}, read_every={self.read_every})"
        )

    def step(self) -> Freezing | None:
        """Count a step of the optimizer; read where a reading is due, decide where a decision is.

        Returns:
            The event of a decision, also where nothing stops; else ``None``.

        Raises:
            ValueError: The probe has changed, everything that trains would stop (a rule without ``most`` and
                ``least``), or what :func:`fishkern.estimate` raises.
            RuntimeError: Another rank has decided otherwise.
        """
        self.count += 1
        if self.count % self.read_every == 0:
            self.read()
        return self._decide() if self.count % self.every == 0 else None

    def preview(self) -> Freezing:
        """Say what a decision would do now, by the readings so far. Nothing changes.

        Returns:
            The event; before the first reading one without scores.
        """
        sizes = self._pool.sizes(self.selection)
        known = {key: self._tracks[key] for key in sizes if key in self._tracks}
        scores = (
            {key: self._drift.score_of(known[key]) if key in known else 0.0 for key in sizes} if self.history else {}
        )
        # What was zero everywhere at first has been followed for a shorter time, and its score is lower for that alone.
        enough = max(2, len(self.history) - self._read_before + 1)
        ready = {key: score for key, score in scores.items() if key in known and known[key].readings >= enough}
        frozen = self._chosen(ready, sizes) if ready else frozenset()
        return self._event(frozen, scores, frozenset(scores.keys() - ready.keys()))

    def read(self) -> None:
        """Take a reading now, whether it is due or not.

        Raises:
            ValueError: The probe has changed, or what :func:`fishkern.estimate` raises.
        """
        self._follow(self._readings(self._source.read()))

    def state_dict(self) -> dict[str, Any]:
        """Give everything that the rest of the training depends on, but for model and optimizer.

        Returns:
            Plain values and tensors.
        """
        return self._state().to_plain()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave. Parameters that had stopped lose ``requires_grad``.

        Args:
            state_dict: Of a freezer with the same slices, drift and statistic, on the same probe and the same pool. The
                rule, ``every`` and ``read_every`` are this freezer's own.

        Raises:
            ValueError: It is damaged, or something of this differs; or the optimizer was not made on its selection.
        """
        self._take_over(FreezerState.from_plain(state_dict))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save :meth:`state_dict` as one ``.safetensors`` file, which appears whole or not at all.

        Args:
            path: ``freezer.safetensors`` (the suffix is added where it is missing). Its folder must exist.

        Returns:
            The file to give to :meth:`load`.

        Raises:
            FileExistsError: A file of that name holds something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
        """
        return self._state().save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what :meth:`save` wrote; see :meth:`load_state_dict`.

        Args:
            path: The file, or its name without suffix.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: As in :meth:`load_state_dict`.
        """
        self._take_over(FreezerState.load(path))

    @staticmethod
    def saved_selection(path: str | os.PathLike[str]) -> Selection:
        """Read which entries were in training when a freezer was saved, to make the optimizer that resumes.

        Args:
            path: What :meth:`save` wrote.

        Returns:
            The selection.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or holds something else.
        """
        return FreezerState.selection_in(path)

    def close(self) -> None:
        """Take off whatever the source of the readings has put on the model."""
        self._source.close()

    def _readings(self, statistics: Held) -> dict[Key, Reading]:
        """Cut a statistic into the readings of the slices in training."""
        self._statistic = json.dumps(statistics.provenance["definition"], sort_keys=True)
        sizes = self._pool.sizes(self.selection)
        return {(name, n): reading_of(statistics, name, self._pool.pieces[name, n]) for name, n in sizes}

    def _follow(self, readings: Mapping[Key, Reading]) -> None:
        """Add a reading to the tracks."""
        tracks = {}
        for key, reading in readings.items():
            track = self._tracks.get(key)
            # Zeros say nothing yet: with B = 0 a LoRA's A has no gradient. A track that began with them would be one
            # jump of the largest distance there is.
            if track is not None or not is_zero(reading):
                tracks[key] = self._drift.follow(track, reading)
        self._tracks = tracks
        scores = {key: self._drift.score_of(track) for key, track in tracks.items()}
        self.history.append(Read(self.count, self.selection.count, scores))

    def _chosen(self, scores: Mapping[Key, float], sizes: Mapping[Key, int]) -> frozenset[Key]:
        """Ask the rule, which refuses patterns of ``spare`` that match nothing, as where all that they name waits."""
        spare = exactly(sorted({name for name, _ in scores if name in self._spared}))
        return replace(self._rule, spare=spare).choose(scores, sizes, self.initial.total)

    def _decide(self) -> Freezing:
        event = self.preview()
        self._apply(event)
        return event

    def _apply(self, event: Freezing) -> None:
        Ranks().demand_equal(sorted(event.frozen), "the slices that stop")
        if event.frozen:
            self._optimizer.reselect(event.selection, freeze=True)
        self.number, self._read_before = event.number, max(1, len(self.history))
        self._tracks = {key: track for key, track in self._tracks.items() if key not in event.frozen}

    def _event(self, frozen: frozenset[Key], scores: Mapping[Key, float], waiting: frozenset[Key]) -> Freezing:
        present, number = self.selection, self.number + 1
        rule = {"name": type(self._rule).__name__, **self._rule.settings}
        provenance = {"rule": rule, "event": number, "step": self.count, "initial": self.initial.provenance}
        selection = self._pool.without(present, frozen, provenance) if frozen else present
        counts, parameters = selection.counts, named(self._optimizer)
        unmoved = [name for name, count in counts.items() if not count and name in parameters]
        return Freezing(
            step=self.count,
            number=number,
            scores=scores,
            waiting=waiting,
            frozen=frozen,
            selection=selection,
            entries_frozen=present.count - selection.count,
            state_bytes=self._optimizer.state_bytes_under(selection),
            stopped=tuple(name for name in unmoved if frozen and parameters[name].requires_grad),
        )

    def _state(self) -> FreezerState:
        return FreezerState(
            self.count,
            self.number,
            self._read_before,
            self._source.digest,
            self._settings,
            self.initial,
            self.selection,
            dict(self._tracks),
            list(self.history),
        )

    @property
    def _settings(self) -> dict[str, str]:
        """What must be the same when training goes on, in words."""
        settings = {"slices": str(self._slices), "drift": str(self._drift)}
        return settings if self._statistic is None else {**settings, "statistic": self._statistic}

    def _take_over(self, state: FreezerState) -> None:
        demand_fits(state, self.selection, self._pool.pieces, self._settings, self._source.digest)
        self.count, self.number, self.initial = state.count, state.number, state.initial
        self._read_before = state.read_before
        self.history, self._tracks = list(state.history), dict(state.tracks)
        self._statistic = state.settings.get("statistic", self._statistic)
        if self._source.digest is None:
            self._source.digest = state.digest
        if state.selection != state.initial:
            self._optimizer.reselect(self.selection, freeze=True)  # of which nothing moves, and what stopped stays so


def _refuse_shards(optimizer: MaskedOptimizer) -> None:
    """Refuse parameters of which a rank holds a part alone: slices are read and counted whole."""
    groups = optimizer.param_groups
    pairs = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    if names := [name for name, parameter in pairs if is_sharded(parameter)]:
        raise ValueError(
            f"a freezer reads whole slices, and FSDP2 shards {len(names)} parameters of the optimizer "
            f"({listed(names)}): train the whole model in each process (DistributedDataParallel), or reselect on "
            "shards yourself, by optimizer.reselect(fishkern.select(fishkern.estimate(model, batches), rule))."
        )
