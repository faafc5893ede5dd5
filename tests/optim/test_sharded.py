"""Masked optimizers, their states and deltas where FSDP2 shards the model over processes (gloo)."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from fishkern.hosts import Share
from fishkern.selection import Columns, Rows
from fishkern.selection.entries import Entries
from fishkern.selection.local import held, in_shard, in_whole, own_values
from tests.support.ranks import launched
from tests.support.slow import but_slowly, slowly

PROGRAM = "tests.optim.mesh_program"
SPLIT = ["sgd, split", "norm, split", "sgd, both"]
QUICK = ["adamw, listed", "adamw, ranges", "resumed", "16 bits", "delta", "selected on ranks", "norm of the own part"]
QUICK += ["global index in the shard", "local index in a file"]
SHAPES = [(7, 5), (7,), (3, 4, 2), (2, 6), (1, 1), (0, 3), (3, 4, 2, 2)]


def some_of(shape: torch.Size) -> list[Entries]:
    generator = torch.Generator().manual_seed(0)
    rows, width = shape[0], shape[1:].numel() if len(shape) > 1 else shape[0]
    listed = torch.randperm(shape.numel(), generator=generator)[: shape.numel() // 2]
    return [
        Entries.all(shape),
        Entries.none(shape),
        Entries.of(shape, Rows((0, rows))),
        Entries.of(shape, Rows((0, rows // 3), (rows // 2, rows))),
        Entries.of(shape, Columns((0, width // 3), (width // 2, width))),
        Entries.of(shape, listed),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shard_numbers_the_entries_that_slicing_the_whole_gives(shape):
    """Every range along either axis, and blocks of both, against the slice of a tensor of the whole's numbers."""
    shape = torch.Size(shape)
    numbers = torch.arange(shape.numel()).view(shape)
    whole = tuple((0, size) for size in shape)
    every = [[(start, stop) for stop in range(size + 1) for start in range(stop + 1)] for size in shape[:2]]
    cut = [(*whole[:axis], one, *whole[axis + 1 :]) for axis, ends in enumerate(every) for one in ends]
    if len(shape) > 1:
        cut += [(rows, columns, *whole[2:]) for rows, columns in product(every[0][::4], every[1][::5])]
    for ranges in cut:
        share = Share(shape, ranges)
        shard = numbers[share.place]
        assert share.local_shape == shard.shape
        assert torch.equal(held(share).indices().long(), shard.reshape(-1))
        for entries in some_of(shape):
            own = in_shard(entries, share)
            inside = entries.mask()[share.place]
            assert torch.equal(own.mask(), inside)
            assert torch.equal(in_whole(own, share).long(), shard[inside])
            assert torch.equal(own_values(entries.indices(), entries, share).long(), shard[inside])
            assert own.is_all or own.count == 0 or (own.ranges is None) is (entries.ranges is None)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    slow = ["sgd, listed", "one rank alone", "state", "groups", "mixed precision", "offloaded", "start", "refusals"]
    slow += ["replaced parameters", "data parallel", *SPLIT, "summands, split", "norm of the own part, split"]
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("two"), QUICK, slow)


def check(reports: list[dict], case: str) -> None:
    for report in reports:
        assert report[case]["error"] < 1e-12
        assert report[case]["moved"] > 1e-2
        norm, expected = report[case]["norm"]
        assert abs(norm - expected) < 1e-12
        assert norm > 0.02  # so the step was clipped
        assert report[case]["still"]


@pytest.mark.parametrize("case", ["adamw, listed", "adamw, ranges", slowly("sgd, listed"), slowly("one rank alone")])
def test_twenty_steps_are_those_of_one_process(two, case):
    check(two, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SPLIT)
def test_twenty_steps_of_a_model_that_tensor_parallel_splits(two, case):
    """With FSDP2 beside it, which shards the parts among one process each."""
    check(two, case)


def test_each_rank_keeps_state_of_its_own_entries_alone(two):
    counts = [report["adamw, listed"]["held"] for report in two]
    assert sum(counts) == two[0]["adamw, listed"]["selected"]
    assert min(counts) > 0


@pytest.mark.slow
def test_a_rank_without_selected_entries_keeps_no_state(two):
    assert [report["one rank alone"]["held"] for report in two] == [3, 0]


def test_going_on_from_a_saved_state_is_not_stopping(two):
    assert all(report["resumed"] == {"own form": True, "torch's form": True} for report in two)


@pytest.mark.slow
def test_the_state_is_that_of_one_process_through_changes_of_the_selection(two):
    for report in two:
        assert all(report["state"]["alike"])
        assert report["state"]["error"] < 1e-12
        assert report["state"]["changes"]
        assert report["state"]["again"]
        assert report["state"]["frozen"]
        assert report["state"]["without gradient"]


def test_a_selection_of_which_each_rank_has_its_own_entries(two):
    for report in (one["selected on ranks"] for one in two):
        assert report["sharded"]
        assert report["error"] < 1e-12
        assert report["alike"]
        assert report["loaded"]
        assert report["bytes"]
        assert report["changed"]
        assert report["bound"]
        assert "shard the model as it was for the scores" in report["another model"]


@pytest.mark.slow
def test_groups_schedules_and_parameters_outside_the_pool(two):
    assert all(report["groups"]["error"] < 1e-12 for report in two)


def test_masters_of_16_bit_shards(two):
    assert all(report["16 bits"] == {"still": True, "masters": True, "moved": True} for report in two)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixed precision", "offloaded"])
