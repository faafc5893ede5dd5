"""Where the state of selected entries lies: flat tensors, of which ``optimizer.state`` shows parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gather(tensor: Tensor, indices: Tensor | None) -> Tensor:
    """Read the selected entries of a parameter or of its gradient.

    Args:
        tensor: Of the parameter's shape, any strides.
        indices: Flat indices ``[K]`` on its device, or ``None`` for all.

    Returns:
        ``[K]``; with ``None`` a view, where the tensor is contiguous.
    """
    flat = tensor.detach().contiguous().view(-1)
    return flat if indices is None else flat.index_select(0, indices)


class Bucket:
    """The compact state of the parameters that one call of an operation updates.

    ``state[parameter]`` holds views of it. What is found there instead, because it was loaded or put there by hand, is
    copied in and replaced by the views (:meth:`own`), so ``optimizer.state`` is always what counts.

    Args:
        params: ``P`` parameters of one dtype and device.
        indices: The selected entries of each on that device, ``[K_i]`` of one dtype, or ``None`` for all.
        names: What the algorithm keeps for each selected entry, such as ``("exp_avg", "exp_avg_sq")``.
        with_master: Keep the weights in float32 as well, and all else in float32.
    """

    def __init__(
        self, params: Sequence[Tensor], indices: Sequence[Tensor | None], names: Sequence[str], with_master: bool
    ) -> None:
        self.params, self.indices = list(params), list(indices)
        self.dtype, self.device = params[0].dtype, params[0].device
        self._sizes = [p.numel() if i is None else len(i) for p, i in zip(params, indices, strict=True)]
        K = sum(self._sizes)
        self.flat = {
            name: torch.zeros(K, dtype=torch.float32 if with_master else self.dtype, device=self.device)
            for name in (*names, *(["master"] if with_master else []))
        }
        self.steps = torch.zeros(len(params), device=self.device)
        self.starts: Tensor | None = None
        parts = {name: flat.split(self._sizes) for name, flat in self.flat.items()}
        self._views: list[dict[str, Tensor]] = [
            {"step": step, **{name: part[i] for name, part in parts.items()}}
            for i, step in enumerate(self.steps.unbind())
        ]
        for views, chosen in zip(self._views, indices, strict=True):
            if chosen is not None:
                views["indices"] = chosen

    @property
    def master(self) -> Tensor | None:
        """The selected weights in float32, ``[K]``."""
        return self.flat.get("master")

    def fits(self) -> bool:
        """Tell whether the parameters still have the dtype and device that the state was made for.

        Returns:
            Whether all of them have.
        """
        return all(param.dtype == self.dtype and param.device == self.device for param in self.params)

    def own(self, i: int, state: dict[str, Any]) -> None:
        """Make ``state`` of parameter ``i`` views of this bucket, with the values that stand in it.

        Args:
            i: Which parameter.
            state: ``optimizer.state[parameter]``; empty before the first step.
        """
        views = self._views[i]
        if all(state.get(name) is view for name, view in views.items()):
            return
        for name, view in views.items():
            if name == "indices":
                continue
            if name in state:
                view.copy_(torch.as_tensor(state[name]))
            elif name == "master":
                view.copy_(gather(self.params[i], self.indices[i]))
            else:
                view.zero_()
        if "start" in state:
            if self.starts is None:
                self.starts = torch.zeros(sum(self._sizes), device=self.device)
            views["start"] = self.starts.split(self._sizes)[i]
            views["start"].copy_(state["start"])
        state.update(views)

    def advance(self, grads: Sequence[Tensor | None]) -> None:
        """Count one more update of the parameters that have a gradient.

        Args:
            grads: The gradient of each, or ``None``.
        """
        if all(grad is not None for grad in grads):
            self.steps.add_(1)
        else:
            for views, grad in zip(self._views, grads, strict=True):
                if grad is not None:
                    views["step"].add_(1)


def carried_over(state: dict[str, Any], old: Tensor, new: Tensor | None, param: Tensor) -> tuple[dict[str, Any], int]:
    """Move one parameter's state to another selection of its entries.

    Entries that stay keep theirs, the others begin with zeros and count their updates from here.

    Args:
        state: ``optimizer.state[param]``; may be empty.
        old: The indices it belongs to, ``[K]`` ascending.
        new: The indices it shall belong to, ``[K]`` ascending on the same device, or ``None`` for all.
        param: The parameter.

    Returns:
        The new state, empty where none of the entries with state stays, and how many entries stay.
    """
    chosen = torch.arange(param.numel(), dtype=old.dtype, device=old.device) if new is None else new
    stays = torch.isin(chosen, old, assume_unique=True)
    kept = int(stays.sum())
    if not state or kept == 0:
        return {}, kept
    places = torch.searchsorted(old, chosen[stays])
    moved: dict[str, Any] = {"step": state["step"].clone()}
    for name, values in state.items():
        if name in ("step", "start", "indices"):
            continue
        if name == "master":
            moved[name] = gather(param, new).to(values.dtype, copy=True)
        else:
            moved[name] = values.new_zeros(len(chosen))
        moved[name][stays] = values[places]
    if kept < len(chosen) or "start" in state:
        moved["start"] = state["step"].to(param.device).repeat(len(chosen))
        moved["start"][stays] = state["start"][places] if "start" in state else 0.0
    if new is not None:
        moved["indices"] = new
    return moved, kept
