"""An interrupted estimate goes on from its checkpoint to the bits of one that was not, or says why it cannot."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fishkern as fk
from fishkern.statistics.checkpoint import Checkpoint, unfinished
from fishkern.statistics.likelihood_identity import identity_of
from tests.support.forked import forked
from tests.support.own_estimators import OWN

ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc", mc_samples=2, seed=3),
    "type-2": fk.DiagonalFisher("type-2"),
    "batch": fk.DiagonalFisher(unit="batch"),
    "sketched": fk.SketchedFisher(2),
    "rows": fk.GroupFisher(by="row"),
    "words": fk.GroupFisher(by=lambda name: name[0], fisher_type="mc"),
    "kronecker": fk.DiagonalKronecker(),
    "directions": fk.DirectionEnergy(importance="kronecker"),
    "passes": fk.DirectionEnergy(basis="power", importance="exact", layers_per_pass=1),
    **OWN,
}
SIZES = (1, 3, 2, 3, 1, 2)  # the second has a plan of its own: one example does not show whose rows are whose


class Broken(Exception):
    """Raised by data."""


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(*sizes: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)) for N in sizes or SIZES
    ]


def breaking(batches: list, after: int):
    yield from batches[:after]
    raise Broken


def of(kind: str, model: nn.Module, batches, **options) -> fk.statistics.Held:
    named = {} if kind in ("empirical", "batch") else {"parameters": "*.weight"}
    return fk.estimate(model, batches, ESTIMATORS[kind], **{"likelihood": fk.Classification(), **named, **options})


def assert_same(one: fk.statistics.Held, other: fk.statistics.Held) -> None:
    assert one == other  # values to the bit, counts, provenance and coverage
    assert list(one) == list(other)


@pytest.fixture
def part(tmp_path) -> Path:
    return tmp_path / "fisher.part"


def interrupt(part: Path, after: int, kind: str = "empirical", **options) -> None:
    """Let the data raise after some batches of the usual ones."""
    batches = (breaking(data(), after) for _ in range(1))
    with pytest.raises(Broken):
        of(kind, small(), next(batches), checkpoint=part, **options)


class Breaking:
    """Data that can be read again, and raises in the given reading after some batches."""

    def __init__(self, reading: int, after: int) -> None:
        self.reading, self.after, self.readings = reading, after, 0

    def __iter__(self):
        self.readings += 1
        yield from breaking(data(), self.after) if self.readings == self.reading else data()


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_data_that_raise_twice_end_in_the_same_bits(kind, part):
    whole = of(kind, small(), data())
    for after in (1, 4):
        with pytest.raises(Broken):
            of(kind, small(), Breaking(1, after), checkpoint=part)
    assert_same(of(kind, small(), data(), checkpoint=part), whole)
    assert os.listdir(part.parent) == []


def test_a_pass_that_has_ended_is_not_run_again(part, monkeypatch):
    whole = of("passes", small(), data())
    with pytest.raises(Broken):
        of("passes", small(), Breaking(2, 3), checkpoint=part)
    assert sorted(os.listdir(part.parent)) == ["fisher.part.pass-1", "fisher.part.pass-2"]
    run, counted = nn.Module.__call__, []

    def call(self, x):
        counted.append(len(x))
        return run(self, x)

    monkeypatch.setattr(nn.Sequential, "__call__", call, raising=False)
    batches = data()
    of("passes", small(), batches)
    expected = len(counted)
    counted.clear()
    assert_same(of("passes", small(), batches, checkpoint=part), whole)
    # of the first pass only the two batches that make its plans, of the second those and the four that were left
    assert len(counted) == expected - 4 - 1
    assert os.listdir(part.parent) == []


class Interruptible(nn.Sequential):
    """Control-C is pressed in its given run."""

    at: int | None = None
    runs = 0

    def forward(self, x):
        type(self).runs += 1
        if self.runs == self.at:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("save_every", [0, 1000])
def test_an_interrupt_within_a_batch_costs_what_came_after_the_last_write(part, monkeypatch, save_every):
    monkeypatch.setattr(Interruptible, "runs", 0)

    def run(**options):
        return of("mc", Interruptible(*small()), data(), **options)

    whole, runs = run(), Interruptible.runs
    monkeypatch.setattr(Interruptible, "runs", 0)
    monkeypatch.setattr(Interruptible, "at", runs - 1)  # in the last batch but one
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=part, save_every=save_every)
    monkeypatch.setattr(Interruptible, "at", None)
    assert part.exists() == (save_every == 0)
    if part.exists():
        held = unfinished(part)
        assert held.batches == len(SIZES) - 2
        assert held.examples == held.units == sum(SIZES[:-2])
    assert_same(run(checkpoint=part), whole)
    assert not part.exists()


class Branching(nn.Module):
    """On inputs that ask for it a second module runs, which shares the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        y = self.first(x)
        return y + self.second(x.square()) if bool((x > 5).any()) else y


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("forgetful", [False, True])
def test_what_an_earlier_batch_has_shown_is_shown_again(part, monkeypatch, forgetful):
    """Without a second run of that batch (the planted error) the parameter would have another path."""
    batches = data(3, 3, 3, 3)
    batches[1][0][:, 2] = 6.0
    options = dict(likelihood=fk.Classification(), checkpoint=part)
    whole = fk.estimate(Branching(), batches, **options)
    with pytest.raises(Broken):
        fk.estimate(Branching(), breaking(batches, 3), **options)
    held = Checkpoint.read(part)
    assert held.planned == [0, 1]
    if forgetful:
        monkeypatch.setattr(
            Checkpoint, "read", lambda path: Checkpoint(held.facts, held.likelihood, held.place, [0], held.tensors)
        )
    resumed = fk.estimate(Branching(), batches, **options)
    assert (resumed == whole) is not forgetful
    assert whole.coverage["first.weight"].path == "loop"


