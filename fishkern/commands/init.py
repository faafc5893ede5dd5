"""``fishkern init``: the start of a LoRA from the directions of a model's weights, into a folder."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from torch import nn
from typer import Option

import fishkern as fk
from fishkern.commands.options import InputsWithoutData, Json, with_options
from fishkern.commands.output import console, next_command, progress, rows_in_words, waiting
from fishkern.commands.workload import (
    Prepared,
    fitting,
    note_what_is_not_linear,
    prepare,
    prepare_model,
    refuse_adapter,
)
from fishkern.files import format_of
from fishkern.integrations.tasks import TASKS

RANKS = {"farss": 128, "filet": 32, "pissa": 16}
SAMPLES = {"farss": 16, "filet": 320}
AVERAGE = 50  # of the shallow layers in farss, or the rank if that is smaller

_METHOD = "Options of single methods"
_FILES = ("adapter_init.safetensors", "adapter_model.safetensors", "adapter_config.json")
_ABOUT_DATA = frozenset(
    {"data", "split", "subset", "first", "text", "text_pair", "target", "label", "words", "image", "tokenizer",
     "num_labels", "max_length", "batch_size"}
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """Options that some methods have and others have not, ``None`` where they are not given."""

    shallow: Annotated[
        int | None, Option(min=0, metavar="N", help="farss: number of the last shallow layer, from 0; required.",
                           rich_help_panel=_METHOD)
    ] = None  # fmt: skip
    average: Annotated[
        int | None, Option(min=1, metavar="R", help="farss: mean rank of the shallow layers.", rich_help_panel=_METHOD,
                           show_default=f"{AVERAGE}, or the rank if that is smaller")
    ] = None  # fmt: skip
    least: Annotated[
        int | None, Option(min=1, metavar="R", help="farss: smallest rank in the shallow layers.",
                           rich_help_panel=_METHOD, show_default="1")
    ] = None  # fmt: skip
    most: Annotated[
        int | None, Option(min=1, metavar="R", help="farss: largest rank in the shallow layers.",
                           rich_help_panel=_METHOD, show_default="64")
    ] = None  # fmt: skip
    basis: Annotated[
        str | None, Option(metavar="BASIS", help="filet: svd, or power.", rich_help_panel=_METHOD, show_default="svd")
    ] = None
    order: Annotated[
        str | None, Option(metavar="ORDER", help="filet: directions of smallest energy, or largest.",
                           rich_help_panel=_METHOD, show_default="smallest")
    ] = None  # fmt: skip
    magnitude: Annotated[
        str | None, Option(metavar="SIZE", help="filet: how large a direction starts: energy, sigma, uniform.",
                           rich_help_panel=_METHOD, show_default="energy")
    ] = None  # fmt: skip
    floor: Annotated[
        float | None, Option(metavar="X", help="filet: smallest size of a direction under --magnitude energy.",
                             rich_help_panel=_METHOD, show_default="1e-08")
    ] = None  # fmt: skip
    size: Annotated[
        float | None, Option(metavar="X", help="filet: norm of a start under --magnitude uniform, as a share of the "
                             "weight's.", rich_help_panel=_METHOD, show_default="0.01")
    ] = None  # fmt: skip
    fisher: Annotated[
        str | None, Option(metavar="WHICH", help="farss, filet: kronecker, or joint (gradients of single examples).",
                           rich_help_panel=_METHOD, show_default="kronecker")
    ] = None  # fmt: skip
    positions: Annotated[
        str | None, Option(metavar="WHICH", help="farss, filet: attended, labelled, or all (also padding).",
                           rich_help_panel=_METHOD, show_default="attended")
    ] = None  # fmt: skip
    dead: Annotated[
        str | None, Option(metavar="WHAT", help="farss, filet: keep or skip directions that the data do not reach.",
                           rich_help_panel=_METHOD, show_default="keep")
    ] = None  # fmt: skip
    samples: Annotated[
        int | None, Option(min=1, metavar="N", help="farss, filet: number of examples.", rich_help_panel=_METHOD,
                           show_default=", ".join(f"{count} for {name}" for name, count in SAMPLES.items()))
    ] = None  # fmt: skip
    layers_per_pass: Annotated[
        int | None, Option(min=1, metavar="N", help="farss, filet: read the data once for every N layers, to need less "
                           "memory.", rich_help_panel=_METHOD, show_default="all")
    ] = None  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Give the options that the user names."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_SHARED = {"fisher", "positions", "dead", "samples", "layers_per_pass"}
_OPTIONS = {
    "farss": {"shallow", "average", "least", "most", *_SHARED},
    "filet": {"basis", "order", "magnitude", "floor", "size", *_SHARED},
    "pissa": set(),
}


@with_options
def init(
    work: InputsWithoutData,
    method: Annotated[str, Option(metavar="METHOD", help="farss, filet, or pissa, which needs no data.")],
    out: Annotated[str, Option(metavar="FOLDER", help="Output folder.")],
    options: Method,
    rank: Annotated[
        int | None,
        Option(min=1, metavar="R", help="Rank of a module; for farss of a deep one.",
               show_default=", ".join(f"{rank} for {name}" for name, rank in RANKS.items())),
    ] = None,
    alpha: Annotated[
        float | None,
        Option(metavar="A", help="lora_alpha at this rank; it follows the rank.", show_default="the rank"),
    ] = None,
    targets: Annotated[
        list[str],
        Option(metavar="PATTERN", help="Only these weights or modules, such as q_proj or '*.layers.0.*'; may be "
               "repeated. By default every linear weight in the layers, for filet q_proj, k_proj, v_proj, up_proj and "
               "down_proj."),
    ] = (),
    json_: Json = False,
) -> None:  # fmt: skip
    """Make the start of a LoRA adapter from the directions of a model's weights.

    The folder gets the start, and an ordinary LoRA for PEFT and vLLM. That one has twice the rank, since it also holds
    the start with a negative sign, and changes nothing until it is trained.
    """  # noqa: DOC501 - it is the help text
    _check(work, method, options)
    rank = RANKS[method] if rank is None else rank
    if alpha is not None and not alpha > 0:
        raise ValueError(f"--alpha must be positive, got {alpha:g}.")
    arguments = {"rank": rank, "targets": list(targets) or None, "scaling": 1.0 if alpha is None else alpha / rank}
    folder = _checked_folder(out)
    refuse_adapter(work, "a start is made")
    if method == "pissa":
        model, described = prepare_model(work)
        start = time.perf_counter()
        with progress("decomposing", "weights") as report:
            made = fk.pissa(model, **arguments, progress=report)
    else:
        prepared, given = prepare(work, options.samples or SAMPLES[method]), options.given()
        start = time.perf_counter()
        made, batch_size = _from_data(prepared, work.batch_size, method, {**given, **arguments})
        model, described = prepared.model, {**prepared.described, "batch_size": batch_size}
    seconds = time.perf_counter() - start
    if not targets:
        note_what_is_not_linear(model)
    described = {"model": type(model).__name__, "from": work.model, **described}
    made = fk.AdapterInit(made, digests=made.digests, provenance={**made.provenance, "inputs": described})
    with waiting("writing"):
        _write(made, model, folder)
    result = _result(made, folder, seconds)
    if json_:
        print(json.dumps(result, indent=2))
        return
    _show(result, made)
    next_command("fishkern", "show", folder / _FILES[0])
    console().print("or in Python:")
    for line in _in_python(model, described, folder / _FILES[0], work.dtype):
        print(f"  {line}")  # whole, however narrow the terminal is, so that it can be pasted


def _check(work: InputsWithoutData, method: str, options: Method) -> None:
    """Refuse options that do not belong together."""
    if method not in _OPTIONS:
        raise ValueError(f"--method is one of {', '.join(_OPTIONS)}, got {method!r}.")
    if odd := [name for name in options.given() if name not in _OPTIONS[method]]:
        raise ValueError(f"--method {method} takes no {_spelled(odd)}: leave it out.")
    if options.basis == "power" and options.magnitude == "sigma":
        raise ValueError("--basis power has no singular values: leave out --magnitude sigma, or --basis.")
    if method == "pissa":
        named = [one.name for one in fields(work) if one.name in _ABOUT_DATA and getattr(work, one.name) != one.default]
        if named:
            raise ValueError(f"--method pissa reads no data: leave out {_spelled(named)}.")
    elif not work.data:
        raise ValueError(f"--method {method} chooses directions by data: name it with --data.")
    if method == "farss" and options.shallow is None:
        raise ValueError(
            "--method farss needs --shallow, the number of the last shallow layer, from 0: the paper has 6 of 32 for "
            "mathematics, and 4 for code and instructions."
        )


def _spelled(names: list[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


def _from_data(
    prepared: Prepared, requested: int | None, method: str, arguments: dict[str, Any]
) -> tuple[fk.AdapterInit, int]:
    """Make the start by a statistic of data, and say in batches of how many examples."""
    verb = fk.farss if method == "farss" else fk.filet
    if method == "farss":
        bounds = {name: arguments.pop(name) for name in ("least", "most") if name in arguments}
        average = arguments.pop("average", min(AVERAGE, arguments["rank"]))
        arguments["ranks"] = fk.InverseImportance(average, **bounds)
    arguments["max_examples"] = len(prepared.examples)  # all of them; so their number is known to the progress
    arguments.pop("samples", None)

    def run(size: int) -> tuple[fk.AdapterInit, int]:
        return verb(prepared.model, prepared.batches(size), **arguments, progress=report), size

    with progress("estimating", "examples", then="computing directions") as report:
        return fitting(run, requested, prepared.device, len(prepared.examples))


def _checked_folder(out: str) -> Path:
    """Check before the work that the folder can be written, and holds nothing but an older start."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder with --out.")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"the folder {folder.parent} does not exist: create it, or choose another --out.")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise PermissionError(f"{folder.absolute()} may not be written to: choose another --out.")
    inside = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
    if odd := [name for name in inside if name not in _FILES]:
        raise FileExistsError(f"{folder} holds {odd[0]}, which is no start: name a new or an empty folder with --out.")
    if inside and not _is_untrained_start(folder):
        raise FileExistsError(
            f"{folder} holds an adapter that fishkern init did not make, or that was trained since: name a new or an "
            "empty folder with --out."
        )
    return folder


