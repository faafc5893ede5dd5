"""Models that FSDP2 shards over processes (gloo): the statistics are those of one process with the whole model."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from tests.support.ranks import launched
from tests.support.slow import slowly

PROGRAM = "tests.statistics.sharded_exchanges"  # which has the cases of sharded_program, too
MORE = ["checkpointed", "checkpointed reentrantly", "checkpointed by torch", "lora", "lora, all", "positions", "gated"]
MORE += ["mc", "packed", "experts", "pairs", "large logits"]
PLANTED = ["no reduction, unchecked", "mean, unchecked"]
EXCHANGES = ["some positions", "unequal lengths", "an example missing", "features of other rows"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    cases = ["whole", "tied, in blocks", "unequal", "looped", "files", "no reduction", *PLANTED, *EXCHANGES]
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("two"), cases, ["judged alike", "failures", "mixed"])


@pytest.mark.parametrize("case", ["whole", "tied, in blocks", "unequal", slowly("judged alike")])
def test_two_ranks_give_what_the_loop_gives(two, case):
    for report in two:
        assert report[case]["error"] < 2e-7  # the mean is rounded to float32
        assert report[case]["paths"] == ["fused"]
        assert report[case]["count"] == report[case]["examples"]
        assert report[case]["placed"]


def test_the_slow_path_and_verify_run_each_example_on_all_ranks(two):
    for report in two:
        assert report["looped"]["error"] < 2e-7
        assert report["looped"]["paths"] == ["fused", "loop"]
        assert report["looped"]["noted"] == 2  # once on shards, and once by one process
        assert report["looped"]["examples"] == 5
        assert report["looped"]["verified"]
        assert not report["looped"]["wrong"]


@pytest.mark.slow
def test_one_ranks_failure_ends_all(two):
    first, second = (report["failures"] for report in two)
    expected = {
        "sums": "MemoryError: no room for the sums",
        "rule": "MemoryError: no room for a product",
        "loader": "OSError: the disk is gone",
        "forward": "IndexError: index out of range in self",
        "inside": "MemoryError: no room",
        "loss": "ValueError: the loss of example 3 ",
        "pickle": "TypeError: with a sharded model all ranks run some examples of each, so batches must hold",
    }
    for case, message in expected.items():
        assert second[case].startswith(message)
        assert first[case].startswith(f"RuntimeError: rank 1 failed with {message}")
    assert all("the data holds no example" in report["empty"] for report in (first, second))
    assert first["error afterwards"] < 2e-7
    assert "is not computed on shards" in first["another recipe"]
    assert "in the middle of gradient accumulation" in first["accumulating"]


@pytest.mark.slow
def test_a_model_in_mixed_precision_trains_as_if_no_pass_had_been(two):
    for report in two:
        assert report["mixed"]["error"] < 1e-5  # against one process in bfloat16, with the same batches
        assert report["mixed"]["trained alike"]
        assert report["mixed"]["as found"]


def test_the_file_is_that_of_one_process(two):
    for report in two:
        assert report["files"] == {"bytes": True, "loaded": True, "equal": True, "full": True}


def test_a_batch_sends_the_bytes_of_the_formula_which_are_the_fewest(two):
    """Of some maps factors, of others squares; what the ranks agree on beside is small."""
    for report in (one["some positions"] for one in two):
        assert abs(report["bytes"] - report["formula"]) < 0.02 * report["formula"]
        assert report["as by formula"]
        assert 0 < report["by factors"] < 15


def test_factors_give_what_the_loop_gives_and_planted_errors_are_seen(two):
    for report in two:
        assert report["unequal lengths"]["error"] < 2e-7, report["unequal lengths"]["where"]
        assert report["unequal lengths"]["by factors"] == 15
        assert report["an example missing"]["error"] > 0.05
        assert report["features of other rows"]["error"] > 0.05


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_error_is_seen(two, case):
    assert all(report[case]["error"] > 0.2 for report in two)


def test_the_self_check_sees_a_planted_error_and_autograd_takes_over(two):
    for report in two:
        assert report["no reduction"]["noted"]
        assert report["no reduction"]["paths"] == ["loop"]
        assert report["no reduction"]["error"] < 2e-7


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[dict]:
    cases = ["whole", "tied, in blocks", "kept", "offloaded", "units of their own", *MORE, "files"]
    return launched(PROGRAM, 3, tmp_path_factory.mktemp("three"), cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["whole", "tied, in blocks", "kept", "offloaded", "units of their own", *MORE])
def test_three_ranks_with_uneven_shards_give_what_the_loop_gives(three, case):
    for report in three:
        assert report[case]["error"] < 2e-7
        assert report[case]["paths"] == ["fused"]
        assert report[case]["count"] == report[case]["examples"]


@pytest.mark.slow
def test_the_file_is_that_of_one_process_with_uneven_shards(three):
    assert all(report["files"]["bytes"] for report in three)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict]:
    cases = [
        "columns, in blocks",
        "replicated",
        "replicated columns",
        "replicated twice, unchecked",
        "mixed, replicated",
    ]
    return launched(PROGRAM, 4, tmp_path_factory.mktemp("four"), [*cases, "generic", "looped, replicated"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["columns, in blocks", "replicated", "replicated columns"])
def test_four_ranks_give_what_the_loop_gives(four, case):
    for report in four:
        assert report[case]["error"] < 2e-7
        assert report[case]["paths"] == ["fused"]


@pytest.mark.slow
def test_replicas_count_a_looped_example_once(four):
    assert all(report["looped, replicated"]["error"] < 2e-7 for report in four)


@pytest.mark.slow
def test_replicas_counted_twice_are_seen(four):
    assert all(report["replicated twice, unchecked"]["error"] > 0.5 for report in four)


@pytest.mark.slow
def test_a_replicated_model_in_mixed_precision_trains_as_before(four):
    assert all(report["mixed, replicated"]["trained alike"] for report in four)


@pytest.mark.slow
def test_a_module_without_a_rule_runs_once_more_on_shards(four):
    for report in four:
        assert report["generic"]["error"] < 2e-7
        assert "generic" in report["generic"]["paths"]
