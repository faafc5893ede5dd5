"""A whole LLaMA on one device: the Fisher of all parameters, a selection, sparse training, its delta.

    python -m benchmarks demonstration [--shape llama-3.1-8b]

The LLaMA has random weights, made on the device and without a network: speed does not depend on weights or tokens.
``verify`` takes the tensors of three layers and all outside layers, and runs before training, since statistics belong
to the weights that they were estimated with. A falling loss on the batch that is trained on shows that the steps reach
the weights, not that anything is learnt. The batch-size-1 loop and Opacus run on fewer examples, with their time for
one example; torch's dense fused AdamW takes the same training steps.

Every arm has a process of its own, and a rival that fails is recorded with its error. Nothing is recorded of
``fishkern`` unless the verification holds and the delta restores the trained model bit for bit. An arm appends its
stages to ``<results>/<machine>/demonstration.jsonl`` when it has ended; an arm that is recorded for the same setting
and commit is not measured again.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine import RESULTS
from benchmarks.engine.memory import MIB
from benchmarks.engine.origin import gpu_state, origin
from benchmarks.engine.process import Process, ProcessError, in_short
from benchmarks.engine.records import Record, Records, read
from benchmarks.engine.stages import Stages
from benchmarks.rivals.providers import PASSES
from benchmarks.subjects.demonstration import SHAPES, RefusedError, Setting, plan

# Examples, tokens, examples of the rivals: a run of a few minutes.
SIZES = {"cuda": (128, 128, 16), "cpu": (32, 64, 8)}


class FailedError(RuntimeError):
    """The verification does not hold, or a result is not the expected one."""


def fishkern(setting: Setting, stages: Stages, folder: Path) -> None:
    """From a model to a delta, and back."""
    with stages.measured("build") as figures:
        model = setting.model()
        figures |= {"weights": sum(p.numel() for p in model.parameters()), "weights_bytes": nbytes(model)}
    batches = setting.batches(setting.batch_size)
    # Not by a name of its own, which would keep the statistics in memory after they are saved.
    selection, statistics = selected(setting, stages, folder, estimated(setting, stages, model, batches))
    verified(setting, stages, model, batches, statistics)
    del statistics
    with stages.measured("train") as figures:
        optimizer = fk.MaskedAdamW(model, selection, lr=setting.lr, max_grad_norm=math.inf)
        figures |= train(model, batches[0], optimizer, setting.steps)
    del optimizer
    with stages.measured("delta") as figures:
        file = fk.delta(model, selection).save(folder / "delta.safetensors")
        figures |= {"file_bytes": file.stat().st_size, "weights_bytes": nbytes(model)}
    fresh = setting.model()
    with stages.measured("apply to a fresh model") as figures:
        delta = fk.Delta.load(file)
        before = fk.apply_delta(fresh, delta)
        trained = dict(model.named_parameters())
        if wrong := [name for name, p in fresh.named_parameters() if not torch.equal(p, trained[name])]:
            raise FailedError(f"with the delta applied {len(wrong)} parameters are not the trained ones: {wrong[:3]}.")
        names = [name for name, count in selection.counts.items() if count]
        moved = sum(int((delta.values(name) != before.values(name)).sum()) for name in names)
        figures |= {"restored": True, "moved": moved, "selected": selection.count}


def estimated(setting: Setting, stages: Stages, model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Statistics:
    accumulate_on = None if setting.accumulate_on == setting.device else setting.accumulate_on
    estimate = partial(fk.estimate, model, accumulate_on=accumulate_on)
    with stages.measured("estimate one batch"):
        estimate(batches[:1])
    with stages.measured("estimate") as figures:
        statistics = estimate(batches, progress=True)
        coverage: Counter[str] = Counter()
        for one in statistics.coverage.values():
            coverage[one.path] += one.numel
        figures |= {"examples": statistics.count, "coverage": coverage}
    return statistics


def selected(
    setting: Setting, stages: Stages, folder: Path, statistics: fk.Statistics
) -> tuple[fk.Selection, fk.Statistics]:
    """The selection, and the statistics out of the device's memory: in a file, or on the host."""
    rule = fk.GlobalTopK(density=setting.density)
    with stages.measured("select") as figures:
        selection = fk.select(statistics, rule)
        figures |= {"selected": selection.count, "pool": selection.total}
        figures |= {"tensors": len(selection.names), "tensors_with_any": sum(map(bool, selection.counts.values()))}
    if setting.save:
        with stages.measured("save the statistics") as figures:
            path = statistics.save(folder / "statistics.safetensors")
            figures["file_bytes"] = sum(file.stat().st_size for file in folder.glob("statistics*.safetensors"))
        statistics = fk.Statistics.load(path, lazy=True)
        with stages.measured("select from the file") as figures:
            if fk.select(statistics, rule) != selection:
                raise FailedError("the selection from the file is not the one from memory.")
            figures["same"] = True
    elif setting.accumulate_on != "cpu":
        with stages.measured("statistics to the host"):
            moved = {name: statistics[name].cpu() for name in statistics}
            origin = {"provenance": statistics.provenance, "coverage": statistics.coverage}
            statistics = fk.Statistics(moved, count=statistics.count, **origin)
    return selection, statistics


