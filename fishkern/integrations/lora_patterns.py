"""Ranks of single modules as PEFT and axolotl take them: a default, and patterns for the modules that differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fishkern.arguments import integer
from fishkern.names import listed


def peft_patterns(
    ranks: Mapping[str, int], *, scaling: float | Mapping[str, float] = 1.0, rslora: bool = False
) -> dict[str, Any]:
    """Express ranks of single modules in the fields of PEFT's ``LoraConfig``.

    PEFT reads the keys of its patterns as regular expressions that may begin at any dot of a module's path. So they are
    escaped and anchored here, and each matches its own module only (``layers.1`` and ``layers.11``, ``encoder.`` and
    ``decoder.``). Alphas follow the ranks: what a module's product is multiplied by is the same for all, also where a
    loader ignores the patterns.

    Args:
        ranks: The rank of each module by its path.
        scaling: What the product of the factors is multiplied by, one for all or one for each path.
        rslora: Whether the config has ``use_rslora``, which divides alpha by the root of the rank.

    Returns:
        ``r`` (the largest rank, so that memory that is reserved by it suffices), ``lora_alpha``, ``target_modules``
        (the paths), ``rank_pattern`` and ``alpha_pattern`` (empty where all modules have the default).

    Raises:
        TypeError: A rank is not an integer.
        ValueError: There is no module, a rank is below 1, or a scaling is missing or not a positive number.
    """
    ranks = _checked(ranks)
    scalings = _scalings(ranks, scaling)
    alphas = {path: scalings[path] * (math.sqrt(rank) if rslora else rank) for path, rank in ranks.items()}
    largest = max(ranks, key=lambda path: ranks[path])
    return {
        "r": ranks[largest],
        "lora_alpha": _whole(alphas[largest]),
        "target_modules": list(ranks),
        "rank_pattern": _pattern(ranks, ranks[largest]),
        "alpha_pattern": _pattern({path: _whole(alpha) for path, alpha in alphas.items()}, _whole(alphas[largest])),
    }


def axolotl_yaml(ranks: Mapping[str, int], *, scaling: float | Mapping[str, float] = 1.0) -> str:
    """Write ranks of single modules as lines of axolotl's config.

    Its fields ``lora_rank_pattern`` and ``lora_alpha_pattern`` go to PEFT as they are, and take whole numbers only.

    Args:
        ranks: The rank of each module by its path.
        scaling: What the product of the factors is multiplied by, one for all or one for each path.

    Returns:
        Lines of YAML, the last one ended.

    Raises:
        TypeError: A rank is not an integer.
        ValueError: As in :func:`peft_patterns`, or an alpha is not a whole number.
    """
    fields = peft_patterns(ranks, scaling=scaling)
    alphas = {"lora_alpha": fields["lora_alpha"], **fields["alpha_pattern"]}
    if broken := [f"{key}: {alpha:g}" for key, alpha in alphas.items() if not isinstance(alpha, int)]:
        raise ValueError(
            f"axolotl takes whole numbers as alpha, and scaling times rank gives others ({listed(broken)}): choose a "
            "scaling such as 1 or 2."
        )
    lines = [f"lora_r: {fields['r']}", f"lora_alpha: {fields['lora_alpha']}", "lora_target_modules:"]
    lines += [f"  - {_quoted(path)}" for path in fields["target_modules"]]
    for name in ("rank_pattern", "alpha_pattern"):
        if fields[name]:
            lines += [f"lora_{name}:", *(f"  {_quoted(key)}: {value}" for key, value in fields[name].items())]
    return "\n".join(lines) + "\n"


def targets(paths: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Express modules as PEFT's ``target_modules``, so that no other module of the model is meant.

    Args:
        paths: Paths of the modules to adapt.
        modules: Paths of all modules of the model.

    Returns:
        The paths, which every loader understands; or one regular expression where another module's path ends in one of
        them, which PEFT's list would take as well.
    """
    paths = list(paths)
    wanted, endings = set(paths), tuple(f".{path}" for path in paths)
    if any(module.endswith(endings) for module in modules if module not in wanted):
        return "|".join(map(re.escape, paths))
    return paths


def _checked(ranks: Mapping[str, int]) -> dict[str, int]:
    checked = {path: integer(rank, f"the rank of {path}") for path, rank in ranks.items()}
    if not checked:
        raise ValueError("patterns need the rank of at least one module, got none.")
    if low := [path for path, rank in checked.items() if rank < 1]:
        raise ValueError(f"a rank is at least 1: leave modules out that are not to be adapted ({listed(low)}).")
    return checked


def _scalings(ranks: Mapping[str, int], scaling: float | Mapping[str, float]) -> dict[str, float]:
    given = scaling if isinstance(scaling, Mapping) else dict.fromkeys(ranks, scaling)
    if missing := ranks.keys() - given.keys():
        raise ValueError(f"scaling lacks {len(missing)} of the modules that have a rank ({listed(sorted(missing))}).")
    for path in ranks:
        if not (math.isfinite(given[path]) and given[path] > 0):
            raise ValueError(f"scaling must be a positive number, got {given[path]!r} for {path}.")
    return {path: float(given[path]) for path in ranks}


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Anchor and escape the paths; nothing is listed where all modules have the default."""
    if all(value == default for value in values.values()):
        return {}
    return {"^" + re.escape(path): value for path, value in values.items()}


def _whole(alpha: float) -> int | float:
    """Give a whole alpha as an integer: some loaders take no other."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _quoted(text: str) -> str:
    """Quote a string for YAML so that its backslashes stay."""
    return "'" + text.replace("'", "''") + "'"
