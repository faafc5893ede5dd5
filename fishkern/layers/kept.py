"""What a survey keeps of a call, for a capture to take it as if it had passed there: its gradients, example by example.

The survey back-propagates the loss of each example alone. An output gradient is linear in the losses, and where rows
are those of the examples, one after the other, that of the summed losses has in each row what the loss of the row's own
example has brought there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KeptGrads:
    """The output gradients of one call.

    Args:
        num_tensors: How many floating tensors the output has.
        rows: The rows of example ``n`` in the gradient of its loss, ``[T, ...]``, by number of the tensor and ``n``.
    """

    num_tensors: int
    rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def keep(self, example: int, grads: Sequence[Tensor | None], num_examples: int) -> bool:
        """Keep the example's rows of the gradients of its loss.

        Args:
            example: Its number.
            grads: Gradient of each tensor, ``[N T, ...]``; ``None`` where none arrived.
            num_examples: ``N``.

        Returns:
            Whether they could be kept: not if the rows do not divide by ``N``, or a gradient came before.
        """
        for number, grad in enumerate(grads):
            if grad is None:
                continue
            if not grad.ndim or grad.shape[0] % num_examples or (number, example) in self.rows:
                return False
            # a copy, which does not hold the rows of the others
            self.rows[number, example] = grad.chunk(num_examples)[example].clone() if len(grad) else grad
        return True

    def joined(self, num_examples: int) -> list[Tensor | None]:
        """Put the rows together to the gradients of the summed losses.

        Args:
            num_examples: ``N``.

        Returns:
            ``[N T, ...]`` for each tensor of the output; ``None`` where none arrived.
        """
        joined: list[Tensor | None] = []
        for number in range(self.num_tensors):
            rows = [self.rows.get((number, n)) for n in range(num_examples)]
            one = next((row for row in rows if row is not None), None)
            whole = None if one is None else [torch.zeros_like(one) if row is None else row for row in rows]
            joined.append(None if whole is None else torch.cat(whole))
        return joined
