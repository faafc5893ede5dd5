"""FISH-Tuning (Xue et al., 2025, arXiv:2504.04050) and the FISH Mask that it builds on (Sung et al., 2021, 2111.09839).

Score every entry of a pool by the exact diagonal empirical Fisher over some examples, select the ``k`` largest of the
whole pool together, train those alone; the head, which starts at random, is trained whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import ROUND_UP, Decimal
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fishkern import adapters, hosts
from fishkern.arguments import fraction_of, integer, one_of
from fishkern.backend import Backend
from fishkern.integrations.budgets import trained_by
from fishkern.layers import UnsupportedModuleError, stored_weights
from fishkern.names import listed, without_wrappers
from fishkern.selection import GlobalTopK, Random, Selection, bound_to_start, select
from fishkern.selection.agreement import check_agreement
from fishkern.selection.base import exactly
from fishkern.selection.budgeted import share
from fishkern.statistics import DiagonalFisher, Drawn, Likelihood, Statistics, estimate
from fishkern.statistics.batches import Shared

Order = Literal["largest", "smallest", "random", "magnitude"]
ORDERS: tuple[Order, ...] = ("largest", "smallest", "random", "magnitude")
Pool = Literal["adapter", "model"]
POOLS: tuple[Pool, ...] = ("adapter", "model")


class _Parts(NamedTuple):
    """The parameters of a pool: those that are ranked, and the head, which is trained whole; gates are in either."""

    parameters: dict[str, nn.Parameter]  # all of them, in the model's order
    ranked: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    gates: dict[str, nn.Parameter]  # of UniPELT, where they are trained whole


def fish_tuning(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    k: int | None = None,
    density: float | None = None,
    trainable: int | None = None,
    match: Any = None,
    order: Order = "largest",
    pool: Pool = "adapter",
    max_examples: int | None = 128,
    likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | Drawn | None = None,
    heads: str | Iterable[str] = hosts.HEADS,
    rank_gates: bool = False,
    allow_zeros: bool = False,
    seed: int = 42,
    accumulate_on: str | torch.device | None = None,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    shared: Shared = None,
) -> Selection:
    """Select the entries of an adapter that FISH-Tuning trains.

    The pool is ranked globally, across matrices and layers, with the model's present weights: the selection is valid
    for these values of adapter and head alone. For LoRA and DoRA the paper starts from PiSSA; with LoRA's usual start
    ``B = 0`` every entry of ``A`` scores exactly zero and there is nothing to rank.

    Cost: one forward and one backward pass for each batch (none for ``"random"`` and ``"magnitude"``), and a float32
    for each entry of the pool.

    Args:
        model: A model with an adapter of PEFT or of :mod:`fishkern.adapters`. Every parameter that is trained belongs
            to the pool, but for the head's.
        batches: What a ``DataLoader`` over the training data yields, see :func:`fishkern.estimate`; not read for
            ``"random"`` and ``"magnitude"``.
        k: Budget in entries of the pool; the head comes on top. Give exactly one of the four budgets.
        density: Budget as a fraction of the pool: floor(density * pool); the head comes on top.
        trainable: Budget of everything that is trained, the head included.
        match: As many entries of the pool as this adapter would train on this model: a PEFT config, as in the paper's
            comparison ``LoraConfig(r=1, layers_to_transform=[0], ...)``, or a :class:`fishkern.adapters.Adapter`.
        order: ``"largest"`` Fisher information, as in the paper; its controls ``"smallest"`` ("rev") and ``"random"``;
            and ``"magnitude"``, the largest absolute values.
        pool: ``"adapter"``; or ``"model"`` for the FISH Mask over all parameters of a model without one, in which case
            ``density`` and ``trainable`` cover the head as well.
        max_examples: How many examples to look at; 128 in the paper.
        likelihood: See :func:`fishkern.estimate`.
        heads: Names of the modules that are the head, or one name.
        rank_gates: Whether UniPELT's gates are ranked with the rest; by default they are trained whole, as the head is,
            and paid for by ``match``. A reconstruction: the paper does not say.
        allow_zeros: Go on although half of the adapter or more scores exactly zero; with ``pool="model"``, although
            ``k`` exceeds the scores that are not zero.
        seed: Of the random order, independent of all other generators.
        accumulate_on: See :func:`fishkern.estimate`.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.
        progress: See :func:`fishkern.estimate`.
        shared: See :func:`fishkern.estimate`.

    Returns:
        A selection whose pool is the adapter and the head, the head selected whole; ``.k`` counts without the head. It
        records a digest of the values that both have, which the first step of a masked optimizer compares.

    Raises:
        ValueError: Not exactly one budget is given, it is not in the pool's range, the model has no adapter, half of
            the adapter scores exactly zero, or fewer entries of a whole model than ``k`` score anything.
        TypeError: ``match`` is not an adapter, or another budget or ``seed`` is not a number.
        RuntimeError: Under a process group, the ranks have selected different entries.
        UnsupportedModuleError: The model is sharded, or would not see PEFT's prefix, whatever of it is selected; or its
            adapter is merged.
    """
    one_of(order, ORDERS, "order")
    one_of(pool, POOLS, "pool")
    seed, heads = integer(seed, "seed"), (heads,) if isinstance(heads, str) else tuple(heads)
    if reason := hosts.sharded(model) or hosts.lost_prefix(model):
        raise UnsupportedModuleError(f"{reason}.")
    parts = _parts(model, pool, heads, rank_gates=rank_gates)
    if match is not None:
        match = trained_by(match, model, heads) - _count(parts.gates)
    k = _budget({"k": k, "density": density, "trainable": trainable, "match": match}, parts, whole=pool == "model")
    always = exactly(parts.head)
    if order == "random":
        selection = select(_values(parts), Random(k=k, seed=seed, always=always))
    elif order == "magnitude":
        sizes = {name: value.abs() for name, value in _values(parts).items()}
        selection = select(sizes, GlobalTopK(k=k, always=always), backend=backend)
    else:
        statistics = estimate(
            model,
            batches,
            DiagonalFisher(),
            likelihood=likelihood,
            parameters=lambda name, parameter: name in parts.parameters,
            max_examples=max_examples,
            accumulate_on=accumulate_on,
            backend=backend,
            progress=progress,
            shared=shared,
        )
        if not allow_zeros and pool == "adapter":
            _refuse_zeros(statistics, model, parts.ranked)
        elif not allow_zeros and order == "largest":
            _refuse_more_than_scored(statistics, model, parts.ranked, k)
        selection = select(statistics, GlobalTopK(k=k, order=order, always=always), backend=backend)
    check_agreement(selection)
    # Only adapters start at random: a pretrained model has one start.
    return bound_to_start(selection, hosts.unwrap(model)) if pool == "adapter" else selection


def _parts(model: nn.Module, pool: Pool, heads: tuple[str, ...], *, rank_gates: bool) -> _Parts:
    parameters = _pool(model, pool)
    if reason := hosts.merged_adapter(model, parameters):
        raise UnsupportedModuleError(f"{reason}.")
    gates = {} if rank_gates else {name: parameters[name] for name in adapters.gates(model) if name in parameters}
    whole = {name for name in parameters if hosts.is_head(name, heads) or name in gates}
    head = {name: parameter for name, parameter in parameters.items() if name in whole}
    ranked = {name: parameter for name, parameter in parameters.items() if name not in whole}
    if not ranked:
        raise ValueError(f"nothing but the head ({', '.join(head)}) is trained, so there is nothing to select from.")
    return _Parts(parameters, ranked, head, gates)


def _count(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _pool(model: nn.Module, pool: str) -> dict[str, nn.Parameter]:
    named = hosts.named_parameters(model)
    if pool == "model":
        if stored := list(stored_weights(hosts.unwrap(model))):
            raise UnsupportedModuleError(
                f"pool='model' trains entries of the weights, and {len(stored)} of them are quantised "
                f"({listed(stored)}): put an adapter on the model and take pool='adapter'."
            )
        return named
    if not hasattr(hosts.unwrap(model), "peft_config") and not adapters.adapter_parameters(model):
        raise ValueError(
            f"{type(model).__name__} has no adapter: pass a model of PEFT or one that fishkern.adapters.attach has "
            "changed, or take pool='model' for the FISH Mask over all of its parameters."
        )
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trained:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: its adapter is frozen.")
    return trained


def _budget(budgets: Mapping[str, Any], parts: _Parts, *, whole: bool) -> int:
    """Turn one of the four budgets into a number of entries on top of the head.

    Args:
        budgets: ``k``, ``density``, ``trainable`` and ``match``; ``None`` where it is not given.
        parts: What is ranked, and the head.
        whole: Whether ``density`` is one of the whole model, head included.

    Returns:
        ``k``.

    Raises:
        TypeError: The budget is not a number.
        ValueError: Not exactly one is given, or it selects nothing, or more than there is.
    """
    entries, head = _count(parts.ranked), _count(parts.head)
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(given) or "none"
        raise ValueError(f"give exactly one budget of k=, density=, trainable= and match=, got {names}.")
    ((name, value),) = given.items()
    shown = "match=" if name == "match" else f"{name}={value}"
    if name == "density":
        density = fraction_of(value)
        k = share(density, entries + head) - head if whole else share(density, entries)
    else:
        k = integer(value, name) - (head if name == "trainable" else 0)
    pays_for_head = name == "trainable" or (whole and name == "density")
    if k < 1 and pays_for_head:
        least = f"trainable={head + 1}" if name == "trainable" else f"density={_least_density(head, entries)}"
        raise ValueError(
            f"{shown} does not pay for the head of {head:,} entries, which is trained whole: take at least {least}, "
            "or k=, which counts without the head."
        )
    if k < 1:
        raise ValueError(f"{shown} selects nothing out of a pool of {entries:,} entries.")
    if k > entries:
        raise ValueError(f"{shown} asks for {k:,} entries, and the pool has {entries:,} without the head.")
    return k


def _least_density(head: int, entries: int) -> str:
    """Give the smallest density of a few digits that pays for the head and one entry more."""
    least = Decimal(head + 1) / (entries + head)
    return f"{least.quantize(Decimal(1).scaleb(least.adjusted() - 2), ROUND_UP).normalize():f}"


def _values(parts: _Parts) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parts.parameters.items()}


def _refuse_zeros(statistics: Statistics, model: nn.Module, names: Iterable[str]) -> None:
    """Refuse an adapter half of whose own entries score zero: no choice of data ranks them."""
    names = _adapter_entries(model, names)
    zeros = {name: _num_zeros(statistics[name]) for name in names}
    entries = sum(statistics[name].numel() for name in names)
    if not entries or 2 * sum(zeros.values()) < entries:
        return
    worst = max(zeros, key=zeros.get)
    if "prompt_encoder" in worst:
        why = "Where PEFT's prefix is for cross-attention, it is not seen: take LoRA"
    elif "lora_" in worst:
        why = "LoRA's usual start B = 0 does that: start from PiSSA (init_lora_weights='pissa')"
    else:
        why = "A start at zero does that, or a module that no example reaches: start elsewhere"
    raise ValueError(
        f"{sum(zeros.values()):,} of {entries:,} entries of the adapter score exactly zero (most of them in {worst}), "
        f"so that the data do not rank them. {why}, or pass allow_zeros=True."
    )


def _adapter_entries(model: nn.Module, names: Iterable[str]) -> list[str]:
    """List the adapter's own parameters, but for those that an adapter of an embedding has for each token."""
    model = hosts.unwrap(model)
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)  # PEFT's word for its own parameters
    own = set(adapters.adapter_parameters(model))
    tables = tuple(
        without_wrappers(f"{path}.")
        for path, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Embedding)
    )
    names = [name for name in names if not name.startswith(tables)]
    if own:
        return [name for name in names if name in own]
    return [name for name in names if not prefix or any(part.startswith(prefix) for part in name.split("."))]


