"""Examples of one rank, sent to all: those of which all ranks of a sharded model run the same ones."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import torch

from fishkern.statistics.batches import Examples
from fishkern.statistics.shards import Ranks


@dataclass(frozen=True)
class SharedExamples:
    """Sends examples between ranks.

    Args:
        ranks: All ranks.
        device: Where this rank runs the model.
    """

    ranks: Ranks
    device: torch.device

    def first(self, batch: Examples | None, rank: int) -> Examples:
        """Give all ranks the first examples of a batch of one of them. A collective operation.

        Args:
            batch: This rank's batch.
            rank: The rank whose batch it is.

        Returns:
            The examples, on this rank's device.
        """
        return self.sent(batch.few if self.ranks.rank == rank else None, rank)

    def sent(self, examples: Examples | None, rank: int) -> Examples:
        """Send examples of one rank to all; an error of pickling them ends all. A collective operation.

        Args:
            examples: The examples, on the rank that has them; ``None`` on the others.
            rank: The rank that has them.

        Returns:
            The examples, on this rank's device.
        """
        content = b""
        with self.ranks.failing_together():
            if examples is not None:
                content = _pickled(replace(examples.to(torch.device("cpu")), cut_from=None))
        return pickle.loads(self.ranks.gathered(content)[rank]).to(self.device)


def _pickled(examples: Examples) -> bytes:
    try:
        return pickle.dumps(examples)
    except Exception as error:  # of several kinds, by what does not pickle
        raise TypeError(
            f"with a sharded model all ranks run some examples of each, so batches must hold what pickles, and pickle "
            f"says: {error}. Give tensors, lists and plain values, or objects of classes that a module defines."
        ) from error
