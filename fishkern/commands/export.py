"""``fishkern export``: a whole model or a plain LoRA out of an adapter or a delta, or the delta of a whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from torch import nn
from typer import Argument, Option

import fishkern as fk
from fishkern.commands.options import Json, with_options
from fishkern.commands.output import checked_file, console, waiting
from fishkern.files import atomic_folder, check_new_folder, copy_beside
from fishkern.integrations import hub, models
from fishkern.integrations.merged import changes, merge_adapter
from fishkern.integrations.plain import write_plain_lora
from fishkern.integrations.tasks import TASKS
from fishkern.names import listed


@with_options
def export(
    model: Annotated[str, Argument(metavar="MODEL", help="Folder of a model or a PEFT adapter, or its id on the hub.")],
    delta: Annotated[
        str, Option(metavar="FILE", help="A delta of MODEL, as fishkern tune saves it; the output has its values.")
    ] = "",
    since: Annotated[
        str, Option(metavar="MODEL", help="The model before training: the output is the delta of MODEL from it.")
    ] = "",
    lora: Annotated[
        bool, Option("--lora", help="Write the adapter as a plain LoRA for its base as it is, not a whole model.")
    ] = False,
    task: Annotated[str, Option(metavar="TASK", help=f"By default according to the config: {', '.join(TASKS)}.")] = "",
    base: Annotated[str, Option(metavar="MODEL", help="Base of the adapter, if it has moved.")] = "",
    out: Annotated[
        str, Option(metavar="PATH", help="Output folder, new or empty; with --since a file.", show_default="exported")
    ] = "",
    json_: Json = False,
) -> None:
    """Write a whole model, with the adapter merged into its weights or the values of a delta, or the delta of a model.

    An adapter that a delta belongs to is merged after the delta is applied. What is written loads with from_pretrained
    alone, in the dtype of the checkpoint. A plain LoRA needs no decomposition of the base when it is loaded, as an
    adapter that began with PiSSA does.
    """  # noqa: DOC501 - it is the help text
    if delta and since:
        raise ValueError("--delta makes a model of a delta, and --since a delta of a model: give one of them.")
    if since and lora:
        raise ValueError("--lora writes an adapter, and --since a delta of a whole model: give one of them.")
    if since:
        target = checked_file(out or "exported.safetensors", "--out", "delta.safetensors")
        result = _delta(model, since, task, base, target)
    elif lora:
        result = _lora(model, delta, task, base, check_new_folder(out or "exported"))
    else:
        result = _whole(model, delta, task, base, check_new_folder(out or "exported"))
    if json_:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        console().print(f"{key:8} {value:,}" if isinstance(value, int) else f"{key:8} {value}")
    console().print(f"\nNext, in Python:  {_in_python(result)}")


def _in_python(result: dict[str, Any]) -> str:
    """Say how what was written is loaded."""
    if "file" in result:
        return f"import fishkern as fk; fk.apply_delta(model, fk.Delta.load({result['file']!r}))"
    if "rank" in result:
        return f"import peft; model = peft.PeftModel.from_pretrained(model, {result['folder']!r})"
    return f"import transformers; model = transformers.{result['model']}.from_pretrained({result['folder']!r})"


def _whole(name: str, file: str, task: str, base: str, folder: Path) -> dict[str, Any]:
    model, source = _loaded(name, task, base)
    if file:
        fk.apply_delta(model, fk.Delta.load(file))
    merged = hasattr(model, "peft_config")
    if not merged and not file:
        raise ValueError(f"{name} is a whole model already: give an adapter, --delta, or --since for a delta.")
    if merged:
        model = merge_adapter(model)
    with waiting(f"writing {folder}"), hub.quiet(), atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for path in (source.adapter, source.folder):
            if path is not None and Path(path).is_dir():
                copy_beside(path, temporary)
    return {"model": type(model).__name__, "folder": str(folder), "entries": model.num_parameters()}


def _lora(name: str, file: str, task: str, base: str, folder: Path) -> dict[str, Any]:
    model, source = _loaded(name, task, base)
    if not hasattr(model, "peft_config"):
        raise ValueError(f"{name} is a whole model, and --lora writes an adapter: give an adapter.")
    if file:
        fk.apply_delta(model, fk.Delta.load(file))
    with waiting(f"writing {folder}"), hub.quiet(), atomic_folder(folder) as temporary:
        before, _ = models.load(replace(source, adapter=None), task or source.task, device="cpu")
        rank = write_plain_lora(model, before, temporary)
    return {"model": type(model).__name__, "folder": str(folder), "rank": rank}


def _delta(name: str, since: str, task: str, base: str, target: Path) -> dict[str, Any]:
    before, _ = _loaded(since, task, "")
    model, _ = _loaded(name, task, base)
    if hasattr(model, "peft_config"):
        model = merge_adapter(model)
    if hasattr(before, "peft_config"):
        raise ValueError(f"--since {since} is an adapter: name the whole model that was trained.")
    taken = changes(model, before)
    path = taken.save(target)
    return {"model": type(model).__name__, "file": str(path), "changed": taken.count, "of": taken.selection.total}


def _loaded(name: str, task: str, base: str) -> tuple[nn.Module, models.Source]:
    with waiting(f"loading {name}"), hub.quiet():
        source = models.find(name, base or None)
        chosen = task or source.task
        if chosen not in TASKS:
            raise ValueError(f"{name} does not say what it is trained for: give --task, one of {', '.join(TASKS)}.")
        model, fresh = models.load(source, chosen, device="cpu")
    if fresh:
        raise ValueError(f"{name} lacks {listed(fresh)}, whose values would be random: another --task may be meant.")
    return model, source