def _refuse_more_than_scored(statistics: Statistics, model: nn.Module, names: Iterable[str], k: int) -> None:
    """Refuse to spend a budget on entries of a whole model that score zero, and say what they are."""
    zeros = {name: _num_zeros(statistics[name]) for name in names}
    non_zero = sum(statistics[name].numel() - count for name, count in zeros.items())
    if k <= non_zero:
        return
    if unseen := _unseen(statistics, model, zeros):
        what = f"{sum(unseen.values()):,} are rows of {listed(unseen)} that these examples do not contain"
    else:
        what = f"most of them in {max(zeros, key=zeros.get)}"
    raise ValueError(
        f"k={k:,} exceeds the {non_zero:,} non-zero scores of the pool; {sum(zeros.values()):,} entries score exactly "
        f"zero ({what}). Take more examples or a smaller budget, or pass allow_zeros=True to choose among the zeros by "
        "their position."
    )


def _num_zeros(score: Tensor) -> int:
    return score.numel() - int(score.count_nonzero())


def _unseen(statistics: Statistics, model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Count for each embedding the entries in rows that no example looks up."""
    counts = {}
    for path, module in hosts.unwrap(model).named_modules():
        name = without_wrappers(f"{path}.weight")
        if isinstance(module, nn.Embedding) and name in names:
            empty = statistics[name].count_nonzero(dim=1) == 0
            if module.padding_idx is not None:
                empty[module.padding_idx] = False  # it has no gradient, contained or not
            counts[name] = int(empty.sum()) * module.embedding_dim
    return {name: count for name, count in counts.items() if count}
