"""Make sure that all ranks of a process group have selected the same entries."""

from __future__ import annotations

from hashlib import blake2b

from fishkern.selection.result import Selection
from fishkern.statistics.shards import Ranks


def check_agreement(selection: Selection) -> None:
    """Check that all ranks have selected the same entries; without a process group there is nothing to check.

    Args:
        selection: Of this rank.

    Raises:
        RuntimeError: Two ranks differ.
    """
    Ranks().demand_equal(_digest(selection), "the digest of the selection")


def _digest(selection: Selection) -> str:
    digest = blake2b(digest_size=16)
    for name in selection.names:
        entries = selection.entries(name)
        digest.update(f"{name} {entries.is_all} ".encode())
        if not entries.is_all:
            digest.update(entries.indices().numpy().tobytes())
    return digest.hexdigest()
