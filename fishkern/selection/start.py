"""The start of a selection: the initial values of adapter and head, on which its scores were computed.

A selection ranks the entries of one random initialisation and is meaningless for another. So it can carry a digest of
the values it was made for, and the values themselves can be saved with it.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.digests import agree, difference, digest_of_pieces
from fishkern.files import (
    PIECE,
    Format,
    Region,
    StoredTensor,
    in_brief,
    is_sharded,
    open_tensors,
    pieces,
    read_region,
    save_tensors,
    write_from_ranks,
)
from fishkern.names import fitted
from fishkern.selection.agreement import check_on_shards
from fishkern.selection.local import own_entries, without
from fishkern.selection.result import Selection, check_selection

FORMAT = Format("fishkern.start", version=1, saved_by="fishkern.selection.save_start")


def bound_to_start(selection: Selection, model: nn.Module) -> Selection:
    """Add to a selection a digest of the values that its pool has in a model.

    Of a model that FSDP2 shards it is the digest of one process; this is a collective operation then.

    Args:
        selection: The selection.
        model: The model that it was made for, with the values it was made for.

    Returns:
        The same selection with ``provenance["start"]``: for each name the norm, and the sum under random signs; and
        with ``provenance["start_unselected"]``, which are those of the entries that are not selected.

    Raises:
        ValueError: The selection does not fit the model.
        RuntimeError: Ranks that shard the model have different selections.
    """
    named = agreed_tensors(model, selection)
    selection.check(model)
    start = {
        "start": {name: _digest(named[name]) for name in selection.names},
        "start_unselected": {
            name: _digest_of_others(selection, name, named[name])
            for name, count in selection.counts.items()
            if count < selection.shapes[name].numel() or not count
        },
    }
    return selection.with_provenance(**start)


def check_start(
    selection: Selection, model: nn.Module | Iterable[tuple[str, Tensor]], *, trained: bool = False
) -> None:
    """Check that a model has the values that the selection was made for; of a sharded one a collective operation.

    Args:
        selection: The selection; one that carries no digest passes.
        model: The model before its first step, or its named parameters; others of the pool are not compared.
        trained: Whether to accept as well a model in which this very selection was trained from there: selected entries
            have moved, and all others have the values that they had.

    Raises:
        ValueError: A parameter has other values.
    """
    if (digests := selection.provenance.get("start")) is None:
        return
    named = named_tensors(model, digests)
    for name, recorded in digests.items():
        if name not in named:
            continue
        actual = _digest(named[name])
        if not agree(actual, recorded):
            if trained and _was_trained(selection, named):
                return
            raise ValueError(
                f"the selection was made for another start: {name} {difference(actual, recorded)}. Load the start that "
                "was saved with it (fishkern.selection.load_start), or select anew."
            )


def _was_trained(selection: Selection, named: Mapping[str, Tensor]) -> bool:
    """Tell whether only selected entries have moved from the start, some of them in a parameter that has others."""
    # A parameter that is selected whole has no other entries to compare: a head alone that differs is another start.
    recorded = selection.provenance.get("start_unselected", {})
    recorded = {name: pair for name, pair in recorded.items() if name in named and name in selection}
    unselected = {name: _digest_of_others(selection, name, named[name]) for name in recorded}
    unmoved = all(agree(unselected[name], pair) for name, pair in recorded.items())
    conclusive = any(norm > 0 for norm, _ in recorded.values())  # zeros are the same in every start
    start = selection.provenance["start"]
    return unmoved and conclusive and any(not agree(_digest(named[name]), start[name]) for name in recorded)


def _digest(tensor: Tensor) -> tuple[float, float]:
    return digest_of_pieces(pieces(tensor, PIECE))


def _digest_of_others(selection: Selection, name: str, parameter: Tensor) -> tuple[float, float]:
    """Compute the digest of a parameter, with zeros where it is selected."""
    return _digest(without(parameter, *own_entries(selection, name, parameter)))


def save_start(model: nn.Module, selection: Selection, path: str | os.PathLike[str]) -> Path:
    """Save the values that the pool of a selection has in a model.

    Of a model that FSDP2 shards all ranks call it, and the first writes the file of one process.

    Args:
        model: The model, before its first step.
        selection: Says which parameters.
        path: ``name.safetensors``.

    Returns:
        The file.

    Raises:
        ValueError: The selection does not fit the model, or was made for other values.
        RuntimeError: Ranks that shard the model have different selections.
    """
    named = agreed_tensors(model, selection)
    selection = selection.gathered()
    selection.check(model)
    check_start(selection, model)
    tensors = {name: named[name].detach() for name in selection.names}
    if any(map(is_sharded, tensors.values())):
        return write_from_ranks(tensors, lambda fed: save_tensors(path, fed, format=FORMAT, metadata={}))
    return save_tensors(path, tensors, format=FORMAT, metadata={})


def load_start(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a model the values that were saved; of a sharded parameter a rank reads its own part alone.

    Args:
        model: Changed in place.
        path: What :func:`save_start` wrote.

    Raises:
        ValueError: The file is damaged, or the model lacks a parameter or has it in another shape; the model is then
            left as it was.
    """
    stored = open_start(path)
    named = named_tensors(model)
    for name, tensor in stored.items():
        if reason := misfit(name, tensor.shape, named, model):
            raise ValueError(f"{path} {reason}.")
    with torch.no_grad():
        for name, tensor in stored.items():
            share = hosts.share_of(name, named[name])
            ranges = tuple((0, size) for size in tensor.shape) if share is None else share.ranges
            hosts.local_part(named[name]).copy_(read_region(tensor, Region(tensor.shape, ranges), tensor.dtype))


