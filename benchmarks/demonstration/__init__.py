"""The whole way on one device, in one table: the Fisher of all parameters, a selection, sparse training, its delta.

    python -m benchmarks demonstration [--shape llama-3.1-8b]

A LLaMA is built with random weights, on the device and without a network: speed does not depend on weights or tokens.
Then come ``estimate`` of all its parameters, ``select``, ``verify`` on the tensors of three layers and all outside
layers, steps of ``MaskedAdamW`` on one batch, and the delta, saved and put back onto a fresh model. ``verify`` comes
before training, since statistics belong to the weights that they were estimated with. That the loss falls on the batch
that is trained on shows that the steps arrive, and not that anything is learnt.

Beside it run the batch-size-1 loop and Opacus on fewer examples, with their time for one example, and the same training
steps by torch's dense fused AdamW, each in a process of its own. What does not run is tried all the same, and its own
error stands in its place. Nothing is recorded of ours unless the verification holds and the delta gives the trained
model bit for bit. Each process appends its stages to ``<results>/<machine>/demonstration.jsonl`` when it has ended, and
what is there of the same setting and commit is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.demonstration.setting import GIB, SHAPES, Needs, Setting
from benchmarks.demonstration.table import table
from benchmarks.provenance import gpu_state, machine, software
from benchmarks.topk_cases import available_memory

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ARMS = ("fishkern", "one_by_one", "opacus", "opacus_single", "dense_adamw")
SAVED_BY_DEFAULT = 8 * GIB  # of statistics
# What a run of a few minutes allows: examples, tokens, examples of the rivals.
SIZES = {"cuda": (128, 128, 16), "cpu": (32, 64, 8)}

Record = dict[str, Any]
Run = Callable[[str, Setting, Path, Path], int]


class RefusedError(ValueError):
    """What was asked for cannot run, or cannot be recorded."""


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and print the table.

    Args:
        arguments: Of the command line.

    Returns:
        Exit status: 1 where ours failed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        origin = _origin(options)
        with _folder(options.out) as folder:
            setting = plan(options, Path(folder))
            return _measure(setting, options, Path(folder), origin, in_process_of_its_own)
    except RefusedError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks demonstration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_gpu = torch.cuda.is_available()
    examples, tokens, rival_examples = SIZES["cuda" if on_gpu else "cpu"]
    parser.add_argument("--shape", choices=SHAPES, help="default: the largest that fits a GPU, small on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--examples", type=int, default=examples, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=tokens, metavar="T", help="of an example, default: %(default)s")
    parser.add_argument("--density", type=float, default=0.005, help="selected fraction, default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="training steps, default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the steps, default: %(default)s")
    parser.add_argument("--rival-examples", type=int, default=rival_examples, metavar="N", help="default: %(default)s")
    parser.add_argument("--accumulate-on", choices=["cpu", "cuda"], help="default: the device, where all fits")
    parser.add_argument(
        "--save-statistics", action=argparse.BooleanOptionalAction, help="default: up to 8 GiB of statistics"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep selection, delta and statistics there")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--revision", metavar="TEXT", help="what the sources are, where git does not say it")
    return parser


def _origin(options: argparse.Namespace) -> Record:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("no CUDA device is here: leave out --device cuda.")
    if options.device == "cpu" and torch.cuda.is_available():
        raise RefusedError("the CPU's figures would stand among this GPU's: hide it with CUDA_VISIBLE_DEVICES= .")
    origin = {**machine(), **software(options.revision), **(gpu_state() if options.device == "cuda" else {})}
    if not origin["commit"]:
        raise RefusedError("there is no git here: name the revision with --revision TEXT.")
    return origin


def _folder(out: Path | None) -> Any:
    """The folder of the artefacts, as a context: a temporary one, or one that is kept."""
    if out is None:
        return tempfile.TemporaryDirectory(prefix="demonstration-")
    out.mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(out.resolve())


def plan(options: argparse.Namespace, folder: Path) -> Setting:
    """Settle what is left open by what is there, and refuse what does not fit.

    Args:
        options: Of the command line.
        folder: Where the artefacts go.

    Returns:
        The setting.

    Raises:
        RefusedError: The device, the host or the disk is too small, or a number is out of range.
    """
    for name in ("examples", "batch_size", "tokens", "steps", "rival_examples"):
        if getattr(options, name) < 1:
            raise RefusedError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    device = options.device
    shapes = [options.shape] if options.shape else ["small"]
    if not options.shape and device == "cuda":
        shapes = [name for name in SHAPES if name != "tiny"]
    places = [options.accumulate_on] if options.accumulate_on else dict.fromkeys([device, "cpu"])
    free = {"cpu": available_memory(), "disk": shutil.disk_usage(folder).free}
    if device == "cuda":
        free["cuda"] = torch.cuda.mem_get_info()[0]
    reasons = []
    for name in shapes:
        for accumulate_on in places:
            setting, needs = _settled(options, name, accumulate_on)
            what = f"{name} in {setting.dtype} with float32 accumulators on the {accumulate_on}"
            amounts = [f"{needs[at] / GIB:.2f} GiB on the {at} ({free[at] / GIB:.2f} are free)" for at in needs]
            line = f"{what} needs about {', '.join(amounts)}"
            if all(needs[at] <= free[at] for at in needs):
                print("\n".join([*(f"passed over: {reason}" for reason in reasons), line]), file=sys.stderr)
                return setting
            reasons.append(line)
    raise RefusedError(f"{'; '.join(reasons)}. Take less: --shape, --batch-size, --tokens.")


def _settled(options: argparse.Namespace, shape: str, accumulate_on: str) -> tuple[Setting, dict[str, int]]:
    """One setting, and the bytes that it needs by place: ``"cuda"``, ``"cpu"``, ``"disk"``."""
    device = options.device
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    needs = Needs.of(SHAPES[shape], getattr(torch, dtype), options.batch_size, options.tokens)
    save = needs.accumulators <= SAVED_BY_DEFAULT if options.save_statistics is None else options.save_statistics
    given = {key: value for key, value in vars(options).items() if key in Setting.__dataclass_fields__}
    setting = Setting(**{**given, "shape": shape, "dtype": dtype, "accumulate_on": accumulate_on, "save": save})
    found = {device: needs.weights + needs.work, "disk": needs.accumulators if save else 0}
    found[accumulate_on] = found.get(accumulate_on, 0) + needs.accumulators
    if device != "cpu" and not save:  # they make room for what follows
        found["cpu"] = needs.accumulators
    return setting, found


def _measure(setting: Setting, options: argparse.Namespace, folder: Path, origin: Record, run: Run) -> int:
    path = options.results / origin["machine"] / "demonstration.jsonl"
    shared = {"op": "demonstration", "setting": asdict(setting)}
    known = _recorded(path, shared, origin)
    if options.out:
        known = [record for record in known if record["arm"] != "fishkern"]  # whose files are wanted
    records: list[Record] = []
    for arm in options.arms:
        if arm == "opacus_single" and not _too_much(records):
            continue
        found = [record for record in known if record["arm"] == arm]
        if not found:
            lines = folder / f".{arm}.jsonl"
            lines.unlink(missing_ok=True)
            status = run(arm, setting, folder, lines)
            read = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
            lines.unlink(missing_ok=True)
            if status and arm == "fishkern":
                print(f"ours ended with status {status}: nothing is recorded of it.", file=sys.stderr)
                return 1
            if status:
                why = f"signal {-status}, as when the system runs out of memory" if status < 0 else f"status {status}"
                read.append({"arm": arm, "stage": "ended", "left out": f"its process was ended by {why}"})
            found = [{**shared, **line, **origin} for line in read]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:  # an arm at once, so that an interrupted one is measured again
                file.write("".join(json.dumps(record) + "\n" for record in found))
        records += found
    print("\n".join(table(records)))
    return 0


def _too_much(records: list[Record]) -> bool:
    """Whether a whole batch was too much for Opacus."""
    return any(record["arm"] == "opacus" and "memory" in record.get("left out", "") for record in records)


def _recorded(path: Path, shared: Record, origin: Record) -> list[Record]:
    """What is there of this setting and commit; sources with changes are nobody's."""
    if origin["dirty"] or not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    wanted = {**shared, "commit": origin["commit"]}
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def in_process_of_its_own(arm: str, setting: Setting, folder: Path, lines: Path) -> int:
    """Run one arm.

    Args:
        arm: Its name.
        setting: What it runs on.
        folder: Where its artefacts go.
        lines: The file of what it finds.

    Returns:
        Exit status of the process, negative where a signal ended it, as when the system runs out of memory.
    """
    command = [sys.executable, "-m", "benchmarks.demonstration.arms", arm, json.dumps(asdict(setting))]
    return subprocess.run([*command, str(folder), str(lines)], cwd=ROOT, stdout=sys.stderr).returncode
