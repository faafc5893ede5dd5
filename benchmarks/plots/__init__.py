"""Pictures of records: ``python -m benchmarks plot``.

``<name>.py`` here draws ``<results>/<machine>/<name>.jsonl``. It has one function, which reads nothing but the records:

    draw(records: list[dict[str, Any]]) -> matplotlib.figure.Figure

and is listed in :data:`PLOTS` with its content. :mod:`benchmarks.plots.style` has the parts that all pictures share.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = {
    "whole_pass": "time and peak memory of a pass over data",
    "rivals": "examples per second and peak memory of a pass, by all ways to it",
    "streaming_topk": "time of exact top-k, in memory and from a file",
    "masked_step": "time and peak memory of a masked optimizer's step",
    "scaling": "time and peak memory as sizes grow, with exponents",
    "demonstration": "the Fisher of all parameters of a LLaMA, and training a few of them",
    "exactness": "overlap of other squares with the exact Fisher, and the noise floor",
    "starts": "starts of adapters: scores, forgetting, and what the statistic is worth",
    "freezing": "what freezing does to scores, to the entries in training, and to the memory of a step",
    "tr_pts": "accuracy of tuning a vision transformer, and what trains, computes and stays in memory",
    "glue": "scores of FISH-Tuning's arms on GLUE, seed by seed",
}
# Records without a picture, and why.
WITHOUT = {
    "precision": "a few numbers",
    "cheaper_rivals": "tables, which the page of measurements has",
    "failures": "a table, which the command prints",
    "token_reduction": "a few numbers",
    "fish_tuning": "one measurement, which the page of measurements tells",
    "training_step": "two numbers",
    "host_time": "six numbers",
    "group_fisher": "a few numbers",
    "plan": "a few numbers",
    "parts": "a few numbers",
    "masked_rows": "a few numbers",
    "frozen_layers": "a few numbers",
    "online": "six numbers",
    "packed": "a few numbers",
    "pairs": "a few numbers",
    "logits": "four numbers",
    "experts": "nine numbers",
    "busy": "a few numbers",
    "weight_sync": "a few numbers",
    "merging": "one measurement",
}


def draw(name: str, records: list[dict[str, Any]]) -> Figure:
    """Draw the records of one file by the module of its name."""
    return import_module(f"benchmarks.plots.{name}").draw(records)
