"""The start that a selection belongs to: the values of adapter and head on which its scores were computed.

A selection ranks the entries of one random start. On another the same entries mean nothing, so the selection carries a
digest of its start, and the values themselves can be saved beside it.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.files import Format, StoredTensor, in_brief, open_tensors, save_tensors
from fishkern.names import fitted
from fishkern.selection.result import Selection

FORMAT = Format("fishkern.start", version=1, saved_by="fishkern.selection.save_start")

# An SVD that another number of threads computes, or a cast to bfloat16, moves the digest less; another seed moves it by
# about the norm of the parameter.
_TOLERANCE = 1e-2


def bound_to_start(selection: Selection, model: nn.Module) -> Selection:
    """Let a selection carry a digest of the values that its pool has in a model.

    Args:
        selection: The selection.
        model: The model that it was made for, as it stands.

    Returns:
        The same selection with ``provenance["start"]``: for each name the norm, and the sum under random signs; and
        with ``provenance["start_unselected"]``, which are those of the entries that are not selected.

    Raises:
        ValueError: The selection does not fit the model.
    """
    selection.check(model)
    named = named_tensors(model)
    indices = {name: selection.indices(name) for name in selection.names if name not in selection.whole}
    start = {
        "start": {name: _digest(named[name]) for name in selection.names},
        "start_unselected": {name: _digest(_unselected(named[name], selection, name)) for name in indices},
    }
    return Selection(selection.shapes, indices, whole=selection.whole, provenance={**selection.provenance, **start})


def check_start(
    selection: Selection, model: nn.Module | Iterable[tuple[str, Tensor]], *, trained: bool = False
) -> None:
    """Make sure that a model stands where it stood when the selection was made.

    Args:
        selection: The selection; one that carries no digest passes.
        model: The model before its first step, or its named parameters; what is not among them is not looked at.
        trained: Whether a model passes as well that this very selection was trained in from there: selected entries
            have moved, and all others stand where they stood.

    Raises:
        ValueError: A parameter has other values.
    """
    if (digests := selection.provenance.get("start")) is None:
        return
    named = named_tensors(model, digests)
    for name, (norm, signed) in digests.items():
        if name not in named:
            continue
        found = _digest(named[name])
        if not _agree(found, (norm, signed)):
            if trained and _was_trained(selection, named):
                return
            raise ValueError(
                f"the selection was made for another start: {name} had norm {norm:.6g} and has {found[0]:.6g} (sums "
                f"under random signs {signed:.6g} and {found[1]:.6g}). Load the start that was saved with it "
                "(fishkern.selection.load_start), or select anew."
            )


def _was_trained(selection: Selection, named: Mapping[str, Tensor]) -> bool:
    """Tell whether only selected entries have moved from the start, some of them in a parameter that has others."""
    # What is selected whole has nothing that could tell: a head alone that differs is another start.
    held = selection.provenance.get("start_unselected", {})
    digests = {name: digest for name, digest in held.items() if name in named and name in selection}
    stay = all(_agree(_digest(_unselected(named[name], selection, name)), own) for name, own in digests.items())
    told = any(norm > 0 for norm, _ in digests.values())
    return stay and told and any(not _agree(_digest(named[n]), selection.provenance["start"][n]) for n in digests)


def _agree(found: Sequence[float], own: Sequence[float]) -> bool:
    return max(abs(found[0] - own[0]), abs(found[1] - own[1])) <= _TOLERANCE * own[0]


def _unselected(tensor: Tensor, selection: Selection, name: str) -> Tensor:
    """Give a copy of a parameter, ``[P]``, with zeros where it is selected."""
    indices = selection.indices(name).long().to(tensor.device)
    return tensor.detach().flatten().index_fill(0, indices, 0)


def save_start(model: nn.Module, selection: Selection, path: str | os.PathLike[str]) -> Path:
    """Save the values that the pool of a selection has in a model.

    Args:
        model: The model, before its first step.
        selection: Says which parameters.
        path: ``name.safetensors``.

    Returns:
        The file.

    Raises:
        ValueError: The selection does not fit the model, or was made for other values.
    """
    selection.check(model)
    check_start(selection, model)
    named = named_tensors(model)
    return save_tensors(path, {name: named[name].detach() for name in selection.names}, format=FORMAT, metadata={})


def load_start(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a model the values that were saved.

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
        if name not in named or named[name].shape != tensor.shape:
            has = f"has it as {tuple(named[name].shape)}" if name in named else "has no such parameter"
            shown = f"{in_brief(name, 80)} {tuple(tensor.shape)}"
            raise ValueError(f"{path} holds {shown}, and {type(model).__name__} {has}.")
    with torch.no_grad():
        for name, tensor in stored.items():
            named[name].copy_(tensor.read())


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


def named_tensors(model: nn.Module | Iterable[tuple[str, Tensor]], known: Container[str] = ()) -> dict[str, Tensor]:
    """Give every parameter by its canonical name, a shared one by each of them.

    Args:
        model: A model, or its named parameters.
        known: For named parameters: names that tell whether these are those of a model under DDP.

    Returns:
        Name to parameter.
    """
    if isinstance(model, nn.Module):
        return hosts.named_parameters(model, remove_duplicate=False)
    named = list(model)
    names = fitted([name for name, _ in named], known)
    return {name: tensor for name, (_, tensor) in zip(names, named, strict=True)}


@torch.no_grad()
def _digest(tensor: Tensor) -> list[float]:
    values = tensor.detach().double().cpu().flatten()
    signs = torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [values.norm().item(), (values @ signs.double()).item()]
