"""Gradients that do not pile up: gathered at the selected entries as soon as they are complete, and released."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from fishkern.optim.compact import gather

# Without a word from the user, gradients are released of parameters this large of which this little is selected: base
# weights, not adapters.
LARGE, LITTLE = 2**20, 0.1


class ReleasedGrads:
    """Hooks that gather the gradients of some parameters during the backward pass, and what they gathered.

    Several backward passes add up, in float32 (float64 for float64). The hooks go with :meth:`close`, or with
    ``owner``.

    Args:
        owner: The optimizer.
        entries: ``(name, parameter, indices [K] on its device)`` of each.
    """

    def __init__(self, owner: object, entries: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        self.grads: dict[Tensor, Tensor] = {}
        handles = []
        for name, parameter, indices in entries:
            hook = _Hook(name, indices, self.grads)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        self.count = len(handles)
        self._finalizer = weakref.finalize(owner, _remove, handles)
        self._finalizer.atexit = False

    def check_exchanged(self) -> None:
        """Refuse gradients that several processes have not exchanged.

        Raises:
            RuntimeError: There are some.
        """
        if self.grads and _several_processes():
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

    def __init__(self, name: str, indices: Tensor, grads: dict[Tensor, Tensor]) -> None:
        self.name, self.indices, self.grads = name, indices, grads

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        grad = dense(self.name, parameter.grad)
        selected = gather(grad, self.indices)
        selected = selected.to(torch.promote_types(selected.dtype, torch.float32))
        if parameter in self.grads:
            self.grads[parameter] += selected
        else:
            self.grads[parameter] = selected
        parameter.grad = None


def to_release(
    moving: Iterable[tuple[str, Tensor, Tensor | None]], release: bool | None
) -> list[tuple[str, Tensor, Tensor]]:
    """Choose the parameters whose gradients are released.

    Args:
        moving: ``(name, parameter, indices [K])`` of each, ``None`` for indices where it moves whole.
        release: ``True`` takes all that do not move whole, ``None`` the large ones of which little is selected, unless
            several processes train.

    Returns:
        Those to hand to :class:`ReleasedGrads`.
    """
    if release is None and _several_processes():
        release = False
    entries = []
    for name, parameter, chosen in moving:
        if chosen is not None and parameter.requires_grad:
            large = parameter.numel() > LARGE and len(chosen) <= LITTLE * parameter.numel()
            if large if release is None else release:
                entries.append((name, parameter, chosen))
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


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