def verified(
    setting: Setting, stages: Stages, model: nn.Module, batches: list[dict[str, Tensor]], statistics: fk.Statistics
) -> None:
    with stages.measured("verify") as figures:
        layers = SHAPES[setting.shape].layers
        sample = {"parameters": lambda name, _: sampled(name, layers), "density": setting.density}
        report = fk.verify(model, batches, statistics, **sample)
        if not report.ok:
            raise FailedError(f"verify: {'; '.join(report.failures[:3])}.")
        worst = report.worst_first[0]
        figures |= {
            "ok": report.ok,
            "compared": len(report.compared),
            "entries": sum(one.numel for one in report.compared),
            "worst": {"name": worst.name, "error": worst.error, "noise": worst.noise, "allowed": worst.allowed},
            "density": report.density,
            "overlap": report.overlap,
            "noise_overlap": report.noise_overlap,
            "loop_seconds": report.loop_seconds,
        }


def sampled(name: str, layers: int) -> bool:
    """Whether a parameter is verified: those of the first, the middle and the last layer, and all outside layers."""
    number = re.search(r"\.layers\.(\d+)\.", name)
    return number is None or int(number[1]) in (0, layers // 2, layers - 1)


def train(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int) -> Record:
    """Take steps on one batch: the loss before each and after the last, and the time of a step without the first."""
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # which waits for the device
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        losses.append(model(**batch, use_cache=False).loss.item())
    return {"losses": losses, "step_seconds": median(seconds[1:] or seconds)}


def rival(provider: str, setting: Setting, stages: Stages, folder: Path, *, single: bool) -> None:
    """Another way to the Fisher, on fewer examples, in batches or one at a time."""
    way = PASSES[provider]
    size = 1 if single else setting.batch_size
    if way.why_not:
        stages.write({"stage": "estimate", "left out": way.why_not})
        return
    with stages.measured("build"):
        model = setting.model()
    batches = setting.batches(size, setting.rival_examples)
    with stages.measured("first call"):  # libraries are loaded on first use
        way.run(model, [{name: rows[:1] for name, rows in batches[0].items()}])
    with stages.measured("estimate") as figures:
        way.run(model, batches)
        examples = sum(len(batch["input_ids"]) for batch in batches)
        figures |= {"examples": examples, "batch_size": size, "how": way.settings, "version": way.version}


def dense_adamw(setting: Setting, stages: Stages, folder: Path) -> None:
    """The same training steps of all weights, by torch's fused AdamW in the weights' dtype."""
    with stages.measured("build"):
        model = setting.model()
    with stages.measured("train") as figures:
        optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, fused=True)
        figures |= train(model, setting.batches(setting.batch_size)[0], optimizer, setting.steps)


ARMS: dict[str, Callable[[Setting, Stages, Path], None]] = {
    "fishkern": fishkern,
    "one_by_one": partial(rival, "one_by_one", single=True),
    "opacus": partial(rival, "opacus", single=False),
    "opacus_single": partial(rival, "opacus", single=True),  # where a whole batch is too much
    "dense_adamw": dense_adamw,
}


def nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def run_arm(arm: str, setting: Setting, folder: Path, lines: Path) -> None:
    """Run one arm, with its libraries loaded and their threads started; a rival may fail."""
    warm = SHAPES["tiny"].model(setting.device, torch.float32)
    ids = torch.zeros(2, 8, dtype=torch.long, device=setting.device)
    warm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    stages = Stages(lines, arm, setting.device)
    try:
        ARMS[arm](setting, stages, folder)
    except Exception as error:
        if arm == "fishkern":
            raise
        stages.write({"left out": in_short(error)})


