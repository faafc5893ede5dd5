"""Statistics: one tensor for each parameter, the number of units it is the mean of, and its provenance."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.files import AnyTensor, Format, StoredTensor, is_sharded, read_region, region_of
from fishkern.statistics.held import Held
from fishkern.statistics.second_moment import second_moment


class Statistics(Held[Tensor]):
    """The mean of a per-parameter statistic over ``count`` units, by parameter name; for example the diagonal Fisher.

    A read-only mapping from the canonical name (:func:`fishkern.names.without_wrappers`) to a float32 tensor, in the
    model's order. Its shape is the parameter's, or the estimator's own, such as one number for each row.
    ``provenance["definition"]`` says what a unit is (an example, a batch) and which Fisher this is.
    ``==`` compares contents, with the runs in any order. Where FSDP2 shards the parameters, the tensors are sharded
    alike: see :meth:`full`, and ``==`` and :meth:`save` are called on all ranks. :meth:`sharded_as` makes such
    statistics of a file.

    Args:
        tensors: The statistic by parameter name, floating; not copied if float32 already. Wrappers are removed from
            the names.
        count: Number of units that the tensors are the mean of, at least 1.
        provenance: ``{"definition": {...}, "runs": [{...}, ...]}``, JSON. Only statistics of equal definitions merge
            (estimator, fisher_type, unit, likelihood, reduction, ...); each run describes one pass (model class,
            dtype, seed, batches, versions, ...).
        coverage: One :class:`Covered` for every parameter of the model, also those left out; empty if unknown.
        precision: How precise the mean is; ``None`` if unknown.

    Raises:
        TypeError: An entry is not a floating tensor, ``count`` is not an integer, or ``provenance`` is not JSON.
        ValueError: Two names become one without wrappers, ``count`` is below 1, a float64 value overflows float32,
            ``provenance`` has other keys, or ``coverage`` contradicts ``tensors``.
    """

    FORMAT: ClassVar[Format] = Format("fishkern.statistics", version=1, saved_by="Statistics.save")

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> Statistics:
        """Read Adam's second moment: the running mean of the squares of batch gradients.

        It is what many take for a Fisher information because it is there, and is none: the square of a batch's mean
        gradient, clipped where gradients were clipped, at the weights of many steps. The definition says so, and it
        merges with no other statistic.

        Args:
            optimizer: Of Adam's kind, with ``exp_avg_sq`` for every entry: Adam, AdamW, NAdam or RAdam of torch.
            model: For the names of the parameters, unless the optimizer was made with ``model.named_parameters()``.

        Returns:
            ``exp_avg_sq / (1 - beta2^step)`` by parameter, float32 on its device; ``count`` is the number of steps.
            Parameters that have no state, with ``model`` also those that the optimizer was not given, are left out, and
            the coverage lists them.

        Raises:
            TypeError: It is no optimizer.
            ValueError: It is none of Adam's kind (nor is SparseAdam), has taken no step, is masked, sharded or
                quantised, has groups of different decays, or there are no names or one name twice.
        """
        moment = second_moment(optimizer, model)
        return cls(moment.tensors, count=moment.count, provenance=moment.provenance, coverage=moment.coverage)

    @property
    def total(self) -> int:
        """Number of coordinates of all tensors."""
        return sum(shape.numel() for shape in self.shapes.values())

    def __getitem__(self, name: str) -> Tensor:
        (entry,) = self._entries_of(name)
        return self._read(entry)

    def full(self, name: str) -> Tensor:
        """Return the whole tensor of a name, also where the model's parameters were sharded.

        For such a name ``statistics[name]`` is a ``DTensor`` of the parameter's placements, whose ``to_local()`` this
        rank holds. Gathering the parts is a collective operation: every rank calls it.

        Args:
            name: A name.

        Returns:
            An ordinary tensor, on every rank.

        Raises:
            KeyError: There is nothing for that name.
        """
        tensor = self[name]
        return tensor.full_tensor() if is_sharded(tensor) else tensor

    def whole(self) -> Statistics:
        """Gather sharded tensors, each as :meth:`full` does.

        Returns:
            Statistics of ordinary tensors, on every rank; these ones if they are that already.
        """
        if not any(map(is_sharded, self.blocks.values())):
            return self
        tensors = {name: self.full(name) for name in self}
        return Statistics(tensors, **self._facts)

    def sharded_as(self, model: nn.Module) -> Statistics:
        """Take of each tensor the part of the parameter that this rank holds; nothing is exchanged between ranks.

        Statistics that were loaded lazily are read from disk, by each rank its part alone.

        Args:
            model: Sharded by FSDP2, with the parameters of these statistics. A parameter that is not sharded keeps the
                whole tensor.

        Returns:
            Statistics in memory, whose tensors are distributed as the parameters are and on their devices.

        Raises:
            ValueError: A parameter is missing, has another shape, or is distributed in a way that is not served; or a
                tensor is sharded already.
        """
        parameters = hosts.named_parameters(model, remove_duplicate=False)
        tensors = {name: _part_of(name, one, parameters.get(name)) for name, one in self.blocks.items()}
        return Statistics(tensors, **self._facts)

    @property
    def _facts(self) -> dict[str, Any]:
        """All but the tensors."""
        return {name: getattr(self, name) for name in ("count", "provenance", "coverage", "precision")}

    def __repr__(self) -> str:
        definition = self.provenance["definition"]
        unit = definition.get("unit", "unit")
        counted = "example" if unit == "position" else unit  # squares of positions are summed over each example
        parts = [
            " ".join(str(definition[key]) for key in ("estimator", "fisher_type") if key in definition),
            _counted(len(self), "group" if "groups" in definition else "parameter"),
            _counted(self.total, "coordinate"),
            f"mean over {_counted(self.count, counted)}",
        ]
        if left_out := sum(covered.path == "left out" for covered in self._coverage.values()):
            parts.append(f"{left_out:,} left out")
        if any(isinstance(entry, StoredTensor) for entry in self._entries.values()):
            parts.append("on disk")
        return f"Statistics({', '.join(filter(None, parts))})"


def _part_of(name: str, tensor: AnyTensor, parameter: Any) -> Tensor:
    """Take of a whole tensor, in memory or on disk, what this rank holds of a parameter."""
    if is_sharded(tensor):
        raise ValueError(f"the statistics of {name} are sharded already: take those of whole(), or save and load them.")
    if parameter is None or parameter.shape != tensor.shape:
        there = "no such parameter" if parameter is None else f"it as {tuple(parameter.shape)}"
        raise ValueError(f"the statistics hold {name} {tuple(tensor.shape)}, and the model has {there}.")
    region, device = region_of(name, parameter), hosts.local_part(parameter).device
    if isinstance(tensor, StoredTensor):
        part = read_region(tensor, region, torch.float32).to(device)
    else:
        part = tensor[tuple(slice(*bounds) for bounds in region.ranges)].to(device, copy=True)
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor  # torch itself imports it with the first sharded model only

    options = {"run_check": False, "shape": tensor.shape, "stride": torch.empty(tensor.shape, device="meta").stride()}
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **options)


def _counted(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{plural}"
