"""Checks of ``verify``: the statistics must have the same recipe, loss, examples and model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator, check_estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.held import Held
from fishkern.statistics.likelihood import Likelihood, recognise_likelihood
from fishkern.statistics.likelihood_argument import OWN_TOKENS, described
from fishkern.statistics.result import Statistics


def check_recipe(estimator: Estimator) -> None:
    """Refuse anything but a recipe that is defined by whole gradients of single examples.

    Args:
        estimator: The argument of the caller.

    Raises:
        TypeError: It is not a recipe.
        ValueError: It is one of batches or of positions, or a sketch.
    """
    check_estimator(estimator)
    if estimator.reads not in ("squares", "examples") or estimator.definition.get("unit", "example") != "example":
        raise ValueError(
            f"verify compares with whole gradients of single examples, from which {estimator.definition} cannot be "
            "made: take a recipe of unit='example'."
        )


def check_kind(statistics: Statistics, estimator: Estimator, examples: int) -> None:
    """Refuse statistics of another recipe, or of another number of examples.

    Args:
        statistics: The statistics to verify.
        estimator: The recipe that ``verify`` was given.
        examples: Number of examples in the data.

    Raises:
        ValueError: The recipe or the number differs.
    """
    definition = statistics.provenance["definition"]
    expected = estimator.definition
    wrong = {key: definition[key] for key in expected if definition.get(key, expected[key]) != expected[key]}
    for run in statistics.provenance["runs"]:
        wrong |= {key: run[key] for key, value in estimator.settings.items() if run.get(key, value) != value}
    if wrong:
        raise ValueError(
            f"verify was given {expected | dict(estimator.settings)}, these statistics are of {wrong}: pass the "
            "recipe that they were estimated with as estimator=."
        )
    if statistics.count != examples * estimator.units(1):
        raise ValueError(
            f"the statistics are the mean over {statistics.count} examples and the data holds {examples}: give the "
            "examples that they were estimated on."
        )


def check_loss(
    statistics: Mapping[str, Tensor],
    model: nn.Module,
    likelihood: Likelihood | LossFunction | Drawn | None,
    one: Examples,
) -> None:
    """Refuse statistics of another loss than the one that ``verify`` was given, or else than the model's own.

    Functions are not compared, because the same one may have several names.

    Args:
        statistics: The statistics to verify.
        model: The model, in evaluation mode.
        likelihood: The loss that ``verify`` was given.
        one: An example.

    Raises:
        ValueError: The losses differ.
    """
    theirs = statistics.provenance["definition"].get("likelihood") if isinstance(statistics, Statistics) else None
    if theirs is None or theirs.startswith("function ") or (likelihood is None and hosts.task(model) is None):
        return
    theirs = theirs.removesuffix(OWN_TOKENS)
    ours = described(recognise_likelihood(model, one.content) if likelihood is None else likelihood)
    if ours != theirs and not ours.startswith("function "):
        raise ValueError(
            f"the statistics are of the loss {theirs}, and verify was given {ours}: pass the likelihood= that "
            "they were estimated with."
        )
    if likelihood is None:
        Answering(model, None).prepare(one)


def check_names(statistics: Mapping[str, Tensor]) -> None:
    """Refuse statistics that are not of parameters.

    Args:
        statistics: The statistics to verify.

    Raises:
        TypeError: They are not a mapping, such as the path of a file, or of another kind than Statistics.
        ValueError: They are statistics of groups.
    """
    if not isinstance(statistics, Mapping):
        raise TypeError(
            f"statistics must be fishkern.Statistics or a mapping from names to tensors, got {statistics!r:.80}: load "
            "a file with fishkern.Statistics.load(path)."
        )
    if isinstance(statistics, Held) and not isinstance(statistics, Statistics):
        raise TypeError(
            f"verify compares one tensor for each parameter, and these are {type(statistics).__name__}, whose exact "
            "part the self-check of estimate has compared with autograd."
        )
    if isinstance(statistics, Statistics) and "groups" in statistics.provenance["definition"]:
        raise ValueError(
            "verify compares parameter by parameter, and these statistics are of groups of parameters: verify "
            "GroupFisher(by='tensor'), whose sums they are."
        )


def check_shapes(statistics: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Refuse statistics of other shapes.

    Args:
        statistics: The statistics to verify.
        expected: The shape of each statistic.

    Raises:
        ValueError: A shape differs.
    """
    for name, shape in expected.items():
        if statistics[name].shape != shape:
            raise ValueError(
                f"the statistics hold {name} with shape {tuple(statistics[name].shape)}, of this model it has "
                f"{tuple(shape)}: they are of another model."
            )
