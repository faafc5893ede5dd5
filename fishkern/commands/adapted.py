"""The model with its adapter, and the examples to measure it on, of ``fishkern tune``."""

from __future__ import annotations

from torch import nn

from fishkern.adapters import Adapter
from fishkern.commands.output import note, waiting
from fishkern.commands.tune_options import Settings
from fishkern.commands.workload import Prepared
from fishkern.integrations import data, hub
from fishkern.integrations.adapting import adapt
from fishkern.integrations.examples import Example

MOST_HELD_OUT = 10_000  # examples to measure on


def held_out(prepared: Prepared, settings: Settings) -> list[Example]:
    """Read the examples to measure on.

    Args:
        prepared: The model and its data.
        settings: The options.

    Returns:
        The examples of ``--eval-split``, at most 10,000; none where it is not given.

    Raises:
        ValueError: There is nothing to measure on.
    """
    work, split = settings.work, settings.training.eval_split
    if not split:
        return []
    with waiting(f"reading {split}"), hub.quiet():
        rows = data.read(work.data, name=work.subset or None, split=split, first=True)
        examples = list(prepared.encoder.examples(rows, MOST_HELD_OUT))
    if not examples:
        raise ValueError(f"{work.data} has no row in {split!r} with anything to measure on.")
    return examples


def adapted(prepared: Prepared, settings: Settings) -> tuple[nn.Module, Adapter | None, str]:
    """Add the adapter to the model.

    Args:
        prepared: The model and its data.
        settings: The options.

    Returns:
        The model with its adapter, the recipe of one of fishkern (``None`` for PEFT's), and what to call it.

    Raises:
        ValueError: The model is an adapter, and another one is asked for.
    """
    model, work, adapting = prepared.model, settings.work, settings.adapting
    if hasattr(model, "peft_config"):
        if options := [f"--{name}" for name, value in vars(adapting).items() if value]:
            raise ValueError(f"{work.model} is an adapter, and no other is added: leave out {' and '.join(options)}.")
        note(f"{work.model} is an adapter: no other is added, and this one is trained further")
        return model, None, "the given adapter"
    with waiting(f"adding {adapting.kind}"):
        model, recipe = adapt(
            model,
            adapting.kind,
            task=prepared.described["task"],
            layers=adapting.numbers,
            size=adapting.size,
            seed=work.seed,
        )
    return model, recipe, adapting.kind
