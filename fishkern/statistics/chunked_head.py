"""Run a language model without forming its logits whole: its head gets one position, and the others come afterwards.

A hook cuts what the head gets down to the last position, so the model itself runs unchanged to its end. From the hidden
states that the hook has kept, :class:`fishkern.statistics.head_logits.HeadLogits` computes the losses. That these are
the model's own logits is confirmed on a real call, by their values and by what autograd's graph shows between the head
and them; otherwise the logits are formed whole, and why is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import hooks_of_others
from fishkern.statistics.batches import Batch, Examples
from fishkern.statistics.head_logits import HeadLogits, Onlooker
from fishkern.statistics.likelihood import CausalLM, MaskedLM, TokenClassification, read_logits
from fishkern.statistics.predictive import Categorical, Predictive

# Names, in autograd's graph, of operations that change no value.
_COPIES = frozenset(
    f"{name}Backward0" for name in ("ToCopy", "View", "UnsafeView", "ReshapeAlias", "Slice", "Alias", "Clone")
)
_ROUNDINGS = 16  # by which values of the same products may differ, in another order of sums; in 16 bits fewer
_ROUNDINGS_16_BIT = 4
_HALF = (torch.float16, torch.bfloat16)
_LOOKED_AT = 8  # positions of the confirming call
_GRADIENT_ROUNDINGS = 2**10  # of the gradient at the hidden states, a sum over all classes
_GRADIENT_ROUNDINGS_16_BIT = 8
_SEVERAL_CALLS = "the model calls its head several times, or with something else than hidden states [N, T, H]"


@dataclass
class _Seen:
    """What the calls of a head got and gave."""

    hidden: list[Any] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    plain: bool = True


class ChunkedHead:
    """The head of a language model.

    Args:
        model: The model.
        likelihood: Of its labels, with a limit for the bytes of the logits.

    Attributes:
        said: How logits above the limit were computed last, in words; ``None`` if there were none.
        tried: Whether the model was run without its logits, on the first batch with large ones.
    """

    def __init__(self, model: nn.Module, likelihood: CausalLM | MaskedLM) -> None:
        self._model = model
        self._likelihood = likelihood
        self._most = likelihood.logits_bytes
        self._head = hosts.head_of(model)
        self._num_classes = self._positions = 0  # of the logits of the first example
        self._dtype = torch.float32
        self.tried = False
        self._meanwhile: str | None = None
        self._why = None if self._head else "the model has no head that is known (get_output_embeddings, lm_head)"
        if hosts.units(model):
            self._why = "the model is sharded, and its head has its weights in the model's own forward pass alone"
        if hosts.mesh_of(model) is not None:
            self._why = "several processes compute the model together, and form its logits in its own forward pass"
        self.said: str | None = None

    @contextmanager
    def confirming(self) -> Iterator[list[Tensor]]:
        """Watch a run of the model with gradients, on one example, and compare its logits with those of the head.

        Yields:
            A list that takes the logits ``[1, T, V]``, in the dtype of the losses.
        """
        logits: list[Tensor] = []
        if self._head is None:
            yield logits
            return
        seen, head = _Seen(), self._head.module

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.hidden.append(args[0] if args else None)
            seen.plain &= len(args) == 1 and not kwargs

        handles = [
            head.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            head.register_forward_hook(lambda _, args, output: seen.nodes.append(getattr(output, "grad_fn", None))),
        ]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()
        if logits:
            self._why = self._why or self._differs(seen, logits[0])
        else:
            self._why = "the likelihood gives no logits"

    def awaits(self, batch: Examples) -> bool:
        """Tell whether it is still to be tried if the model runs without the logits of a batch.

        Args:
            batch: The batch.

        Returns:
            Whether they may be above the limit, and nothing speaks against it so far.
        """
        # the model may add positions of its own (prompt tuning); a try that was not needed does no harm
        most = 2 * _num_positions(batch.content) + batch.num_examples * self._positions
        return self._why is None and not self.tried and self._are_large(most)

    def meet(self, batch: Examples) -> None:
        """Try whether the model runs without its logits.

        Args:
            batch: Some batch, of which one example runs.
        """
        self.tried = True
        self._why = self._fails_on(batch.take(0, 1).copied())

    def predictive(self, batch: Batch, onlooker: Onlooker | None) -> Predictive:
        """Run the model on a batch.

        Args:
            batch: The batch, for one run.
            onlooker: Looks on while it runs, and in the backward pass.

        Returns:
            The distribution; of :class:`fishkern.statistics.head_logits.HeadLogits` if the logits are above the limit.
        """
        why = self._why if self.tried or self._why else "the model was not tried without them"
        with self._cut(why, onlooker) as kept:
            logits = read_logits(self._model, batch)
        if kept:
            logits = self._of_hidden(kept, logits, onlooker)
            self.said = f"in chunks of {self._most} bytes"
        elif logits.nbytes > self._most:
            of_onlooker = onlooker and self._head and onlooker.why_whole(self._head.module)
            self.said = f"whole: {why or of_onlooker or self._meanwhile or 'a later batch calls the head otherwise'}"
        return self._likelihood.of_logits(logits, self._model, batch)

    def _of_hidden(self, kept: list[Tensor], logits: Tensor, onlooker: Onlooker | None) -> HeadLogits:
        fits = len(kept) == 1 and logits.shape == (len(kept[0]), 1, self._num_classes)
        if not fits or not self._equals(kept[0][:, -1:], logits):
            raise ValueError(
                f"{type(self._model).__name__} calls its head, or changes its logits, otherwise than on the first "
                "example, so they cannot be computed in chunks: form them whole, with "
                f"likelihood=fishkern.{type(self._likelihood).__name__}(logits_bytes=None)."
            )
        head, size = self._head, self._num_classes * self._dtype.itemsize
        most = max(1, self._most // size)
        return HeadLogits(kept[0], head.module, head.then, self._num_classes, logits.dtype, most, onlooker)

    @contextmanager
    def _cut(self, why: str | None, onlooker: Onlooker | None, *, always: bool = False) -> Iterator[list[Tensor]]:
        """Let the head run on the last position alone where the logits are above the limit, and keep what it got."""
        kept: list[Tensor] = []
        if why is not None:
            yield kept
            return
        self._meanwhile, outside = None, hooks_of_others(self._head.module)

        def cut(module: nn.Module, args: tuple) -> tuple | None:
            hidden = args[0] if len(args) == 1 else None
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                return None
            large = always or self._are_large(hidden.shape[:-1].numel())
            if not large or (onlooker is not None and onlooker.why_whole(module) is not None):
                return None
            if hooks_of_others(module) != outside:  # a chunk would run without them
                self._meanwhile = "the model puts hooks on its head while it runs"
                return None
            kept.append(hidden)
            return (hidden[:, -1:],)

        # before the user's hooks on the head, which then run on the parts as well
        handle = self._head.module.register_forward_pre_hook(cut, prepend=True)
        try:
            yield kept
        finally:
            handle.remove()

    def _are_large(self, positions: int) -> bool:
        return positions * self._num_classes * self._dtype.itemsize > self._most

    def _differs(self, seen: _Seen, logits: Tensor) -> str | None:
        """Say why logits are not those of the head, or return ``None``."""
        if len(seen.hidden) != 1 or len(seen.nodes) != 1 or not seen.plain:
            return _SEVERAL_CALLS
        (hidden,), (node,) = seen.hidden, seen.nodes
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.grad_fn is None or node is None:
            return _SEVERAL_CALLS
        if logits.ndim != 3 or logits.shape[:2] != hidden.shape[:2]:
            return f"the head gets {list(hidden.shape)}, and the logits are {list(logits.shape)}"
        self._positions, self._num_classes = logits.shape[1:]
        self._dtype = logits.dtype
        if unknown := _between(logits.grad_fn, node) - _COPIES - self._head.operations:
            return (
                f"between its head and the logits the model computes what is not known ({', '.join(sorted(unknown))})"
            )
        others = _leaves(logits.grad_fn, hidden.grad_fn) - set(self._head.module.parameters())
        if others:
            return "the logits depend on other parameters than those of the head, not through its input alone"
        return self._differs_elsewhere(hidden, logits)

    @torch.enable_grad()
    def _differs_elsewhere(self, hidden: Tensor, logits: Tensor) -> str | None:
        """Say why the head gives other logits, or another gradient, for states at other places, or return ``None``."""
        # among other states, and in a row of another length: a chunk has neither their places nor their neighbours
        T = logits.shape[1]
        places = torch.linspace(0, T - 1, max(1, min(_LOOKED_AT, T // 2))).round().long()
        expected = logits[:, places]
        states = hidden[:, places].detach()
        states = torch.stack([states.flip(1) / 2, states], 2).flatten(1, 2).requires_grad_()
        try:
            output = self._head.module(states.view_as(states))  # FlopCounterMode takes no leaf as an input
        except Exception as error:  # any error of a head that takes no other positions than those of the text
            return f"the head does not run on positions of its own ({type(error).__name__})"
        values = self._head.then(output).to(logits.dtype)[:, 1::2]
        if values.shape != expected.shape:
            return "the logits are not what the head gives"
        half = output.dtype in _HALF
        if not _same(values, expected, output.dtype, _ROUNDINGS_16_BIT if half else _ROUNDINGS):
            return "the logits are not what the head gives for each position alone"
        weights = torch.linspace(-1, 1, values.numel(), dtype=values.dtype, device=values.device).view_as(values)
        (own,) = torch.autograd.grad(values, states, weights, materialize_grads=True)
        (given,) = torch.autograd.grad(expected, hidden, weights, retain_graph=True, materialize_grads=True)
        roundings = _GRADIENT_ROUNDINGS_16_BIT if half else _GRADIENT_ROUNDINGS
        if not _same(own[:, 1::2], given[:, places], output.dtype, roundings):
            return "the gradient that arrives at the head is not that of the logits"
        return None

    @torch.no_grad()
    def _equals(self, hidden: Tensor, logits: Tensor) -> bool:
        """Tell whether the head gives these logits, in a call of the same shape."""
        output = self._head.module(hidden)
        values = self._head.then(output).to(logits.dtype)
        roundings = _ROUNDINGS_16_BIT if output.dtype in _HALF else _ROUNDINGS
        return values.shape == logits.shape and _same(values, logits, output.dtype, roundings)

    def _fails_on(self, example: Batch) -> str | None:
        """Say why the model cannot be run without its logits, or return ``None``."""
        try:
            with torch.no_grad(), self._cut(None, None, always=True) as kept:
                logits = read_logits(self._model, example)
        except Exception as error:  # any error of a model that does more with its logits
            what = next(iter(str(error).strip().splitlines()), "without a message")
            return f"the model does not run with the logits of one position ({type(error).__name__}: {what})"
        if self._meanwhile:
            return self._meanwhile
        if len(kept) != 1 or logits.shape[1] != 1 or not self._equals(kept[0][:, -1:], logits):
            return "the model gives other logits where its head gets one position"
        return None


def chunked_head(model: nn.Module, likelihood: Any) -> ChunkedHead | None:
    """Make the head of a model, where the likelihood reads logits of positions and sets a limit for them.

    Args:
        model: The model.
        likelihood: Any likelihood.

    Returns:
        The head; ``None`` where the logits are formed whole in any case.
    """
    if not isinstance(likelihood, CausalLM | MaskedLM) or likelihood.logits_bytes is None:
        return None
    own = type(likelihood).predictive in (CausalLM.predictive, TokenClassification.predictive)
    classes_last = getattr(likelihood, "class_axis", -1) == -1
    return ChunkedHead(model, likelihood) if own and classes_last else None


def logits_of_answer(answer: Any) -> list[Tensor]:
    """Give the logits of positions that a distribution is made of.

    Args:
        answer: A distribution.

    Returns:
        One tensor ``[N, T, V]``, or none.
    """
    return [answer.logits] if isinstance(answer, Categorical) and isinstance(answer.logits, Tensor) else []


def _same(one: Tensor, other: Tensor, dtype: torch.dtype, roundings: int) -> bool:
    """Tell whether values are the same but for some roundings of a dtype, relative to the largest finite one."""
    one, other = one.detach(), other.detach()
    finite = torch.where(other.isfinite(), other, 0.0)
    near = (one - other).abs() <= roundings * torch.finfo(dtype).eps * finite.abs().max()
    return bool((near | (one == other) | (one.isnan() & other.isnan())).all())


def _num_positions(batch: Batch) -> int:
    """Count the positions of a batch by its labels, or by its first entry; more than there are do no harm."""
    tensors = batch.values() if hasattr(batch, "values") else batch
    sizes = [one.numel() for one in tensors if isinstance(one, Tensor) and one.ndim == 2]
    return max(sizes, default=0)


def _between(last: Any, first: Any) -> set[str]:
    """Name the nodes of autograd's graph from one on, as far as another."""
    return {type(node).__name__ for node in _walk(last, first)} - {"AccumulateGrad"}


def _leaves(last: Any, stop: Any) -> set[Tensor]:
    """Find the tensors that a node depends on otherwise than through another one."""
    return {node.variable for node in _walk(last, stop) if hasattr(node, "variable")}


def _walk(last: Any, stop: Any) -> Iterator[Any]:
    met, todo = {last}, [last]
    while todo:
        node = todo.pop()
        if node is None or node is stop:
            continue
        yield node
        new = {following for following, _ in node.next_functions} - met
        met |= new
        todo += new