def test_with_everything_selected_shards_step_as_under_torchs_optimizer(two, case):
    assert all(report[case] for report in two)


def test_a_delta_has_the_bytes_of_one_process(two):
    for report in two:
        assert report["delta"]["bytes"]
        assert report["delta"]["applied"]
        assert report["delta"]["undone"]
        assert report["delta"]["streamed"]
        assert report["delta"]["another base"].startswith("ValueError: the model is not the delta's base")


@pytest.mark.slow
def test_the_start_is_recognised_on_shards(two):
    for report in two:
        assert report["start"]["as in one process"]
        assert report["start"]["loaded"]
        assert report["start"]["bytes"]
        assert report["start"]["read"] == report["start"]["own"]  # entries of the file
        assert report["start"]["another start"].startswith("ValueError: the selection was made for another start")


@pytest.mark.slow
def test_what_is_refused_on_shards(two):
    first, second = (report["refusals"] for report in two)
    for messages in (first, second):
        assert messages["released"].startswith("ValueError: 5 parameters are sharded")
        assert "belongs to other entries than are selected here" in messages["other entries"]
    assert first["damaged on one rank"].startswith("RuntimeError: rank 1 failed with ValueError: the state of 0.weight")
    assert second["damaged on one rank"].startswith("ValueError: the state of 0.weight")
    for case in ("frozen on one rank", "reselected on one rank"):
        assert first[case].startswith("RuntimeError: rank 1 failed with ValueError: 1 parameters with selected entries")
        assert second[case].startswith("ValueError: 1 parameters with selected entries have requires_grad=False")
    for messages in (first, second):
        assert messages["freezer"].startswith("ValueError: a freezer reads whole slices, and FSDP2 shards 5 parameters")


@pytest.mark.slow
def test_ranks_under_ddp_with_different_selections_are_refused(two):
    for report in (one["data parallel"] for one in two):
        assert report["alike"] == report["not wrapped"] == "nothing"
        for case in ("reselected", "other from the start"):
            assert report[case].startswith("RuntimeError: rank ")
            assert "have different selections" in report[case]


@pytest.mark.slow
def test_ranks_with_different_selections_are_refused(two):
    """Each would move its own entries, and what they join would be values of one rank under numbers of another."""
    for report in two:
        for message in report["refusals"]["another selection"]:
            assert message.startswith("RuntimeError: rank ")
            assert "have different selections" in message


@pytest.mark.slow
def test_parameters_that_fsdp2_has_replaced_are_warned_of_once(two):
    for report in (one["replaced parameters"] for one in two):
        (later,), (gathered,) = report["sharded later"], report["gathered"]
        assert later.startswith("5 parameters of the optimizer (0.weight, 0.bias, 2.weight and 2 more) are whole")
        assert gathered.startswith("2 parameters of the optimizer (4.weight, 4.bias) are whole")
        assert report["sharded"] == []


@pytest.mark.parametrize(
    "case",
    but_slowly(
        ["norm of the own part", "global index in the shard", "summands, split", "norm of the own part, split"], QUICK
    ),
)
def test_a_planted_error_is_seen(two, case):
    assert max(report[case]["error"] for report in two) > 1e-3


def test_a_number_in_the_shard_is_not_taken_for_one_in_the_whole(two):
    assert all("repeat" in report["local index in a file"] for report in two)


@pytest.fixture(scope="module")
def handed_on(tmp_path_factory) -> list[list[dict]]:
    """Two processes begin, three go on from their checkpoint, and one from that of the three."""
    folder: Path = tmp_path_factory.mktemp("handed on")
    runs = [(2, "steps 0 to 8"), (3, "steps 8 to 14"), (1, "steps 14 to 20")]
    reports = []
    for world, case in runs:
        (into := folder / str(world)).mkdir()
        reports.append([report[case] for report in launched(PROGRAM, world, into, [case])])
    return reports


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_number_of_ranks(handed_on):
    for report in (report for reports in handed_on for report in reports):
        assert report["error"] < 1e-12
        assert report["still"]
        assert report["whole"]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[dict]:
    cases = ["adamw, listed", "adamw, ranges", "sgd, listed", "nesterov, ranges", "one rank alone", "kept", "resumed"]
    cases += ["state", "groups", "delta", "start", "selected on ranks"]
    return launched(PROGRAM, 3, tmp_path_factory.mktemp("three"), cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["adamw, listed", "adamw, ranges", "sgd, listed", "nesterov, ranges", "one rank alone", "kept"]
)
def test_three_ranks_with_uneven_and_empty_shards(three, case):
    check(three, case)


@pytest.mark.slow
def test_states_deltas_and_starts_of_three_ranks(three):
    test_going_on_from_a_saved_state_is_not_stopping(three)
    test_the_state_is_that_of_one_process_through_changes_of_the_selection(three)
    test_groups_schedules_and_parameters_outside_the_pool(three)
    test_a_delta_has_the_bytes_of_one_process(three)
    test_the_start_is_recognised_on_shards(three)
    test_a_selection_of_which_each_rank_has_its_own_entries(three)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict]:
    cases = ["replicated", "replicated, ranges", "columns", "columns, ranges", "replicated columns", "replicas counted"]
    return launched(PROGRAM, 4, tmp_path_factory.mktemp("four"), cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["replicated", "replicated, ranges", "columns", "columns, ranges", "replicated columns"]
)
def test_replicas_and_columns(four, case):
    check(four, case)


@pytest.mark.slow
def test_a_norm_that_counts_replicas_is_seen(four):
    assert all(report["replicas counted"]["error"] > 1e-3 for report in four)
