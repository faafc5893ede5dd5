"""Several ranks: which examples of the whole data each one has, and the sums over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# torch 2.13 has renamed it
_gather_into = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class Shard:
    """One rank's part of the data.

    A rank's examples are every ``count``-th one of all, as ``torch.utils.data.DistributedSampler`` distributes them, or
    every ``count``-th batch, as accelerate does. Both repeat examples at the end to give all ranks the same number. The
    indices of these repetitions are not below ``limit``, and they do not count.

    Args:
        rank: This rank.
        count: Number of ranks.
        limit: Number of examples of the whole data, if known.
        batch_size: Size of the batches that are distributed whole; ``None`` if single examples are.
        by_rows: Whether a sampler deals rows to several ranks.
    """

    rank: int = 0
    count: int = 1
    limit: int | None = None
    batch_size: int | None = None
    by_rows: bool = False

    def places(self, batch: int, before: int, N: int) -> range:
        """Give the indices of a batch's examples in the whole data.

        Args:
            batch: Number of the batch on this rank.
            before: Number of examples in this rank's batches before it.
            N: Number of its examples.

        Returns:
            ``N`` indices, ascending.
        """
        if self.batch_size is not None:
            start = (batch * self.count + self.rank) * self.batch_size
            return range(start, start + N)
        return range(self.rank + self.count * before, self.rank + self.count * (before + N), self.count)

    @property
    def size(self) -> int | None:
        """Number of examples that count on this rank, if known."""
        if self.limit is None or self.batch_size is None:
            return None if self.limit is None else len(range(self.rank, self.limit, self.count))
        starts = range(self.rank * self.batch_size, self.limit, self.count * self.batch_size)
        return sum(min(self.batch_size, self.limit - start) for start in starts)


def shard_of(batches: Iterable[Any], ranks: Ranks, max_examples: int | None) -> Shard:
    """Recognise how a ``DataLoader`` distributes its data to the ranks.

    Args:
        batches: The argument of :func:`fishkern.estimate`.
        ranks: The ranks that take part.
        max_examples: Stop after so many examples of the whole data.

    Returns:
        The shard. An iterable that is not recognised is treated as this rank's own part, of unknown length.

    Raises:
        ValueError: The loader distributes its data in another way, so repeated examples cannot be identified.
    """
    if ranks.count == 1:
        return Shard(limit=max_examples)
    kind, sampler = type(batches).__name__, getattr(batches, "sampler", None)
    batch_sampler = getattr(batches, "batch_sampler", None)
    limit, batch_size = None, None
    if type(batch_sampler).__name__ == "BatchSamplerShard" and not batch_sampler.split_batches:
        limit, batch_size = length_of(batches.dataset), batch_sampler.batch_size
    elif kind in ("DataLoaderShard", "DataLoaderDispatcher"):
        raise ValueError(
            f"this {kind} does not distribute whole batches to the ranks, so the examples that it repeats at the end "
            "cannot be identified. Prepare it without split_batches and dispatch_batches, or use a DistributedSampler."
        )
    elif hasattr(sampler, "num_replicas"):
        if (sampler.rank, sampler.num_replicas) != (ranks.rank, ranks.count):
            raise ValueError(
                f"the sampler is for rank {sampler.rank} of {sampler.num_replicas}, and this is rank {ranks.rank} of "
                f"{ranks.count}."
            )
        limit = length_of(sampler.dataset)
    elif length_of(getattr(batches, "dataset", None)) is not None:
        raise ValueError(
            f"every one of the {ranks.count} ranks would see all of this DataLoader's data: give it a "
            "torch.utils.data.DistributedSampler, or prepare it with accelerate. If its dataset is this rank's own "
            "part of the data, pass iter(loader)."
        )
    limits = [size for size in (limit, max_examples) if size is not None]
    return Shard(ranks.rank, ranks.count, min(limits, default=None), batch_size, by_rows=limit is not None)


class Ranks:
    """The processes of a group: by default all, or this process alone.

    Args:
        group: A process group with this process in it; ``None`` for all processes.

    Attributes:
        count: Their number.
        rank: The place of this process among them.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        together = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0

    @classmethod
    def alone(cls) -> Ranks:
        """Make the ranks of a process that waits for no other.

        Returns:
            One rank.
        """
        one = cls.__new__(cls)
        one._group, one.count, one.rank = None, 1, 0
        return one

    @classmethod
    @contextmanager
    def of(cls, every: Sequence[Sequence[int]]) -> Iterator[Ranks]:
        """Make groups of all processes, for the time of a ``with`` block. A collective operation of all of them.

        Args:
            every: The members of each group, equally many; each process is in one group.

        Yields:
            The ranks of the group that this process is in.
        """
        groups = [dist.new_group(list(members)) for members in every]
        try:
            yield cls(next(group for group, members in zip(groups, every, strict=True) if dist.get_rank() in members))
        finally:
            for group, members in zip(groups, every, strict=True):
                if dist.get_rank() in members:
                    dist.destroy_process_group(group)

    def places(self, group: Any) -> list[int]:
        """Find some of these ranks among them.

        Args:
            group: A process group of some of them.

        Returns:
            The place of each of its members, in its order.
        """
        members = dist.get_process_group_ranks(group)
        return members if self._group is None else [dist.get_group_rank(self._group, one) for one in members]

    def gathered(self, value: Any) -> list[Any]:
        """Collect a small value from every rank.

        Args:
            value: Anything that pickles.

        Returns:
            The values, by rank.
        """
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value, group=self._group)
        return values

    def every(self, tensor: Tensor) -> Tensor:
        """Collect a small tensor from every rank.

        Args:
            tensor: On the CPU; of the same shape and dtype on every rank.

        Returns:
            ``[count, *shape]``.
        """
        if self.count == 1:
            return tensor[None]
        with_gpus = dist.get_backend(self._group) == "nccl"
        mine = tensor.flatten().cuda() if with_gpus else tensor.flatten()
        every = mine.new_empty(self.count * mine.numel())
        gather_into(every, mine, self._group)
        return every.cpu().view(self.count, *tensor.shape)

    def sum_(self, tensor: Tensor, group: Any = None) -> None:
        """Replace a tensor by its sum over the ranks.

        Args:
            tensor: Of the same shape and dtype on every rank.
            group: A process group of some of the ranks; ``None`` for all of them.
        """
        self._reduce_(tensor, "SUM", group)

    def take_first_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first rank.

        Args:
            tensor: Of the same shape and dtype on every rank.
        """
        if self.count == 1:
            return
        sent = tensor.contiguous()
        if tensor.device.type == "cpu" and dist.get_backend(self._group) == "nccl":  # which works on GPUs only
            sent = tensor.cuda()
        dist.broadcast(sent, group_src=0, group=self._group)
        if sent is not tensor:
            tensor.copy_(sent)

    def largest(self, tensor: Tensor) -> Tensor:
        """Find the largest value of each entry over the ranks.

        Args:
            tensor: Of the same shape and dtype on every rank; changed in place.

        Returns:
            The tensor.
        """
        self._reduce_(tensor, "MAX")
        return tensor

    def _reduce_(self, tensor: Tensor, operation: str, group: Any = None) -> None:
        if self.count == 1:
            return
        reduced = tensor
        group = self._group if group is None else group
        if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":  # which works on GPUs only
            reduced = tensor.cuda()
        dist.all_reduce(reduced, getattr(dist.ReduceOp, operation), group=group)
        if reduced is not tensor:
            tensor.copy_(reduced)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let an exception on one rank end the work on all, so that the others do not wait for it.

        Yields:
            Nothing.

        Raises:
            RuntimeError: Another rank has failed; the message says which, and its error.
        """
        if self.count == 1:
            yield
            return
        failure = error = None
        try:
            yield
        except Exception as raised:
            failure, error = f"{type(raised).__name__}: {raised}", raised
        # every rank takes part, failed or not: a rank that skipped it would leave the others waiting
        if self.largest(torch.tensor(int(failure is not None))).item():
            for rank, one in enumerate(self.gathered(failure)):
                if one is not None:
                    raise error or RuntimeError(f"rank {rank} failed with {one}")

    def demand_equal(self, value: Any, what: str) -> None:
        """Raise if a value differs between ranks.

        Args:
            value: The value that must be equal.
            what: Its name in words.

        Raises:
            RuntimeError: It differs.
        """
        for rank, other in enumerate(self.gathered(value)):
            if other != value:
                raise RuntimeError(f"rank {self.rank} and rank {rank} differ in {what}: {value!r} and {other!r}.")


def gather_into(every: Tensor, mine: Tensor, group: Any) -> None:
    """Gather a tensor of every rank into one, by torch's function of whichever name.

    Args:
        every: The tensors of all ranks one after the other along the first axis; overwritten.
        mine: This rank's.
        group: The ranks; ``None`` for all.
    """
    _gather_into(every, mine, group=group)


def length_of(data: Any) -> int | None:
    """Return the length of an object, if it has one.

    Args:
        data: Anything.

    Returns:
        Its length, or ``None``.
    """
    try:
        return len(data)
    except TypeError:  # nothing, or an iterable dataset
        return None
