"""The state of selected entries: flat tensors, of which ``optimizer.state`` holds views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishkern import hosts
from fishkern.optim.selected import ENTRIES, Selected
from fishkern.selection import Entries


class Operands(NamedTuple):
    """What an operation on selected entries takes: a parameter each, or a view of each of its ranges of rows.

    Attributes:
        params: ``P`` tensors, changed in place.
        grads: The gradient of each, of its shape or of its selected entries; or ``None``.
        indices: The selected entries of each, or ``None`` for all.
        steps: ``[P]``, which update this is of each.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    indices: list[Tensor | None]
    steps: Tensor


class Bucket:
    """The compact state of the parameters that one call of an operation updates.

    ``state[parameter]`` holds views of it. Values that are there instead, because they were loaded or put there by
    hand, are copied in and replaced by the views (:meth:`own`), so ``optimizer.state`` is always what counts.

    Attributes:
        parameters: As given.
        params: What is stepped: the parameters, of sharded ones the local shards.
        count: ``K``, how many entries of all of them are selected; of shards maybe none.

    Args:
        parameters: ``P`` parameters of one dtype and device.
        selected: The selected entries of each, of sharded ones those of the local shard; indices of one dtype.
        names: What the algorithm keeps for each selected entry, such as ``("exp_avg", "exp_avg_sq")``.
        with_master: Keep the weights in float32 as well, and all else in float32.
        fused: Whether torch's fused update is to step it; then no parameter has indices, and all are contiguous.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        selected: Sequence[Selected],
        names: Sequence[str],
        *,
        with_master: bool,
        fused: bool,
    ) -> None:
        self.parameters, self.selected, self.fused = list(parameters), list(selected), fused
        self.params = params = [hosts.local_part(parameter) for parameter in parameters]
        self._sharded = any(param is not parameter for param, parameter in zip(params, parameters, strict=True))
        self.dtype, self.device = params[0].dtype, params[0].device
        self._contiguous = [param.is_contiguous() for param in params]
        self._sizes = [one.entries.count for one in selected]
        self.count = K = sum(self._sizes)
        self.flat = {
            name: torch.zeros(K, dtype=torch.float32 if with_master else self.dtype, device=self.device)
            for name in (*names, *(["master"] if with_master else []))
        }
        self.steps = torch.zeros(len(params), device=self.device)
        self.starts: Tensor | None = None
        self.pieces: Any = None  # of a fused update, which keeps there what it has cut
        self._updates = [0] * len(params)  # the steps on the host, where reading them does not wait for the device
        parts = {name: flat.split(self._sizes) for name, flat in self.flat.items()}
        self._views: list[dict[str, Tensor]] = [
            {"step": step, **{name: part[i] for name, part in parts.items()}, **selected[i].key()}
            for i, step in enumerate(self.steps.unbind())
        ]
        pieces = [1 if one.in_one_piece else len(one.entries.spans) for one in selected]
        cut = not all(one.in_one_piece for one in selected)
        self._owners = _repeated(pieces).to(self.device) if cut else None  # of each piece the number of its parameter

    @property
    def master(self) -> Tensor | None:
        """The selected weights in float32, ``[K]``."""
        return self.flat.get("master")

    def fits(self) -> bool:
        """Tell whether the parameters still have the dtype, device and layout that the state was made for.

        Returns:
            Whether all of them have.
        """
        if self._sharded:
            self.params = [hosts.local_part(parameter) for parameter in self.parameters]
        for param, contiguous in zip(self.params, self._contiguous, strict=True):  # all() would take twice as long
            if param.dtype is not self.dtype or param.device != self.device or param.is_contiguous() is not contiguous:
                return False
        return True

    def own(self, states: Mapping[Tensor, dict[str, Any]], grads: Sequence[Tensor | None]) -> None:
        """Replace the values in the states of parameters by views of this bucket, which take them over.

        Args:
            states: ``optimizer.state``, which makes an empty one where there is none.
            grads: The gradient of each parameter; one without is left alone.
        """
        for i, (parameter, views, grad) in enumerate(zip(self.parameters, self._views, grads, strict=True)):
            if grad is None:
                continue
            state = states[parameter]
            # As after every step but the first. Nothing here is called twice, since all of it costs the host.
            if len(state) != len(views) or not all(map(is_, views.values(), state.values())):
                self._take_over(i, state)

    def _take_over(self, i: int, state: dict[str, Any]) -> None:
        views = self._views[i]
        if all(state.get(name) is view for name, view in views.items()):
            return  # with something of the caller's beside them
        for name, view in views.items():
            if name in ENTRIES:
                continue
            if name in state:
                view.copy_(torch.as_tensor(state[name]))
            elif name == "master":
                view.copy_(self.selected[i].gather(self.params[i]))
            else:
                view.zero_()
        if "start" in state:
            if self.starts is None:
                self.starts = torch.zeros(sum(self._sizes), device=self.device)
            views["start"] = self.starts.split(self._sizes)[i]
            views["start"].copy_(state["start"])
        self._updates[i] = int(state["step"]) if "step" in state else 0
        for name in views:
            state.pop(name, None)
        others = {**state}
        state.clear()
        state.update({**views, **others})  # in this order, by which the next step knows them

    def advance(self, grads: Sequence[Tensor | None]) -> None:
        """Count one more update of the parameters that have a gradient.

        Args:
            grads: The gradient of each, or ``None``.
        """
        self._updates = [n if grad is None else n + 1 for n, grad in zip(self._updates, grads, strict=True)]
        if all(grad is not None for grad in grads):
            self.steps.add_(1)
        else:
            for views, grad in zip(self._views, grads, strict=True):
                if grad is not None:
                    views["step"].add_(1)

    def by_age(self, grads: Sequence[Tensor | None]) -> list[tuple[bool, list[int]]]:
        """Part the parameters that have a gradient by whether the update that :meth:`advance` counted is their first.

        Args:
            grads: The gradient of each, or ``None``.

        Returns:
            Whether their entries have no momentum yet, and the numbers of such parameters; no empty part.
        """
        parts: tuple[list[int], list[int]] = ([], [])
        for i, (grad, updates) in enumerate(zip(grads, self._updates, strict=True)):
            if grad is not None:
                parts[updates == 1].append(i)
        return [(first, numbers) for first, numbers in ((True, parts[1]), (False, parts[0])) if numbers]

    def views(self, i: int) -> dict[str, Tensor]:
        """Give the state of one parameter.

        Args:
            i: Which parameter.

        Returns:
            By name ``[K_i]`` each, views of :attr:`flat`; and ``"step"``, zero-dimensional.
        """
        return self._views[i]

    def tensors(self) -> list[Tensor]:
        """List all memory that is kept here.

        Returns:
            The compact state and the steps; views of them are in the states of the parameters.
        """
        starts = [] if self.starts is None else [self.starts]
        return [*self.flat.values(), self.steps, *starts, *(s.indices for s in self.selected if s.indices is not None)]

    def operands(self, grads: Sequence[Tensor | None]) -> Operands:
        """Take each range of rows for a parameter of its own, all of which is selected.

        The compact state stays as it is: the entries of ranges follow one another in it as those of parameters do.

        Args:
            grads: The gradient of each parameter, of its shape or ``[K_i]``; or ``None``.

        Returns:
            The arguments of an operation.
        """
        if self._owners is None:
            return Operands(self.params, list(grads), [one.indices for one in self.selected], self.steps)
        params: list[Tensor] = []
        pieces: list[Tensor | None] = []
        indices: list[Tensor | None] = []
        for param, one, grad in zip(self.params, self.selected, grads, strict=True):
            if one.in_one_piece:
                params.append(param)
                pieces.append(grad)
                indices.append(one.indices)
                continue
            views = one.views(param)
            params += views
            pieces += [None] * len(views) if grad is None else one.views(grad)
            indices += [None] * len(views)
        return Operands(params, pieces, indices, self.steps[self._owners])


def carried_over(
    state: dict[str, Any], old: Entries, new: Selected, param: Tensor, *, staying: int, added: int
) -> dict[str, Any]:
    """Move one parameter's state to another selection of its entries.

    Entries that stay keep theirs, the others begin with zeros and count their updates from here.

    Args:
        state: ``optimizer.state[param]``; may be empty.
        old: The entries it belongs to.
        new: The entries that it is to belong to.
        param: The parameter, or the local shard of one.
        staying: How many entries of the whole parameter stay.
        added: How many entries of the whole parameter come in.

    Returns:
        The new state, empty where none of the entries with state stays. That of every rank has the same keys, and the
        same step.
    """
    count = new.entries.count
    if not state or staying == 0:
        return {}
    values = {name: tensor for name, tensor in state.items() if name not in ("step", "start", *ENTRIES)}
    moved: dict[str, Tensor] = {
        name: new.gather(param).to(tensor.dtype, copy=True) if name == "master" else tensor.new_zeros(count)
        for name, tensor in values.items()
    }
    step = state["step"].clone()
    if added or "start" in state:
        # The step is the parameter's. An entry that comes in now has done none of its updates: it starts at this one.
        values["start"] = state.get("start", torch.zeros(old.count, device=param.device))
        moved["start"] = step.to(param.device).repeat(count)
    for before, after in old.moves(new.entries):
        source, target = _on(param.device, before), _on(param.device, after)
        for name, tensor in values.items():
            moved[name][target] = tensor[source]
    if "start" in moved and new.share is None and bool((moved["start"] == moved["start"][0]).all()):
        step -= moved.pop("start")[0].to(step.device)  # one age for all again, with which rows are fused
    return {"step": step, **moved, **new.key()}


def apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a parameter's state out of the memory that it shares with others.

    Args:
        state: ``optimizer.state[parameter]``.

    Returns:
        The same values in memory of their own, which keeps nobody else's alive.
    """
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Add up the memory behind some tensors.

    Args:
        tensors: Several may share memory, which counts once and whole, however little of it they view.

    Returns:
        Bytes.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _on(device: torch.device, places: slice | Tensor) -> slice | Tensor:
    return places if isinstance(places, slice) else places.to(device)


def _repeated(times: Sequence[int]) -> Tensor:
    """Repeat each number from 0 on so many times: ``[2, 1]`` gives ``[0, 0, 1]``."""
    return torch.arange(len(times)).repeat_interleave(torch.tensor(times))
