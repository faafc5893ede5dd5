"""Passes of several ranks that are broken off go on to the same bits, and those that stop early stop together."""

from __future__ import annotations

import math
import os
import re
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import fishkern as fk
from tests.statistics import long_program as program
from tests.support.ranks import launched

PROGRAM = "tests.statistics.long_program"
pytestmark = pytest.mark.slow  # the quick ones of their kind are of one process, in test_long_runs.py
QUICK = ["mc goes on", "killed in two saves", "refused", "stops, sharded"]
MORE = ["goes on", "goes on, without data or prepared", "killed in a save", "stops", "elsewhere"]
FOLLOWED = ("empirical", "mc", "batches")  # recipes of a diagonal


def launch(world: int, folder: Path, cases: list[str]) -> list[dict]:
    """Run cases beside the checkpoint of one process."""
    with pytest.raises(ConnectionError):
        broken = program.breaking(program.batches_of(0), 3)
        fk.estimate(program.whole(), broken, checkpoint=folder / "of one.part", **program.LIKELIHOOD)
    return launched(PROGRAM, world, folder, cases)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    return launch(2, folder, QUICK)


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> list[dict]:
    return launch(2, tmp_path_factory.mktemp("more"), MORE)


def assert_goes_on(reports: list[dict], case: str) -> None:
    for kind in reports[0][case]:
        first, *others = (report[case][kind] for report in reports)
        assert first["broken"] == ["ConnectionError: the data is on another machine"] * 2
        for one in (first, *others):
            assert one["same"]
            assert one["held"] == [f"fisher.part.rank-{rank}" for rank in range(len(reports))]
            assert one["left"] == []
            assert one["followed"] == (kind.split(",")[0] in FOLLOWED)
        assert all("rank 0 failed with ConnectionError" in said for one in others for said in one["broken"])


def test_data_of_one_rank_that_raise_twice_end_in_the_same_bits(two):
    assert_goes_on(two, "mc goes on")


@pytest.mark.slow
def test_every_recipe_goes_on(more):
    assert set(more[0]["goes on"]) == set(program.KINDS)
    assert_goes_on(more, "goes on")


@pytest.mark.slow
def test_ranks_without_data_and_prepared_passes_go_on(more):
    assert_goes_on(more, "goes on, without data or prepared")


def assert_one_turn(reports: list[dict], case: str, kills: list[tuple[int, str]]) -> None:
    """All ranks have gone on from the same turn, to the same bits."""
    for number, at in kills:
        every = [report[case][f"{at}, {number}"] for report in reports]
        for one in every:
            assert one["said"] == f"Killed: {at}"
            assert one["same"]
            assert one["left"] == []
        # once all have written, the save counts
        saved = number if at.startswith("move") or at == "write, after all" else number - 1
        # the first rank reports the batches that make plans, the place in the checkpoint, and what came after it
        reported = every[0]["counted"]
        assert len(reported) == (min(saved, 2) + 1 + 7 - saved if saved else 7), (at, number)
        assert reported[-1] == 13


def test_ranks_that_are_killed_in_a_save_go_on_from_one_turn(two):
    assert_one_turn(two, "killed in two saves", program.KILLS[:2])


@pytest.mark.slow
def test_ranks_that_are_killed_anywhere_in_a_save_go_on_from_one_turn(more):
    assert_one_turn(more, "killed in a save", program.KILLS[2:])


@pytest.mark.slow
def test_ranks_of_which_one_is_killed_at_ten_points_end_in_the_same_bits(tmp_path):
    """By a signal that it cannot catch; the others then find that it has gone, and end."""
    generator = torch.Generator().manual_seed(1)
    places = sorted(torch.randint(35, (10,), generator=generator).tolist())
    delays = (0.02 * torch.rand(10, generator=generator)).tolist()

    def run(folder: str, kill: str = "") -> list[dict]:
        (tmp_path / folder).mkdir(parents=True)
        if kill:
            (tmp_path / folder / "kill").write_text(kill)
        return launched(PROGRAM, 2, tmp_path / folder, ["killed for good"])

    whole = run("apart/whole")
    for number, (at, after) in enumerate(zip(places, delays, strict=True)):
        with pytest.raises(AssertionError):
            run(f"kill-{number}", f"{number % 2} {at} {after}")
    held = [name for name in os.listdir(tmp_path) if name.startswith("fisher.part.rank-")]
    assert {"fisher.part.rank-0", "fisher.part.rank-1"} <= set(held)
    assert run("resumed") == whole
    assert not [name for name in os.listdir(tmp_path) if "fisher.part" in name]


