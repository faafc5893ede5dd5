"""The logits of a language model's head, as many at a time as fit a limit: whole they are the largest tensor of a pass.

For one position with hidden state ``h`` and label ``y``, ``-log p = logsumexp(z) - z[y]`` with ``z = head(h)``, and its
gradient by ``z`` is ``softmax(z) - onehot(y)``. Nothing else is needed of a position's logits, so each chunk of them is
dropped when its losses, and their gradient by the hidden states, are there. Positions without a label have none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fishkern.layers import Part, of_part
from fishkern.ops.dtypes import accumulates_in


class Onlooker(Protocol):
    """Who looks on while a model runs."""

    def taps(self, head: nn.Module) -> bool:
        """Tell whether gradients of the head are captured."""

    def why_whole(self, head: nn.Module) -> str | None:
        """Say why the head must run on all examples at once, or return ``None``."""


class Taps(Onlooker, Protocol):
    """Who captures gradients of the head, if any.

    Attributes:
        anchor: A leaf on which the output of every captured call depends.
    """

    anchor: Tensor

    def parts(self, num_rows: int, num_positions: int, most: int) -> Iterator[Part]:
        """Divide a batch into parts of whole examples."""

    def part(self, part: Part) -> AbstractContextManager[None]:
        """Take the gradients that arrive inside the ``with`` block for those of these examples."""


@dataclass(frozen=True, eq=False)
class Survey:
    """A survey of a model, which sees the calls of a head and not its parts.

    Args:
        requested: The parameters that it looks for.

    Attributes:
        asked: The heads of large logits that it was asked about.
    """

    requested: Collection[Tensor]
    asked: list[nn.Module] = field(default_factory=list, init=False)

    def taps(self, head: nn.Module) -> bool:
        """Tell whether gradients of the head are captured: here they are looked at, in one call."""
        return False

    def why_whole(self, head: nn.Module) -> str | None:
        """Say why the head must run on all examples at once, or return ``None``."""
        self.asked.append(head)
        own = {id(one) for one in (*head.parameters(), *head.buffers())}
        return "the survey looks at the head" if any(id(one) in own for one in self.requested) else None


@dataclass(frozen=True, eq=False)
class HeadLogits:
    """Stands for the logits of a batch, of which no more than a chunk is in memory.

    Args:
        hidden: What the head gets, ``[R, T, H]``.
        head: The module. Its parameters are differentiated where they require a gradient.
        then: What the model makes of its output, entry by entry.
        num_classes: ``V``.
        dtype: Of the logits, float32 or float64.
        most: The most positions of a chunk.
        onlooker: Captures gradients of the head, if any are captured; ``None`` for ordinary autograd alone.
    """

    hidden: Tensor
    head: nn.Module
    then: Callable[[Tensor], Tensor]
    num_classes: int
    dtype: torch.dtype
    most: int
    onlooker: Onlooker | None = None

    @property
    def shape(self) -> torch.Size:
        """``[R, T, V]``."""
        return torch.Size((*self.hidden.shape[:2], self.num_classes))

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the logits would be."""
        return self.hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def losses(self, labels: Tensor, counted: Tensor) -> Tensor:
        """Compute ``-log p`` of a label at each position.

        Args:
            labels: ``[R, T]``, int64; read where they count.
            counted: Which positions count, ``[R, T]``, bool.

        Returns:
            ``[R, T]``, differentiable; zero where it does not count.
        """
        return self._losses(counted, labels, None)

    def drawn_losses(self, uniform: Tensor, counted: Tensor) -> Tensor:
        """Compute ``-log p`` of labels that are drawn from the logits, see :func:`drawn`.

        Args:
            uniform: A number in [0, 1) for each position, ``[R, T]``.
            counted: As for :meth:`losses`.

        Returns:
            As for :meth:`losses`.
        """
        return self._losses(counted, torch.zeros_like(counted, dtype=torch.int64), uniform)

    @torch.no_grad()
    def at(self, places: Tensor) -> Tensor:
        """Compute the logits of some positions.

        Args:
            places: Their numbers in the flattened rows, ``[S]``.

        Returns:
            ``[S, V]``, without a gradient.
        """
        return self.run(self.hidden.detach().flatten(0, 1)[places][None])[0]

    def run(self, hidden: Tensor) -> Tensor:
        """Run the head on some positions.

        Args:
            hidden: ``[r, s, H]``.

        Returns:
            Their logits, ``[r, s, V]``.
        """
        return self.then(self.head(hidden)).to(self.dtype)

    def _losses(self, counted: Tensor, labels: Tensor, uniform: Tensor | None) -> Tensor:
        inputs = [one for one in self.head.parameters() if one.requires_grad]
        if captures := self.onlooker is not None and self.onlooker.taps(self.head):
            # the hidden states may need no gradient, and a module in the head may be called on something else
            inputs = [self.onlooker.anchor, *inputs]
        given = labels.to(self.device), uniform, counted.to(self.device)
        return _Losses.apply(self, captures, *given, self.hidden, *inputs)


