"""The selected values of a model, and a digest of all others by which the model is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from fishkern import hosts
from fishkern.files import PIECE, pieces
from fishkern.names import listed
from fishkern.selection.local import Joined, own_entries, without
from fishkern.selection.result import Selection


def selected_values(named: Mapping[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """Copy the selected values of a model; where it is sharded, a collective operation.

    Args:
        named: Its parameters by name.
        selection: What is selected, the same on all ranks.

    Returns:
        For each name with selected entries ``[K]`` on the CPU, ascending, of all ranks.
    """
    values = {}
    for name, count in selection.counts.items():
        if count:
            own, share = own_entries(selection, name, named[name])
            held = own.gather(hosts.local_part(named[name]))
            values[name] = (held if share is None else Joined(own, share)(held)).to("cpu", copy=True)
    return values


def check_base(named: Mapping[str, Tensor], selection: Selection, digests: Mapping[str, str]) -> None:
    """Check that a model has, where nothing is selected, the values that a digest is of.

    Args:
        named: Its parameters by name.
        selection: What is selected, or whatever has moved.
        digests: For each name of the pool, from :func:`digest_of_others`.

    Raises:
        ValueError: It is another model.
    """
    if missing := [name for name in digests if name not in named]:
        raise ValueError(f"the model is not the delta's base: it has no {listed(missing)}.")
    actual = {name: digest_of_others(selection, name, named[name]) for name in selection.names}
    if differing := [name for name, digest in actual.items() if digest != digests[name]]:
        raise ValueError(
            f"the model is not the delta's base: {len(differing)} of {len(actual)} parameters differ where "
            f"nothing is selected, such as {differing[0]}. Load the base that it was trained from, and for an "
            "adapter its start; undo a delta of another selection first; check=False applies it all the same."
        )


def digest_of_others(selection: Selection, name: str, parameter: Tensor) -> str:
    """Hash dtype and bytes of a parameter, with zeros where it is selected.

    Args:
        selection: What is selected.
        name: The parameter's.
        parameter: The parameter; where it is sharded, a collective operation.

    Returns:
        Sixteen hexadecimal digits. One that is selected whole has no bytes to hash.
    """
    digest = blake2b(str(parameter.dtype).encode(), digest_size=8)
    if 0 < parameter.numel() == selection.counts[name]:
        return digest.hexdigest()
    entries, share = own_entries(selection, name, parameter)
    shown = parameter if share is None else without(parameter, entries, share)
    start = 0
    for piece in pieces(shown, PIECE):
        buffer = bytearray(piece.nbytes)
        copy = torch.frombuffer(buffer, dtype=piece.dtype).copy_(piece)
        if share is None:
            entries.fill_(copy, 0, start)
        digest.update(buffer)
        start += len(piece)
    return digest.hexdigest()
