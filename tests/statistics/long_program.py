"""What each process of ``test_long_runs_on_ranks.py`` runs: passes that are broken off, and passes that stop early."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fishkern as fk
from fishkern.statistics import kept_files
from fishkern.statistics.checkpoint import Checkpoint

CASES: dict[str, Callable[[], Any]] = {}
rank, world, folder = 0, 1, Path()
Batches = list[tuple[Tensor, Tensor]]

KINDS: dict[str, fk.Estimator] = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc", mc_samples=2, seed=3),
    "sketched": fk.SketchedFisher(2),
    "rows": fk.GroupFisher(by="row"),
    "batches": fk.DiagonalFisher(unit="batch"),
    "directions": fk.DirectionEnergy(),
}
LIKELIHOOD = {"likelihood": fk.Classification()}


class Killed(BaseException):
    """Stands for a signal: nothing of the library runs after it but what leaves the model as found."""


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def listed(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = run
        return run

    return listed


def whole(width: int = 31) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def sharded(width: int = 31, replicas: int = 1, *, root: bool = True) -> nn.Module:
    """Two units of uneven shards; without ``root`` the first linear is whole on every rank."""
    sizes = (world,) if replicas == 1 else (replicas, world // replicas)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ranks",) if replicas == 1 else ("replicas", "ranks"))
    model = whole(width)
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh) if root else model


def batches_of(of_rank: int, count: int = 7, ranks: int | None = None) -> Batches:
    """The batches of a rank.

    The last rank has one less. The first ones have one example, which does not show whose rows are whose, so that the
    first of two has a plan of its own; on each rank it comes at another turn.
    """
    generator = torch.Generator().manual_seed(1 + of_rank)
    count -= of_rank == (ranks or world) - 1 > 0
    sizes = [1 if number <= of_rank else 2 for number in range(count)]
    scales = torch.logspace(-2, 2, 6)
    return [
        (torch.randn(N, 6, generator=generator) * scales, torch.randint(3, (N,), generator=generator)) for N in sizes
    ]


def breaking(batches: Batches, after: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Raise after some batches, on the first rank."""
    yield from batches[: after if rank == 0 else None]
    if rank == 0:
        raise ConnectionError("the data is on another machine")


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except (Exception, Killed) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def same(one: Any, other: Any) -> bool:
    """Whether all that two calls give has the same bits on this rank, what is followed included."""
    own, others = one.blocks, other.blocks
    values = all(torch.equal(local(own[name]), local(others[name])) for name in own) and list(own) == list(others)
    if one.precision is None or other.precision is None:
        return values and one.precision is other.precision
    entries, others = one.precision.entries, other.precision.entries
    followed = all(torch.equal(a, b) for name in entries for a, b in zip(entries[name], others[name], strict=True))
    return values and followed and one.precision.plain() == other.precision.plain()


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def part(name: str) -> Path:
    """A checkpoint in a folder of its own, which all ranks see."""
    (folder / name).mkdir(exist_ok=True)
    return folder / name / "fisher.part"


