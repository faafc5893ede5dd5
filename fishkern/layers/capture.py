"""Capture: hooks that hand each layer's inputs and output gradients to its rule while ordinary autograd runs.

The outputs of captured modules are tapped (:mod:`fishkern.layers.tap`). An extra input that requires a gradient keeps
the graph alive, so the weights themselves can be frozen for the pass and their ordinary gradients are never computed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.layers.embedding import Embedding
from fishkern.layers.generic import module_grads
from fishkern.layers.grads import DenseGrads, OuterProductGrads, PerExampleGrads, TiedRows, join
from fishkern.layers.reentrant import segment
from fishkern.layers.site import Layout, Site
from fishkern.layers.tap import FrozenCall, copied, frozen_call, rows_and_length, tapped
from fishkern.ops import embedding_rows

Sink = Callable[[str, PerExampleGrads], None]


class Capture:
    """Hooks on the sites of a model, for the time of a ``with`` block.

    Args:
        sites: What to capture.
        sink: Called with a parameter's canonical name and its per-example gradients, during backward.
        squares: Whether the sink only adds squares. Then those of a head whose weight an embedding shares come first,
            and what the embedding adds to them later (:class:`TiedRows`); else both come as one, once both are known.

    Attributes:
        distrusted: Paths of modules whose picked rows turned out not to be one for each example.
    """

    def __init__(self, sites: Sequence[Site], sink: Sink, *, squares: bool = True) -> None:
        self._sites = sites
        self._sink = sink
        self._squares = squares
        self._active = False
        self._forward = False
        self._weighing = False
        self._handles: list[Any] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._entered: dict[Site, list[tuple[tuple, dict[str, Any]]]] = {}
        self._by_key: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            for key in site.keys.values():
                self._by_key[key].append(site)
        self._batch = _Batch(0)
        self.distrusted: set[str] = set()

    @property
    def unsettled(self) -> frozenset[str]:
        """Canonical names whose gradients of the last backward were withheld, because a layout is not established."""
        return frozenset(self._batch.unsettled)

    def __enter__(self) -> Capture:
        for site in self._sites:
            module = site.module
            # next to the module's forward: around ours are the user's, which may change what goes in and comes out
            if site.reruns and (module._forward_pre_hooks or site.rewritten):
                enter = self._enter(site)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._hook(site), with_kwargs=True, prepend=True))
        for block in {site.block for site in self._sites if site.layout is Layout.FLATTENED}:
            self._handles.append(block.register_forward_pre_hook(self._note_length, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._entered.clear()
        self._batch = _Batch(0)

    @contextmanager
    def forward(self, num_examples: int) -> Iterator[None]:
        """Capture the forward pass that runs inside the ``with`` block.

        Args:
            num_examples: ``N`` of the batch.

        Yields:
            Nothing.
        """
        self._batch = _Batch(num_examples)
        for calls in self._entered.values():
            calls.clear()
        self._active = self._forward = True
        try:
            yield
        finally:
            self._active = self._forward = False

    def backward(self, losses: Tensor, *, retain_graph: bool = False) -> None:
        """Run backward and hand every parameter's per-example gradients to the sink.

        Args:
            losses: ``[N]``.
            retain_graph: Keep the graph for another backward.
        """
        self._batch.received.clear()
        self._batch.heads.clear()
        self._batch.unsettled.clear()
        if not losses.requires_grad:
            return
        try:
            self._active = self._weighing = True  # what is recomputed runs as it did, but nothing is received
            self._weigh_picked_rows(losses)
            self._weighing = False
            losses.sum().backward(retain_graph=retain_graph)
        finally:
            self._active = self._weighing = False
        for key in self._batch.received.keys() - self._batch.unsettled:
            self._close(key)

    def _enter(self, site: Site) -> Callable[..., None]:
        """Note what a module is called with, ahead of the hooks on its input: a second run goes through them, too."""
        self._entered[site] = []

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._active:
                self._entered[site].append(copied((args, kwargs)) if site.rewritten else (args, kwargs))

        return enter

    def _hook(self, site: Site) -> Callable[..., Any]:
        entered = self._entered.get(site)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if not self._active:
                return None
            if entered:
                args, kwargs = entered.pop()
            elif site.rewritten and site.reads_input:
                args, kwargs = copied((args, kwargs))
            # later calls are checkpointing's recomputations; a run without gradients, as of a target, is no use
            if self._forward and (torch.is_grad_enabled() or segment()):
                self._batch.calls[site] += 1
                self._note_tokens(site, args, kwargs)
            if not torch.is_grad_enabled():
                return None
            if site.layout is Layout.SHARED:
                output = output.expand(self._batch.num_examples, *output.shape[1:])
            call = frozen_call(module, args, kwargs, keep=site.reads_input)
            output = tapped(output, self._anchor, lambda saved, grads: self._receive(site, call, saved, grads), call)
            if site.picked and self._forward:
                self._batch.picked.append((site, output))
            return output

        return hook

    def _weigh_picked_rows(self, losses: Tensor) -> None:
        """Back-propagate differently weighted losses down to the picked rows: the weights tell whose each row is."""
        picked = [(site, output) for site, output in self._batch.picked if self._right_number(site, output)]
        if not picked:
            return
        outputs = [output for _, output in picked]
        most = 5 if any(output.dtype == torch.float16 for output in outputs) else 61
        numbers = torch.arange(self._batch.num_examples, device=losses.device)
        self._batch.exponents, self._batch.weighted = [], defaultdict(list)
        while not self._batch.exponents or numbers.any():  # one probe for each digit of the example's number
            self._batch.exponents.append(numbers % most - most // 2)
            weighted = (self._weights(losses)[-1] * losses).sum()
            grads = self._grads_at(outputs, weighted)
            for (site, _), grad in zip(picked, grads, strict=True):
                self._batch.weighted[site].append(grad)
            numbers = numbers // most

    def _grads_at(self, outputs: Sequence[Tensor], weighted: Tensor) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(weighted, outputs, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):  # a checkpoint of this kind, behind the rows, knows backward alone
                raise
        grads: list[Tensor | None] = [None] * len(outputs)
        handles = [output.register_hook(partial(grads.__setitem__, place)) for place, output in enumerate(outputs)]
        try:
            weighted.backward(retain_graph=True)
        finally:
            for handle in handles:
                handle.remove()
        return grads

    def _weights(self, like: Tensor) -> list[Tensor]:
        """Powers of two, by which a gradient scales without rounding; all probes together tell every example apart."""
        return [(2.0**exponents).to(like) for exponents in self._batch.exponents]

    def _right_number(self, site: Site, output: Tensor) -> bool:
        """Tell whether an output has as many rows as its layout says for ``N`` examples."""
        each = self._batch.lengths.get(site.block) if site.layout is Layout.FLATTENED else 1
        return each is not None and output.shape[0] == self._batch.num_examples * each

    def _rows_are_the_examples(self, site: Site, grad: Tensor) -> bool:
        """Tell whether the rows of an output gradient come from the losses of the examples, in their order."""
        probes = self._batch.weighted.get(site, [])
        if not probes or any(weighted is None or weighted.shape != grad.shape for weighted in probes):
            return False
        for weighted, weights in zip(probes, self._weights(grad), strict=True):
            weights = weights.repeat_interleave(grad.shape[0] // self._batch.num_examples)
            expected = grad * weights.view(-1, *[1] * (grad.ndim - 1))
            gap = (weighted - expected).abs().flatten(1).amax(1)
            if not (gap <= 0.1 * expected.abs().flatten(1).amax(1)).all():
                return False
        return True

    def _note_length(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._active:
            rows, length = rows_and_length((args, kwargs)) or (None, None)
            self._batch.lengths[module] = length if rows == self._batch.num_examples else None

    def _note_tokens(self, site: Site, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember the tokens of an embedding whose weight a head shares: the head's backward comes first."""
        for key in site.keys.values():
            if isinstance(site.layer, Embedding) and len(self._by_key[key]) > 1:
                indices = args[0] if args else next(iter(kwargs.values()))
                self._batch.tokens[key].append(indices.detach())

    @torch.no_grad()
    def _receive(self, site: Site, call: FrozenCall, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        if not self._active or self._weighing or all(grad is None for grad in grads):
            return
        if site.layout is None:
            if any(grad is not None and bool(grad.any()) for grad in grads):
                self._batch.unsettled.update(site.keys.values())
            return
        lengths = {_rows(grad) for grad in grads if grad is not None}
        if site.layout is Layout.BATCHED and lengths == {1} and self._batch.num_examples > 1:
            self._batch.unsettled.update(site.keys.values())  # shared by all examples, and surveyed in a batch of one
            return
        alike = self._has_the_rows(site, saved, grads)
        if not alike or (site.picked and not self._rows_are_the_examples(site, grads[0])):
            self._batch.unsettled.update(site.keys.values())
            self.distrusted.add(site.path)
            return
        device_type = call.autocast[0]
        with torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext():
            if site.layer is None:
                self._receive_generic(site, call, saved, grads)
                return
            (grad,) = grads
            N = self._batch.num_examples
            if site.layout is Layout.SHARED:
                saved = [tensor.expand(N, *tensor.shape[1:]) if _rows(tensor) == 1 else tensor for tensor in saved]
            names = frozenset(site.keys)
            for name, per_example in site.layer.per_example_grads(call.thaw(saved), grad, names):
                flattened = site.layout is Layout.FLATTENED
                self._deliver(site.keys[name], per_example.grouped(N) if flattened else per_example)

    def _receive_generic(
        self, site: Site, call: FrozenCall, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> None:
        self._active, active = False, self._active
        try:
            for n in range(self._batch.num_examples):
                both = zip(saved, site.sliced, strict=True)
                tensors = [_row(tensor, n) if sliced else tensor for tensor, sliced in both]
                output_grads = [None if grad is None else grad[n : n + 1] for grad in grads]
                for name, grad in module_grads(call.thaw(tensors), output_grads, site.keys).items():
                    self._deliver(site.keys[name], DenseGrads(grad[None]))
        finally:
            self._active = active

    def _has_the_rows(self, site: Site, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
        """Tell whether a call has the rows that the survey has seen: their number may depend on the data."""
        if site.layer is not None:
            return self._right_number(site, grads[0])
        lengths = {tensor.shape[0] for tensor, sliced in zip(saved, site.sliced, strict=False) if sliced}
        lengths |= {grad.shape[0] for grad in grads if grad is not None}
        alike = len(saved) == len(site.sliced) and lengths == {self._batch.num_examples}
        return alike and self._batch.calls[site] == 1

    def _deliver(self, key: str, grads: PerExampleGrads) -> None:
        sites = self._by_key[key]
        if len(sites) > 1 and any(site.layout is None or site.picked for site in sites):
            self._batch.received[key].append(grads)  # until it is known that no other part will be withheld
            return
        expected = sum(self._batch.calls[site] for site in sites)
        if expected == 1 or isinstance(grads, DenseGrads):
            self._sink(key, grads)
            return
        if self._squares and isinstance(grads, OuterProductGrads) and self._is_only_head(key):
            self._sink(key, grads)
            self._batch.heads[key] = self._head_rows(key, grads)
            return
        received = self._batch.received[key]
        received.append(grads)
        if len(received) + (key in self._batch.heads) == expected:
            self._close(key)

    def _close(self, key: str) -> None:
        """Square the sum over the uses of a parameter, once all that get a gradient have got it."""
        grads = join(self._batch.received.pop(key))
        if key in self._batch.heads:
            grads = TiedRows(grads, *self._batch.heads.pop(key))
        self._sink(key, grads)

    def _is_only_head(self, key: str) -> bool:
        """Tell whether the other uses of a parameter are embeddings alike, whose tokens are known for each example."""
        heads = sum(self._batch.calls[site] for site in self._by_key[key] if not isinstance(site.layer, Embedding))
        embeddings = [site for site in self._by_key[key] if isinstance(site.layer, Embedding)]
        N = self._batch.num_examples
        tokens = self._batch.tokens[key]
        batched = all(site.layout is Layout.BATCHED for site in embeddings)
        alike = len({site.module.padding_idx for site in embeddings}) == 1  # so that they join
        return heads == 1 and bool(tokens) and batched and alike and all(rows.shape[0] == N for rows in tokens)

    def _head_rows(self, key: str, grads: OuterProductGrads) -> tuple[Tensor, Tensor]:
        N = self._batch.num_examples
        tokens = torch.cat([indices.reshape(N, -1) for indices in self._batch.tokens[key]], dim=1)
        example, row, _ = embedding_rows(tokens, grads.output_grads.new_zeros(*tokens.shape, 0))
        return example * grads.shape[0] + row, grads.rows(example, row)


@dataclass
class _Batch:
    """What one forward pass and its backward passes have shown so far."""

    num_examples: int
    calls: Counter[Site] = field(default_factory=Counter)
    lengths: dict[nn.Module | None, int | None] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    received: dict[str, list[PerExampleGrads]] = field(default_factory=lambda: defaultdict(list))
    heads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)
    picked: list[tuple[Site, Tensor]] = field(default_factory=list)
    weighted: dict[Site, list[Tensor | None]] = field(default_factory=dict)
    exponents: list[Tensor] = field(default_factory=list)


def _rows(tensor: Tensor) -> int | None:
    return tensor.shape[0] if tensor.ndim else None


def _row(tensor: Tensor, n: int) -> Tensor:
    """Copy one row: the module may write into it, and torch's backward fails on rows of ``channels_last`` for some."""
    return tensor[n : n + 1].clone(memory_format=torch.contiguous_format)
