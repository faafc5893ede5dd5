"""What ``fishkern tune --method tr-pts`` does without an adapter, and what is said of it in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import fishkern as fk
from fishkern.commands.output import console
from fishkern.commands.tune_options import Settings
from fishkern.commands.workload import Prepared
from fishkern.integrations.examples import Example
from fishkern.integrations.tasks import TASKS
from fishkern.report.tables import contributions_table
from fishkern.report.tokens import TokenCount, count_tokens
from fishkern.tokens.recipe import FILE as REDUCTION


def without_adapter(prepared: Prepared, settings: Settings) -> tuple[nn.Module, None, str]:
    """Take the model as it is.

    Args:
        prepared: The model and its data.
        settings: The options.

    Returns:
        The model, no recipe of an adapter, and no name of one.

    Raises:
        ValueError: The model is an adapter.
    """
    if hasattr(prepared.model, "peft_config"):
        raise ValueError(
            f"{settings.work.model} is an adapter, and --method tr-pts trains the model itself: name a model without "
            "one, or take --method fish."
        )
    return prepared.model, None, ""


def method_of(relevance: fk.TaskRelevance, settings: Settings, model: nn.Module, example: Example) -> dict[str, Any]:
    """Say for the report what was selected, and which layers drop tokens.

    Args:
        relevance: Of the run.
        settings: The options.
        model: With its token reduction, if it has one.
        example: Of the data; its image says how many tokens there are.

    Returns:
        Plain values.
    """
    contributions, reduction = relevance.contributions, relevance.reduction
    counts = {} if reduction is None else tokens_of(relevance, model, example)
    layers = {
        key: {
            "numel": one.numel,
            "top_count": one.top_count,
            "share": one.share,
            "connections": one.connections,
            "selected": one.count,
            **({"tokens": [counts[key].entering, counts[key].leaving]} if key in counts else {}),
        }
        for key, one in contributions.layers.items()
    }
    return {
        "method": settings.method,
        "top": contributions.top,
        "density": settings.budget.density,
        "least_per_row": settings.connections.least_per_row or 1,
        "most_per_row": settings.connections.most_per_row,
        "connections": contributions.count,
        "keep": reduction and reduction.keep,
        "token_layers": [] if reduction is None else list(reduction.layers),
        "layers": layers,
    }


def tokens_of(relevance: fk.TaskRelevance, model: nn.Module, example: Example) -> dict[str, TokenCount]:
    """Count the image tokens of the layers that drop some.

    Args:
        relevance: Of the run; some layers drop tokens.
        model: With its token reduction.
        example: Of the data.

    Returns:
        The counts by the layer's path.
    """
    image = example["pixel_values"][None].to(next(model.parameters()))
    patches = math.prod(fk.tokens.kept_tokens(model, image)[0].grid)
    paths = {one.layer.number: key for key, one in relevance.contributions.layers.items() if one.layer is not None}
    return {paths[number]: count for number, count in count_tokens(relevance.reduction, patches).items()}


def say_trained(report: Mapping[str, Any]) -> None:
    """Print what of the model trains, and how many tokens it keeps.

    Args:
        report: Of the run.
    """
    say = console().print
    connections, others = report["connections"], report["trained"] - report["connections"]
    say(f"{'trained':9} {report['trained']:,} of {report['pool']:,} entries of the model")
    share = report["trained"] / report["pool"]
    say(f"{'':9} ({share:.2%}: {connections:,} connections, and {others:,} of biases and head)")
    if layers := report["token_layers"]:
        counts = [one["tokens"] for one in report["layers"].values() if "tokens" in one]
        numbers = ", ".join(map(str, layers))
        where = f"layer {numbers}" if len(layers) == 1 else f"layers {numbers}"
        kept = f"{'which keeps' if len(layers) == 1 else 'each of which keeps'} {report['keep']:.0%}"
        say(f"{'tokens':9} {counts[0][0]:,} of an image, {counts[-1][1]:,} after {where}, {kept}")


def say_contributions(report: Mapping[str, Any], relevance: fk.TaskRelevance) -> None:
    """Print what each layer contributes, and how many tokens it keeps.

    Args:
        report: Of the run.
        relevance: Of the run.
    """
    tokens = {key: TokenCount(*one["tokens"]) for key, one in report["layers"].items() if "tokens" in one}
    console().print(contributions_table(relevance.contributions, tokens))


def in_python(prepared: Prepared, settings: Settings, folder: Path, *, reduces: bool) -> str:
    """Write the line that makes the tuned model from its base and the delta.

    Args:
        prepared: The model and its data.
        settings: The options.
        folder: Of the run.
        reduces: Whether the model drops tokens.

    Returns:
        A line of Python.
    """
    config, described = prepared.encoder.config, prepared.described
    labels = f", num_labels={config.num_labels}" if "label" in described["columns"] else ""
    dtype = "" if settings.work.dtype == "auto" else f", dtype={settings.work.dtype!r}"
    base = (
        f"transformers.{TASKS[described['task']].auto_class}.from_pretrained({config._name_or_path!r}{labels}{dtype})"
    )
    line = f"model = {base}; fk.apply_delta(model, fk.Delta.load({str(folder / 'delta.safetensors')!r}))"
    if reduces:
        recipe = f"fk.tokens.TokenReduction.load({str(folder / REDUCTION)!r})"
        line += f"; fk.tokens.attach(model, {recipe})"
    return f"import fishkern as fk, transformers; {line}"