def in_process_of_its_own(arm: str, setting: Setting, folder: Path, lines: Path) -> None:
    with Process() as process:
        process.call("benchmarks.cases.demonstration:run_arm", arm, setting, folder, lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the arms that are missing, and print the table.

    Args:
        arguments: Of the command line.

    Returns:
        Exit status: 1 where ``fishkern`` failed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        where = _origin(options)
        with tempfile.TemporaryDirectory(prefix="demonstration-") as folder:
            return _measure(plan(options, Path(folder)), options, Path(folder), where)
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
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--revision", metavar="TEXT", help="name of the sources, where there is no git")
    return parser


def _origin(options: argparse.Namespace) -> Record:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("there is no CUDA device: leave out --device cuda.")
    if options.device == "cpu" and torch.cuda.is_available():
        raise RefusedError("the CPU's figures would be recorded as this GPU's: hide it with CUDA_VISIBLE_DEVICES= .")
    where = {**origin(options.revision), **(gpu_state() if options.device == "cuda" else {})}
    if not where["commit"]:
        raise RefusedError("there is no git here: name the revision with --revision TEXT.")
    return where


def _measure(setting: Setting, options: argparse.Namespace, folder: Path, where: Record) -> int:
    path = options.results / where["machine"] / "demonstration.jsonl"
    shared = {"op": "demonstration", "setting": asdict(setting)}
    log = Records(path, origin=lambda: where, **shared)
    records: list[Record] = []
    for arm in options.arms:
        if arm == "opacus_single" and not any("memory" in record.get("left out", "") for record in records):
            continue
        # Sources with changes that are not committed are measured each time.
        known = [] if where["dirty"] else log.find(arm=arm, commit=where["commit"])
        if not known:
            stages, why = _stages(arm, setting, folder)
            if why and arm == "fishkern":
                print(f"fishkern failed, and nothing is recorded of it: {why}", file=sys.stderr)
                return 1
            known = log.append(*stages)  # all of an arm at once: an interrupted one is measured again
        records += known
    print("\n".join(table(records)))
    return 0


def _stages(arm: str, setting: Setting, folder: Path) -> tuple[list[Record], str]:
    """Run an arm: its stages, and why it ended early, if it did."""
    lines = folder / f"{arm}.jsonl"
    lines.unlink(missing_ok=True)
    why = ""
    try:
        in_process_of_its_own(arm, setting, folder, lines)
    except (ProcessError, FailedError) as error:
        why = str(error)
    stages = read(lines)
    return [*stages, {"arm": arm, "stage": "ended", "left out": why}] if why else stages, why


def table(records: list[Record]) -> Iterator[str]:
    """Lay out the stages of each arm, with the main figures of each.

    Args:
        records: Of one setting and machine, in the order of the stages.

    Yields:
        Lines.
    """
    setting, machine = records[0]["setting"], records[0]["machine"]
    yield f"{setting['shape']} in {setting['dtype']} on {machine}, {100 * setting['density']:g} % of entries selected"
    yield f"{setting['examples']} examples of {setting['tokens']} tokens, {setting['batch_size']} in a batch"
    yield ""
    yield f"{'arm':14} {'stage':24} {'seconds':>9} {'peak GiB':>9}"
    ours = {record["stage"]: record for record in records if record["arm"] == "fishkern"}
    for record in records:
        timed = "seconds" in record
        head = f"{record['arm']:14} {record['stage']:24} "
        head += f"{record['seconds']:9.2f} {record['peak_mib'] / 1024:9.2f}" if timed else f"{'-':>9} {'-':>9}"
        words = outcome(record) + against(record, ours.get(record["stage"]))
        yield f"{head}  {textwrap.shorten(words, 80, placeholder=' ...')}".rstrip()
    yield ""
    yield "Peak: of the whole process, weights included; on a CPU above that of one that has only loaded its libraries."


def against(record: Record, ours: Record | None) -> str:
    """How a rival compares with ``fishkern`` in an example or in a step."""
    if record["arm"] == "fishkern" or not ours or "seconds" not in record:
        return ""
    each = {"estimate": lambda r: r["seconds"] / r["examples"], "train": lambda r: r["step_seconds"]}
    if record["stage"] not in each:
        return ""
    slower = each[record["stage"]](record) / each[record["stage"]](ours)
    return f", {slower:.2f}x the time and {record['peak_mib'] / ours['peak_mib']:.2f}x the peak of fishkern"


def outcome(record: Record) -> str:
    """The main figures of a stage, in words."""
    if "left out" in record:
        return record["left out"]
    if "losses" in record:
        first, last = record["losses"][0], record["losses"][-1]
        return f"{1000 * record['step_seconds']:.0f} ms a step, loss {first:.2f} -> {last:.2f}"
    if "overlap" in record:
        worst = record["worst"]
        return f"holds for {record['compared']} tensors, worst error {worst['error']:.1e} of {worst['allowed']:.1e}"
    words = {
        "examples": lambda: f"{1000 * record['seconds'] / record['examples']:.1f} ms an example",
        "moved": lambda: f"the trained model bit for bit, {record['moved']:,} of {record['selected']:,} entries moved",
        "pool": lambda: f"{record['selected']:,} entries of {record['pool']:,}",
        "file_bytes": lambda: f"{record['file_bytes'] / MIB:,.2f} MiB on disk",
        "weights": lambda: f"{record['weights']:,} weights",
    }
    return next((text() for field, text in words.items() if field in record), "")
