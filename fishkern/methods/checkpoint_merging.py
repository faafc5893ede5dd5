"""Merging checkpoints on disk by their Fisher information, in the memory of a few pieces of one tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fishkern.files import (
    PIECE,
    AnyTensor,
    ModelFiles,
    atomic_folder,
    check_new_folder,
    copy_beside,
    open_model,
    write_one,
)
from fishkern.methods.fisher_merging import Merging, Part
from fishkern.statistics import Statistics


def merge_checkpoints(
    checkpoints: Mapping[str | os.PathLike[str], Statistics | Mapping[str, Tensor]],
    folder: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    floor: float = 0.0,
    own: str | Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Merge checkpoints into a new one, as :func:`fisher_merge` merges models, without loading them.

    Everything is read, merged and written in pieces of 2^20 entries: the memory does not grow with the models. The
    result has the files, the config, the tokenizer and ``own`` of the first checkpoint; for another one's head, name
    that checkpoint first.

    A file does not say which of its tensors are parameters. Where the statistics have a coverage, as those of
    :func:`fishkern.estimate` do, what it does not list is a buffer and must be equal. Integers are buffers in any case.

    Args:
        checkpoints: At least two folders with ``model.safetensors`` or its shards, each with its own statistics. Load
            these by ``Statistics.load(path, lazy=True)``, to leave them on disk as well.
        folder: New or empty. It appears when everything is written.
        weights: See :func:`fisher_merge`.
        floor: See :func:`fisher_merge`.
        own: See :func:`fisher_merge`.
        progress: Called with the number of entries written and of all.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is there and not empty.
        FileNotFoundError: A checkpoint has no weights as ``.safetensors``.
        TypeError: See :func:`fisher_merge`.
        ValueError: See :func:`fisher_merge`; or a file is damaged.
    """
    if not isinstance(checkpoints, Mapping) or not all(isinstance(one, str | os.PathLike) for one in checkpoints):
        raise TypeError("checkpoints are given as {folder: statistics, ...}, with their statistics.")
    target = check_new_folder(folder)
    opened = [open_model(path) for path in checkpoints]
    parts = [_part_of(files, statistics) for files, statistics in zip(opened, checkpoints.values(), strict=True)]
    first = opened[0]
    merging = Merging(parts, weights=weights, floor=floor, own=own)
    sources: dict[str, AnyTensor] = {**{name: first.tensors[name] for name in merging.own if name in first.tensors}}
    sources |= merging.recipes
    sources = {name: sources[name] for name in first.tensors}
    total = sum(tensor.numel() for tensor in sources.values())
    with atomic_folder(target) as temporary:
        copy_beside(first.folder, temporary)
        if first.index is not None:
            shutil.copyfile(first.index, temporary / first.index.name)
        written = _Counter(total, progress)
        for file, names in first.shards.items():
            shard = {name: _Counted(sources[name], written) for name in names}
            write_one(temporary / file, shard, first.metadata[file])
    return target


class _Counter:
    """Says how many entries have been written."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, entries: int) -> None:
        self.done += entries
        if self.progress:
            self.progress(self.done, self.total)


class _Counted:
    """A tensor whose pieces are counted as they are written."""

    def __init__(self, tensor: AnyTensor, counter: _Counter) -> None:
        self._tensor, self._counter = tensor, counter
        self.shape, self.dtype, self.numel = tensor.shape, tensor.dtype, tensor.numel

    def pieces(self, numel: int = PIECE) -> Iterator[Tensor]:
        for piece in self._tensor.pieces(numel):
            yield piece
            self._counter.add(len(piece))


def _part_of(files: ModelFiles, statistics: Statistics | Mapping[str, Tensor]) -> Part:
    coverage = statistics.coverage if isinstance(statistics, Statistics) else {}
    parameters = frozenset(coverage) if coverage else None
    return Part(str(files.folder), files.tensors, statistics, parameters, {})
