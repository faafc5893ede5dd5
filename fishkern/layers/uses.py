"""The uses of one parameter: a sum over all of them comes before the square.

A parameter is used more than once where a module is called several times, or where several modules share it (an
embedding and the head). Its gradients are delivered once every use that gets one has got it.

There is one exception, because the gradients of a head ``[N, T, V]`` are the largest of a language model. If only
squares are needed, the head's are delivered as soon as it has its gradient, which in backward is before all other uses.
For its addition to them, the embedding later needs the head's gradient only at the rows of the batch's tokens
(:class:`fishkern.layers.grads.TiedRows`), which are known since the forward pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fishkern.layers.documents import Documents
from fishkern.layers.embedding import Embedding
from fishkern.layers.grads import DenseGrads, OuterProductGrads, PerExampleGrads, TiedRows, join
from fishkern.layers.packed_grads import PackedOuterProductGrads
from fishkern.layers.site import Layout, Site
from fishkern.layers.unsupported import UnsupportedModuleError
from fishkern.ops import embedding_rows

Sink = Callable[[str, PerExampleGrads], None]


def sites_by_key(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """List the sites of each parameter.

    Args:
        sites: All sites.

    Returns:
        Those of each, by canonical name.
    """
    of: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        for key in site.keys.values():
            of[key].append(site)
    return dict(of)


class Uses:
    """The uses of each parameter in one forward pass and its backward passes.

    Args:
        sites: The sites of each parameter, by canonical name (:func:`sites_by_key`).
        sink: Called with a parameter's canonical name and its per-example gradients.
        squares: Whether the sink only adds squares, which may then be delivered in parts.
        num_examples: ``N`` of the batch.
        documents: The examples of a batch of packed rows; ``None`` for any other batch.

    Attributes:
        withheld: Canonical names whose gradients of the last backward pass are held back, since nothing says whose
            rows they are.
    """

    def __init__(
        self,
        sites: Mapping[str, Sequence[Site]],
        sink: Sink,
        *,
        squares: bool,
        num_examples: int,
        documents: Documents | None = None,
    ) -> None:
        self._by_key = sites
        self._sink = sink
        self._squares = squares
        self._num_examples = num_examples
        self._documents = documents
        self._calls: Counter[Site] = Counter()
        self._tokens: dict[str, list[Tensor]] = defaultdict(list)
        self._received: dict[str, list[PerExampleGrads]] = defaultdict(list)
        self._heads: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._part: slice | None = None  # of the examples, whose head's gradients are delivered
        self.withheld: set[str] = set()

    def note_call(self, site: Site, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Count a call, and remember the tokens of an embedding whose weight a head shares.

        Args:
            site: The site that was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._calls[site] += 1
        for key in site.keys.values():
            # only a shared table can be tied to a head, whose rows at these tokens are needed later
            if isinstance(site.layer, Embedding) and len(self._by_key[key]) > 1:
                indices = args[0] if args else next(iter(kwargs.values()))
                own = site.layer.own_tokens(site.module, indices.detach())
                self._tokens[key].append(self._of_examples(site, own))

    def _of_examples(self, site: Site, indices: Tensor) -> Tensor:
        """Join the tokens of the rows of each example, where it has several."""
        rows = site.order.count(self._num_examples)
        return site.order.joined(indices, self._num_examples) if indices.ndim > 1 and len(indices) == rows else indices

    def calls(self, site: Site) -> int:
        """Count the calls of a module.

        Args:
            site: Its site.

        Returns:
            The number of its calls in the forward pass.
        """
        return self._calls[site]

    def begin(self) -> None:
        """Forget the gradients of the previous backward pass."""
        self._received.clear()
        self._heads.clear()
        self.withheld.clear()

    @contextmanager
    def part(self, examples: slice) -> Iterator[None]:
        """Take what is delivered inside the ``with`` block for gradients of some of the examples, of a head alone.

        Args:
            examples: Their numbers.

        Yields:
            Nothing.

        Raises:
            UnsupportedModuleError: A parameter is used elsewhere, in a way that forbids to deliver it in parts.
        """
        before = set(self._received)
        self._part = examples
        try:
            yield
            for key in self._received.keys() - before:  # of a module that also has calls without a gradient
                self._close_part(key)
        finally:
            self._part = None

    def withhold(self, site: Site) -> None:
        """Deliver no gradient of a site's parameters in this backward pass.

        Args:
            site: The site.
        """
        self.withheld.update(site.keys.values())

    def deliver(self, key: str, grads: PerExampleGrads) -> None:
        """Add the gradients of one use, and pass those of all uses to the sink once they are complete.

        Args:
            key: Canonical name of the parameter.
            grads: Of one use; on the generic path, of one example at a time.
        """
        sites = self._by_key[key]
        if len(sites) > 1 and any(site.picked or not site.settled for site in sites):
            self._received[key].append(grads)  # until backward ends: if a later part is held back, all must be
            return
        expected = sum(self._calls[site] for site in sites)
        # On the generic path one call of one host gives the gradient, which already is the sum over all uses.
        if expected == 1 or isinstance(grads, DenseGrads):
            self._sink(key, grads)
            return
        of_linear = isinstance(grads, OuterProductGrads | PackedOuterProductGrads)
        if self._squares and of_linear and self._is_only_head(key):
            self._sink(key, grads)
            self._heads[key].append(self._head_rows(key, grads))
            return
        received = self._received[key]
        received.append(grads)
        if len(received) + (key in self._heads) == expected:
            self._close(key)

    def finish(self) -> None:
        """Deliver the rest, now that backward has ended: a use that got no gradient adds none."""
        for key in self._received.keys() - self.withheld:
            self._close(key)

    def _close(self, key: str) -> None:
        grads = join(self._received.pop(key))
        if key in self._heads:
            pairs, rows = zip(*self._heads.pop(key), strict=True)
            grads = TiedRows(grads, torch.cat(pairs), torch.cat(rows))
        self._sink(key, grads)

    def _close_part(self, key: str) -> None:
        if any(isinstance(site.layer, Embedding) for site in self._by_key[key]):
            raise UnsupportedModuleError(
                f"{key} is used by the head and elsewhere, in a way that the first examples did not show, so its "
                "gradients cannot be added part by part: form the logits whole, with "
                "likelihood=fishkern.CausalLM(logits_bytes=None)."
            )
        self._close(key)

    def _is_only_head(self, key: str) -> bool:
        """Tell whether all other uses of a parameter are embeddings of one kind, with known tokens of each example."""
        heads = sum(self._calls[site] for site in self._by_key[key] if not isinstance(site.layer, Embedding))
        embeddings = [site for site in self._by_key[key] if isinstance(site.layer, Embedding)]
        tokens = self._tokens[key]
        batched = all(site.layout is Layout.BATCHED for site in embeddings)
        alike = len({site.module.padding_idx for site in embeddings}) == 1  # so that they join
        if self._documents is not None:
            of_examples = len(tokens) == 1 and tokens[0].ndim == 2 and self._documents.fit(tokens[0])
        else:
            of_examples = bool(tokens) and all(rows.shape[0] == self._num_examples for rows in tokens)
        return heads == 1 and batched and alike and of_examples

    def _head_rows(self, key: str, grads: OuterProductGrads | PackedOuterProductGrads) -> tuple[Tensor, Tensor]:
        """Keep the head's gradient at the rows of the tokens of its examples."""
        N, documents = self._num_examples, self._documents
        first, end = (0, N) if self._part is None else (self._part.start, self._part.stop)
        if documents is not None:
            borders = documents.offsets()
            tokens = documents.packed(self._tokens[key][0])[borders[first] : borders[end]]
            offsets = borders[first : end + 1] - borders[first]
        else:
            tokens = torch.cat([indices.reshape(N, -1)[first:end] for indices in self._tokens[key]], dim=1)
            offsets = None
        example, row, _ = embedding_rows(tokens, grads.output_grads.new_zeros(*tokens.shape, 0), offsets=offsets)
        return (first + example) * grads.shape[0] + row, grads.rows(example, row)
