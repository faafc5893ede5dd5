"""Recipes other than the diagonal Fisher of the data's labels on sharded models, and which are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.support.ranks import launched

PROGRAM = "tests.statistics.sharded_recipes"
QUICK = ["groups, looped", "refusals", "sketch", "sketch, mean", "sketch, unreached", "sketch, ignored in 16 bits"]
SKETCHES = ["sketch, ignored parameters", "sketch, checkpointed reentrantly", "sketch, one rank without data"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> list[dict]:
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("quick"), QUICK)


def test_groups_of_a_weight_on_the_slow_path(quick):
    for report in quick:
        assert report["groups, looped"]["error"] < 2e-7
        assert report["groups, looped"]["paths"] == ["fused", "loop"]


@pytest.mark.parametrize("case", ["sketch", "sketch, unreached"])
def test_a_sketch_takes_the_batches_of_all_ranks_for_one(quick, case):
    assert all(report[case] < 1e-6 for report in quick)  # norms compute in float32
    assert all(report["sketch, mean"] > 0.5 for report in quick)


def test_gradients_in_16_bits_are_not_added_up_in_16_bits(quick):
    for report in quick:
        assert report["sketch, ignored in 16 bits"]["wide"] < 1e-6
        assert report["sketch, ignored in 16 bits"]["16"] > 1e-4


def test_what_is_not_computed_on_shards_is_refused_by_name(quick):
    by_fsdp = "UnsupportedModuleError: FSDP2 shards the parameters, and "
    whole = "UnsupportedModuleError: FSDP shards the parameters of 'the model'. Load the whole model in each process"
    expected = [
        f"{by_fsdp}Own(fisher_type='empirical', unit='example') is not computed on shards: expected DiagonalFisher of",
        f"{by_fsdp}DiagonalFisher(fisher_type='empirical', unit='batch') is not computed on shards",
        f"{by_fsdp}verify compares entries, of which each rank has its own: verify DiagonalFisher",
        whole,
        whole,
    ]
    for report in quick:
        for message, begin in zip(report["refusals"], expected, strict=True):
            assert message.startswith(begin)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[dict]:
    cases = ["groups", "groups, no reduction", "all labels", *SKETCHES, "sketch, training"]
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("many"), cases)


@pytest.mark.slow
def test_the_expectation_over_labels_is_that_of_one_process(many):
    assert all(report["all labels"]["error"] < 2e-7 for report in many)


@pytest.mark.slow
def test_sums_over_groups_are_those_of_the_loop(many):
    for report in many:
        assert all(error < 2e-7 for error in report["groups"].values())
        assert all(error > 0.2 for error in report["groups, no reduction"].values())


@pytest.mark.slow
def test_groups_and_sketches_count_each_example_of_replicas_once(tmp_path):
    for report in launched(PROGRAM, 4, tmp_path, ["groups, replicated", "sketch, replicated"]):
        assert all(error < 2e-7 for error in report["groups, replicated"].values())
        assert report["sketch, replicated"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", SKETCHES)
def test_more_sketches_are_those_of_the_formula(many, case):
    assert all(report[case] < 1e-6 for report in many)


@pytest.mark.slow
def test_a_sketched_model_in_mixed_precision_trains_as_before(many):
    assert all(report["sketch, training"] for report in many)
