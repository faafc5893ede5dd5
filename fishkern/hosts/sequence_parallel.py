"""Models whose positions are dealt out to several processes between some modules (sequence parallel)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fishkern.hosts.tensor_parallel import given_by, split_of


@contextmanager
def demanding_positions(model: nn.Module) -> Iterator[None]:
    """Refuse inputs with positions that cannot be dealt out, before any process waits for another.

    torch takes the parts of ordinary tensors for equally long. With unequal ones processes exchange more than others
    expect, and wait until the time limit of the process group; so does a process whose neighbour fails without any
    position. All see the whole input, and raise at the same call.

    Args:
        model: A module; hooks are added for the time of the ``with`` block, if it is a model of this kind.

    Yields:
        Nothing.

    Raises:
        ValueError: The number of positions does not divide by that of processes; or, where a module gives a
            ``DTensor``, it is smaller.
    """
    handles = []
    for path, module in model.named_modules():
        given = given_by(module)
        # a norm takes what is dealt out already, and the features of an output are those of the weight
        if given is None or not given[0].is_shard() or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        axes = 1 if isinstance(module, nn.Embedding) else 0  # which the output has and the input has not
        check = partial(_check, path, given[0].dim, axes, split_of(module).mesh.size(), local=given[1])
        handles.append(module.register_forward_pre_hook(check, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(
    path: str,
    axis: int,
    axes: int,
    size: int,
    module: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    local: bool,
) -> None:
    x = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
    if x is None:
        return
    axis = axis if axis >= 0 else axis + x.ndim + axes
    if axis >= x.ndim - 1 + axes:  # the last axis of the output has features, and not positions
        return
    count = x.shape[axis]
    if count < size or (local and count % size):
        raise ValueError(
            f"{path} deals out the positions of a batch to {size} processes (sequence parallel), and this one has "
            f"{count} (axis {axis} of {tuple(x.shape)}): expected {'a multiple of' if local else 'at least'} {size}. "
            f"Pad the batches, as by pad_to_multiple_of={size} of a collator, or estimate with the model split without "
            "sequence parallel."
        )
