"""What each process of ``test_select_on_ranks.py`` runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fishkern as fk
from fishkern.files import Region, StoredTensor
from fishkern.selection import _topk_on_ranks
from fishkern.selection.shards import Shards

CASES: dict[str, Callable[[], Any]] = {}
rank, world, folder = 0, 1, Path()
# Rows that do not divide by the ranks, and fewer rows than ranks.
SHAPES = {
    "embed.weight": (50, 8), "layers.0.bias": (31,), "layers.0.weight": (13, 12), "layers.1.conv.weight": (6, 4, 3),
    "layers.1.weight": (64, 36), "head.weight": (2, 12), "empty": (0, 4),
}  # fmt: skip
TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def listed(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = run
        return run

    return listed


def scores(kind: str = "random", shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """The whole scores, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    of: dict[str, Callable[[Tensor], Tensor]] = {
        "random": lambda one: one,
        "many equal": lambda one: (one * 4).floor() / 4,
        "mostly zero": lambda one: torch.where(one > 0.97, one, torch.zeros(())),
        "all equal": torch.ones_like,
        "negative": lambda one: ((one - 0.5) * 8).round(),
        "bfloat16": lambda one: one.bfloat16(),
        "float64": lambda one: one.double() / 3,
        "infinite": lambda one: torch.where(one > 0.9, torch.inf, torch.where(one < 0.1, -torch.inf, -0.0 * one)),
    }
    return {name: of[kind](one) for name, one in values.items()}


KINDS = ["random", "many equal", "mostly zero", "all equal", "negative", "bfloat16", "float64", "infinite"]
COUNTS = [1, 17, TOTAL // 3, TOTAL - 1, TOTAL]


@cache  # each one has groups and threads of its own
def mesh_of(layout: str) -> DeviceMesh:
    if layout in ("replicated", "grid", "shards of rows", "shards of columns", "teams"):
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("one", "other"))
    return init_device_mesh("cpu", (world,))


