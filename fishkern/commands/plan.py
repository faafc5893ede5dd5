"""``fishkern plan``: what an estimate takes, before anything is loaded."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import Annotated, Any

from typer import Argument, Option

import fishkern as fk
from fishkern.arguments import byte_count
from fishkern.commands.options import Json
from fishkern.commands.output import note, waiting
from fishkern.commands.workload import DTYPES
from fishkern.integrations import hub, models
from fishkern.integrations.tasks import TASKS, example_batch


def plan(
    model: Annotated[str, Argument(metavar="MODEL", help="Folder of a model, or its id on the hub.")],
    task: Annotated[
        str, Option(metavar="TASK", help=f"What it is trained for, by default by its config: {', '.join(TASKS)}.")
    ] = "",
    dtype: Annotated[
        str, Option(metavar="DTYPE", help="Of the weights: auto (the checkpoint's), float32, bfloat16, float16.")
    ] = "auto",
    batch_size: Annotated[int, Option(min=1, metavar="N", help="Examples in a batch.")] = 8,
    length: Annotated[int, Option(min=2, metavar="N", help="Tokens of an example.")] = 512,
    parameters: Annotated[
        list[str], Option(metavar="PATTERN", help="Only these parameters; may be repeated. By default all.")
    ] = (),
    memory: Annotated[
        str, Option(metavar="SIZE", help="Say how many passes over the data so much memory above the weights needs.")
    ] = "",
    ranks: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Also plan for N processes over which FSDP2 shards the model.",
            show_default="one process",
        ),
    ] = None,
    no_check: Annotated[bool, Option("--no-check", help="Without the comparison with ordinary autograd.")] = False,
    json_: Json = False,
) -> None:
    """Say what an estimate takes before it runs: bytes, passes over the data, the path of each parameter.

    Only the config is read, and no weights: the model is made without values.

    fishkern estimate with the same --memory takes as many passes as are said here, for batches of this shape.
    """  # noqa: DOC501 - it is the help text
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, got {dtype!r}.")
    if memory:
        byte_count(memory, "--memory")  # refused before the model is planned
    with waiting("reading config"), hub.quiet() as warned:
        source = models.find(model)
        chosen = task or source.task
        if chosen not in TASKS:
            said = f"--task is none of these, got {chosen!r}" if chosen else f"{model} does not say its task"
            raise ValueError(f"{said}: give --task, one of {', '.join(TASKS)}.")
        on_meta = models.without_values(source, chosen, dtype)
    for text in warned:
        note(text)
    on_meta.requires_grad_(True)
    names = [name for name, _ in on_meta.named_parameters()]
    for pattern in parameters:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--parameters {pattern!r} matches none of {len(names)} names such as {names[0]}.")
    batch = example_batch(chosen, on_meta.config, batch_size, length)
    with waiting("planning"):
        planned = fk.plan(on_meta, batch, parameters=list(parameters) or "all", check=not no_check, ranks=ranks)
    parts = planned.parts(memory) if memory else None
    if json_:
        print(json.dumps(_described(planned, parts), indent=2))
        return
    print(planned)
    if parts is not None:
        print(f"within {memory} above the weights: {len(parts)} pass{'es' * (len(parts) > 1)} over the data")


def _described(planned: fk.PassPlan, parts: list[list[str]] | None) -> dict[str, Any]:
    own = {name: value for name, value in vars(planned).items() if name != "per_rank"}
    described = {name: dict(value) if hasattr(value, "items") else value for name, value in own.items()}
    described |= {"peak_bytes": planned.peak_bytes, "total_bytes": planned.total_bytes}
    if (each := planned.per_rank) is not None:
        described["per_rank"] = vars(each) | {"peak_bytes": each.peak_bytes}
    return described | ({} if parts is None else {"parts": parts})
