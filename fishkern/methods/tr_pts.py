"""TR-PTS (Luo et al., 2025, arXiv:2507.22872): the connections and the tokens of a model that matter to a task.

Layers with many of the entries of most Fisher information train more connections of each neuron. Layers with few of
them drop the image tokens to which the class token attends least.

The code of the paper was never published, and the paper leaves open how many examples are read, how counts are rounded,
what a layer is, which tensors take part, and which layers drop tokens. This is a reconstruction; each such choice is an
argument or is named in :func:`tr_pts`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import adapters, hosts, tokens
from fishkern.backend import Backend
from fishkern.layers import UnsupportedModuleError, stored_weights
from fishkern.names import listed, without_wrappers
from fishkern.selection import Contributions, ContributionTopK, Entries, Selection, select
from fishkern.selection.agreement import check_agreement
from fishkern.selection.contribution_topk import USUAL_TOP
from fishkern.statistics import DiagonalFisher, Drawn, Likelihood, estimate
from fishkern.statistics.batches import Shared
from fishkern.tokens import TokenReduction
from fishkern.tokens.recipe import FILE as REDUCTION
from fishkern.tokens.towers import tower_of
from fishkern.warning import warn_caller

KEEP = 0.95

SPARSEST = "sparsest"

SELECTION = "selection.safetensors"

_WITH_ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class TaskRelevance:
    """What :func:`tr_pts` has found to matter to a task.

    Attributes:
        selection: The entries to train. Its pool is every parameter of the model.
        reduction: Which layers drop tokens, for :func:`fishkern.tokens.attach`; ``None`` if none does.
    """

    selection: Selection
    reduction: TokenReduction | None

    @property
    def contributions(self) -> Contributions:
        """What each layer has in the top set, and how many connections of each neuron that gives it."""
        return Contributions.of(self.selection)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Save as ``selection.safetensors`` and, where layers drop tokens, ``token_reduction.json``.

        Args:
            folder: Made if it does not exist; its own folder must. Of an earlier save, both files are replaced.

        Returns:
            The folder.

        Raises:
            FileExistsError: A file of one of these names holds something else.
            OSError: The folder cannot be made or written to, or the disk is full.
        """
        folder = Path(folder)
        folder.mkdir(exist_ok=True)
        if self.reduction is None:
            (folder / REDUCTION).unlink(missing_ok=True)
        else:
            self.reduction.save(folder / REDUCTION)
        self.selection.save(folder / SELECTION)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TaskRelevance:
        """Load what :meth:`save` wrote.

        Args:
            folder: The folder.

        Returns:
            The same.

        Raises:
            FileNotFoundError: There is no selection in it.
            ValueError: A file is damaged, or the selection was made in another way.
        """
        selection = Selection.load(Path(folder) / SELECTION)
        _ = Contributions.of(selection)  # raises where it has none
        file = Path(folder) / REDUCTION
        return cls(selection, TokenReduction.load(file) if file.is_file() else None)


