"""Setting the selected weights of a model to zero."""

from __future__ import annotations

import torch
from torch import nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError, is_stored, stored_weights
from fishkern.names import listed
from fishkern.selection.result import Selection, check_selection
from fishkern.selection.start import named_tensors


@torch.no_grad()
def prune_(model: nn.Module, selection: Selection) -> None:
    """Set the selected entries of a model to zero, in place.

    What is selected goes. So select the least scores, ``order="smallest"``, of a saliency such as
    :func:`fishkern.saliency` gives. To undo it, keep ``fishkern.delta(model, selection)`` from before.

    Args:
        model: Changed in place; only what is selected.
        selection: What becomes zero.

    Raises:
        TypeError: What is given is no selection.
        ValueError: The selection does not fit the model.
        UnsupportedModuleError: The model's parameters are sharded; a selected weight is quantised; or PEFT has merged
            an adapter into it, so that unmerging would change the zeros.
    """
    check_selection(selection)
    plain = hosts.unwrap(model)
    if reason := hosts.sharded(plain):
        raise UnsupportedModuleError(f"{reason}.")
    chosen = [name for name, count in selection.counts.items() if count]
    stored = stored_weights(plain)
    named = named_tensors(model)
    if packed := [name for name in chosen if name in stored or (name in named and is_stored(named[name]))]:
        raise UnsupportedModuleError(
            f"{listed(packed)} is quantised and stored in another form, whose entries cannot become zero: prune the "
            "model before it is quantised."
        )
    selection.check(model)
    if reason := hosts.merged_adapter(plain, chosen):
        raise UnsupportedModuleError(f"{reason}.")
    for name in chosen:
        parameter, entries = named[name], selection.entries(name)
        entries.scatter_(parameter, parameter.new_zeros(entries.count))
