"""Options that commands share, as dataclasses whose fields become options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from fishkern.integrations.tasks import TASKS

_MODEL, _DATA, _RUN = "Model", "Data", "Run"
_DATA_HELP = "A file (parquet, json, jsonl, csv, tsv, txt), a folder, or an id on the hub."


@dataclass(frozen=True)
class Inputs:
    """A model and the data that runs through it, as the command line names them."""

    model: Annotated[str, Argument(metavar="MODEL", help="Folder of a model or a PEFT adapter, or its id on the hub.")]
    data: Annotated[
        str,
        Option(
            metavar="DATA",
            help=_DATA_HELP,
            rich_help_panel=_DATA,
        ),
    ]
    task: Annotated[
        str, Option(metavar="TASK", help=f"What the model is trained for, by default according to its config: "
                    f"{', '.join(TASKS)}.", rich_help_panel=_MODEL)
    ] = ""  # fmt: skip
    base: Annotated[
        str, Option(metavar="MODEL", help="Base of the adapter, if it has moved.", rich_help_panel=_MODEL)
    ] = ""
    tokenizer: Annotated[
        str,
        Option(metavar="NAME", help="Another tokenizer (or image processor) than the model's.", rich_help_panel=_MODEL),
    ] = ""
    num_labels: Annotated[
        int | None, Option(metavar="N", min=1, help="Number of classes, if neither model nor data say.",
                    rich_help_panel=_MODEL)
    ] = None  # fmt: skip
    dtype: Annotated[
        str, Option(metavar="DTYPE", help="auto (the checkpoint's), float32, bfloat16, float16, float64.",
                    rich_help_panel=_MODEL)
    ] = "auto"  # fmt: skip
    split: Annotated[str, Option(metavar="NAME", help="Part of the data.", rich_help_panel=_DATA)] = "train"
    subset: Annotated[str, Option(metavar="NAME", help="Configuration of data on the hub.", rich_help_panel=_DATA)] = ""
    first: Annotated[
        bool, Option("--first", help="Read the first rows, and no further; else rows are drawn at random.",
                     rich_help_panel=_DATA)
    ] = False  # fmt: skip
    text: Annotated[str, Option(metavar="COLUMN", help="Column of the text.", rich_help_panel=_DATA)] = ""
    text_pair: Annotated[str, Option(metavar="COLUMN", help="Column of the second text.", rich_help_panel=_DATA)] = ""
    target: Annotated[
        str, Option(metavar="COLUMN", help="Column of the answer; only its tokens are labels.", rich_help_panel=_DATA)
    ] = ""
    label: Annotated[str, Option(metavar="COLUMN", help="Column of the label(s).", rich_help_panel=_DATA)] = ""
    words: Annotated[str, Option(metavar="COLUMN", help="Column of lists of words.", rich_help_panel=_DATA)] = ""
    image: Annotated[str, Option(metavar="COLUMN", help="Column of the image.", rich_help_panel=_DATA)] = ""
    max_length: Annotated[
        int | None, Option(metavar="N", min=2, help="Cut texts to this many tokens; by default what the model takes, "
                           "at most 512.", rich_help_panel=_DATA)
    ] = None  # fmt: skip
    batch_size: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Examples in a batch; by default chosen automatically.", rich_help_panel=_RUN),
    ] = None
    device: Annotated[
        str, Option(metavar="NAME", help="cpu, cuda, cuda:1; by default cuda if there is one.", rich_help_panel=_RUN)
    ] = ""
    seed: Annotated[
        int, Option(metavar="N", help="Seed of all random draws: rows, labels, masks, weights of a fresh head.",
                    rich_help_panel=_RUN)
    ] = 0  # fmt: skip


@dataclass(frozen=True)
class Workload(Inputs):
    """The same, and which parameters of the model."""

    parameters: Annotated[
        list[str], Option(metavar="PATTERN", help="Only these parameters, such as '*.q_proj.*'; may be repeated. "
                          "'*' is all; by default those that are trained.", rich_help_panel=_MODEL)
    ] = ()  # fmt: skip


@dataclass(frozen=True)
class InputsWithoutData(Inputs):
    """The same for a command that may do without data."""

    data: Annotated[
        str,
        Option(
            metavar="DATA",
            help=_DATA_HELP,
            rich_help_panel=_DATA,
            show_default="none",
        ),
    ] = ""


Targets = Annotated[
    list[str],
    Option(
        metavar="PATTERN",
        help="Only these weights or modules, such as q_proj or '*.layers.0.*'; may be repeated. "
        "By default every linear weight in the layers.",
    ),
]
Positions = Annotated[
    str, Option(metavar="WHICH", help="Which positions count: attended, labelled, or all (also padding).")
]
LayersPerPass = Annotated[
    int | None,
    Option(metavar="N", min=1, help="Read the data once for every N layers, to need less memory.", show_default="all"),
]
Json = Annotated[bool, Option("--json", help="Print JSON instead.")]


def with_options(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Replace each parameter of a command that is a dataclass by that dataclass's fields.

    Args:
        command: A function with annotated parameters.

    Returns:
        The same function, with one parameter for each option.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            own = get_type_hints(groups[name], include_extras=True)
            for one in fields(groups[name]):
                default = inspect.Parameter.empty if one.default is MISSING else one.default
                flat.append(_keyword(one.name, own[one.name], default))
        else:
            flat.append(_keyword(name, hints[name], parameter.default))

    @wraps(command)
    def run(**values: Any) -> int | None:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})
        return command(**values)

    run.__signature__ = inspect.Signature(flat)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