def open_start(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Open what :func:`save_start` wrote; the values stay on disk.

    Args:
        path: The file.

    Returns:
        The values of each parameter by name.

    Raises:
        ValueError: The file is damaged, or holds no start.
    """
    _, stored = open_tensors(path, format=FORMAT)
    for name, tensor in stored.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{path} holds {in_brief(name, 80)} as {tensor.dtype}, and a start is floating.")
    return stored


def misfit(name: str, shape: torch.Size, named: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Say why a stored tensor is none of a model's parameters.

    Args:
        name: Of the tensor in its file.
        shape: Its shape.
        named: The model's parameters by canonical name.
        model: The model.

    Returns:
        The reason, of which the file is the subject: ``"holds ..., and ... has no such parameter"``; ``None`` if there
        is a parameter of this name and shape.
    """
    if name in named and named[name].shape == shape:
        return None
    has = f"has it as {tuple(named[name].shape)}" if name in named else "has no such parameter"
    return f"holds {in_brief(name, 80)} {tuple(shape)}, and {type(model).__name__} {has}"


def agreed_tensors(model: nn.Module, selection: Selection) -> dict[str, Tensor]:
    """Give the parameters of a model, of which all ranks have the same selection. Of shards a collective operation.

    Args:
        model: A model.
        selection: Of this rank.

    Returns:
        As :func:`named_tensors`.

    Raises:
        TypeError: It is no selection.
        RuntimeError: Ranks that shard the model have different selections.
    """
    check_selection(selection)
    named = named_tensors(model)
    check_on_shards(selection, named.values())
    return named


def named_tensors(model: nn.Module | Iterable[tuple[str, Tensor]], known: Container[str] = ()) -> dict[str, Tensor]:
    """Give every parameter by its canonical name, a shared one by each of them.

    Args:
        model: A model, or its named parameters.
        known: For named parameters: names that tell whether these are those of a model under DDP.

    Returns:
        Name to parameter.
    """
    if isinstance(model, nn.Module):
        hosts.reshard(model)
        return hosts.named_parameters(model, remove_duplicate=False)
    named = list(model)
    names = fitted([name for name, _ in named], known)
    return {name: tensor for name, (_, tensor) in zip(names, named, strict=True)}