def left(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


@case("goes on")
def _(replicas: int = 1, kinds: Iterable[str] = KINDS) -> dict[str, Any]:
    """The data of one rank raise twice."""
    report = {}
    for kind in kinds:
        estimator = KINDS[kind]
        model, path = sharded(replicas=replicas), part(f"{kind}-{replicas}")
        own = batches_of(rank)
        expected = fk.estimate(model, own, estimator, **LIKELIHOOD)
        options = {"checkpoint": path, **LIKELIHOOD}
        broken = [
            message(lambda: fk.estimate(model, breaking(own, after), estimator, **options))  # noqa: B023
            for after in (1, 4)
        ]
        held = left(path)
        again = fk.estimate(model, own, estimator, **options)
        report[kind] = {"same": same(again, expected), "broken": broken, "held": held, "count": expected.count}
        report[kind] |= {"left": left(path), "followed": expected.precision is not None}
    return report


@case("goes on, without data or prepared")
def _() -> dict[str, Any]:
    """The last rank has no data; and passes that are prepared anew in each call."""
    report = {}
    for kind in ("empirical", "sketched"):
        model, estimator, of_all = sharded(), KINDS[kind], batches_of(rank)
        for what, own in {"without data": of_all if rank < world - 1 else [], "prepared": of_all}.items():
            path = part(f"{kind}-{what}")

            def run(batches: Any, **options: Any) -> Any:
                if what == "prepared":  # noqa: B023
                    options["prepared"] = fk.prepare(model, of_all[-1], estimator, **LIKELIHOOD)  # noqa: B023
                return fk.estimate(model, batches, estimator, **LIKELIHOOD, **options)  # noqa: B023

            expected = run(own)
            broken = [message(lambda: run(breaking(own, after), checkpoint=path)) for after in (1, 4)]  # noqa: B023
            held = left(path)
            again = run(own, checkpoint=path)
            report[f"{kind}, {what}"] = {"same": same(again, expected), "broken": broken, "held": held}
            report[f"{kind}, {what}"] |= {"left": left(path), "followed": expected.precision is not None}
    return report


CASES["mc goes on"] = lambda: CASES["goes on"](kinds=["mc"])
CASES["goes on, replicated"] = lambda: CASES["goes on"](2)


@contextmanager
def killed_in_save(number: int, at: str) -> Iterator[None]:
    """Kill all ranks in a save: before or after each of them, or the first alone, has written or moved its file."""
    what, where = at.split(", ")
    write, replace, saves = Checkpoint.write, os.replace, []

    def killing(run: Callable[..., Any], name: str) -> Callable[..., Any]:
        def once(*args: Any) -> Any:
            saves.extend([0] if name == "write" else [])
            if len(saves) < number or name != what:
                return run(*args)
            if where == "after all" or (where == "after one" and rank == 0):
                run(*args)
            raise Killed(at)

        return once

    system = SimpleNamespace(replace=killing(replace, "move"))
    with patch.object(Checkpoint, "write", killing(write, "write")), patch.object(kept_files, "os", system):
        yield


# In the first save, which has none before it, and in a later one.
KILLS = [(4, "write, after one"), (4, "move, after one"), (1, "write, after one"), (1, "move, after one")]
KILLS += [(4, f"{what}, {where}") for what in ("write", "move") for where in ("before all", "after all")]


@case("killed in a save")
def _(kills: Iterable[tuple[int, str]] = KILLS[2:]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    model, own = sharded(), batches_of(rank)
    expected = fk.estimate(model, own, KINDS["mc"], **LIKELIHOOD)
    for number, at in kills:
        path, counted = part(f"{at}-{number}"), []
        options = {"estimator": KINDS["mc"], "checkpoint": path, **LIKELIHOOD}
        with killed_in_save(number, at):
            said = message(lambda: fk.estimate(model, own, save_every=0, **options))  # noqa: B023
        dist.barrier()
        again = fk.estimate(model, own, progress=lambda done, total: counted.append(done), **options)  # noqa: B023
        report[f"{at}, {number}"] = {"said": said, "same": same(again, expected), "left": left(path)}
        report[f"{at}, {number}"] |= {"counted": counted}
    return report


CASES["killed in two saves"] = lambda: CASES["killed in a save"](KILLS[:2])


def on_the_second(run: Callable[[], Any]) -> None:
    """Let the second rank do something while the others wait."""
    if rank == 1:
        run()
    dist.barrier()


@case("refused")
def _() -> dict[str, Any]:
    report: dict[str, Any] = {}
    model, own, path = sharded(), batches_of(rank), part("refused")
    options = {"checkpoint": path, **LIKELIHOOD}
    expected = fk.estimate(model, own, **LIKELIHOOD)
    for after in (2, 3):  # of the first files alone, one that is missing may never have been written
        report["broken"] = message(lambda: fk.estimate(model, breaking(own, after), **options))  # noqa: B023
    mine = path.with_name(f"fisher.part.rank-{rank}")
    content = mine.read_bytes()
    calls: dict[str, Callable[[], Any]] = {
        "other data": lambda: fk.estimate(model, own[::-1] if rank else own, **options),
        "fewer data": lambda: fk.estimate(model, own[:2] if rank else own, **options),
        "other weights": lambda: fk.estimate(changed(), own, **options),
        "on one alone": lambda: fk.estimate(model, own, **LIKELIHOOD, checkpoint=None if rank else path),
        "parts": lambda: fk.estimate(model, own, parts=[[name] for name in expected], **options),
        "of one process": lambda: fk.estimate(model, own, checkpoint=folder / "of one.part", **LIKELIHOOD),
    }
    report |= {name: message(call) for name, call in calls.items()}
    on_the_second(lambda: mine.rename(folder / "away"))
    report["missing"] = message(lambda: fk.estimate(model, own, **options))
    on_the_second(lambda: (folder / "away").rename(mine))
    report["untouched"] = mine.read_bytes() == content
    write, writes = Checkpoint.write, []

    def full(self: Checkpoint, file: Path) -> None:
        writes.append(file)
        if rank == 1 and len(writes) == 2:
            raise OSError(errno.ENOSPC, "no space left")
        write(self, file)

    with patch.object(Checkpoint, "write", full):
        report["full"] = message(lambda: fk.estimate(model, own, save_every=0, **options))
    report["held"] = left(path)
    report["same"] = same(fk.estimate(model, own, **options), expected)
    report["left"] = left(path)
    report["for one"] = message(lambda: fk.estimate(model, breaking(own, 3), **options | {"checkpoint": part("two")}))
    return report


def changed() -> nn.Module:
    model = sharded()
    with torch.no_grad():
        model[2].bias.to_local().add_(1)
    return model


def stops(model: nn.Module, name: str) -> dict[str, Any]:
    """Stop at a goal, and once more after the data of one rank have raised on the way."""
    own, path = batches_of(rank, TURNS), part(name)
    options = {"until": (GOAL, TOP), **LIKELIHOOD}
    stopped = fk.estimate(model, own, **options)
    run, precision = stopped.provenance["runs"][0], stopped.precision
    broken = message(lambda: fk.estimate(model, breaking(own, 3), checkpoint=path, **options))
    held = left(path)
    again = fk.estimate(model, own, checkpoint=path, **options)
    errors = torch.cat([entries.standard_errors for entries in precision.entries.values()])
    return {
        "count": stopped.count, "turns": run["batches"], "broken": broken, "held": held, "same": same(again, stopped),
        "left": left(path), "overlap": precision.overlap(TOP), "batches": precision.batches, "errors": errors.tolist(),
        "whole": stopped.whole().precision.plain() == precision.plain(),
    }  # fmt: skip


GOAL, TOP, TURNS, WIDE = 0.87, 0.2, 24, 600

CASES |= {
    "stops": lambda: stops(whole(WIDE), "stops"),
    "stops, sharded": lambda: stops(sharded(WIDE), "sharded"),
    "stops, partly sharded": lambda: stops(sharded(WIDE, root=False), "partly"),
    "stops, replicated": lambda: stops(sharded(WIDE, replicas=2), "replicated"),
}


@case("killed for good")
def _() -> dict[str, Any]:
    """Be one of the ranks of which a signal ends one, at a place and after a time that the file ``kill`` says."""
    model, path = sharded(), folder.parent / "fisher.part"
    victim, at, after = (folder / "kill").read_text().split() if (folder / "kill").exists() else (-1, 0, 0)

    def own() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches_of(rank, 40)):
            if (rank, number) == (int(victim), int(at)):
                threading.Timer(float(after), os.kill, (os.getpid(), signal.SIGKILL)).start()
            yield batch

    statistics = fk.estimate(model, own(), KINDS["mc"], checkpoint=path, save_every=0, **LIKELIHOOD)
    whole = {name: statistics.full(name).tolist() for name in statistics}
    entries = {name: [one.tolist() for one in of_name] for name, of_name in statistics.precision.entries.items()}
    return {"values": whole, "entries": entries, "precision": statistics.precision.plain()}


@case("elsewhere")
def _() -> dict[str, Any]:
    """In parts, with results in files and checkpoints of every pass."""
    model, own, path = sharded(), batches_of(rank), part("elsewhere")
    expected = fk.estimate(model, own, **LIKELIHOOD)
    names = list(expected)
    options = {"parts": [names[2:], names[:2]], "results_on": path.parent, **LIKELIHOOD}
    broken = message(lambda: fk.estimate(model, Breaking(own, 2, 3), checkpoint=path, **options))
    held = left(path)
    found = fk.estimate(model, own, checkpoint=path, **options)
    values = all(torch.equal(local(found[name]), local(expected[name])) for name in names)
    full = all(torch.equal(found.full(name), expected.full(name)) for name in names)
    saved = fk.Statistics.load(found.save(folder / "saved"))
    return {
        "broken": broken, "held": held, "values": values, "full": full, "left": left(path),
        "names": list(found) == names, "precision": found.precision is None,
        "saved": all(torch.equal(saved[name], found.full(name)) for name in names),
    }  # fmt: skip


class Breaking:
    """Data that raise on the first rank, in one of their readings."""

    def __init__(self, batches: Batches, reading: int, after: int) -> None:
        self.batches, self.reading, self.after, self.readings = batches, reading, after, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.readings += 1
        return breaking(self.batches, self.after) if self.readings == self.reading else iter(self.batches)