class Noisy(nn.Module):
    """Adds noise that torch's generator draws, in evaluation as well; the same noise for all examples of a run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) * (1 + torch.rand(1))


def test_what_the_model_draws_goes_on(part):
    options = dict(likelihood=fk.Classification(), estimator=fk.DiagonalFisher(unit="batch"))
    model = Noisy()
    torch.manual_seed(5)
    whole = fk.estimate(model, data(), **options)
    torch.manual_seed(5)
    with pytest.raises(Broken):
        fk.estimate(model, breaking(data(), 3), checkpoint=part, **options)
    torch.manual_seed(6)  # another process has another state
    assert_same(fk.estimate(model, data(), checkpoint=part, **options), whole)
    assert fk.estimate(model, data(), **options) != whole


def test_drawn_losses_go_on(part):
    def losses(model, batch, draws):
        x, y = batch
        return F.cross_entropy(model(x + draws.randn(4)), y, reduction="none")

    options = dict(likelihood=fk.Drawn(losses, seed=2))
    whole = fk.estimate(small(), data(), **options)
    with pytest.raises(Broken):
        fk.estimate(small(), breaking(data(), 3), checkpoint=part, **options)
    with pytest.raises(ValueError, match=r"likelihood was Drawn\(.*seed=2\) and is .*seed=3\)"):
        fk.estimate(small(), data(), checkpoint=part, likelihood=fk.Drawn(losses, seed=3))
    assert_same(fk.estimate(small(), data(), checkpoint=part, **options), whole)


def test_a_prepared_pass_goes_on(part):
    model = small()
    prepared = fk.prepare(model, data()[0], likelihood=fk.Classification())
    whole = fk.estimate(model, data(), prepared=prepared)
    with pytest.raises(Broken):
        fk.estimate(model, breaking(data(), 3), prepared=prepared, checkpoint=part)
    assert_same(fk.estimate(model, data(), prepared=prepared, checkpoint=part), whole)


def test_a_call_with_a_limit_goes_on(part):
    whole = of("empirical", small(), data(), max_examples=8)
    interrupt(part, 3, max_examples=8)
    assert_same(of("empirical", small(), data(), checkpoint=part, max_examples=8), whole)


# What another call differs in: the model, the arguments, and what the message says.
OTHERS = {
    "weights": (lambda: changed(small()), {}, r"the digest of 0\.bias was \w+ and is \w+"),
    "parameters": (small, {"parameters": "*.bias"}, r"the statistic of 0\.weight was torch.float32 .* and is absent"),
    "settings": (small, {"estimator": fk.DiagonalFisher("mc", mc_samples=2, seed=4)}, r"estimator was .*'seed': 3"),
    "estimator": (small, {"estimator": fk.SketchedFisher()}, r"DiagonalFisher.* and is .*SketchedFisher"),
    "check": (small, {"check": False}, r"the argument check was True and is False"),
    "limit": (small, {"max_examples": 9}, r"the argument max_examples was None and is 9"),
    "layers": (lambda: nn.Sequential(*small()[:1], nn.ReLU(), *small()[2:]), {}, r"module 1 was Tanh and is ReLU"),
}


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[0].bias[2] = torch.nextafter(model[0].bias[2], torch.tensor(9.0))
    return model


@pytest.mark.parametrize("what", OTHERS)
def test_another_call_is_refused_by_name_and_the_checkpoint_stays(part, what):
    mc = ESTIMATORS["mc"]
    options = dict(estimator=mc, likelihood=fk.Classification(), checkpoint=part)
    with pytest.raises(Broken):
        fk.estimate(small(), breaking(data(), 3), **options)
    held = part.read_bytes()
    model, others, message = OTHERS[what]
    with pytest.raises(ValueError, match=message) as refused:
        fk.estimate(model(), data(), **options | others)
    assert "Make the call that fisher.part is of, or delete it to begin at the first batch." in str(refused.value)
    assert part.read_bytes() == held
    assert_same(fk.estimate(small(), data(), **options), fk.estimate(small(), data(), **options | {"checkpoint": None}))


def losses_at(scale: float):
    def losses(model, batch):
        return scale * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return losses


def test_another_likelihood_is_refused(part):
    interrupt(part, 3)
    message = r"the argument likelihood was Classification.* and is function losses_at.*losses with the code"
    with pytest.raises(ValueError, match=message):
        of("empirical", small(), data(), checkpoint=part, likelihood=losses_at(1.0))


def test_a_function_of_the_same_name_with_another_code_is_refused(part):
    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none").square()

    def counting(model, batch):
        nonlocal calls
        calls += 1
        return losses_at(1.0)(model, batch)

    calls = 0
    losses.__qualname__ = losses_at(1.0).__qualname__
    interrupt(part, 3, likelihood=losses_at(1.0))
    for other in (losses_at(2.0), losses):
        assert identity_of(partial(other)) != identity_of(partial(losses_at(1.0)))
        assert identity_of(cache(other)) != identity_of(cache(losses_at(1.0)))
        with pytest.raises(
            ValueError, match=r"likelihood was function (\S+) with the code \w+ and is function \1 with"
        ):
            of("empirical", small(), data(), checkpoint=part, likelihood=other)
    whole = of("empirical", small(), data(), likelihood=losses_at(1.0))
    assert_same(of("empirical", small(), data(), checkpoint=part, likelihood=losses_at(1.0)), whole)
    interrupt(part, 3, likelihood=counting)
    assert of("empirical", small(), data(), checkpoint=part, likelihood=counting).count == sum(SIZES)


def test_the_first_batch_that_differs_is_named(part):
    interrupt(part, 5)
    swapped = data()
    swapped[2:4] = swapped[3], swapped[2]
    with pytest.raises(ValueError, match=r"batch 2 is not the one that .*fisher.part has counted.*Seed the sampler"):
        of("empirical", small(), swapped, checkpoint=part)
    shuffled = DataLoader(TensorDataset(*map(torch.cat, zip(*data(), strict=True))), 2, shuffle=True)
    with pytest.raises(ValueError, match="batch 0 is not the one"):
        of("empirical", small(), shuffled, checkpoint=part)
    later = data()
    later[5][1][0] = (later[5][1][0] + 1) % 3  # what was not counted may be anything
    assert of("empirical", small(), later, checkpoint=part).count == sum(SIZES)


def test_data_that_end_too_early_are_refused(part):
    interrupt(part, 5)
    with pytest.raises(ValueError, match=r"has counted 5 batches, and the data ends after 4"):
        of("empirical", small(), data()[:4], checkpoint=part)


def test_a_seeded_sampler_gives_the_same_order(part):
    rows = TensorDataset(*map(torch.cat, zip(*data(), strict=True)))

    def loader():
        return DataLoader(rows, 3, shuffle=True, generator=torch.Generator().manual_seed(7))

    whole = of("mc", small(), loader())
    with pytest.raises(Broken):
        of("mc", small(), breaking(list(loader()), 2), checkpoint=part)
    assert_same(of("mc", small(), loader(), checkpoint=part), whole)


class Stateful:
    """A loader that knows where it is, and whose batches carry noise from torch's generator."""

    def __init__(self, batches: list, fails_at: int | None = None) -> None:
        self.batches, self.fails_at, self.given, self.begin = batches, fails_at, [], 0

    def __iter__(self):
        self.at, self.begin = self.begin, 0
        torch.rand(3)  # as DataLoader draws a seed for its workers
        return self.read()

    def read(self):
        while self.at < len(self.batches):
            x, y = self.batches[self.at]
            self.given.append(self.at)
            self.at += 1
            noise = torch.randn(x.shape) / 10
            if self.at == self.fails_at:  # when it has moved on already
                raise Broken
            yield x + noise, y

    def state_dict(self):
        return {"at": self.at, "of": [len(y) for _, y in self.batches], "kept": torch.tensor([self.at])}

    def load_state_dict(self, state):
        assert state["kept"].tolist() == [state["at"]]
        self.begin = state["at"]


