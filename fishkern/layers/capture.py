"""Capture: per-example gradients of every parameter of a plan, from one forward and one backward pass of a batch.

Three parts work together: hooks report inputs and output gradients (:mod:`fishkern.layers.hooks`), their rows are
assigned to examples (:mod:`fishkern.layers.rows`), and the uses of a parameter are added up
(:mod:`fishkern.layers.uses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishkern import hosts
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
from fishkern.layers.hooks import Arrival, Hooks, hooks_of_others
from fishkern.layers.parts import Part, of_part, parts_of, sites_inside, why_whole
from fishkern.layers.routed import Routed
from fishkern.layers.rows import Rows
from fishkern.layers.rules import factored
from fishkern.layers.site import Layout, Site
from fishkern.layers.tap import FrozenCall
from fishkern.layers.unsupported import UnsupportedModuleError
from fishkern.layers.uses import Sink, Uses, sites_by_key

Deferring = Callable[[], AbstractContextManager[Any]]


class Passed(NamedTuple):
    """A call that an earlier pass has kept.

    Attributes:
        site: The site that was called.
        call: The call, with its tensors.
        grads: The gradients that arrived at its output; ``None`` if none arrived.
        hooks: What :func:`hooks_of_others` listed when the call was made.
        number: As the how many-th call it ended.
        arrival: As the how many-th the gradients arrived.
    """

    site: Site
    call: FrozenCall
    grads: Sequence[Tensor | None] | None
    hooks: tuple[int, ...]
    number: int
    arrival: int


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
        self._by_key = sites_by_key(sites)
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
        for block in {site.block for site in self._sites if site.block is not None and _counts_rows(site)}:
            self._handles.append(block.register_forward_pre_hook(self._note_input, with_kwargs=True))
        for entry in {site.entry for site in self._sites if site.entry is not None}:
            self._handles.append(entry.register_forward_hook(self._note_entry))
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
            self._rows.prove(losses, {(site.entry, site.order) for site in self._sites if site.entry is not None})
            self._weighing = False
            losses.sum().backward(retain_graph=retain_graph)
        finally:
            self._hooks.active = self._weighing = False
        self._uses.finish()

    def take(self, passed: Sequence[Passed], num_examples: int, counted: Tensor | None = None) -> None:
        """Take calls and gradients that an earlier pass has kept, instead of a forward and a backward pass.

        Args:
            passed: The calls, which the survey has looked at.
            num_examples: ``N``.
            counted: As for :meth:`forward`.
        """
        self._begin(num_examples, counted)
        self._rows = Rows(num_examples, surveyed=True)
        for one in sorted(passed, key=lambda one: one.number):
            call = one.call.thaw(one.call.tensors)
            self._note_call(one.site, call.args, call.kwargs)
        self._uses.begin()
        for one in sorted(passed, key=lambda one: one.arrival):
            if one.grads is not None:
                saved = one.call.tensors if one.site.reads_input else ()
                self._receive(Arrival(one.site, one.call, saved, one.grads, None, one.hooks if one.site.reruns else ()))
        self._uses.finish()

    @property
    def anchor(self) -> Tensor:
        """A leaf on which the output of every captured call depends."""
        return self._hooks.anchor

    def taps(self, head: nn.Module) -> bool:
        """Tell whether gradients of a head are captured.

        Args:
            head: A module.

        Returns:
            Whether a site is the head or inside it.
        """
        return bool(sites_inside(head, self._sites))

    def why_whole(self, head: nn.Module) -> str | None:
        """Say why a head must run on all examples at once, see :func:`fishkern.layers.parts.why_whole`."""
        return why_whole(head, self._sites, squares=self._squares)

    def parts(self, num_rows: int, num_positions: int, most: int) -> Iterator[Part]:
        """Divide the batch into parts of whole examples, see :func:`fishkern.layers.parts.parts_of`."""
        return parts_of(num_rows, num_positions, self._documents, most)

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Take the gradients that arrive inside the ``with`` block for those of some of the examples.

        Args:
            part: Whose they are.

        Yields:
            Nothing.
        """
        whole = self._num_examples, self._counted, self._rows, self._documents
        self._num_examples, self._rows = part.num_examples, Rows(part.num_examples)
        self._counted = None if self._counted is None else of_part(self._counted, part)
        self._documents = part.documents
        try:
            with self._uses.part(part.examples):
                yield
        finally:
            self._num_examples, self._counted, self._rows, self._documents = whole

    def _begin(self, num_examples: int, counted: Tensor | None) -> None:
        self._num_examples, self._counted = num_examples, counted
        self._rows = Rows(num_examples)
        options = {"squares": self._squares, "documents": self._documents}
        self._uses = Uses(self._by_key, self._sink, num_examples=num_examples, **options)

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

    def _note_entry(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._hooks.active and self._hooks.forward:
            self._rows.note_left(module, output)

    def _note_output(self, site: Site) -> Callable[[Tensor], None] | None:
        return (lambda output: self._rows.note_picked(site, output)) if site.picked else None

    def _expanded(self, site: Site) -> Callable[[Tensor], Tensor] | None:
        """Give every example its own row of an output that all share, so that each row gets its own gradient."""
        if site.layout is not Layout.SHARED:
            return None
        return lambda output: output.expand(self._rows.running(site), *output.shape[1:])

    def _receive(self, arrival: Arrival) -> None:
        if self._weighing:
            return
        site, grads = arrival.site, arrival.grads
        if not site.settled:  # no gradient but zeros arrived here in the survey, so nobody knows whose rows these are
            if bool(hosts.in_any(torch.tensor(_any(grads)), hosts.split_of(site.module))):
                self._uses.withhold(site)
                return
            if not self._factors:
                return  # zeros add nothing, except to what is counted of the activations
        if self._is_one_row_for_all(arrival):  # a plan for batches of one cannot tell that from one row for each
            self._uses.withhold(site)
            return
        # Rows that follow the data, or a module that is no longer what it was: hold this batch back, and let the survey
        # find another path for the module.
        if site.reruns and arrival.hooks != hooks_of_others(site.module):
            self._uses.withhold(site)
            self.distrusted.add(site.path)
            return
        as_many = self._has_the_rows(arrival)
        proved = site.entry is None or self._rows.are_proved(site.entry, site.order)
        if not (as_many and proved) or (site.picked and not self._are_the_examples(arrival)):
            self._uses.withhold(site)
            # examples of several rows may have more or fewer in another batch, which the survey of that batch shows
            if as_many or site.order.per_example == 1:
                self.distrusted.add(site.path)
            return
        receive = self._receive_generic if site.layer is None else self._receive_by_rule
        if not site.reruns and self._deferring is nullcontext and not arrival.is_autocast:  # most: contexts take time
            receive(arrival)
            return
        # a module that runs once more must not report the hooked modules inside
        once_more = self._hooks.paused() if site.reruns else nullcontext()
        with arrival.without_autocast(), once_more, self._deferring():
            receive(arrival)

    def _are_the_examples(self, arrival: Arrival) -> bool:
        """Tell whether picked rows are the examples, in every process that computes the module."""
        site = arrival.site
        others = not self._rows.are_the_examples(site, hosts.local_part(_arrived(arrival)))
        return not bool(hosts.in_any(torch.tensor(others), hosts.split_of(site.module)))

    def _is_one_row_for_all(self, arrival: Arrival) -> bool:
        lengths = {_rows(grad) for grad in arrival.grads if grad is not None}
        several = arrival.site.order.count(self._num_examples) > 1
        return arrival.site.layout is Layout.BATCHED and lengths == {1} and several

    def _receive_by_rule(self, arrival: Arrival) -> None:
        site, N = arrival.site, self._num_examples
        if site.layout is Layout.SHARED:
            rows = site.order.count(N)
            saved = [one.expand(rows, *one.shape[1:]) if _rows(one) == 1 else one for one in arrival.saved]
            arrival = arrival._replace(saved=saved)
        several = site.layout is Layout.FLATTENED or site.order.per_example > 1
        counted = self._counted_of_examples(site)
        for key, grads in self._by_example(arrival).per_example_grads():
            grads = grads.unflattened(N) if several else grads
            if counted is not None:
                grads = self._with_counted(arrival, key, grads, counted)
            self._deliver(key, grads)

    def _by_example(self, arrival: Arrival) -> Arrival:
        """Put the rows of a call into the order of the examples, where each has several."""
        order, N = arrival.site.order, self._num_examples
        if order.adjacent:
            return arrival
        rows = {_rows(grad) for grad in arrival.grads if grad is not None}
        saved = [order.by_example(one, N) if _rows(one) in rows else one for one in arrival.saved]
        grads = [None if grad is None else order.by_example(grad, N) for grad in arrival.grads]
        return arrival._replace(saved=saved, grads=grads)

    def _counted_of_examples(self, site: Site) -> Tensor | None:
        """Say which positions of the examples count: where an example has several rows, of all of them."""
        counted, order = self._counted, site.order
        of_rows = counted is not None and counted.shape[0] == order.count(self._num_examples)
        return order.joined(counted, self._num_examples) if of_rows else counted

    def _with_counted(
        self, arrival: Arrival, key: str, grads: PerExampleGrads, of_positions: Tensor
    ) -> PerExampleGrads:
        """Attach which positions count: those of the batch, or the only one of a pooler."""
        if not isinstance(grads, OuterProductGrads | EmbeddingGrads | PositionGrads | Routed):
            return grads
        T = grads.num_terms() // grads.num_examples
        if of_positions.shape == (grads.num_examples, T):
            return replace(grads, counted=of_positions)
        if arrival.site.order.per_example == T:
            return grads
        of_heads = isinstance(grads, PositionGrads)
        counted = self._spread(grads, _arrived(arrival), of_positions) if of_heads else None
        if counted is None:
            raise UnsupportedModuleError(
                f"{key} runs at {T} positions, and attention_mask or labels say of "
                f"{of_positions.shape[1]} which count. Give batches without padding, count positions='all', or leave "
                "the parameter out with parameters=."
            )
        return replace(grads, counted=counted)

    def _spread(self, grads: PositionGrads, output_grads: Tensor, of_positions: Tensor) -> Tensor | None:
        """Spread which positions count over the heads at each of them, where a norm runs at every head.

        An axis as long as there are positions may be that of the heads. So terms of positions that do not count must be
        zero, as they are at padding.

        Args:
            grads: Terms of a norm, ``[N, T H, D]`` or ``[N, H T, D]``.
            output_grads: The gradient that they are made of, with these axes apart.
            of_positions: Which positions count, ``[N, T]``.

        Returns:
            ``[N, T H]`` or ``[N, H T]``; ``None`` if there is no such axis.
        """
        N, T = of_positions.shape
        axes = output_grads.shape[1 : output_grads.ndim - grads.features]
        for axis, size in enumerate(axes):
            if size != T or axes.numel() != grads.output_grads.shape[1]:
                continue
            ones = [T if place == axis else 1 for place in range(len(axes))]
            counted = of_positions.view(N, *ones).expand(N, *axes).reshape(N, -1)
            if not bool(where_counted(grads.terms, ~counted).any()):
                return counted
        return None

    def _receive_generic(self, arrival: Arrival) -> None:
        site = arrival.site
        for n in range(self._num_examples):
            pairs = zip(arrival.saved, site.sliced, strict=True)
            tensors = [_copied(self._part(site, tensor, n)) if sliced else tensor for tensor, sliced in pairs]
            output_grads = [None if grad is None else self._part(site, grad, n) for grad in arrival.grads]
            if self._factors:
                self._receive_factors(site, arrival.call.thaw(tensors), output_grads)
                continue
            for name, grad in module_grads(arrival.call.thaw(tensors), output_grads, site.keys).items():
                self._deliver(site.keys[name], DenseGrads(grad[None]))

    def _part(self, site: Site, tensor: Tensor, n: int) -> Tensor:
        """Take the part of an example of a tensor that has one for each."""
        return tensor[site.order.rows(n, self._num_examples)]

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
        alike = len(saved) == len(site.sliced) and lengths == {site.order.count(self._num_examples)}
        # a second call would bring a part of the same gradient, which the square cannot take apart
        return alike and self._uses.calls(site) == 1


def _arrived(arrival: Arrival) -> Tensor:
    """Return the gradient that has arrived: the first one, where a module returns several tensors."""
    return next(grad for grad in arrival.grads if grad is not None)


def _any(grads: Sequence[Tensor | None]) -> bool:
    """Tell whether an entry is not zero."""
    return any(grad is not None and bool(hosts.local_part(grad).any()) for grad in grads)


def _rows(tensor: Tensor) -> int | None:
    return tensor.shape[0] if tensor.ndim else None


def _counts_rows(site: Site) -> bool:
    """Tell whether a module around a site says how many rows there are, or positions in them."""
    return site.layout in (Layout.FLATTENED, Layout.SHARED)


def _copied(tensor: Tensor) -> Tensor:
    """Copy a part: the module may write into it, and some backward passes of torch fail on ``channels_last`` rows."""
    return tensor.clone(memory_format=torch.contiguous_format)
