"""Recipes other than the diagonal Fisher of the data's labels on sharded models, and which are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.support.ranks import launched

pytestmark = pytest.mark.slow  # the quick ones of their kind are in test_sharded_ranks.py

PROGRAM = "tests.statistics.sharded_recipes"
CASES = ["groups, looped", "refusals", "sketch", "sketch, mean", "sketch, unreached", "sketch, ignored in 16 bits"]
CASES += ["batches", "energies", "energies, one rank's mask", "prepared"]
SKETCHES = ["sketch, ignored parameters", "sketch, checkpointed reentrantly", "sketch, one rank without data"]


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> list[dict]:
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("some"), CASES)


def test_groups_of_a_weight_on_the_slow_path(some):
    for report in some:
        assert report["groups, looped"]["error"] < 2e-7
        assert report["groups, looped"]["paths"] == ["fused", "loop"]


@pytest.mark.parametrize("case", ["sketch", "sketch, unreached"])
def test_a_sketch_takes_the_batches_of_all_ranks_for_one(some, case):
    assert all(report[case] < 1e-6 for report in some)  # norms compute in float32
    assert all(report["sketch, mean"] > 0.5 for report in some)


def test_gradients_in_16_bits_are_not_added_up_in_16_bits(some):
    for report in some:
        assert report["sketch, ignored in 16 bits"]["wide"] < 1e-6
        assert report["sketch, ignored in 16 bits"]["16"] > 1e-4


def test_what_is_not_computed_on_shards_is_refused_by_name(some):
    by_fsdp = "UnsupportedModuleError: FSDP2 shards the parameters, and "
    whole = "UnsupportedModuleError: FSDP shards the parameters of 'the model'. Load the whole model in each process"
    expected = [
        f"{by_fsdp}Own(fisher_type='empirical', unit='example') is not computed on shards: expected DiagonalFisher, ",
        f"{by_fsdp}verify compares entries, of which each rank has its own: verify DiagonalFisher",
        whole,
    ]
    for report in some:
        assert len(report["refusals"]) == len(expected)
        for message, begin in zip(report["refusals"], expected, strict=True):
            assert message.startswith(begin)


def test_the_gradient_of_a_batch_is_that_of_all_ranks_batches_together(some):
    for report in some:
        found = report["batches"]
        assert found["error"] < 1e-6  # norms compute in float32
        assert found["count"] == found["steps"] == 2
        assert found["paths"] == ["batch"]


def test_energies_are_those_of_each_examples_gradient(some):
    for report in some:
        found = report["energies"]
        assert found["error"] < 1e-6  # norms compute in float32
        assert found["alike"] < 1e-6
        assert found["count"] == found["examples"] == 5
        assert found["weights"] == 15


def test_a_mask_that_one_rank_cannot_read_ends_all(some):
    first, second = (report["energies, one rank's mask"] for report in some)
    assert second.startswith("ValueError: positions='attended' counts what an attention_mask [N, T] marks")
    assert first.startswith("RuntimeError: rank 1 failed with ValueError: positions='attended'")


def test_a_prepared_pass_gives_the_same_bits_in_fewer_runs(some):
    for report in some:
        found = report["prepared"]
        assert found["paths"] == ["fused"]
        assert found["preparing"] > 0
        for data in ("seen", "trained", "other data"):
            alike, fewer, more = found[data]
            assert alike
            assert fewer == 2 if data != "other data" else 2 < fewer < more
            assert more > 2
        assert "was prepared for something else: requires_grad of model.norm.weight was True" in found["changed"]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[dict]:
    cases = ["groups", "groups, no reduction", "all labels", *SKETCHES, "sketch, training", "prepared, others"]
    cases += ["energies, power basis, in parts", "energies, no reduction", "batches, mean of means"]
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("many"), cases)


def test_the_expectation_over_labels_is_that_of_one_process(many):
    assert all(report["all labels"]["error"] < 2e-7 for report in many)


def test_sums_over_groups_are_those_of_the_loop(many):
    for report in many:
        assert all(error < 2e-7 for error in report["groups"].values())
        assert all(error > 0.2 for error in report["groups, no reduction"].values())


@pytest.mark.parametrize("case", ["energies, no reduction", "batches, mean of means"])
def test_a_planted_error_of_other_recipes_is_seen(many, case):
    assert all(report[case]["error"] > 0.2 for report in many)


def test_energies_of_a_basis_of_candidates_in_parts(many):
    assert all(report["energies, power basis, in parts"]["error"] < 1e-6 for report in many)


def test_other_recipes_are_prepared(many):
    for report in many:
        assert len(report["prepared, others"]) == 5
        assert all(report["prepared, others"].values())


def test_groups_and_sketches_count_each_example_of_replicas_once(tmp_path):
    for report in launched(PROGRAM, 4, tmp_path, ["groups, replicated", "sketch, replicated", "batches, replicated"]):
        assert report["batches, replicated"]["error"] < 1e-6
        assert all(error < 2e-7 for error in report["groups, replicated"].values())
        assert report["sketch, replicated"] < 1e-6


@pytest.mark.parametrize("case", SKETCHES)
def test_more_sketches_are_those_of_the_formula(many, case):
    assert all(report[case] < 1e-6 for report in many)


def test_a_sketched_model_in_mixed_precision_trains_as_before(many):
    assert all(report["sketch, training"] for report in many)