def _is_untrained_start(folder: Path) -> bool:
    from safetensors.torch import load_file

    try:
        if format_of(folder / _FILES[0]) != "fishkern.adapter-init":
            return False
        tensors = load_file(folder / _FILES[1]) if (folder / _FILES[1]).exists() else {}
    except (OSError, ValueError, RuntimeError):
        return False
    trained = (tensor[:, : tensor.shape[1] // 2] for name, tensor in tensors.items() if "lora_B" in name)
    return not any(bool(half.any()) for half in trained)  # B - B0


def _write(made: fk.AdapterInit, model: nn.Module, folder: Path) -> None:
    """Write the files elsewhere, and move them into the folder together."""
    from fishkern.integrations.lora import attach_init, plain_lora

    described = made.provenance["inputs"]
    task = TASKS[described["task"]].peft_type
    adapted = attach_init(model, made, **({"task_type": task} if task else {}))
    new = not folder.exists()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent if new else folder) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        made.save(whole / _FILES[0])
        plain_lora(adapted, whole)
        if new:
            whole.rename(folder)
        else:
            for name in _FILES:
                os.replace(whole / name, folder / name)


def _result(made: fk.AdapterInit, folder: Path, seconds: float) -> dict[str, Any]:
    provenance = made.provenance
    method = {key: value for key, value in provenance["method"].items() if key != "importances"}
    return {
        "folder": str(folder),
        "files": {name: (folder / name).stat().st_size for name in _FILES},
        **provenance["inputs"],
        "method": method,
        **({"rule": provenance["rule"], "energies": provenance["energies"]} if "rule" in provenance else {}),
        "modules": len(made),
        "ranks": made.ranks,
        "entries": sum(module.A.numel() + module.B.numel() for module in made.values()),
        "seconds": round(seconds, 3),
    }


def _show(result: dict[str, Any], made: fk.AdapterInit) -> None:
    say = console().print
    for key in ("model", "task", "data"):
        if key in result:
            say(f"{key:9} {result[key]}")
    if "rows" in result:
        say(f"{'rows':9} {rows_in_words(result['rows'])}")
    method = result["method"]
    shallow = f", layers up to {method['shallow']} shallow" if "shallow" in method else ""
    say(f"{'method':9} {method['name']}{shallow}")
    ranks = sorted(made.ranks.values())
    span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    say(f"{'start':9} {len(made)} modules, {span}, {result['entries']:,} entries")
    say(f"{'took':9} {result['seconds']:.1f} s")
    for key, name in zip(("saved", "and", ""), _FILES, strict=True):
        what = "the start" if key == "saved" else "a LoRA of twice the rank, which changes nothing yet" if key else ""
        say(f"{key:9} {Path(result['folder']) / name}, {_size(result['files'][name])}{', ' if what else ''}{what}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _in_python(model: nn.Module, described: dict[str, Any], path: Path, dtype: str) -> list[str]:
    """Write the lines that train the model from the start."""
    task = TASKS[described["task"]]
    options = f", num_labels={model.config.num_labels}" if "label" in described.get("columns", {}) else ""
    options += f", dtype={dtype!r}" if dtype != "auto" else ""
    kind = f", task_type={task.peft_type!r}" if task.peft_type else ""
    return [
        "import fishkern as fk",
        f"from transformers import {task.auto_class}, Trainer",
        "from fishkern.integrations.lora import InitCallback, attach_init",
        f"init = fk.AdapterInit.load({str(path)!r})",
        f"model = {task.auto_class}.from_pretrained({described['from']!r}{options})",
        f"model = attach_init(model, init{kind})  # its output stays what it was",
        "Trainer(model, ..., callbacks=[InitCallback(init)]).train()  # the trained LoRA: plain_lora in output_dir",
    ]