def test_a_loader_with_a_state_is_restored(part):
    model, loader = small(), Stateful(data())
    torch.manual_seed(1)
    whole = of("mc", model, Stateful(data()))
    torch.manual_seed(1)
    with pytest.raises(Broken):
        of("mc", model, Stateful(data(), fails_at=5), checkpoint=part)
    torch.manual_seed(1)
    assert_same(of("mc", model, loader, checkpoint=part), whole)
    assert loader.given == [0, 1, 4, 5]  # the first two are those on which the plans depend


def test_a_loader_with_a_state_and_one_without_take_over_from_each_other(part):
    class Silent(Stateful):
        def read(self):
            for number, batch in enumerate(self.batches[self.at :]):
                if number == self.fails_at:
                    raise Broken
                self.at += 1
                self.given.append(self.at)
                yield batch

    whole = of("mc", small(), data())
    interrupt(part, 3, "mc")
    with pytest.raises(Broken):
        of("mc", small(), Silent(data(), fails_at=5), checkpoint=part)
    assert unfinished(part).batches == 5
    assert_same(of("mc", small(), data(), checkpoint=part), whole)


def test_a_state_of_a_loader_that_cannot_be_kept_is_refused_at_once(part):
    class Opaque(Stateful):
        def state_dict(self):
            return {"dataset": self}

    loader = Opaque(data())
    with pytest.raises(TypeError, match=r"state_dict\(\) gives, which must be plain values and tensors"):
        of("empirical", small(), loader, checkpoint=part)
    assert loader.given == [0]


