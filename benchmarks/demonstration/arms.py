"""What the demonstration times: ours from a model to its delta, and beside it what people use for parts of that.

Each arm runs in a process of its own, ``python -m benchmarks.demonstration.arms ARM SETTING FOLDER LINES``, so that it
finds the memory empty; what it found is in LINES, one JSON object for each stage.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.demonstration.setting import SHAPES, Setting
from benchmarks.demonstration.watch import Watch
from benchmarks.providers import RIVALS, in_short


class FailedError(RuntimeError):
    """What was to be shown does not hold."""


def fishkern(setting: Setting, watch: Watch, folder: Path) -> None:
    """From a model to a delta, and back."""
    with watch.stage("build") as found:
        model = setting.model()
        found |= {"weights": sum(p.numel() for p in model.parameters()), "weights_bytes": _nbytes(model)}
    batches = setting.batches()
    _estimate_and_select(setting, watch, folder, model, batches)
    selection = fk.Selection.load(folder / "selection.safetensors")
    with watch.stage("train") as found:
        optimizer = fk.MaskedAdamW(model, selection, lr=setting.lr, max_grad_norm=math.inf)
        found |= train(model, batches[0], optimizer, setting.steps)
    del optimizer
    with watch.stage("delta") as found:
        file = fk.delta(model, selection).save(folder / "delta.safetensors")
        found |= {"file_bytes": file.stat().st_size, "weights_bytes": _nbytes(model)}
    fresh = setting.model()
    with watch.stage("apply to a fresh model") as found:
        delta = fk.Delta.load(file)
        before = fk.apply_delta(fresh, delta)
        trained = dict(model.named_parameters())
        if wrong := [name for name, p in fresh.named_parameters() if not torch.equal(p, trained[name])]:
            raise FailedError(f"with the delta applied {len(wrong)} parameters are not the trained ones: {wrong[:3]}.")
        names = [name for name, count in selection.counts.items() if count]
        moved = sum(int((delta.values(name) != before.values(name)).sum()) for name in names)
        found |= {"restored": True, "moved": moved, "selected": selection.count}


def _estimate_and_select(
    setting: Setting, watch: Watch, folder: Path, model: nn.Module, batches: list[dict[str, Tensor]]
) -> None:
    """The statistics, which are gone when this is over, the selection, which is saved, and the verdict on them."""
    accumulate_on = None if setting.accumulate_on == setting.device else setting.accumulate_on
    estimate = partial(fk.estimate, model, accumulate_on=accumulate_on)
    with watch.stage("estimate one batch"):
        estimate(batches[:1])
    with watch.stage("estimate") as found:
        statistics = estimate(batches, progress=True)
        coverage: Counter[str] = Counter()
        for one in statistics.coverage.values():
            coverage[one.path] += one.numel
        found |= {"examples": statistics.count, "coverage": coverage}
    rule = fk.GlobalTopK(density=setting.density)
    with watch.stage("select") as found:
        selection = fk.select(statistics, rule)
        found |= {"selected": selection.count, "pool": selection.total}
        found |= {"tensors": len(selection.names), "tensors_with_any": sum(map(bool, selection.counts.values()))}
    selection.save(folder / "selection.safetensors")
    if setting.save:
        with watch.stage("save the statistics") as found:
            path = statistics.save(folder / "statistics.safetensors")
            found["file_bytes"] = sum(file.stat().st_size for file in folder.glob("statistics*.safetensors"))
        statistics = fk.Statistics.load(path, lazy=True)
        with watch.stage("select from the file") as found:
            if fk.select(statistics, rule) != selection:
                raise FailedError("the selection from the file is not the one from memory.")
            found["same"] = True
    elif setting.accumulate_on != "cpu":
        with watch.stage("statistics to the host"):
            statistics = fk.Statistics(
                {name: statistics[name].cpu() for name in statistics},
                count=statistics.count,
                provenance=statistics.provenance,
                coverage=statistics.coverage,
            )
    with watch.stage("verify") as found:
        layers = SHAPES[setting.shape].layers
        how = {"parameters": lambda name, _: sampled(name, layers), "density": setting.density}
        report = fk.verify(model, batches, statistics, **how, progress=_show)
        if not report.ok:
            raise FailedError(f"verify: {'; '.join(report.failures[:3])}.")
        worst = report.worst_first[0]
        found |= {
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


def train(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
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


def one_by_one(setting: Setting, watch: Watch, folder: Path) -> None:
    """The batch-size-1 loop that squares in a hook."""
    _rival(setting, watch, "one_by_one", 1)


def opacus(setting: Setting, watch: Watch, folder: Path, batch_size: int | None = None) -> None:
    """Opacus, whose hooks keep the gradients of all examples of a batch beside each parameter."""
    _rival(setting, watch, "opacus", batch_size or setting.batch_size)


def opacus_single(setting: Setting, watch: Watch, folder: Path) -> None:
    """The same with one example at a time, as many as the memory may hold where a batch is too much."""
    opacus(setting, watch, folder, 1)


def _rival(setting: Setting, watch: Watch, provider: str, batch_size: int) -> None:
    watch.current = "estimate"
    way = RIVALS[provider]
    if way.why_not:
        watch.write({"left out": way.why_not})
        return
    with watch.stage("build"):
        model = setting.model()
    rows = [row for batch in setting.batches(setting.rival_examples) for row in batch["input_ids"]]
    ids = torch.stack(rows).split(batch_size)
    watch.current = "estimate"
    way.run(model, [{"input_ids": ids[0][:1], "labels": ids[0][:1]}])  # libraries are loaded on first use
    with watch.stage("estimate") as found:
        way.run(model, [{"input_ids": part, "labels": part} for part in ids])
        found |= {"examples": len(rows), "batch_size": batch_size, "how": way.settings, "version": way.version}


def dense_adamw(setting: Setting, watch: Watch, folder: Path) -> None:
    """The same training steps of all weights, by torch's fused AdamW in the weights' dtype."""
    with watch.stage("build"):
        model = setting.model()
    with watch.stage("train") as found:
        optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, fused=True)
        found |= train(model, setting.batches()[0], optimizer, setting.steps)


ARMS: dict[str, Callable[[Setting, Watch, Path], None]] = {
    "fishkern": fishkern,
    "one_by_one": one_by_one,
    "opacus": opacus,
    "opacus_single": opacus_single,
    "dense_adamw": dense_adamw,
}


def warm_up(device: str) -> None:
    """Load libraries, and start their threads, before anything is timed."""
    model = SHAPES["tiny"].model(device, torch.float32)
    ids = torch.zeros(2, 8, dtype=torch.long, device=device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _show(done: int, of: int | None) -> None:
    print(f"\rverify: {done}/{of} examples", end="\n" if done == of else "", file=sys.stderr, flush=True)


def main(arm: str, described: str, folder: str, lines: str) -> int:
    setting = Setting(**json.loads(described))
    warm_up(setting.device)
    watch = Watch(Path(lines), arm, setting.device)
    try:
        ARMS[arm](setting, watch, Path(folder))
    except FailedError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:  # a rival may fail in any way, and says how
        if arm == "fishkern":
            raise
        watch.write({"left out": in_short(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
