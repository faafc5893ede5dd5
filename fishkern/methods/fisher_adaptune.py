"""FisherAdapTune (Rostami, Chen, Hosseini, 2026, arXiv:2606.10196): freeze slices whose Fisher has stopped drifting.

While a model trains, a statistic is read now and then. A slice of a parameter is frozen for good once the distances of
its readings from its own past have settled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from fishkern.arguments import one_of
from fishkern.freezing import Freezer, FreezeRule, JensenShannon, Slices
from fishkern.freezing.published import PublishedFreezer
from fishkern.freezing.reference import ReferenceDrift, ReferenceFactors, ReferenceRule
from fishkern.freezing.sources import Online, Probe
from fishkern.freezing.trained import demand_trains, masked
from fishkern.optim import MaskedOptimizer
from fishkern.selection import Selection
from fishkern.statistics import DiagonalFisher, DiagonalKronecker, Drawn, Estimator, Likelihood, OnlineFisher
from fishkern.statistics.batches import Shared
from fishkern.statistics.shards import Ranks

Compat = Literal["reference"]

LARGE = 10**9  # entries of a pool: 4 GB for a statistic of single entries, and as much for its reference


def fisher_adaptune(
    model: nn.Module,
    probe: Iterable[Any] | OnlineFisher | None,
    *,
    optimizer: MaskedOptimizer,
    every: int,
    read_every: int,
    estimator: Estimator | None = None,
    slices: Slices | None = None,
    drift: JensenShannon | None = None,
    rule: FreezeRule | None = None,
    likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | Drawn | None = None,
    shared: Shared = None,
    compat: Compat | None = None,
) -> Freezer:
    """Freeze, while a model trains, the slices of parameters whose Fisher information has stopped changing.

        freezer = fk.fisher_adaptune(model, probe, optimizer=optimizer, every=300, read_every=30)
        ...
        optimizer.step()
        event = freezer.step()

    Every ``read_every`` steps the Fisher is read on a fixed probe, and the distance of each slice in training from its
    smoothed past goes into its score. Every ``every`` steps slices with low scores leave the optimizer's selection, no
    more than the rule's ``most`` at once. The published code reads the batches it trains on instead, whose noise
    freezes large slices first, and freezes all but about a sixth of the slices at each event;
    ``compat="reference"`` does as it does.

    Readings leave the model and torch's random numbers as found: a training without events is that without a freezer,
    to the bit. Gradient accumulation, schedulers and early stopping are not affected; a step is one of the optimizer.

    Cost of a reading: a forward and a backward pass over the probe. Memory: a float32 for each entry in training, as
    the reference of the drift (less with ``reference="factors"`` and ``"histogram"``), and during a reading a second
    one.

    Args:
        model: What ``optimizer`` trains.
        probe: Batches as for :func:`fishkern.estimate`, 16 to 64 examples: a list, or a ``DataLoader`` that gives the
            same batches each time; an iterator is read once, into a list. Or a :class:`fishkern.OnlineFisher`, whose
            running mean over the training steps is read, with the noise that it has. ``None`` with ``compat``.
        optimizer: A masked optimizer. Its selection, which may be sparse, says what is in training.
        every: Steps from one decision to the next; in the paper's recipes 3000.
        read_every: Steps from one reading to the next; in the paper's recipes 300.
        estimator: The statistic on the probe. ``None``: :class:`fishkern.DiagonalFisher`, and
            :class:`fishkern.DiagonalKronecker` where the pool has more than 10^9 entries.
        slices: How parameters are cut; ``None`` for ``Slices()``, four ranges of rows.
        drift: How a slice's change is measured. ``None``: ``JensenShannon()``, with ``reference="factors"`` where
            the statistic is in factors and of more than 10^9 entries; with ``compat`` the published code's.
        rule: Which slices stop. ``None``: ``FreezeRule()``; with ``compat`` the published code's, without limits.
        likelihood: The loss of an example, as for :func:`fishkern.estimate`.
        shared: As for :func:`fishkern.estimate`.
        compat: ``"reference"`` for what the published code does, its defects included: factors of Linear, Conv2d,
            BatchNorm2d and LayerNorm from the last training batch, smoothed with a constant; all others frozen before
            the first update; decisions before the update of the same step.

    Returns:
        The freezer. On a probe it has taken a first reading.

    Raises:
        TypeError: The optimizer is not a masked one, or the estimator's result is not of the parameters' shapes.
        ValueError: ``every`` or ``read_every`` is below 1, an argument does not go with another or with several
            processes, the optimizer is of another model, values of more than 10^9 entries would be kept as references
            without having been asked for, or as :func:`fishkern.estimate` raises.
        UnsupportedModuleError: As :func:`fishkern.estimate` raises.
    """
    trained = masked(optimizer)
    demand_trains(trained, model)
    options: dict[str, Any] = {"every": every, "read_every": read_every, "slices": slices or Slices()}
    if compat is not None:
        one_of(compat, ("reference",), "compat")
        _refuse(f"compat={compat!r}, which reads the training batch", probe, estimator, likelihood, shared)
        _refuse_ranks(f"compat={compat!r}")
        options |= {"drift": drift or ReferenceDrift(), "rule": rule or ReferenceRule()}
        return PublishedFreezer(ReferenceFactors(model), trained, **options)
    options["rule"] = rule or FreezeRule()

    def in_training() -> list[str]:
        return [name for name, count in trained.selection.counts.items() if count]

    if isinstance(probe, OnlineFisher):
        _refuse("an OnlineFisher, which has its own", None, estimator, likelihood, shared)
        _refuse_ranks("an OnlineFisher")
        online = Online(probe, model, names=in_training)
        return Freezer(online, trained, drift=_drift(drift, trained.selection, factored=False), **options)
    if probe is None:
        raise ValueError("probe must be batches, such as a list of 16 to 64 examples; None is for compat='reference'.")
    large = trained.selection.total > LARGE
    if estimator is None:
        estimator = DiagonalKronecker() if large else DiagonalFisher()
    source = Probe(
        model,
        probe,
        estimator,
        likelihood,
        names=in_training,
        shared=shared,
    )
    factored = large and isinstance(estimator, DiagonalKronecker)
    freezer = Freezer(source, trained, drift=_drift(drift, trained.selection, factored=factored), **options)
    freezer.read()
    return freezer


def _drift(drift: JensenShannon | None, selection: Selection, *, factored: bool) -> JensenShannon:
    """Choose the default drift, and refuse a reference that nobody has asked for and that may not fit into memory."""
    if drift is not None:
        return drift
    if factored:
        return JensenShannon(reference="factors")
    if selection.total > LARGE:
        raise ValueError(
            f"the references of {selection.total:,} entries would take {4 * selection.total / 2**30:,.0f} GiB: pass "
            "drift=fishkern.JensenShannon(reference='histogram'), or reference='values' if that is meant."
        )
    return JensenShannon()


def _refuse_ranks(source: str) -> None:
    if Ranks().count > 1:
        raise ValueError(
            f"{source} reads each process's own batches, so that processes would freeze different slices: give each "
            "its part of a probe."
        )


def _refuse(of: str, probe: Any, estimator: Any, likelihood: Any, shared: Any) -> None:
    given = {"probe": probe, "estimator": estimator, "likelihood": likelihood, "shared": shared}
    if names := [f"{name}=" for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(names)} does not go with {of}: leave it out (probe=None).")
