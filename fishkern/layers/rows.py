"""Whose rows: whether the rows of a call are those of the examples, checked on every batch.

A module may get rows that were picked from among the positions of the examples: a pooler the first token of each, an
expert the tokens that a router sent it. ``N`` such rows need not be one for each of ``N`` examples, and no shape tells.
Nothing was picked where a module gets the input of the one around it, merely reshaped (fused experts). Anywhere else,
before a backward pass the losses are back-propagated once more, down to the picked rows alone, each loss times a
weight of its own. An output gradient is linear in the losses, so a row that comes from example ``n`` alone comes out
scaled by the weight of example ``n``, and a row that mixes examples, or belongs to another one, by something else.

The weights are powers of two: multiplying by one changes no bit of the mantissa, so that the only differences left are
those of sums in another order. Their exponents must stay where the dtype neither overflows nor loses digits, which
bounds how many examples one probe tells apart: 5 exponents (-2 to 2) for float16, 61 (-30 to 30) for float32 and
bfloat16. With more examples the exponents are the digits of the example's number in base 5 or 61, one probe for each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern import hosts
from fishkern.layers.row_order import RowOrder
from fishkern.layers.site import Layout, Site
from fishkern.layers.tap import Entered
from fishkern.layers.unsupported import UnsupportedModuleError

_DIGITS = {torch.float16: 5}  # and for all others:
_DIGITS_OF_OTHERS = 61
# Neighbouring weights differ by a factor of two, so a row of another example is off by at least half its size. The
# rounding of sums in another order, a percent or two in bfloat16, must pass.
_TOLERANCE = 0.1


class Rows:
    """The rows of the calls of one forward pass.

    Args:
        num_examples: ``N`` of the batch.
        surveyed: Whether the survey has looked at these very calls, and found whose their rows are.
    """

    def __init__(self, num_examples: int, *, surveyed: bool = False) -> None:
        self._num_examples = num_examples
        self._surveyed = surveyed
        self._entered: dict[nn.Module | None, Entered] = {}
        self._whole: dict[Site, bool] = {}
        self._picked: list[tuple[Site, Tensor]] = []
        self._exponents: list[Tensor] = []
        self._weighted: dict[Site, list[Tensor | None]] = {}
        self._verdicts: dict[Site, bool] = {}
        self._left: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self._proved: dict[tuple[nn.Module, RowOrder], bool] = {}

    def note_input(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note the input ``[N, T, ...]`` of a module, for the flattened calls inside it.

        Args:
            module: The module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._entered[module] = Entered((args, kwargs))

    def note_call(self, site: Site, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note whether a call with flattened rows gets the whole input of its block, of which nothing was picked.

        Args:
            site: The module's site.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if site.picked and site.block in self._entered:
            whole = self._entered[site.block].is_reshaped((args, kwargs))
            self._whole[site] = whole and self._whole.get(site, True)

    def note_picked(self, site: Site, output: Any) -> None:
        """Note an output whose rows may have been picked.

        Args:
            site: The module's site.
            output: The output that the model continues with. Several tensors are not examined: whose their rows are is
                then not known.
        """
        if isinstance(output, Tensor) and not self._whole.get(site):
            self._picked.append((site, output))

    def weigh(self, losses: Tensor, *, training: bool = False) -> None:
        """Back-propagate weighted losses down to the picked rows.

        Args:
            losses: ``[N]``; the graph is kept.
            training: Whether weights require gradients, which must then not be touched.
        """
        picked = [(site, output) for site, output in self._picked if self.are_as_many(site, output)]
        if not picked:
            return
        outputs = [output for _, output in picked]
        self._exponents, self._weighted = self._exponents_for(outputs, losses.device), {site: [] for site, _ in picked}
        for weights in self._weights(losses):
            grads = _grads_at(outputs, (weights * losses).sum(), training=training)
            for (site, _), grad in zip(picked, grads, strict=True):
                self._weighted[site].append(None if grad is None else hosts.local_part(grad))

    def note_left(self, module: nn.Module, output: Any) -> None:
        """Note what a module returns that was called on several rows for each example.

        Args:
            module: The module.
            output: Any nest.
        """
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim]
        self._left[module] += [leaf for leaf in leaves if leaf.requires_grad]

    def prove(self, losses: Tensor, orders: Collection[tuple[nn.Module, RowOrder]]) -> None:
        """Prove by what has left these modules whose the rows of the batch are.

        Args:
            losses: ``[N]``; the graph is kept.
            orders: These modules, and which rows the survey has found an example to have in them.
        """
        for module, order in orders - self._proved.keys():
            left = [one for one in self._left[module] if len(one) == order.count(self._num_examples)]
            self._proved[module, order] = bool(left) and self._are_in_order(left, losses, order)
        self._left.clear()

    def are_proved(self, module: nn.Module, order: RowOrder) -> bool:
        """Tell whether the rows of the batch lie in an order.

        Args:
            module: A module that was called on them.
            order: One of those to be proved of it.

        Returns:
            Whether they do.
        """
        return self._proved.get((module, order), False)

    def _are_in_order(self, left: Sequence[Tensor], losses: Tensor, order: RowOrder) -> bool:
        grads = _grads_at(left, losses.sum(), training=False)
        owners = order.owners(self._num_examples).to(losses.device)
        for exponents in self._exponents_for(left, losses.device):
            weights = (2.0**exponents).to(losses)
            weighted = _grads_at(left, (weights * losses).sum(), training=False)
            pairs = [(one, two) for one, two in zip(grads, weighted, strict=True) if one is not None]
            if not pairs or not all(_are_scaled(one, two, weights[owners]) for one, two in pairs):
                return False
        return True

    def _exponents_for(self, outputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Say by which powers of two the losses are weighted: one set for each digit of an example's number."""
        base = min(_DIGITS.get(output.dtype, _DIGITS_OF_OTHERS) for output in outputs)
        numbers, exponents = torch.arange(self._num_examples, device=device), []
        while not exponents or numbers.any():
            exponents.append(numbers % base - base // 2)  # which keeps the weights around 1
            numbers = numbers // base
        return exponents

    @property
    def any_picked(self) -> bool:
        """Whether an output with picked rows was noted."""
        return bool(self._picked)

    def judge(self, losses: Tensor) -> None:
        """Judge the picked rows by losses that stand in for those whose gradients arrive later.

        Args:
            losses: ``[N]``, each of what an example has at the model's output; the graph is kept. Weights get no
                gradient, though they require one.

        Raises:
            UnsupportedModuleError: A reentrant checkpoint is in between.
        """
        picked = [(site, output) for site, output in self._picked if self.are_as_many(site, output)]
        if not picked:
            return
        self.weigh(losses, training=True)
        grads = _grads_at([output for _, output in picked], losses.sum(), training=True)
        self._verdicts = {
            site: grad is not None and self.are_the_examples(site, grad)
            for (site, _), grad in zip(picked, grads, strict=True)
        }

    def are_the_examples(self, site: Site, grad: Tensor) -> bool:
        """Tell whether the rows of an output gradient come from the losses of the examples, in their order.

        Args:
            site: The site of the output.
            grad: Gradient of the summed losses, ``[G N M, ...]``.

        Returns:
            Whether the module got the whole input of its block, or each row has scaled by the weight of its example in
            every probe.
        """
        if self._surveyed or self._whole.get(site):
            return True
        if site in self._verdicts:
            return self._verdicts[site]
        probes = self._weighted.get(site, [])
        several_calls = len(probes) != len(self._exponents)
        if not probes or several_calls or any(weighted is None or weighted.shape != grad.shape for weighted in probes):
            return False
        for weighted, weights in zip(probes, self._weights(grad), strict=True):
            owners = site.order.owners(self._num_examples).to(weights.device)
            if not _are_scaled(grad, weighted, weights[owners].repeat_interleave(grad.shape[0] // len(owners))):
                return False
        return True

    def are_as_many(self, site: Site, output: Tensor) -> bool:
        """Tell whether an output, or its gradient, has the number of rows that its layout implies for ``N`` examples.

        Args:
            site: The site of the output.
            output: ``[rows, ...]``.

        Returns:
            Whether it has ``G N``, or ``G N T`` where they are flattened.
        """
        if self._surveyed:
            return True
        expected = site.order.count(self._num_examples)
        rows, each = expected, 1
        if site.layout is Layout.FLATTENED:
            entered = self._entered.get(site.block)
            rows, each = (entered and entered.rows_and_length) or (None, None)
        return rows == expected and output.shape[0] == rows * each

    def running(self, site: Site) -> int:
        """Count the rows that the model runs on, for an output of which each gets its own copy.

        Args:
            site: Its site.

        Returns:
            Those of the input of the module around the site, where there is one; else ``G N``.
        """
        entered = self._entered.get(site.block)
        rows, _ = (entered and entered.rows_and_length) or (site.order.count(self._num_examples), None)
        return rows

    def _weights(self, like: Tensor) -> list[Tensor]:
        return [(2.0**exponents).to(like) for exponents in self._exponents]


def _are_scaled(grad: Tensor, weighted: Tensor, weights: Tensor) -> bool:
    """Tell whether each row of a gradient has scaled by a weight."""
    expected = grad * weights.to(grad).view(-1, *[1] * (grad.ndim - 1))
    gap = (weighted - expected).unsqueeze(-1).abs().flatten(1).amax(1)
    return bool((gap <= _TOLERANCE * expected.unsqueeze(-1).abs().flatten(1).amax(1)).all())


def _grads_at(outputs: Sequence[Tensor], weighted: Tensor, *, training: bool) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(weighted, outputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):  # a reentrant checkpoint after the rows supports backward() alone
            raise
        if training:  # which would also add to the weights' gradients
            raise UnsupportedModuleError(
                "rows that are picked from positions go through a reentrant checkpoint, behind which it cannot be "
                "checked whose they are. Checkpoint with use_reentrant=False."
            ) from error
    grads: list[Tensor | None] = [None] * len(outputs)
    handles = [output.register_hook(partial(grads.__setitem__, place)) for place, output in enumerate(outputs)]
    try:
        weighted.backward(retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return grads
