"""Two processes over gloo: both get the result of one process on all the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fishkern.statistics.shards import Shard

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch import distributed as dist, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
import fishkern as fk
from tests.support.own_estimators import OWN

torch.set_num_threads(1)

class Rows(Dataset):
    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = torch.randint(3, (size,), generator=generator)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, n):
        return self.x[n], self.y[n]

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
data = Rows(13)
options = dict(likelihood=fk.Classification())
OTHERS = {
    "rows": fk.GroupFisher(by="row"),
    "kronecker": fk.DiagonalKronecker(),
    "directions": fk.DirectionEnergy(importance="kronecker"),
    "several passes": fk.DirectionEnergy(layers_per_pass=1),
}
alone = {
    "exact": fk.estimate(model, DataLoader(data, 13), **options),
    "eight": fk.estimate(model, DataLoader(data, 13), max_examples=8, **options),
    "mc": fk.estimate(model, DataLoader(data, 13), fk.DiagonalFisher("mc", mc_samples=3), **options),
    **{name: fk.estimate(model, DataLoader(data, 13), own, parameters="*.weight", **options)
       for name, own in {**OWN, **OTHERS}.items()},
    "three": fk.estimate(model, DataLoader(Rows(3), 3), **options),
}
parts = [part for first in range(2) for part in zip(*(one.split(4) for one in data[first:13:2]), strict=True)]
of_the_same_batches = fk.estimate(model, parts, **options).precision
wide = nn.Sequential(nn.Linear(4, 600), nn.Tanh(), nn.Linear(600, 3))
one_by_one = [part for first in range(2) for part in zip(*(one.split(1) for one in data[first:12:2]), strict=True)]
# the batches as two ranks count them: each has every second one
ordered = [one_by_one[number // 2 + 6 * (number % 2)] for number in range(12)]
of_wide = fk.estimate(wide, ordered, **options).precision
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

def dealt(rows=data, batch_size=4):
    return DataLoader(rows, batch_size, sampler=DistributedSampler(rows, shuffle=False))

from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
prepared = lambda rows, batch_size: accelerator.prepare(DataLoader(rows, batch_size))
ddp = nn.parallel.DistributedDataParallel(model)
ddp(torch.randn(2, 4)).sum().backward()

def message(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def broken(model, batch):
    losses = fk.Classification().predictive(model, batch).losses()
    return losses / 0 if rank == 1 else losses

together = {
    "exact": fk.estimate(model, dealt(), **options),
    "ddp": fk.estimate(ddp, dealt(batch_size=3), **options),
    "eight": fk.estimate(model, dealt(batch_size=3), max_examples=8, **options),
    "mc": fk.estimate(model, dealt(batch_size=3), fk.DiagonalFisher("mc", mc_samples=3), **options),
    "sketched": fk.estimate(model, dealt(batch_size=1), fk.SketchedFisher(draws=1), **options),
    **{name: fk.estimate(model, dealt(batch_size=3), own, parameters="*.weight", **options)
       for name, own in {**OWN, **OTHERS}.items()},
    "accelerate": fk.estimate(model, prepared(data, 4), **options),
    "accelerate, few": fk.estimate(model, prepared(Rows(3), 4), **options),
    "own parts": fk.estimate(model, iter(DataLoader(torch.utils.data.Subset(data, range(rank, 13, 2)), 4)), **options),
    "one has none": fk.estimate(model, [data[:]] if rank == 0 else [], **options),
    "prepared": fk.estimate(model, dealt(), prepared=fk.prepare(ddp, next(iter(dealt())), **options)),
    "prepared, one on other data": fk.estimate(
        model, dealt(), prepared=fk.prepare(model, data[8:] if rank else next(iter(dealt())), **options)),
}
def tuned(batches, of=model, **changes):
    return fk.fish_tuning(of, batches, pool="model", k=7, heads=("2",), **{**options, **changes})

selections = [tuned(dealt(batch_size=3)), tuned([], order="random")]
other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
for parameter in other.parameters():
    parameter.data.mul_(1 + rank).add_(rank * torch.rand_like(parameter))
first = next(iter(dealt()))
ready = fk.prepare(model, first, **options)

def frozen_on_one():
    model[2].requires_grad_(rank == 0)
    try:
        fk.estimate(model, dealt(), prepared=ready)
    finally:
        model[2].requires_grad_(True)

failures = {
    "prepared on one": message(lambda: fk.estimate(model, dealt(), prepared=ready if rank else None, **options)),
    "frozen on one": message(frozen_on_one),
    "unprepared": message(lambda: fk.prepare(model, first, likelihood=broken)),
    "another batch": message(lambda: fk.estimate(
        model, [first if rank == 0 else (first[0], first[1].int())], prepared=ready)),
    "selection": message(lambda: tuned([], other, order="magnitude")),
    "nan": message(lambda: fk.estimate(model, dealt(), likelihood=broken)),
    "parameters": message(lambda: fk.estimate(
        model, dealt(), parameters=lambda name, _: name.startswith(str(2 * rank)), **options)),
    "recipes": message(lambda: fk.estimate(
        model, dealt(), fk.DiagonalFisher("mc" if rank else "empirical"), **options)),
    "likelihoods": message(lambda: fk.estimate(
        model, dealt(), likelihood=fk.Classification(reduction="sum" if rank else "mean"))),
    "checks": message(lambda: fk.estimate(model, dealt(), check=rank == 0, **options)),
    "not dealt": message(lambda: fk.estimate(model, DataLoader(data, 4), **options)),
    "after all that": message(lambda: fk.estimate(model, dealt(), **options)),
}
class Breaking(DataLoader):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if (rank, number) == (1, 1):
                raise ConnectionError("gone")
            yield batch

resumed = {}
for name, recipe in {"mc": fk.DiagonalFisher("mc"), "passes": fk.DirectionEnergy(layers_per_pass=1)}.items():
    given = dict(options, estimator=recipe, parameters="*.weight")
    whole = fk.estimate(model, dealt(batch_size=2), **given)
    given["checkpoint"] = folder / f"{name}.part"
    breaking = Breaking(data, 2, sampler=DistributedSampler(data, shuffle=False))
    failed = message(lambda: fk.estimate(model, breaking, **given))
    left = sorted(path.name for path in folder.glob(f"{name}.part*.rank-{rank}"))
    equal = fk.estimate(model, dealt(batch_size=2), **given) == whole
    resumed[name] = [failed, left, equal, len(list(folder.glob(f"{name}.part*.rank-{rank}")))]
expected = dict.fromkeys(["ddp", "accelerate", "own parts", "one has none"], "exact")
expected |= dict.fromkeys(["prepared", "prepared, one on other data"], "exact")
expected |= {"accelerate, few": "three", "sketched": "exact"}  # with one example in a batch a sketch is exact
report = {"failures": failures, "resumed": resumed, "precision": together["exact"].precision.plain()}
report["precision of one"] = of_the_same_batches.plain()
found = fk.estimate(wide, one_by_one[6 * rank : 6 * rank + 6], **options).precision
report["noise"] = [one.plain()["noise"] for one in (found, of_wide)]
report["entries"] = [
    [one.entries["0.weight"].means.tolist(), one.entries["0.weight"].standard_errors.tolist()]
    for one in (found, of_wide)
]
for name, found in together.items():
    truth = alone[expected.get(name, name)]
    gap = max((found.blocks[key] - one).abs().max() / one.abs().max() for key, one in truth.blocks.items())
    run = found.provenance["runs"][0]
    same = {key: covered.path for key, covered in found.coverage.items() if covered.path != "left out"}
    report[name] = [gap.item(), found.count, truth.count, run["examples"], run["ranks"], sorted(set(same.values()))]
report["likelihoods"] = sorted({one.provenance["definition"]["likelihood"] for one in together.values()})
report["selected"] = [[s.count, *(s.indices("0.weight").tolist())] for s in selections]
report["bits"] = sum(value.double().sum().item() for value in together["exact"].values())
(folder / f"{rank}.json").write_text(json.dumps(report))
dist.destroy_process_group()  # its threads, still running as the interpreter exits, would now and then abort it
"""
# The imports take longer than the program, so both ranks are forked from one process after them.
LAUNCH = """
import os, signal, sys
from pathlib import Path
import accelerate, fishkern, torch

program, folder = sys.argv[1], Path(sys.argv[2])
other = os.fork()
rank = 0 if other else 1
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # which accelerate looks for
try:
    exec(program, {"rank": rank, "folder": folder})
except BaseException:
    if other:
        os.kill(other, signal.SIGKILL)
    raise
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, PROGRAM, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | launched,
        cwd=Path(__file__).parents[2],
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "case",
    [
        "exact",
        "ddp",
        "eight",
        "mc",
        "sketched",
        "rows",
        "kronecker",
        "directions",
        "several passes",
        "factors",
        "norm",
        "signed",
        "accelerate",
        "accelerate, few",
        "own parts",
        "one has none",
        "prepared",
        "prepared, one on other data",
    ],
)
def test_two_ranks_give_what_one_gives(reports, case):
    """13 examples do not divide by two: an example that the samplers repeat counts once."""
    for report in reports:
        gap, count, count_alone, examples, ranks, paths = report[case]
        assert gap < 1e-5
        assert count == count_alone == examples
        assert ranks == 2
        assert paths == ["sketch" if case == "sketched" else "fused"]


def test_the_ranks_hold_the_same_bits(reports):
    assert reports[0]["bits"] == reports[1]["bits"]


def test_the_precision_is_that_of_the_batches_of_all_ranks(reports):
    for report in reports:
        ours, alone = report["precision"], report["precision of one"]
        assert (ours["count"], ours["batches"]) == (alone["count"], alone["batches"]) == (13, 4)
        assert ours["deviation"] == pytest.approx(alone["deviation"], rel=1e-4)
        noise, noise_alone = (dict(one) for one in report["noise"])
        assert noise == pytest.approx(noise_alone, rel=1e-3)
        assert min(noise) == 0.02  # of 4,203 entries
        (means, errors), (means_alone, errors_alone) = report["entries"]
        assert means == pytest.approx(means_alone, rel=1e-4, abs=1e-12)
        assert errors == pytest.approx(errors_alone, rel=1e-3, abs=1e-9)


def test_the_ranks_say_the_same_of_the_likelihood(reports):
    """Also one that has no data."""
    assert [report["likelihoods"] for report in reports] == [["Classification(reduction='mean')"]] * 2


def test_the_ranks_select_the_same(reports):
    assert reports[0]["selected"] == reports[1]["selected"]
    assert all("have different selections" in report["failures"]["selection"] for report in reports)


def test_a_failure_ends_all(reports):
    one, other = (report["failures"] for report in reports)
    assert one["nan"].startswith("RuntimeError: rank 1 failed with ValueError: the loss of example 1 ")
    assert other["nan"].startswith("ValueError: the loss of example 1 ")
    assert "differ in the parameters to estimate" in one["parameters"]
    assert "differ in the parameters to estimate" in other["parameters"]
    for what, named in {"recipes": "the estimator", "likelihoods": "the likelihood", "checks": "check"}.items():
        assert one[what].startswith(f"RuntimeError: rank 0 and rank 1 differ in {named}: ")
        assert other[what].startswith(f"RuntimeError: rank 1 and rank 0 differ in {named}: ")
    assert "would see all of this DataLoader's data" in one["not dealt"]
    assert all("differ in whether a prepared pass is given" in report["prepared on one"] for report in (one, other))
    assert one["frozen on one"].startswith("RuntimeError: rank 1 failed with ValueError: this pass was prepared for")
    assert other["frozen on one"].startswith("ValueError: this pass was prepared for something else: requires_grad of")
    assert one["unprepared"].startswith("RuntimeError: rank 1 failed with ValueError: ")
    assert one["another batch"].startswith("RuntimeError: rank 1 failed with ValueError: this pass was prepared for")
    assert "the entry '1' was a tensor of int64 with 1 axes and is a tensor of int32" in other["another batch"]
    assert one["after all that"] is other["after all that"] is None


def test_ranks_go_on_from_their_checkpoints(reports):
    """Rank 1 fails in its second batch, when rank 0 is further or has ended; each has a file of its own."""
    for rank, report in enumerate(reports):
        for name, first in (("mc", f"mc.part.rank-{rank}"), ("passes", f"passes.part.pass-1.rank-{rank}")):
            failed, left, equal, afterwards = report["resumed"][name]
            assert (
                failed == "ConnectionError: gone" if rank else failed.startswith("RuntimeError: rank 1 failed with Con")
            )
            assert left == [first]
            assert equal
            assert not afterwards


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("limit", [0, 1, 7, 30])
def test_the_shards_of_all_ranks_are_the_data(batch_size, count, limit):
    """Every place once, whatever a rank holds beyond the limit."""
    found = []
    for rank in range(count):
        shard = Shard(rank, count, limit, batch_size)
        N = batch_size or 2
        held = [place for batch in range(40) for place in shard.places(batch, batch * N, N)]
        counted = [place for place in held if place < limit]
        assert len(counted) == shard.size
        found += counted
    assert sorted(found) == list(range(limit))
