"""PEFT's SHiRA with the entries of a selection, instead of random ones (Bhardwaj et al., 2024, arXiv:2406.13175)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from peft import ShiraConfig
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import at_least
from fishkern.files import AnyTensor
from fishkern.integrations.lora_patterns import targets as as_targets
from fishkern.names import listed
from fishkern.selection import PerTensorTopK, Selection, select
from fishkern.selection.base import Patterns, matching
from fishkern.statistics import Statistics


def shira_selection(statistics: Statistics | Mapping[str, AnyTensor], r: int, *, targets: Patterns) -> Selection:
    """Select of each weight as many entries as a LoRA of rank ``r`` has, those of the largest scores.

    PEFT's SHiRA trains exactly ``r (O + I)`` entries of each ``[O, I]``.

    Args:
        statistics: What to sort by.
        r: As in PEFT's config.
        targets: Patterns of weights, such as ``"*.q_proj.weight"``.

    Returns:
        The selection; its pool are these weights.

    Raises:
        TypeError: ``r`` is not an integer.
        ValueError: ``r`` is below 1 or larger than a weight allows; a pattern matches nothing, or something that is no
            matrix.
    """
    r = at_least(1, r, "r")
    blocks = statistics.blocks if isinstance(statistics, Statistics) else statistics
    names = matching((targets,) if isinstance(targets, str) else targets, blocks, "targets")
    by_size: dict[tuple[int, ...], dict[str, AnyTensor]] = {}
    for name in names:
        shape = tuple(blocks[name].shape)
        if len(shape) != 2:
            raise ValueError(f"{name} has shape {shape}, and SHiRA adapts matrices: leave it out of targets=.")
        if r * sum(shape) > shape[0] * shape[1]:
            raise ValueError(f"r={r} means {r * sum(shape):,} entries of {name}, which has {shape[0] * shape[1]:,}.")
        by_size.setdefault(shape, {})[name] = blocks[name]
    return reduce(Selection.union, (select(some, PerTensorTopK(k=r * sum(size))) for size, some in by_size.items()))


def shira_config(model: nn.Module, selection: Selection, **options: Any) -> ShiraConfig:
    """Make the config of a SHiRA adapter that trains the entries of a selection.

    Args:
        model: The model that ``peft.get_peft_model(model, config)`` is then called with.
        selection: For each weight of a linear ``r (O + I)`` entries with one ``r`` for all, as
            :func:`shira_selection` gives, or none.
        options: Further fields of ``ShiraConfig``, such as ``task_type``.

    Returns:
        The config, with ``r``, ``target_modules`` and the masks.

    Raises:
        ValueError: The selection does not fit the model, selects from something else than a linear, or other numbers of
            entries; or an option is one that the selection decides.
    """
    if decided := options.keys() & {"r", "target_modules", "mask_type", "random_seed"}:
        raise ValueError(f"the selection decides {listed(sorted(decided))}: leave them out.")
    selection.check(model)
    plain = hosts.unwrap(model)
    modules = dict(plain.named_modules())
    masked: dict[nn.Module, str] = {}
    ranks: dict[str, float] = {}
    for name, count in selection.counts.items():
        path, _, own = name.rpartition(".")
        if not count:
            continue
        module = modules.get(path)
        if own != "weight" or not isinstance(module, nn.Linear):
            raise ValueError(f"SHiRA adapts the weights of torch.nn.Linear, and {name} is none: leave it out.")
        masked[module] = name
        ranks[name] = count / sum(module.weight.shape)
    if not ranks:
        raise ValueError("the selection selects nothing.")
    r = next(iter(ranks.values()))
    if odd := [name for name, rank in ranks.items() if rank != r or rank % 1]:
        counts = selection.counts
        raise ValueError(
            f"SHiRA trains r (O + I) entries of each weight, with one whole r for all, and {odd[0]} has "
            f"{counts[odd[0]]:,} selected: make the selection by shira_selection(statistics, r, targets=...)."
        )

    def mask(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
        if base_layer not in masked:
            raise ValueError("this config has the masks of one model: make another one for another model.")
        weight = base_layer.weight
        return selection.mask(masked[base_layer]).to(weight.device, weight.dtype)

    paths = [name.removesuffix(".weight") for name in ranks]
    config = ShiraConfig(r=int(r), target_modules=as_targets(paths, modules), **options)
    config.mask_fn = mask
    return config
