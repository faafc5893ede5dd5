"""Where the readings of a freezer come from: a fixed probe, or the running mean of the training steps themselves."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.freezing.readings import Factored
from fishkern.names import listed
from fishkern.statistics import Drawn, Estimator, Likelihood, OnlineFisher, Prepared, estimate, prepare
from fishkern.statistics.batches import Shared
from fishkern.statistics.data import demand_several
from fishkern.statistics.held import Held
from fishkern.statistics.shards import Ranks


class Source(ABC):
    """Gives a statistic of the parameters in training, each time with the model as it is then.

    Attributes:
        digest: Recognises what is read; ``None`` before the first reading, and where no data are fixed.
    """

    digest: str | None = None

    @abstractmethod
    def read(self) -> Held:
        """Read the statistic.

        Returns:
            Of every parameter in training, by canonical name.
        """

    def close(self) -> None:  # noqa: B027  # most sources leave nothing behind
        """Take off whatever the source has put on the model."""


class Probe(Source):
    """A fixed list of batches, read by :func:`fishkern.estimate`: what does not change gives equal bits each time.

    The model and torch's random numbers are left as found, those that a ``DataLoader`` draws included.

    Args:
        model: The model.
        batches: As for :func:`fishkern.estimate`. An iterator is read once, into a list.
        estimator: A statistic of the parameters' shapes, or of their factors.
        likelihood: As for :func:`fishkern.estimate`.
        names: Gives the parameters in training, by canonical name; asked at each reading.
        shared: As for :func:`fishkern.estimate`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        estimator: Estimator,
        likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | Drawn | None = None,
        *,
        names: Callable[[], Collection[str]],
        shared: Shared = None,
    ) -> None:
        self._model, self._estimator, self._likelihood, self._names = model, estimator, likelihood, names
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        self._shared = shared
        self._prepared: tuple[frozenset[str], Prepared] | None = None

    def read(self) -> Held:
        """Read the statistic on the probe.

        Returns:
            Of every parameter in training.

        Raises:
            TypeError: The probe is not an iterable of batches, or the statistic is of another shape.
            ValueError: The probe gives other batches than at the first reading, or as :func:`fishkern.estimate` raises.
        """
        demand_several(self._batches)
        names = frozenset(self._names())
        batches = Digested(self._batches)
        options = {
            "estimator": self._estimator,
            "likelihood": self._likelihood,
            "parameters": lambda name, parameter: name in names,
            "shared": self._shared,
        }
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed whenever it is iterated over
            statistics = estimate(self._model, batches, prepared=self._prepared_for(names, options), **options)
        self._demand_same(batches.digest)
        demand_shapes(statistics, names, self._model)
        return statistics

    def _prepared_for(self, names: frozenset[str], options: dict[str, Any]) -> Prepared | None:
        """Take the prepared pass of the last reading, or prepare one where what is in training or the model changed."""
        last = self._prepared
        fits = last is not None and last[0] == names and _fits(last[1], self._model)
        if last is not None and all(Ranks().gathered(fits)):  # to prepare is a matter of all ranks
            return last[1]
        first = next(iter(self._batches), None)
        together = all(Ranks().gathered(first is not None))  # else a rank has no data, which estimate may allow
        self._prepared = (names, prepare(self._model, first, **options)) if together else None
        return None if self._prepared is None else self._prepared[1]

    def _demand_same(self, own: str) -> None:
        """Compare the batches of all ranks with those of the first reading."""
        digest = _joined(Ranks().gathered(own))
        if self.digest is not None and digest != self.digest:
            raise ValueError(
                f"the probe has given other batches than at the first reading ({digest[:8]} after {self.digest[:8]}): "
                "a loader that shuffles or augments measures its own draws. Pass a fixed list, such as list(loader)."
            )
        self.digest = digest


class Online(Source):
    """The running mean of the training steps' own squared gradients, with the noise of their batches.

    Args:
        online: Around the training steps.
        model: The model.
        names: As for :class:`Probe`.
    """

    def __init__(self, online: OnlineFisher, model: nn.Module, *, names: Callable[[], Collection[str]]) -> None:
        self._online, self._model, self._names = online, model, names

    def read(self) -> Held:
        statistics = self._online.statistics
        demand_shapes(statistics, self._names(), self._model)
        return statistics


class Digested:
    """Batches that are digested as they are read; everything else is asked of the loader itself.

    ``estimate`` looks at a loader's sampler to see how it shares its data out among ranks.

    Args:
        batches: The loader, or a list.

    Attributes:
        digest: Of the batches that were read since the last iteration began.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.digest = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[Any]:
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._batches:
            _digest_into(digest, batch)
            self.digest = digest.hexdigest()
            yield batch


def _fits(prepared: Prepared, model: nn.Module) -> bool:
    """Tell whether a model has the structure for which a pass was prepared."""
    try:
        prepared.demand_model(hosts.unwrap(model))
    except ValueError:
        return False
    return True


def demand_shapes(statistics: Held, names: Collection[str], model: nn.Module) -> None:
    """Refuse a statistic of other parameters, or one that is neither of a parameter's shape nor in factors.

    Args:
        statistics: A reading.
        names: The parameters in training.
        model: The model.

    Raises:
        ValueError: A parameter is missing.
        TypeError: The statistic has another shape.
    """
    if missing := [name for name in names if name not in statistics]:
        raise ValueError(
            f"{len(missing)} parameters in training are not in the reading ({listed(sorted(missing))}): read all "
            "that the selection trains (parameters=), and select by the names that fishkern.estimate gives."
        )
    if isinstance(statistics, Factored):
        return
    named = hosts.named_parameters(hosts.unwrap(model), remove_duplicate=False)
    shapes = {name: named[name].shape for name in names if name in named}
    other = [name for name, shape in shapes.items() if getattr(statistics[name], "shape", None) != shape]
    if other:
        raise TypeError(
            f"{type(statistics).__name__} hold another shape than the parameter for {listed(sorted(other))}: read with "
            "an estimator of every entry, such as fishkern.DiagonalFisher(), or with fishkern.DiagonalKronecker()."
        )


def _joined(digests: list[str]) -> str:
    """One digest of those of all ranks."""
    return digests[0] if len(digests) == 1 else hashlib.blake2b("/".join(digests).encode(), digest_size=16).hexdigest()


def _digest_into(digest: hashlib.blake2b, value: Any) -> None:
    """Add a batch, or a part of one, to a digest."""
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key}:".encode())
            _digest_into(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _digest_into(digest, item)
    elif hasattr(value, "tobytes"):  # arrays and pictures
        digest.update(f"{type(value).__name__}{getattr(value, 'shape', '')}".encode())
        digest.update(value.tobytes())
    elif value is None or isinstance(value, str | bytes | int | float):
        digest.update(repr(value).encode())
    else:  # a repr may contain an address
        digest.update(type(value).__name__.encode())