def test_an_entry_without_bytes_is_refused_by_name(part):
    @dataclass
    class Thing:
        value: int

    def losses(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    batches = [{"x": x, "y": y, "of": [Thing(n) for n in range(len(y))]} for x, y in data()]
    assert fk.estimate(small(), batches, likelihood=losses).count == sum(SIZES)
    with pytest.raises(TypeError, match=r"'of\.0' is a Thing whose values cannot be read"):
        fk.estimate(small(), batches, likelihood=losses, checkpoint=part)


@pytest.mark.parametrize("at", ["write", "fsync", "rename"])
def test_a_full_disk_loses_nothing(part, monkeypatch, at):
    """The fourth write fails, and the third stays; what follows is counted again."""
    whole = of("mc", small(), data())
    full, writes = OSError(errno.ENOSPC, "No space left on device"), []
    checkpoint = Checkpoint.write
    own = {"fsync": os.fsync, "rename": os.replace}

    def write(self, path):
        writes.append(path)
        if len(writes) == 4:
            monkeypatch.setattr(os, {"write": "fsync", "fsync": "fsync", "rename": "replace"}[at], failing)
        checkpoint(self, path)

    def failing(*args):
        raise full

    monkeypatch.setattr(Checkpoint, "write", write)
    with pytest.raises(OSError, match="no space left for .*fisher.part; an older file is unchanged"):
        of("mc", small(), data(), checkpoint=part, save_every=0)
    monkeypatch.undo()
    assert (os.fsync, os.replace) == (own["fsync"], own["rename"])
    assert os.listdir(part.parent) == ["fisher.part"]
    assert unfinished(part).batches == 3
    assert_same(of("mc", small(), data(), checkpoint=part), whole)


def test_what_a_kill_during_a_write_has_left_is_removed(part):
    interrupt(part, 3)
    left = part.with_name(".fisher.part.0123abcd.tmp")
    left.write_bytes(b"half")
    others = [part.with_name(name) for name in (".fisher.part.rank-1.0123abcd.tmp", ".fisher.party.0123abcd.tmp")]
    for other in others:
        other.touch()
    assert_same(of("empirical", small(), data(), checkpoint=part), of("empirical", small(), data()))
    assert sorted(part.parent.iterdir()) == sorted(others)
    long = part.with_name("x" * 60)
    others.append(part.with_name(f".{'x' * 40}.0123abcd.tmp"))  # of another rank, perhaps
    others[-1].touch()
    assert of("empirical", small(), data(), checkpoint=long).count == sum(SIZES)
    assert sorted(part.parent.iterdir()) == sorted(others)


def test_a_full_disk_does_not_hide_why_the_data_ended(part, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Checkpoint, "write", full)
    with pytest.raises(Broken) as raised:
        of("mc", small(), breaking(data(), 3), checkpoint=part)
    assert any("The checkpoint was not written" in note for note in raised.value.__notes__)


def test_a_file_of_something_else_is_not_touched(part):
    of("empirical", small(), data()).save(part.with_name("fisher.safetensors"))
    for name in ("fisher.safetensors", "notes.txt"):
        file = part.with_name(name)
        file.touch()
        content = file.read_bytes()
        with pytest.raises(ValueError, match=r"there is no unfinished estimate in .*another name"):
            of("empirical", small(), data(), checkpoint=file)
        assert file.read_bytes() == content


def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    calls = []

    def batches():
        calls.append(1)
        yield from data()

    with pytest.raises(FileNotFoundError, match=r"the folder .*missing of checkpoint=.* does not exist"):
        of("empirical", small(), batches(), checkpoint=tmp_path / "missing" / "fisher.part")
    with pytest.raises(IsADirectoryError):
        of("empirical", small(), batches(), checkpoint=tmp_path)
    for wrong, kind in ((-1, ValueError), (float("nan"), ValueError), ("often", TypeError), (None, TypeError)):
        with pytest.raises(kind, match="save_every must be a number"):
            of("empirical", small(), batches(), checkpoint=tmp_path / "fisher.part", save_every=wrong)
    assert not calls


def test_the_file_is_written_every_so_often(part, monkeypatch):
    clock, written = [0.0], []
    monkeypatch.setattr("fishkern.statistics.keeping.time.monotonic", lambda: clock[0])
    checkpoint = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self, path: (written.append(clock[0]), checkpoint(self, path)))

    def batches():
        for batch in data():
            yield batch
            clock[0] += 4

    of("empirical", small(), batches(), checkpoint=part, save_every=10)
    assert written == [12.0]  # every four seconds there is a batch
    assert not part.exists()


