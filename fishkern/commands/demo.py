"""``fishkern demo``: everything that fishkern does, on a small model, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option


def demo(
    out: Annotated[
        Path,
        Option(metavar="DIR", help="Output folder, for the Fisher, the tuned values and pictures; made if missing."),
    ] = Path(),
    seconds: Annotated[float, Option(min=1, metavar="N", help="How long to train the model.")] = 25.0,
    examples: Annotated[int, Option(min=2, metavar="N", help="Number of texts to estimate on.")] = 256,
    steps: Annotated[int, Option(min=1, metavar="N", help="Number of steps to tune the model, six times.")] = 40,
    seed: Annotated[int, Option(metavar="N", help="Seed of the weights and of the training data.")] = 0,
    device: Annotated[
        str, Option(metavar="NAME", help="Where to run: cpu, cuda; by default cuda if there is one.")
    ] = "",
) -> None:
    """Train a small LLaMA, estimate its exact Fisher, draw it, verify it, save it; then tune a part of the model by it.

    Needs no network and no data: the text is Python's own documentation and source.
    """
    from fishkern.demo import run

    run(out, seconds=seconds, examples=examples, steps=steps, seed=seed, device=device or None)
