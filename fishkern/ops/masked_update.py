"""One step of any optimizer that moves only the selected entries of its parameters, by an arithmetic that is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fishkern.ops._entries import check_entries, update_entries_, write_back_


@torch.no_grad()
def masked_update_(
    update: Callable[[slice, float, Tensor, Tensor], None],
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    steps: Tensor,
    *,
    state: Mapping[str, Tensor] | None = None,
    maximize: bool = False,
    master: Tensor | None = None,
    starts: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Gather the selected entries of several parameters, update them by a function, and scatter them, in place.

    It is for an algorithm that fishkern does not have: the function is its arithmetic, the rest is as in
    :func:`fishkern.ops.masked_adamw_`. It runs in PyTorch on any device; there is no Triton kernel of it. An entry that
    is not selected is neither read nor written.

    Args:
        update: ``update(span, step, weight, grad)`` changes ``weight [n]`` in place, and reads ``grad [n]``, which has
            its dtype and may be a view of the whole gradient. They belong to some selected entries, at ``span`` of the
            compact state; ``step`` is that of their parameter.
        params: As in :func:`fishkern.ops.masked_adamw_`.
        grads: As there.
        indices: As there.
        steps: ``[P]``, float32: which update this is for each parameter, counted from 1.
        state: What the algorithm keeps for each entry, by name, ``[K]`` each, for its shape to be checked.
        maximize: Change the sign of the gradients.
        master: ``[K]``, float32, the weights that are updated instead of 16-bit ones, as there.
        starts: ``[K]``, float32, as there: ``step - starts[span]`` is how often these entries were updated.
        scale: Zero-dimensional tensor that the gradients are multiplied by.

    Raises:
        ValueError: Shapes, dtypes or devices are not as described.
    """
    flat_params, flat_grads, indices = check_entries(
        params, grads, indices, steps, state=state or {}, master=master, starts=starts
    )
    if not params:
        return
    update_entries_(
        update, flat_params, flat_grads, indices, steps,
        dtype=params[0].dtype if master is None else master.dtype, maximize=maximize, master=master, scale=scale,
        beside=False,
    )  # fmt: skip
    write_back_(params, flat_params)