def tr_pts(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    top: float | None = None,
    density: float | None = None,
    least_per_row: int = 1,
    keep: float | None = KEEP,
    token_layers: Literal["sparsest"] | Sequence[int] = "sparsest",
    by: Literal["layer", "parameter"] = "layer",
    share: Literal["count", "sum", "count-per-entry"] = "count",
    most_per_row: int | None = None,
    biases: bool = True,
    heads: str | Iterable[str] = hosts.HEADS,
    max_examples: int | None = None,
    likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | Drawn | None = None,
    shared: Shared = None,
    accumulate_on: str | torch.device | None = None,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
) -> TaskRelevance:
    """Select the connections of each neuron that matter to a task, and the layers that may drop tokens.

        relevance = fk.tr_pts(model, batches)
        fk.tokens.attach(model, relevance.reduction)
        optimizer = fk.MaskedAdamW(model, relevance.selection, lr=1e-3)

    Weights of linear layers and convolutions are ranked by the exact diagonal empirical Fisher of the model as it is,
    without token reduction; nothing in the model changes. :class:`fishkern.ContributionTopK` says how many connections
    of each neuron that gives. The head is trained whole, and so are the biases of linear layers and convolutions. Not
    trained are norms, layer scales, embeddings, and class, position, register and mask tokens.

    Reconstructed, since no code was published: that a layer is a transformer layer, and that counts are rounded down;
    the per-example Fisher over all batches; what is trained whole and what is not (as in Zhang et al., 2024,
    2312.10136, on which the method builds); and the layers that drop tokens, the third with the fewest entries in the
    top set. The paper gives neither ``top`` nor ``least_per_row``. How much a ``top`` selects depends on how unequal
    the layers are and on how long rows are. For a fraction of your own, give ``density``.

    Cost: one forward and one backward pass for each batch, and a float32 for each ranked entry.

    Args:
        model: A model without adapter. Every parameter belongs to the pool, also one that requires no gradient.
        batches: What a ``DataLoader`` over the training data yields, see :func:`fishkern.estimate`.
        top: The fraction of the ranked entries whose number in each layer counts; by default 0.2. Smaller fractions are
            less evenly spread over the layers, and so select more, not less.
        density: Instead of ``top``, the fraction of the ranked entries to select. ``top`` is then solved for, and the
            nearest that it reaches is selected.
        least_per_row: Connections of each neuron in the layer with the fewest entries in the top set.
        keep: The share of image tokens that stay in each of ``token_layers``; ``None`` keeps all.
        token_layers: Layers that drop tokens, by their numbers from the input; ``"sparsest"`` for the third (rounded
            down, at least one) with the fewest entries in the top set (with ``density`` that of ``top=0.2``), the lower
            number first, and never layer 0; ``[]`` for none. Models without image tokens and a class token need ``[]``.
        by: What a layer is, see :class:`fishkern.ContributionTopK`.
        share: How entries are counted, see :class:`fishkern.ContributionTopK`.
        most_per_row: The most connections of a neuron.
        biases: Whether biases of linear layers and convolutions are trained; those of the head always are.
        heads: Names of the modules that are the head, or one name.
        max_examples: How many examples to look at; ``None`` for all; a task of VTAB-1k has 1,000.
        likelihood: See :func:`fishkern.estimate`.
        shared: See :func:`fishkern.estimate`.
        accumulate_on: See :func:`fishkern.estimate`.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.
        progress: See :func:`fishkern.estimate`.

    Returns:
        The selection, the token reduction, and what each layer contributes.

    Raises:
        ValueError: Both ``top`` and ``density`` are given, or an argument is out of range; the model has an adapter or
            reduces tokens already; none of its layers has a linear layer or a convolution; or it cannot lose tokens.
        TypeError: An argument is not a number.
        RuntimeError: Under a process group, the ranks have selected different entries.
        UnsupportedModuleError: The model is sharded, or its weights are quantised.
    """
    if top is None and density is None:
        top = USUAL_TOP
    rule = ContributionTopK(top, density, least_per_row, by=by, share=share, most_per_row=most_per_row)
    _refuse(model)
    token_half = _TokenLayers.of(model, keep, token_layers)
    pool = _Pool.of(model, (heads,) if isinstance(heads, str) else tuple(heads), biases=biases)
    rule.check({name: value for name, value in hosts.named_parameters(model).items() if name in pool.ranked})
    statistics = estimate(
        model,
        batches,
        DiagonalFisher(),
        likelihood=likelihood,
        parameters=lambda name, parameter: name in pool.ranked,
        max_examples=max_examples,
        accumulate_on=accumulate_on,
        backend=backend,
        progress=progress,
        shared=shared,
    )
    selection = pool.around(select(statistics, rule, backend=backend))
    check_agreement(selection)
    if token_half is None:
        return TaskRelevance(selection, None)
    counted = Contributions.of(selection)
    if density is not None:  # what a density is solved with may be so small that most layers have nothing in it
        counted = ContributionTopK(USUAL_TOP, by=by).connections(statistics, backend=backend)
    return TaskRelevance(selection, token_half.reduction(counted))


def _refuse(model: nn.Module) -> None:
    if reason := hosts.sharded(model):
        raise UnsupportedModuleError(f"{reason}.")
    if stored := list(stored_weights(hosts.unwrap(model))):
        raise UnsupportedModuleError(
            f"tr_pts trains entries of the weights, and {len(stored)} of them are quantised ({listed(stored)}): load "
            "the model unquantised, or put an adapter on it and take fishkern.fish_tuning."
        )
    name = type(hosts.unwrap(model)).__name__
    if hasattr(hosts.unwrap(model), "peft_config") or adapters.adapter_parameters(model):
        raise ValueError(
            f"{name} has an adapter, and tr_pts trains entries of the model itself: pass the model without it, or take "
            "fishkern.fish_tuning for the adapter."
        )
    if tokens.attached(model) is not None:
        raise ValueError(
            f"{name} reduces tokens, and tr_pts ranks the model that has all of them: fishkern.tokens.detach it first."
        )


