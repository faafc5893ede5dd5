"""The table of the demonstration, made of its records alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
WIDTH = 100
PLACES = {"cpu": "CPU", "cuda": "GPU"}
NAMES = {
    "one_by_one": "one by one",
    "opacus": "Opacus",
    "opacus_single": "Opacus, single",
    "dense_adamw": "dense AdamW",
}


def table(records: list[Record]) -> Iterator[str]:
    """Lay out stages and rivals.

    Args:
        records: Of one setting and machine, in the order of the stages.

    Yields:
        Lines of at most 100 columns.
    """
    first = records[0]
    setting = first["setting"]
    ours = {r["stage"]: r for r in records if r["arm"] == "fishkern"}
    where = first["machine"] if setting["device"] == "cuda" else f"{first['cpu']}, {first['threads']} threads"
    yield from _wrapped(
        f"A LLaMA of the shape {setting['shape']} with random weights in {setting['dtype']}, on {where}. The Fisher of "
        f"all its parameters from {setting['examples']} examples of {setting['tokens']} random tokens, "
        f"{setting['batch_size']} in a batch, accumulated in float32 on the {PLACES[setting['accumulate_on']]}; "
        f"{100 * setting['density']:g} % of all entries selected; {setting['steps']} training steps on one batch."
    )
    yield ""
    yield f"{'stage':24} {'seconds':>9} {'peak GiB':>9}  what came out"
    for record in ours.values():
        yield from _row(record["stage"], record, _outcome(record))
    others = [r for r in records if r["arm"] != "fishkern" and ("left out" in r or r["stage"] != "build")]
    if others:
        yield ""
        yield f"{'beside it':24} {'seconds':>9} {'peak GiB':>9}"
    for record in others:
        what = "train" if record["arm"] == "dense_adamw" else "Fisher"
        yield from _row(f"{NAMES[record['arm']]}: {what}", record, _beside(record, ours))
    yield ""
    on_cpu = "resident memory above that of a process which has only loaded its libraries"
    what = "what torch allocates" if setting["device"] == "cuda" else on_cpu
    yield from _wrapped(f"Peak: the most of {what}, during the stage and with all that was there before.")


def _outcome(record: Record) -> str:
    """What a stage of ours found, in words."""
    match record["stage"]:
        case "build":
            return f"{record['weights']:,} weights, {_size(record['weights_bytes'])}"
        case "estimate one batch":
            return "a first call, with all that is done once"
        case "estimate":
            paths = ", ".join(f"{path} {numel:,}" for path, numel in record["coverage"].items())
            return f"{_each(record)} an example; {paths}"
        case "select":
            return f"{record['selected']:,} entries, in {record['tensors_with_any']} of {record['tensors']} tensors"
        case "save the statistics":
            return _size(record["file_bytes"])
        case "select from the file":
            return "the same entries, read lazily"
        case "verify":
            worst = record["worst"]
            return (
                f"holds: {record['compared']} tensors ({record['entries']:,} entries), worst error "
                f"{worst['error']:.1e} of {worst['allowed']:.1e} allowed; {record['overlap']:.1%} of their largest "
                f"{record['density']:.1%} are the loop's"
            )
        case "train":
            return f"{_step(record)}; loss on that batch {record['losses'][0]:.2f} -> {record['losses'][-1]:.2f}"
        case "delta":
            return f"{_size(record['file_bytes'])} on disk, where all weights take {_size(record['weights_bytes'])}"
        case "apply to a fresh model":
            return f"the trained model bit for bit; {record['moved']:,} of {record['selected']:,} entries moved"
    return ""


def _beside(record: Record, ours: dict[str, Record]) -> str:
    if "left out" in record:
        return record["left out"]
    if record["arm"] == "dense_adamw":
        mine = ours.get("train")
        ratio = ""
        if mine:
            slower, larger = record["step_seconds"] / mine["step_seconds"], record["peak_mib"] / mine["peak_mib"]
            ratio = f", {slower:.2f}x the time and {larger:.2f}x the peak of ours"
        return f"{_step(record)}{ratio}; loss {record['losses'][0]:.2f} -> {record['losses'][-1]:.2f}"
    mine = ours.get("estimate")
    ratio = ""
    if mine:
        slower, larger = _seconds_each(record) / _seconds_each(mine), record["peak_mib"] / mine["peak_mib"]
        ratio = f", {slower:.2f}x the time and {larger:.2f}x the peak of ours"
    return f"{_each(record)} an example{ratio}; {record['examples']} examples, {record['batch_size']} in a batch"


def _row(name: str, record: Record, outcome: str) -> Iterator[str]:
    if "seconds" in record:
        head = f"{name:24} {record['seconds']:9.2f} {record['peak_mib'] / 1024:9.2f}"
    else:
        head = f"{name:24} {'-':>9} {'-':>9}"
    margin = " " * (len(head) + 2)
    lines = textwrap.wrap(outcome, WIDTH - len(margin)) or [""]
    yield f"{head}  {lines[0]}".rstrip()
    yield from (margin + line for line in lines[1:])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


def _seconds_each(record: Record) -> float:
    return record["seconds"] / record["examples"]


def _each(record: Record) -> str:
    return f"{1000 * _seconds_each(record):.1f} ms"


def _step(record: Record) -> str:
    return f"{1000 * record['step_seconds']:.0f} ms a step"


def _size(nbytes: int) -> str:
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:.0f} {unit}"
    raise AssertionError
