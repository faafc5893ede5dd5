"""Make sure that all ranks of a process group have selected the same entries."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from fishkern.files import Region
from fishkern.selection.entries import Entries
from fishkern.selection.result import Selection
from fishkern.statistics.shards import Ranks


def check_agreement(selection: Selection) -> None:
    """Check that all ranks have selected the same entries; without a process group there is nothing to check.

    Args:
        selection: Of this rank.

    Raises:
        RuntimeError: Two ranks differ.
    """
    entries = {name: selection.entries(name) for name in selection.names}
    Ranks().demand_equal(_digest(entries), "the digest of the selection")


def check_replicas(entries: Mapping[str, Entries], regions: Mapping[str, Region]) -> None:
    """Check that ranks which hold the same part of parameters have selected the same entries of it.

    Args:
        entries: Of this rank, by name.
        regions: The part of each parameter that this rank holds.

    Raises:
        RuntimeError: Two ranks differ.
    """
    # by parameter: one of a single row is whole on one rank, and empty on the others
    own = {f"{name} {regions[name].ranges}": _digest({name: one}) for name, one in entries.items()}
    first: dict[str, tuple[int, str]] = {}
    for rank, digests in enumerate(Ranks().gathered(own)):
        for part, digest in digests.items():
            before, expected = first.setdefault(part, (rank, digest))
            if digest != expected:  # which all ranks see
                raise RuntimeError(
                    f"rank {before} and rank {rank} hold the same scores, and have selected different entries of "
                    "them: the values differ. Give all ranks the same statistics."
                )


def _digest(entries: Mapping[str, Entries]) -> str:
    digest = blake2b(digest_size=16)
    for name, selected in entries.items():
        digest.update(f"{name} {selected.is_all} ".encode())
        if not selected.is_all:
            digest.update(selected.indices().numpy().tobytes())
    return digest.hexdigest()
