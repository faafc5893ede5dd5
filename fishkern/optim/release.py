"""Gather gradients at the selected entries as soon as they are complete, and free them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from fishkern.names import listed
from fishkern.ops.dtypes import accumulates_in
from fishkern.optim.selected import Selected

# By default, the gradients of parameters this large of which this little is selected are released: those of base
# weights, not of adapters.
LARGE, LITTLE = 2**20, 0.1


class ReleasedGrads:
    """Hooks that gather the gradients of some parameters during the backward pass, and what they gathered.

    Several backward passes add up, in float32 (float64 for float64). The hooks go with :meth:`close`, or with
    ``owner``.

    Args:
        owner: The optimizer.
        entries: ``(name, parameter, selected)`` of each.
    """

    def __init__(self, owner: object, entries: Iterable[tuple[str, Tensor, Selected]]) -> None:
        self.grads: dict[Tensor, Tensor] = {}
        handles = []
        for name, parameter, selected in entries:
            hook = _Hook(name, selected, self.grads)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        self.count = len(handles)
        self._finalizer = weakref.finalize(owner, _remove, handles)
        self._finalizer.atexit = False

    def check_exchanged(self) -> None:
        """Refuse gradients that several processes have not exchanged.

        Raises:
            RuntimeError: There are some.
        """
        if self.grads and several_processes():
            raise RuntimeError(
                "gradients are released before processes exchange them: make the optimizer with release_grads=False."
            )

    def close(self) -> None:
        """Take the hooks off, and forget what was gathered."""
        self._finalizer()
        self.grads.clear()
        self.count = 0


class _Hook:
    """Gather one parameter's gradient."""

    def __init__(self, name: str, selected: Selected, grads: dict[Tensor, Tensor]) -> None:
        self.name, self.selected, self.grads = name, selected, grads

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        grad = dense(self.name, parameter.grad)
        view = self.selected.indices is None  # copied, since it would keep the whole gradient alive
        values = self.selected.gather(grad).to(accumulates_in(grad.dtype), copy=view)
        if parameter in self.grads:
            self.grads[parameter] += values
        else:
            self.grads[parameter] = values
        parameter.grad = None


def to_release(
    moving: Iterable[tuple[str, Tensor, Selected]], release: bool | None
) -> list[tuple[str, Tensor, Selected]]:
    """Choose the parameters whose gradients are released.

    Args:
        moving: ``(name, parameter, selected)`` of each.
        release: ``True`` takes all that do not move whole, ``None`` the large ones of which little is selected, unless
            several processes train.

    Returns:
        Those to hand to :class:`ReleasedGrads`; none that is sharded, whose gradients FSDP2 itself reduces and frees.

    Raises:
        ValueError: ``release`` is ``True``, and a parameter is sharded.
    """
    moving = list(moving)
    if release and (sharded := [name for name, _, selected in moving if selected.share is not None]):
        raise ValueError(
            f"{len(sharded)} parameters are sharded ({listed(sharded)}), and FSDP2 reduces their gradients itself: "
            "leave release_grads= out."
        )
    if release is None and several_processes():
        release = False
    entries = []
    for name, parameter, selected in moving:
        if selected.share is None and not selected.entries.is_all and parameter.requires_grad:
            large = parameter.numel() > LARGE and selected.entries.count <= LITTLE * parameter.numel()
            if large if release is None else release:
                entries.append((name, parameter, selected))
    return entries


def dense(name: str, grad: Tensor) -> Tensor:
    """Refuse a sparse gradient.

    Args:
        name: The parameter's.
        grad: Its gradient.

    Returns:
        ``grad``.

    Raises:
        ValueError: It is sparse.
    """
    if grad.layout is not torch.strided:
        raise ValueError(f"{name} has a sparse gradient ({grad.layout}): make its module with sparse=False.")
    return grad


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def several_processes() -> bool:
    """Tell whether several processes train together.

    Returns:
        Whether torch's distributed package runs more than one.
    """
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