def placed(layout: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores as each rank holds them: parts, and in a mixed layout every other one whole."""

    def placements(ndim: int) -> list[Any]:
        last = Shard(min(1, ndim - 1))
        return {"columns": [last], "replicated": [Replicate(), Shard(0)], "grid": [Shard(0), last]}.get(
            layout, [Shard(0)]
        )

    if layout.startswith("shards of"):
        return fully_sharded(whole, columns=layout.endswith("columns"))
    if layout == "teams":  # each of which holds all, as tensor parallel splits replicas
        split = {name: distribute_tensor(one, mesh_of(layout)["other"], [Shard(0)]) for name, one in whole.items()}
        return {name: one if name.endswith("0.bias") else split[name] for name, one in whole.items()}
    return {
        name: one
        if layout == "mixed" and number % 2
        else distribute_tensor(one, mesh_of(layout), placements(one.ndim), src_data_rank=None)
        for number, (name, one) in enumerate(whole.items())
    }


def fully_sharded(whole: Mapping[str, Tensor], *, columns: bool) -> dict[str, Tensor]:
    """What FSDP2 makes of parameters that tensor parallel has split, most of them."""
    module, mesh = nn.Module(), mesh_of("grid")
    names = {name: name.replace(".", "-") for name in whole}
    for name, one in whole.items():
        if name != "layers.1.weight":  # FSDP2 alone shards this one, over the axis that it has
            one = distribute_tensor(one, mesh["other"], [Shard(min(int(columns), one.ndim - 1))], src_data_rank=None)
        module.register_parameter(names[name], nn.Parameter(one, requires_grad=False))
    fully_shard(module, mesh=mesh["one"])
    return {name: getattr(module, names[name]).detach() for name in whole}


def own_part(one: Tensor) -> Tensor:
    return one.to_local() if isinstance(one, DTensor) else one


def numbers(layout: str) -> dict[str, Tensor]:
    """The flat indices that this rank holds, as torch itself distributes them."""
    flat = {name: torch.arange(torch.Size(shape).numel()).view(shape) for name, shape in SHAPES.items()}
    return {name: own_part(one).reshape(-1) for name, one in placed(layout, flat).items()}


def is_own_part(selection: fk.Selection, expected: Mapping[str, Tensor], layout: str) -> bool:
    """Whether this rank has those of the expected indices that it holds, ascending."""
    return all(
        torch.equal(selection.indices(name).long(), expected[name][torch.isin(expected[name], held)])
        for name, held in numbers(layout).items()
    )


def oracle(whole: Mapping[str, Tensor], k: int, order: str) -> dict[str, Tensor]:
    """The first ``k`` by a stable sort of all scores in a row."""
    flat = torch.cat([one.reshape(-1).double() for one in whole.values()]) + 0.0
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.sort(descending=order == "largest", stable=True).indices[:k]] = True
    parts = chosen.split([one.numel() for one in whole.values()])
    return {name: part.nonzero().view(-1) for name, part in zip(whole, parts, strict=True)}


def quietly(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        result = run()
    return result, [str(one.message) for one in noted if one.category is UserWarning]


def top(layout: str, kinds: list[str] = KINDS, ks: list[int] = COUNTS) -> list[str]:
    """Compare with the oracle; what differs."""
    differing = []
    for kind in kinds:
        whole = scores(kind)
        parts = placed(layout, whole)
        for order in ("largest", "smallest"):
            for k in ks:
                selection, _ = quietly(lambda: fk.select(parts, fk.GlobalTopK(k, order=order)))  # noqa: B023
                expected = oracle(whole, k, order)
                counts = {name: len(one) for name, one in expected.items()}
                if not is_own_part(selection, expected, layout) or selection.counts != counts or selection.k != k:
                    differing.append(f"{kind}, {order}, {k}")
    return differing


LAYOUTS = ["rows", "columns", "mixed", "replicated", "grid", "shards of rows", "shards of columns", "teams"]
SOME, FEW = ["many equal", "negative", "bfloat16"], [1, TOTAL // 3, TOTAL - 1]
CASES |= {f"top of {layout}": lambda layout=layout: top(layout, SOME, FEW) for layout in LAYOUTS}
CASES["all kinds"] = lambda: top("rows")

VECTORS = ["*.bias"]
RULES: dict[str, fk.Rule] = {
    "global, density": fk.GlobalTopK(density=0.1, always="head.*", never="embed.*"),
    "per tensor": fk.PerTensorTopK(density=0.1),
    "per tensor, smallest": fk.PerTensorTopK(density=0.3, order="smallest", never="embed.*"),
    "per row": fk.PerRowTopK(2, never=VECTORS),
    "per row, smallest": fk.PerRowTopK(density=0.3, order="smallest", always=VECTORS),
    "n of m": fk.NofM(1, 2, never=VECTORS),
    "random": fk.Random(density=0.05, seed=3),
    "random, most": fk.Random(density=0.8, seed=3, always="embed.*"),
    "contribution": fk.ContributionTopK(top=0.2, never=VECTORS),
    "contribution, by entries": fk.ContributionTopK(top=0.3, share="count-per-entry", by="parameter", never=VECTORS),
    "contribution, sums": fk.ContributionTopK(top=0.2, share="sum", order="smallest", always=VECTORS),
}


def rules(layout: str, names: list[str], kinds: tuple[str, ...] = ("many equal", "mostly zero")) -> list[str]:
    """Compare with what one process selects of the whole, its provenance and its warnings; what differs."""
    differing = []
    for kind in kinds:
        whole = scores(kind)
        parts = placed(layout, whole)
        for name in names:
            expected, told = quietly(lambda: fk.select(whole, RULES[name]))  # noqa: B023
            found, noted = quietly(lambda: fk.select(parts, RULES[name]))  # noqa: B023
            alike = is_own_part(found, {key: expected.indices(key).long() for key in whole}, layout)
            alike &= found.counts == expected.counts and found.provenance == expected.provenance and noted == told
            if not alike or found.whole != expected.whole:
                differing.append(f"{kind}, {name}")
    return differing


CASES |= {f"rules on {layout}": lambda layout=layout: rules(layout, list(RULES)) for layout in ("rows", "mixed")}
CASES["rules on replicated"] = lambda: rules("replicated", list(RULES))
WITHOUT_ROWS = [name for name in RULES if not name.startswith(("per row", "n of m", "contribution"))]
CASES["groups in columns"] = lambda: rules("columns", ["n of m"])  # even numbers of columns on two ranks
CASES["rules on columns"] = lambda: rules("columns", WITHOUT_ROWS)


def contract(layout: str) -> list[str]:
    """What a selection on shards gives, against the ordinary one."""
    whole = scores("many equal")
    parts, rule = placed(layout, whole), fk.GlobalTopK(density=0.2, always="layers.1.conv.*")
    one, other = fk.select(parts, rule), fk.select(parts, fk.Random(density=0.3, seed=1))
    all_of_one, all_of_other = fk.select(whole, rule), fk.select(whole, fk.Random(density=0.3, seed=1))
    regions = {name: one.region(name) for name in one.names}
    masks = placed(layout, {name: all_of_one.mask(name) for name in whole})

    def same(found: fk.Selection, expected: fk.Selection) -> bool:
        indices = {name: expected.indices(name).long() for name in expected.names}
        everywhere = {name: held for name, held in numbers(layout).items() if name in expected}
        own = all(
            torch.equal(found.indices(name).long(), indices[name][torch.isin(indices[name], held)])
            for name, held in everywhere.items()
        )
        return own and found.counts == expected.counts and found.gathered() == expected

    def short(name: str) -> str:
        return name.removesuffix(".weight")

    checks = {
        "numbers": (one.count, one.total, one.density, one.names, one.whole, dict(one.shapes), repr(one)[9:])
        == (
            all_of_one.count, all_of_one.total, all_of_one.density, all_of_one.names, all_of_one.whole,
            dict(all_of_one.shapes), repr(all_of_one)[9:],
        ),
        "masks": all(torch.equal(one.mask(name), own_part(mask)) for name, mask in masks.items()),
        "sizes": all(regions[name].sizes == own_part(part).shape for name, part in parts.items()),
        "gathered": one.gathered() == all_of_one and one.gathered().provenance == all_of_one.provenance,
        "union": same(one | other, all_of_one | all_of_other),
        "intersection": same(one & other, all_of_one & all_of_other),
        "difference": same(one - other, all_of_one - all_of_other),
        "restricted": same(one.restrict("layers.*") | other.restrict("head*"),
                           all_of_one.restrict("layers.*") | all_of_other.restrict("head*")),
        "renamed": one.rename(short).gathered() == all_of_one.rename(short) and one.rename(short).counts["embed"] > 0,
        "provenance": one.with_provenance(a=1).gathered().provenance == {**all_of_one.provenance, "a": 1}
        and one.with_provenance(a=1) == one,
        "overlap": one.overlap(other) == all_of_one.overlap(all_of_other),
        "overlaps": one.overlap_by_parameter(other) == all_of_one.overlap_by_parameter(all_of_other),
        "equal": one == fk.select(parts, rule) and one != other and one != all_of_one,
        "fits": one.check(list(parts.items())) is None,
    }  # fmt: skip
    return [name for name, holds in checks.items() if not holds]


CASES |= {f"contract of {layout}": lambda layout=layout: contract(layout) for layout in LAYOUTS}


def saved(layout: str) -> dict[str, Any]:
    """Statistics of fixed values, and the files of what is selected of them."""
    digests = {}
    for number, rule in enumerate([fk.GlobalTopK(density=0.1, always="layers.0.bias"), fk.Random(density=0.01)]):
        statistics = fk.Statistics(placed(layout, scores("many equal")), count=3)
        path = fk.select(statistics, rule).save(folder / f"{layout}-{number}")
        alone = fk.select(fk.Statistics(scores("many equal"), count=3), rule)
        alone.save(folder / f"alone-{layout}-{number}-{rank}")
        same = path.read_bytes() == (folder / f"alone-{layout}-{number}-{rank}.safetensors").read_bytes()
        digests[str(number)] = same and fk.Selection.load(path) == alone
    return digests


CASES |= {f"files of {layout}": lambda layout=layout: saved(layout) for layout in LAYOUTS}


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@dataclass(frozen=True)
class First(fk.Rule):
    def choose(self, scores: Any, total: int, backend: Any = None) -> Any:
        return {name: torch.arange(1) for name in scores}


@case("failures")
def _() -> dict[str, str]:
    whole = scores()
    parts = placed("rows", whole)

    def with_nan(*at: tuple[str, int]) -> dict[str, Tensor]:
        changed = {name: one.clone() for name, one in whole.items()}
        for name, place in at:
            changed[name].view(-1)[place] = torch.nan
        return changed

    def top(these: Any, **options: Any) -> Any:
        return fk.select(these, fk.GlobalTopK(k=9), **options)

    def failing_at(number: int) -> str:
        calls, pieces = [0], Shards.pieces

        def fails(shards: Shards, name: str) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] == number:
                raise MemoryError("no room")
            return pieces(shards, name)

        with patch.object(Shards, "pieces", fails):
            return message(lambda: top(parts))

    def whole_on_each(value: float) -> dict[str, Tensor]:
        return {**parts, "layers.0.weight": torch.full((13, 12), value)}

    def by_default() -> None:
        with fk.use_backend("triton"):
            top(parts)

    broken = with_nan(("layers.1.weight", 64 * 36 - 1), ("layers.1.weight", 36 * 40), ("layers.0.bias", 29))
    columns, sums = placed("columns", whole), DTensor.from_local(torch.rand(4, 4), mesh_of("rows"), [Partial()])
    found, expected = fk.select(parts, fk.GlobalTopK(k=9)), fk.select(whole, fk.GlobalTopK(k=9))
    messages = {
        "nan": message(lambda: top(placed("rows", broken))),
        "nan alone": message(lambda: top(broken)),
        "nan in columns": message(lambda: top(placed("columns", with_nan(("embed.weight", 8 * 49 + 7))))),
        "nan in a row": message(lambda: fk.select(placed("rows", broken), fk.PerRowTopK(1, never=["*.bias"]))),
        **{f"memory {number}": failing_at(number) for number in (1, 9, 17, 24, 31)},
        "another k": message(lambda: fk.select(parts, fk.GlobalTopK(k=3 + rank))),
        "another name": message(lambda: top({f"{name}.{rank}": one for name, one in parts.items()})),
        "a pattern": message(lambda: fk.select(parts, fk.GlobalTopK(k=3, never="lm*" if rank == 1 else "head*"))),
        "no rule": message(lambda: fk.select(parts, "top" if rank == 1 else fk.GlobalTopK(k=3))),
        "other values": message(lambda: top(whole_on_each(2.0 + rank))),
        "own rule": message(lambda: fk.select(parts, First())),
        "too many": message(lambda: fk.select(parts, fk.GlobalTopK(k=TOTAL + 1))),
        "density": message(lambda: fk.select(parts, fk.ContributionTopK(density=0.2, never=VECTORS))),
        "rows in columns": message(lambda: fk.select(columns, fk.PerRowTopK(1, never=VECTORS))),
        "groups in columns": message(lambda: fk.select(columns, fk.NofM(1, 4, never=VECTORS))),
        "partial sums": message(lambda: top({"w": sums})),
        "triton": message(lambda: top(parts, backend="triton")),
        "triton by default": message(by_default),
        "negative sums": message(
            lambda: fk.select(
                placed("rows", {"w": torch.arange(-9.0, 3.0).view(6, 2)}), fk.ContributionTopK(top=1.0, share="sum")
            )
        ),
        "with a whole one": message(lambda: found | expected),
        "a whole one with it": message(lambda: expected.union(found)),
        "in two ways": message(lambda: found & top(columns)),
        "another model": message(lambda: found.check(list(columns.items()))),
        "a whole model": message(lambda: found.check(list(whole.items()))),
        "a full disk": message(lambda: found.save(folder / "nowhere" / "file")),
    }
    return messages | {"afterwards": str(top(parts).gathered() == expected)}


@case("bytes")
def _() -> list[int]:
    """Bytes that a selection sends: of few scores, of many, and of many at random."""

    def sent(shape: tuple[int, int], kind: str) -> int:
        parts = placed("rows", scores(kind, {"a": shape, "b": shape}))
        with _Sent() as counted:
            fk.select(parts, fk.GlobalTopK(k=50_000))
        return counted.bytes

    return [sent((200, 200), "many equal"), sent((600, 400), "many equal"), sent((600, 400), "random")]


class _Sent(TorchDispatchMode):
    """Counts the bytes of what collective operations take."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return function(*args, **(kwargs or {}))


@case("estimated")
def _() -> dict[str, bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    inputs, labels = torch.randn(4 * world, 7), torch.arange(4 * world) % 4
    fully_shard(model, mesh=mesh_of("rows"))
    own = [(inputs[rank::world], labels[rank::world])]
    statistics = fk.estimate(model, iter(own), likelihood=fk.Classification())
    stored = fk.Statistics.load(statistics.save(folder / "statistics"), lazy=True)
    read, spans = [0], StoredTensor.spans

    def counting(tensor: StoredTensor, *args: Any, **options: Any) -> Any:
        for piece in spans(tensor, *args, **options):
            read[0] += len(piece)
            yield piece

    with patch.object(StoredTensor, "spans", counting):
        loaded = stored.sharded_as(model)
    own_entries = sum(one.to_local().numel() for one in statistics.values())
    alike = all(
        torch.equal(loaded[name].to_local(), one.to_local()) and loaded[name].placements == one.placements
        for name, one in statistics.items()
    )
    selection = fk.select(statistics, fk.GlobalTopK(density=0.3))
    selection.check(model)
    with torch.no_grad():
        model(own[0][0])  # which leaves the model whole
    left_whole = any(not isinstance(one, DTensor) for one in model.parameters())
    selection.check(model)
    whole = fk.select(statistics.whole(), fk.GlobalTopK(density=0.3))
    return {
        "equal": selection.gathered() == whole,
        "provenance": selection.provenance == whole.provenance,
        "loaded": alike and fk.select(loaded, fk.GlobalTopK(density=0.3)) == selection,
        "own part read": read[0] == own_entries,
        "left whole": left_whole,
    }


def planted(target: Any, name: str, wrong: Callable[..., Any], layout: str) -> bool:
    """Whether an error is seen, by what differs or by an exception that all ranks raise."""
    with patch.object(target, name, wrong):
        try:
            return bool(top(layout, ["many equal"], [TOTAL // 3]))
        except (RuntimeError, ValueError, IndexError):
            return True


_compared = _topk_on_ranks._Ascending.compared


@case("ties counted twice")
def _() -> bool:
    def twice(ascending: Any, last: float) -> Tensor:
        return _compared(ascending, last) * torch.tensor([1, 2])

    return planted(_topk_on_ranks._Ascending, "compared", twice, "rows")


CASES |= {
    "replicas counted twice": lambda: planted(Shards, "counted", lambda shards: list(shards), "replicated"),
    "numbers of the part": lambda: planted(Region, "in_whole", lambda region, places: places, "rows"),
    "own scores alone": lambda: planted(Shards, "summed", lambda shards, count: count(), "rows"),
    "equal ones of each rank": lambda: planted(_topk_on_ranks, "nth_smallest_index", _own_index, "rows"),
}


def _own_index(walk: Any, n: int, numel: int, total: Any) -> int:
    return torch.cat([torch.zeros(n, dtype=torch.int64), *walk()])[-n].item()