@dataclass(frozen=True)
class _Pool:
    """Every parameter of a model, and what becomes of it; what is in neither set is not trained."""

    shapes: dict[str, torch.Size]
    ranked: frozenset[str]
    whole: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, heads: tuple[str, ...], *, biases: bool) -> _Pool:
        named = hosts.named_parameters(model)
        uses: defaultdict[int, set[str]] = defaultdict(set)  # of a parameter that is shared, all of them
        for module in hosts.unwrap(model).modules():
            for own, parameter in module.named_parameters(recurse=False):
                uses[id(parameter)].add(own if isinstance(module, _WITH_ROWS) else type(module).__name__)
        head = {name for name in named if hosts.is_head(name, heads)}
        of_use = {use: {name for name in named if uses[id(named[name])] == {use}} for use in ("weight", "bias")}
        pool = cls(
            {name: parameter.shape for name, parameter in named.items()},
            frozenset(of_use["weight"] - head),
            frozenset(head | of_use["bias"] if biases else head),
        )
        pool._check(type(hosts.unwrap(model)).__name__)
        return pool

    def _check(self, name: str) -> None:
        if not self.ranked:
            raise ValueError(
                f"{name} has no linear layer or convolution of torch outside its head, whose rows would be neurons: "
                "there is nothing to rank. Build the selection with fishkern.select and a rule instead."
            )
        places = hosts.layer_of(self.shapes)
        stacked = [
            name
            for name, shape in self.shapes.items()
            if places[name] and len(shape) > 1 and name not in self.ranked | self.whole
        ]
        if stacked:
            warn_caller(
                f"not trained, since they are not weights of linear layers or convolutions: {listed(stacked)} "
                f"({sum(self.shapes[name].numel() for name in stacked):,} entries)."
            )

    def around(self, selection: Selection) -> Selection:
        """Widen a selection of what is ranked to the whole pool."""
        entries = {
            name: selection.entries(name)
            if name in self.ranked
            else (Entries.all if name in self.whole else Entries.none)(shape)
            for name, shape in self.shapes.items()
        }
        return Selection.from_entries(entries, provenance=selection.provenance)


@dataclass(frozen=True)
class _TokenLayers:
    """The layers that drop tokens: those named, or the sparsest of a stack."""

    keep: float
    numbers: tuple[int, ...] | None
    stack: str
    count: int

    @classmethod
    def of(
        cls, model: nn.Module, keep: float | None, layers: Literal["sparsest"] | Sequence[int]
    ) -> _TokenLayers | None:
        """Check the arguments and the model before anything is estimated."""
        if isinstance(layers, str) and layers != SPARSEST:
            raise ValueError(f"token_layers is {SPARSEST!r} or the numbers of layers, got {layers!r}.")
        if keep is None or len(layers) == 0:
            return None
        numbers = None if isinstance(layers, str) else tuple(layers)
        _ = TokenReduction((1,) if numbers is None else numbers, keep)  # raises where there is no such recipe
        try:
            tower = tower_of(model)
            stack, modules = hosts.stack_of(tower)
            if len(modules) < 2 and numbers is None:
                raise ValueError("its only layer is layer 0, which keeps all tokens.")
            recipe = TokenReduction(range(1, len(modules)) if numbers is None else numbers, keep)
            tokens.detach(tokens.attach(model, recipe))
        except ValueError as error:
            raise ValueError(f"{error} To select parameters alone, pass token_layers=[].") from None
        path = next(path for path, module in hosts.unwrap(model).named_modules() if module is tower)
        return cls(recipe.keep, numbers, without_wrappers(f"{path}.{stack}".removeprefix(".")), len(modules))

    def reduction(self, contributions: Contributions) -> TokenReduction:
        return TokenReduction(self._sparsest(contributions) if self.numbers is None else self.numbers, self.keep)

    def _sparsest(self, contributions: Contributions) -> list[int]:
        counts = dict.fromkeys(range(1, self.count), 0)
        for one in contributions.layers.values():
            layer = hosts.layer_of(one.names)[one.names[0]]
            if layer is not None and layer.stack == self.stack and layer.number:
                counts[layer.number] += one.top_count
        return sorted(counts, key=lambda number: (counts[number], number))[: max(1, self.count // 3)]
