"""Capture: per-example gradients of every parameter of a plan, from one forward and one backward pass of a batch.

Three parts work together: hooks report inputs and output gradients (:mod:`fishkern.layers.hooks`), their rows are
assigned to examples (:mod:`fishkern.layers.rows`), and the uses of a parameter are added up
(:mod:`fishkern.layers.uses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.layers.base import Call
from fishkern.layers.documents import Documents
from fishkern.layers.factored import module_factors
from fishkern.layers.generic import module_grads
from fishkern.layers.grads import (
    DenseGrads,
    EmbeddingGrads,
    OuterProductGrads,
    PerExampleGrads,
    PositionGrads,
    where_counted,
)
from fishkern.layers.hooks import Arrival, Hooks
from fishkern.layers.routed import Routed
from fishkern.layers.rows import Rows
from fishkern.layers.rules import factored
from fishkern.layers.site import Layout, Site
from fishkern.layers.unsupported import UnsupportedModuleError
from fishkern.layers.uses import Sink, Uses

Deferring = Callable[[], AbstractContextManager[Any]]


class Capture:
    """Hooks on the sites of a model, for the time of a ``with`` block.

    Args:
        sites: The modules to capture, with their rules.
        sink: Called with a parameter's canonical name and its per-example gradients, during backward.
        squares: Whether the sink only adds squares. If so, those of a head that shares its weight with an embedding are
            delivered first, and the embedding's addition to them later; otherwise both are delivered as one gradient.
        factors: Whether the sink reads activations and output gradients, which then also come out of hosts.
        deferring: Makes a context for what is computed during backward, which may keep an error until that has ended.

    Attributes:
        distrusted: Paths of modules whose rows turned out not to be the examples' own.
    """

    _documents: Documents | None = None  # of a batch of packed rows

    def __init__(
        self,
        sites: Sequence[Site],
        sink: Sink,
        *,
        squares: bool = True,
        factors: bool = False,
        deferring: Deferring = nullcontext,
    ) -> None:
        self._deferring = deferring
        self._sites = sites
        self._sink = sink
        self._squares = squares
        self._factors = factors
        self._weighing = False
        self._handles: list[Any] = []
        self._hooks = Hooks(
            sites,
            self._receive,
            on_call=self._note_call,
            prepare=self._expanded,
            on_output=self._note_output,
            marked=self._mark,
        )
        self._begin(0, None)
        self.distrusted: set[str] = set()

    @property
    def withheld(self) -> frozenset[str]:
        """Names whose gradients of the last backward pass were held back, since nothing says whose rows they are."""
        return frozenset(self._uses.withheld)

    def __enter__(self) -> Capture:
        self._hooks.__enter__()
        for block in {site.block for site in self._sites if site.layout is Layout.FLATTENED}:
            self._handles.append(block.register_forward_pre_hook(self._note_input, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._begin(0, None)

    @contextmanager
    def forward(self, num_examples: int, counted: Tensor | None = None) -> Iterator[None]:
        """Capture the forward pass that runs inside the ``with`` block.

        Args:
            num_examples: ``N`` of the batch.
            counted: Which positions count, ``[N, T]``, bool; ``None`` for all. Gradients that are sums over positions
                carry it (:class:`fishkern.layers.grads.OuterProductGrads` and others).

        Yields:
            Nothing.
        """
        self._begin(num_examples, counted)
        with self._hooks.running():
            yield

    def backward(self, losses: Tensor, *, retain_graph: bool = False) -> None:
        """Run backward and hand every parameter's per-example gradients to the sink.

        Args:
            losses: ``[N]``.
            retain_graph: Keep the graph for another backward.
        """
        self._uses.begin()
        if not losses.requires_grad:
            return
        try:
            # Checkpointed segments are recomputed here, and must run with their taps in place; no gradient is received.
            self._hooks.active = self._weighing = True
            self._rows.weigh(losses)
            self._weighing = False
            losses.sum().backward(retain_graph=retain_graph)
        finally:
            self._hooks.active = self._weighing = False
        self._uses.finish()

    def _begin(self, num_examples: int, counted: Tensor | None) -> None:
        self._num_examples, self._counted = num_examples, counted
        self._rows = Rows(num_examples)
        options = {"squares": self._squares, "documents": self._documents}
        self._uses = Uses(self._sites, self._sink, num_examples=num_examples, **options)

    def _mark(self) -> Any:
        """Say which pass a call belongs to: here there is one at a time."""
        return None

    def _deliver(self, key: str, grads: PerExampleGrads) -> None:
        self._uses.deliver(key, grads)

    def _note_call(self, site: Site, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._uses.note_call(site, args, kwargs)
        self._rows.note_call(site, args, kwargs)

    def _note_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._hooks.active:
            self._rows.note_input(module, args, kwargs)

    def _note_output(self, site: Site) -> Callable[[Tensor], None] | None:
        return (lambda output: self._rows.note_picked(site, output)) if site.picked else None

    def _expanded(self, site: Site) -> Callable[[Tensor], Tensor] | None:
        """Give every example its own row of an output that all share, so that each row gets its own gradient."""
        if site.layout is not Layout.SHARED:
            return None
        return lambda output: output.expand(self._num_examples, *output.shape[1:])

    def _receive(self, arrival: Arrival) -> None:
        if self._weighing:
            return
        site, grads = arrival.site, arrival.grads
        if not site.settled:  # no gradient but zeros arrived here in the survey, so nobody knows whose rows these are
            if any(grad is not None and bool(grad.any()) for grad in grads):
                self._uses.withhold(site)
                return
            if not self._factors:
                return  # zeros add nothing, except to what is counted of the activations
        if self._is_one_row_for_all(arrival):  # a plan for batches of one cannot tell that from one row for each
            self._uses.withhold(site)
            return
        # Rows that follow the data: hold this batch back, and let the survey find another path for the module.
        if not self._has_the_rows(arrival) or (
            site.picked and not self._rows.are_the_examples(site, _arrived(arrival))
        ):
            self._uses.withhold(site)
            self.distrusted.add(site.path)
            return
        with arrival.without_autocast(), self._deferring():
            if site.layer is None:
                self._receive_generic(arrival)
            else:
                self._receive_by_rule(arrival)

    def _is_one_row_for_all(self, arrival: Arrival) -> bool:
        lengths = {_rows(grad) for grad in arrival.grads if grad is not None}
        return arrival.site.layout is Layout.BATCHED and lengths == {1} and self._num_examples > 1

    def _receive_by_rule(self, arrival: Arrival) -> None:
        site, N = arrival.site, self._num_examples
        if site.layout is Layout.SHARED:
            saved = [one.expand(N, *one.shape[1:]) if _rows(one) == 1 else one for one in arrival.saved]
            arrival = arrival._replace(saved=saved)
        for key, grads in arrival.per_example_grads():
            grads = grads.unflattened(N) if site.layout is Layout.FLATTENED else grads
            counts = self._counted is not None
            self._deliver(key, self._with_counted(key, grads, _arrived(arrival)) if counts else grads)

    def _with_counted(self, key: str, grads: PerExampleGrads, output_grads: Tensor) -> PerExampleGrads:
        """Attach which positions count: those of the batch, or the only one of a pooler."""
        if not isinstance(grads, OuterProductGrads | EmbeddingGrads | PositionGrads | Routed):
            return grads
        T = grads.num_terms() // grads.num_examples
        if T == 1:
            return grads
        if self._counted.shape[1] == T:
            return replace(grads, counted=self._counted)
        counted = self._spread(grads, output_grads) if isinstance(grads, PositionGrads) else None
        if counted is None:
            raise UnsupportedModuleError(
                f"{key} runs at {T} positions, and attention_mask or labels say of "
                f"{self._counted.shape[1]} which count. Give batches without padding, count positions='all', or leave "
                "the parameter out with parameters=."
            )
        return replace(grads, counted=counted)

    def _spread(self, grads: PositionGrads, output_grads: Tensor) -> Tensor | None:
        """Spread which positions count over the heads at each of them, where a norm runs at every head.

        An axis as long as there are positions may be that of the heads. So terms of positions that do not count must be
        zero, as they are at padding.

        Args:
            grads: Terms of a norm, ``[N, T H, D]`` or ``[N, H T, D]``.
            output_grads: The gradient that they are made of, with these axes apart.

        Returns:
            ``[N, T H]`` or ``[N, H T]``; ``None`` if there is no such axis.
        """
        N, T = self._counted.shape
        axes = output_grads.shape[1 : output_grads.ndim - grads.terms.ndim + 2]
        for axis, size in enumerate(axes):
            if size != T or axes.numel() != grads.terms.shape[1]:
                continue
            ones = [T if place == axis else 1 for place in range(len(axes))]
            counted = self._counted.view(N, *ones).expand(N, *axes).reshape(N, -1)
            if not bool(where_counted(grads.terms, ~counted).any()):
                return counted
        return None

    def _receive_generic(self, arrival: Arrival) -> None:
        site = arrival.site
        with self._hooks.paused():  # the second run must not report the hooked modules inside
            for n in range(self._num_examples):
                pairs = zip(arrival.saved, site.sliced, strict=True)
                tensors = [_copied(self._part(tensor, n)) if sliced else tensor for tensor, sliced in pairs]
                output_grads = [None if grad is None else self._part(grad, n) for grad in arrival.grads]
                if self._factors:
                    self._receive_factors(site, arrival.call.thaw(tensors), output_grads)
                    continue
                for name, grad in module_grads(arrival.call.thaw(tensors), output_grads, site.keys).items():
                    self._deliver(site.keys[name], DenseGrads(grad[None]))

    def _part(self, tensor: Tensor, n: int) -> Tensor:
        """Take the part of an example of a tensor that has one for each."""
        return tensor[n : n + 1]

    def _receive_factors(self, site: Site, call: Call, output_grads: Sequence[Tensor | None]) -> None:
        """Deliver the factors of linear maps inside a host, whose call gives the whole gradient of one example."""
        for name, grads in module_factors(call, output_grads, factored(site)).items():
            if self._counted is not None:
                raise UnsupportedModuleError(
                    f"{site.keys[name]} gets rows that {site.path} picks from the positions, so it is unclear which of "
                    "them are padding. Give batches without padding, or count positions='all'."
                )
            self._sink(site.keys[name], grads)

    def _has_the_rows(self, arrival: Arrival) -> bool:
        """Tell whether a call has as many rows as in the survey: their number may depend on the data."""
        site, saved, grads = arrival.site, arrival.saved, arrival.grads
        if site.layer is not None:
            return all(self._rows.are_as_many(site, grad) for grad in grads if grad is not None)
        lengths = {tensor.shape[0] for tensor, sliced in zip(saved, site.sliced, strict=False) if sliced}
        lengths |= {grad.shape[0] for grad in grads if grad is not None}
        alike = len(saved) == len(site.sliced) and lengths == {self._num_examples}
        # a second call would bring a part of the same gradient, which the square cannot take apart
        return alike and self._uses.calls(site) == 1


def _arrived(arrival: Arrival) -> Tensor:
    """Return the gradient that has arrived: the first one, where a module returns several tensors."""
    return next(grad for grad in arrival.grads if grad is not None)


def _rows(tensor: Tensor) -> int | None:
    return tensor.shape[0] if tensor.ndim else None


def _copied(tensor: Tensor) -> Tensor:
    """Copy a part: the module may write into it, and some backward passes of torch fail on ``channels_last`` rows."""
    return tensor.clone(memory_format=torch.contiguous_format)
