"""Make sure that all ranks of a process group have selected the same entries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b

from fishkern.files import AnyTensor, Region, is_sharded
from fishkern.selection.entries import Entries
from fishkern.selection.result import Selection
from fishkern.statistics.shards import Ranks


def check_agreement(selection: Selection, ranks: Ranks | None = None) -> None:
    """Check that all ranks have selected the same entries; without a process group there is nothing to check.

    Of a selection of which each rank has its own entries, what is the same on all ranks is compared: the counts, the
    rule and the digest of the scores.

    Args:
        selection: Of this rank.
        ranks: Which; ``None`` for all processes.

    Raises:
        RuntimeError: Two ranks differ.
    """
    if selection.is_sharded:
        provenance = selection.provenance
        of_all = [selection.counts, provenance.get("rule"), provenance.get("statistics")]
        own = f"sharded {blake2b(json.dumps(of_all).encode(), digest_size=16).hexdigest()}"
    else:
        own = _digest({name: selection.entries(name) for name in selection.names})
    ranks = Ranks() if ranks is None else ranks
    for rank, other in enumerate(ranks.gathered(own)):
        if other != own:
            raise RuntimeError(
                f"rank {ranks.rank} and rank {rank} have different selections: select from the same scores on all "
                "ranks, or let all of them load one file."
            )


def check_on_shards(selection: Selection, parameters: Iterable[AnyTensor]) -> None:
    """Check that all ranks have the same selection of a sharded model; of others there is nothing to check.

    Each rank reaches what it holds by its own copy of the selection: with different ones, what ranks join would be
    values of one rank's entries under the numbers of another's.

    Args:
        selection: Of this rank.
        parameters: Those of the model.

    Raises:
        RuntimeError: Two ranks differ.
    """
    if any(map(is_sharded, parameters)):
        check_agreement(selection)


def together_on_shards(parameters: Iterable[AnyTensor]) -> AbstractContextManager[None]:
    """Let an error of one rank end the work of all where they hold parameters together, which would wait for it.

    Args:
        parameters: Those of the model.

    Returns:
        A context; a collective operation where a parameter is sharded, and nothing otherwise.
    """
    return Ranks().failing_together() if any(map(is_sharded, parameters)) else nullcontext()


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
