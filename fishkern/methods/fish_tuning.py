"""FISH-Tuning (Xue et al., 2025, arXiv:2504.04050) and the FISH Mask that it stands on (Sung et al., 2021, 2111.09839).

Score every entry of a pool by the exact diagonal empirical Fisher over some examples, select the ``k`` largest of the
whole pool together, train those alone; the head, which starts at random, is trained whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import ROUND_UP, Decimal
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import adapters, hosts
from fishkern.arguments import fraction_of, integer, one_of
from fishkern.backend import Backend
from fishkern.layers import UnsupportedModuleError, stored_weights
from fishkern.names import listed, without_wrappers
from fishkern.selection import GlobalTopK, Random, Selection, bound_to_start, select
from fishkern.selection.budgeted import share
from fishkern.statistics import DiagonalFisher, Drawn, Likelihood, Statistics, estimate
from fishkern.statistics.batches import Shared
from fishkern.statistics.shards import Ranks

Order = Literal["largest", "smallest", "random", "magnitude"]
ORDERS: tuple[Order, ...] = ("largest", "smallest", "random", "magnitude")


def fish_tuning(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    k: int | None = None,
    density: float | None = None,
    trainable: int | None = None,
    match: Any = None,
    order: Order = "largest",
    pool: Literal["adapter", "model"] = "adapter",
    max_examples: int | None = 128,
    likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | Drawn | None = None,
    heads: Iterable[str] = hosts.HEADS,
    rank_gates: bool = False,
    allow_zeros: bool = False,
    seed: int = 42,
    accumulate_on: str | torch.device | None = None,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    shared: Shared = None,
) -> Selection:
    """Select the entries of an adapter that FISH-Tuning trains.

    The pool is ranked globally, across matrices and layers, on the model as it stands: the selection holds for these
    very values of adapter and head. For LoRA and DoRA the paper starts from PiSSA; with LoRA's usual start ``B = 0``
    every entry of ``A`` scores exactly zero and there is nothing to rank.

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
        pool: ``"adapter"``; or ``"model"`` for the FISH Mask over all parameters of a model without one, where the
            head is paid out of ``density`` and ``trainable``, which then speak of the whole model.
        max_examples: How many examples to look at; 128 in the paper.
        likelihood: See :func:`fishkern.estimate`.
        heads: Names of the modules that are the head.
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
        carries a digest of the values that both stand at, which the first step of a masked optimizer compares.

    Raises:
        ValueError: Not exactly one budget is given, it is not in the pool's range, the model has no adapter, half of
            the adapter scores exactly zero, or fewer entries of a whole model than ``k`` score anything.
        TypeError: ``match`` is no adapter, or another budget or ``seed`` is no number.
        RuntimeError: Under a process group, the ranks have selected different entries.
        UnsupportedModuleError: The model is sharded, or would not see PEFT's prefix, whatever of it is selected; or its
            adapter is merged.
    """
    one_of(order, ORDERS, "order")
    seed = integer(seed, "seed")
    if reason := hosts.sharded(model) or hosts.lost_prefix(model):
        raise UnsupportedModuleError(f"{reason}.")
    heads = tuple(heads)
    parameters = _pool(model, pool)
    if reason := hosts.merged_adapter(model, parameters):
        raise UnsupportedModuleError(f"{reason}.")
    gates = [] if rank_gates else [name for name in adapters.gates(model) if name in parameters]
    head = [name for name in parameters if hosts.is_head(name, heads) or name in gates]
    ranked = {name: parameter for name, parameter in parameters.items() if name not in head}
    if not ranked:
        raise ValueError(f"nothing but the head ({', '.join(head)}) is trained, so there is nothing to select from.")
    entries = sum(parameter.numel() for parameter in ranked.values())
    head_entries = sum(parameters[name].numel() for name in head)
    if match is not None:
        gate_entries = sum(parameters[name].numel() for name in gates)
        match = _trained_by(match, model, heads) - gate_entries
    k = _budget(k, density, trainable, match, entries, head_entries, whole=pool == "model")
    if order == "random":
        return _bound(select(_values(parameters), Random(k=k, seed=seed, always=_exactly(head))), model, pool)
    if order == "magnitude":
        by_size = GlobalTopK(k=k, always=_exactly(head))
        return _bound(select(_values(parameters, absolute=True), by_size, backend=backend), model, pool)
    statistics = estimate(
        model,
        batches,
        DiagonalFisher(),
        likelihood=likelihood,
        parameters=lambda name, parameter: name in parameters,
        max_examples=max_examples,
        accumulate_on=accumulate_on,
        backend=backend,
        progress=progress,
        shared=shared,
    )
    if not allow_zeros and pool == "adapter":
        _refuse_zeros(statistics, model, ranked)
    elif not allow_zeros and order == "largest":
        _refuse_more_than_scored(statistics, model, ranked, k)
    rule = GlobalTopK(k=k, order=order, always=_exactly(head))
    return _bound(select(statistics, rule, backend=backend), model, pool)


def _bound(selection: Selection, model: nn.Module, pool: str) -> Selection:
    """Bind a selection to the random start of an adapter; a pretrained model is no start that could be another."""
    Ranks().demand_equal(_digest(selection), "the digest of the selection")
    return bound_to_start(selection, hosts.unwrap(model)) if pool == "adapter" else selection


def _digest(selection: Selection) -> str:
    digest = blake2b(digest_size=16)
    for name in selection.names:
        digest.update(f"{name} {name in selection.whole} ".encode())
        if name not in selection.whole:
            digest.update(selection.indices(name).numpy().tobytes())
    return digest.hexdigest()


def _pool(model: nn.Module, pool: str) -> dict[str, nn.Parameter]:
    named = hosts.named_parameters(model)
    if pool == "model":
        if stored := list(stored_weights(hosts.unwrap(model))):
            raise UnsupportedModuleError(
                f"pool='model' trains entries of the weights, and {len(stored)} of them are quantised "
                f"({listed(stored)}): put an adapter on the model and take pool='adapter'."
            )
        return named
    if pool != "adapter":
        raise ValueError(f"pool must be 'adapter' or 'model', got {pool!r}.")
    if not hasattr(hosts.unwrap(model), "peft_config") and not adapters.adapter_parameters(model):
        raise ValueError(
            f"{type(model).__name__} has no adapter: pass a model of PEFT or one that fishkern.adapters.attach has "
            "changed, or take pool='model' for the FISH Mask over all of its parameters."
        )
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trained:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: its adapter is frozen.")
    return trained


def _budget(
    k: int | None,
    density: float | None,
    trainable: int | None,
    match: int | None,
    entries: int,
    head: int,
    *,
    whole: bool,
) -> int:
    """Turn one of the four budgets into a number of entries beside the head."""
    given = {"k": k, "density": density, "trainable": trainable, "match": match}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(given) or "none"
        raise ValueError(f"give exactly one budget of k=, density=, trainable= and match=, got {names}.")
    said = ", ".join(f"{name}={value}" for name, value in given.items() if name != "match") or "match="
    if match is not None:
        k = match
    elif density is not None:
        density = fraction_of(density)
        k = share(density, entries + head) - head if whole else share(density, entries)
    elif trainable is not None:
        k = integer(trainable, "trainable") - head
    else:
        k = integer(k, "k")
    if trainable is not None or (whole and density is not None):
        if k < 1:
            least = f"trainable={head + 1}" if trainable is not None else f"density={_least_density(head, entries)}"
            raise ValueError(
                f"{said} does not pay for the head of {head:,} entries, which is trained whole: take at least {least}, "
                "or k=, which counts without the head."
            )
    elif k < 1:
        raise ValueError(f"{said} selects nothing out of a pool of {entries:,} entries.")
    if k > entries:
        raise ValueError(f"{said} asks for {k:,} entries, and the pool has {entries:,} beside the head.")
    return k


def _least_density(head: int, entries: int) -> str:
    """Give the smallest density of a few digits that pays for the head and one entry more."""
    least = Decimal(head + 1) / (entries + head)
    return f"{least.quantize(Decimal(1).scaleb(least.adjusted() - 2), ROUND_UP).normalize():f}"


def _trained_by(adapter: Any, model: nn.Module, heads: tuple[str, ...]) -> int:
    from fishkern.integrations.budgets import trained_by  # which imports PEFT

    return trained_by(adapter, model, heads)


def _values(parameters: dict[str, nn.Parameter], absolute: bool = False) -> dict[str, Tensor]:
    return {name: value.detach().abs() if absolute else value.detach() for name, value in parameters.items()}


def _exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match these names alone."""
    return tuple(name.replace("[", "[[]") for name in names)


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
    """Leave out what is trained beside the adapter, and what an adapter of an embedding has for each token."""
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