def test_progress_goes_on_from_the_checkpoint(part):
    interrupt(part, 4)
    reported = []
    of("empirical", small(), data(), checkpoint=part, progress=lambda done, total: reported.append(done))
    assert reported == [1, 4, 9, 10, 12]  # the batches that make plans, the place of the checkpoint, and the rest


# Estimates in a process that is killed, by a signal that it cannot catch, some time after it has read the given batch.
KILLED = """
import os, signal, threading, time
import torch
from torch import nn
import fishkern as fk

torch.set_num_threads(1)
ESTIMATORS = {
    "mc": fk.DiagonalFisher("mc", mc_samples=2, seed=3), "type-2": fk.DiagonalFisher("type-2"),
    "sketched": fk.SketchedFisher(2), "directions": fk.DirectionEnergy(importance="kronecker"),
}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
generator = torch.Generator().manual_seed(1)
batches = [(torch.randn(4, 20, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(60)]

def kill():
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)

def read():
    for number, batch in enumerate(batches):
        if number == at:
            threading.Thread(target=kill, daemon=True).start()
        yield batch

options = dict(likelihood=fk.Classification(), parameters="*.weight")
statistics = fk.estimate(model, read(), ESTIMATORS[kind], checkpoint=part, save_every=0, **options)
statistics.save(saved)
precision = getattr(statistics, "precision", None)
if precision is not None:  # also what a file of statistics leaves out: means and errors of the followed entries
    entries = {name: tuple(of_name) for name, of_name in precision.entries.items()}
    torch.save({"entries": entries, **precision.plain()}, saved + ".precision")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mc", "type-2", "sketched", "directions"])
def test_a_process_that_is_killed_at_ten_points_ends_in_the_same_bits(tmp_path, kind):
    load = fk.Energies.load if kind == "directions" else fk.Statistics.load
    generator = torch.Generator().manual_seed(0)
    places = sorted(torch.randint(50, (10,), generator=generator).tolist())
    delays = (0.02 * torch.rand(10, generator=generator)).tolist()
    common = {"kind": kind, "part": str(tmp_path / "fisher.part"), "after": 0.0, "at": None}
    whole, resumed = ({"saved": str(tmp_path / f"{name}.safetensors")} for name in ("whole", "resumed"))
    kills = [{**common, **resumed, "at": at, "after": after} for at, after in zip(places, delays, strict=True)]
    cases = [{**common, **whole}, *kills, {**common, **resumed}]
    first, *killed, last = forked(KILLED, cases, imports="import torch._dynamo, fishkern")
    assert [one.returncode for one in (first, *killed, last)] == [0, *[-9] * 10, 0], (first.stderr, last.stderr)
    assert load(resumed["saved"]) == load(whole["saved"])
    of_a_fisher = kind in ("mc", "type-2")
    left = [
        f"{name}.safetensors{end}" for name in ("resumed", "whole") for end in ("", ".precision")[: 1 + of_a_fisher]
    ]
    assert sorted(os.listdir(tmp_path)) == left
    if of_a_fisher:  # the same entries are followed, and all they tell is of the same bits
        one, other = (torch.load(f"{of['saved']}.precision") for of in (resumed, whole))
        assert len(one["entries"]) == 2
        torch.testing.assert_close(one, other, rtol=0, atol=0)