def test_what_does_not_fit_is_refused_on_all_ranks(two):
    first, second = (report["refused"] for report in two)
    of_the_second = {
        "other data": r"ValueError: batch 0 is not the one that .*fisher.part.rank-1 has counted there",
        "fewer data": r"ValueError: .*fisher.part.rank-1 has counted 3 batches, and the data ends after 2",
    }
    for case, said in of_the_second.items():
        assert re.match(said, second[case])
        assert first[case].startswith("RuntimeError: rank 1 failed with ValueError: ")
    of_both = {
        "other weights": r"ValueError: .*rank-\d is the checkpoint of another call: the digest of 2.bias was",
        "on one alone": "RuntimeError: rank . and rank . differ in whether there is a checkpoint",
        "parts": "ValueError: .* it took one pass over the data, and this one takes 4",
        "of one process": "ValueError: .*of one.part is .* another call: the number of ranks was 1 and is 2",
        "missing": r"ValueError: the files of fisher.part do not fit .*turns \{0: 3, 1: 0\} by rank.*Bring back",
    }
    for case, said in of_both.items():
        assert all(re.match(said, one[case]) for one in (first, second)), (first[case], second[case])


def test_a_full_disk_of_one_rank_loses_nothing(two):
    first, second = (report["refused"] for report in two)
    assert second["full"] == "OSError: [Errno 28] no space left"
    assert first["full"] == f"RuntimeError: rank 1 failed with {second['full']}"
    for one in (first, second):
        assert one["untouched"]
        assert one["held"] == ["fisher.part.rank-0", "fisher.part.rank-1"]
        assert one["same"]
        assert one["left"] == []


def test_one_process_refuses_the_files_of_two_ranks(two, folder):
    options = {"checkpoint": folder / "two" / "fisher.part", **program.LIKELIHOOD}
    with pytest.raises(
        ValueError, match=r"rank-0 is the checkpoint .*the number of ranks was 2 and is 1. Make the call"
    ):
        fk.estimate(program.whole(), program.batches_of(0), **options)


def expected(world: int, *, joined: bool) -> tuple[int, fk.statistics.Precision]:
    """After how many examples one process would stop, and its precision there.

    Args:
        world: Number of ranks, whose batches come in turn.
        joined: Whether the batches of a turn are one batch, as those of a sharded model are.
    """
    every = [program.batches_of(rank, program.TURNS, ranks=world) for rank in range(world)]
    turns = [[one[number] for one in every if number < len(one)] for number in range(program.TURNS)]
    if joined:
        turns = [[tuple(torch.cat(parts) for parts in zip(*turn, strict=True))] for turn in turns]
    examples = [0, *accumulate(sum(len(labels) for _, labels in turn) for turn in turns)]
    batches = [0, *accumulate(map(len, turns))]

    def rung(count: int) -> int:
        return math.floor(math.log(count) / math.log(17 / 16)) if count else -1

    for number in range(1, len(turns) + 1):
        looks = rung(examples[number]) > rung(examples[number - 1]) or batches[number - 1] < 8 <= batches[number]
        if batches[number] >= 8 and looks:
            read = [batch for turn in turns[:number] for batch in turn]
            precision = fk.estimate(program.whole(program.WIDE), read, **program.LIKELIHOOD).precision
            if precision.overlap(program.TOP) >= program.GOAL:
                return examples[number], precision
    raise AssertionError("the goal is never reached: choose another")


def assert_stops(reports: list[dict], case: str, *, joined: bool) -> None:
    count, precision = expected(len(reports), joined=joined)
    assert (
        8 < precision.batches < (1 if joined else len(reports)) * (program.TURNS - 1)
    )  # neither at once nor at the end
    errors = torch.cat([entries.standard_errors for entries in precision.entries.values()])
    for report in reports:
        one = report[case]
        assert one["count"] == count
        assert one["batches"] == precision.batches
        assert one["overlap"] == pytest.approx(precision.overlap(program.TOP), abs=1e-3)
        # of rounded sums: where batches hardly differ, the errors are rounding
        torch.testing.assert_close(torch.tensor(one["errors"], dtype=torch.float64), errors, rtol=1e-3, atol=1e-7)
        assert "ConnectionError" in one["broken"]
        assert len(one["held"]) == len(reports)
        assert one["same"]
        assert one["left"] == []
        assert one["whole"]


@pytest.mark.slow
def test_ranks_stop_at_the_same_batch(more):
    assert_stops(more, "stops", joined=False)


def test_a_sharded_model_stops_as_a_whole_one(two):
    assert_stops(two, "stops, sharded", joined=True)


@pytest.mark.slow
def test_shards_in_parts_with_results_in_files(more):
    for report in more:
        one = report["elsewhere"]
        assert "ConnectionError" in one["broken"]
        assert one["held"] == [f"fisher.part.pass-{number}.rank-{rank}" for number in (1, 2) for rank in (0, 1)]
        assert one["left"] == []
        assert all(one[what] for what in ("values", "full", "names", "precision", "saved"))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[dict]:
    return launch(3, tmp_path_factory.mktemp("three"), ["goes on", "stops", "stops, sharded", "stops, partly sharded"])


@pytest.mark.slow
def test_three_ranks_go_on_and_stop(three):
    assert_goes_on(three, "goes on")
    assert_stops(three, "stops", joined=False)
    for case in ("stops, sharded", "stops, partly sharded"):
        assert_stops(three, case, joined=True)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict]:
    return launch(4, tmp_path_factory.mktemp("four"), ["goes on, replicated", "stops, replicated"])


@pytest.mark.slow
def test_replicas_go_on_and_stop(four):
    assert_goes_on(four, "goes on, replicated")
    assert_stops(four, "stops, replicated", joined=True)