class _Losses(torch.autograd.Function):
    """``-log p`` of each position that counts.

    If only the hidden states need a gradient, the forward pass computes it, and no logits are computed twice. Otherwise
    the backward pass runs the head once more: the head's own gradients depend on what arrives there.
    """

    @staticmethod
    def forward(ctx, logits, captured, labels, uniform, counted, hidden, *inputs):
        ctx.logits, ctx.captured, ctx.inputs = logits, captured, inputs
        ctx.autocast = _autocast(hidden.device.type)
        at_once = ctx.needs_input_grad[5] and not inputs
        states, labels = hidden.flatten(0, 1), labels.flatten().clone()
        losses = torch.zeros(len(labels), dtype=logits.dtype, device=hidden.device)
        grads = torch.zeros_like(states) if at_once else None
        for chunk in _chunks(counted, logits.most):
            h = states[None, chunk].detach().requires_grad_(at_once)
            with torch.set_grad_enabled(at_once):
                z = logits.run(h)
            if uniform is not None:
                labels[chunk] = drawn(z.detach()[0], uniform.flatten()[chunk])
            log_p = z.detach().log_softmax(-1)
            losses[chunk] = -log_p[0].gather(1, labels[chunk, None])[:, 0]
            if at_once:
                g = _less_one_hot_(log_p.exp_(), labels[None, chunk])
                grads[chunk] = torch.autograd.grad(z, h, g)[0][0]
        if at_once:
            ctx.save_for_backward(grads)
        else:
            ctx.save_for_backward(hidden, labels.view(counted.shape), counted)
        return losses.view(counted.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights):
        if len(ctx.saved_tensors) == 1:
            (grads,) = ctx.saved_tensors
            grads = grads.view(*weights.shape, -1)
            # rounded once: a weight rounded to 16 bits first would scale the whole gradient of its example
            return None, None, None, None, None, torch.mul(grads, weights[..., None], out=torch.empty_like(grads))
        with ctx.autocast():
            hidden, *others = _run_again(ctx, weights)
        return None, None, None, None, None, hidden, *others


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw classes from logits by uniform numbers: the first class whose cumulated probability exceeds the number.

    Args:
        logits: ``[..., C]``.
        uniform: ``[...]``, in [0, 1).

    Returns:
        ``[...]``, int64.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    return (cumulative <= uniform[..., None].to(cumulative)).sum(-1).clamp_max(logits.shape[-1] - 1)


def _run_again(ctx: Any, weights: Tensor) -> list[Tensor | None]:
    """Run the head once more, chunk by chunk, and back-propagate weighted losses through it."""
    logits: HeadLogits = ctx.logits
    hidden, labels, counted = ctx.saved_tensors
    own = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    others = [torch.zeros_like(one, dtype=accumulates_in(one.dtype)) for one in ctx.inputs]
    for chunk in _pieces(ctx, counted):
        h = chunk.take(hidden).detach().requires_grad_()
        with chunk.around, torch.enable_grad():
            z = logits.run(h)
            g = _less_one_hot_(z.detach().softmax(-1), chunk.take(labels).clamp_min(0))
            g.mul_(torch.where(chunk.take(counted), chunk.take(weights), 0.0)[..., None])
            grad, *grads = torch.autograd.grad(z, [h, *ctx.inputs], g, allow_unused=True)
        chunk.put(own, grad)
        for total, one in zip(others, grads, strict=True):
            if one is not None:
                total += one
    return [own, *(total.to(one.dtype) for total, one in zip(others, ctx.inputs, strict=True))]


@dataclass(frozen=True)
class _Positions:
    """Some positions, by their numbers in the flattened rows."""

    numbers: Tensor
    around: AbstractContextManager[None]

    def take(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[None, self.numbers]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        tensor.view(-1, *tensor.shape[2:])[self.numbers] = values[0]


@dataclass(frozen=True)
class _Examples:
    """Some examples, with all of their positions."""

    part: Part
    around: AbstractContextManager[None]

    def take(self, tensor: Tensor) -> Tensor:
        return of_part(tensor, self.part)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        of_part(tensor, self.part).copy_(values)


def _pieces(ctx: Any, counted: Tensor) -> Iterator[_Positions | _Examples]:
    """Divide a batch: by examples where gradients of the head are captured, whose squares follow the sum over them."""
    logits: HeadLogits = ctx.logits
    if ctx.captured:
        taps: Taps = logits.onlooker
        for part in taps.parts(*counted.shape, logits.most):
            yield _Examples(part, taps.part(part))
        return
    for numbers in _chunks(counted, logits.most):
        yield _Positions(numbers, nullcontext())


def _chunks(counted: Tensor, most: int) -> Iterator[Tensor]:
    """List the positions that count, in the flattened rows, in chunks; none if there are none."""
    places = counted.flatten().nonzero().flatten()
    return iter(places.split(most)) if len(places) else iter(())


def _less_one_hot_(p: Tensor, labels: Tensor) -> Tensor:
    """Subtract one from the entry of each label, in place."""
    return p.scatter_add_(-1, labels[..., None], p.new_full((*labels.shape, 1), -1.0))


def _autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """Note the autocast state, to restore it in backward, which another thread may run."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
