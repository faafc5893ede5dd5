"""Sharded linear maps: of squares and factors the fewer bytes are sent, and the sums are those of one process.

Quick ones are in ``test_sharded_ranks.py``, which launches processes anyway.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.support.ranks import launched

pytestmark = pytest.mark.slow
PROGRAM = "tests.statistics.sharded_exchanges"
COUNTED = ["few positions", "some positions", "many positions", "some positions, 16 bits"]
COMPARED = ["few, then many", "unequal lengths"]
PLANTED = ["features of other rows", "an example missing", "inputs of the first rank"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("two"), [*COUNTED, *COMPARED, "as it is", *PLANTED])


@pytest.mark.parametrize("case", COUNTED)
def test_a_batch_sends_the_bytes_of_the_formula_which_are_the_fewest(two, case):
    """Squares are sent in the dtype of their sums; what the ranks agree on beside is small."""
    for report in two:
        one = report[case]
        assert abs(one["bytes"] - one["formula"]) < 0.02 * one["formula"]
        assert one["as by formula"]


def test_both_ways_are_taken(two):
    for report in two:
        found = {case: report[case]["by factors"] for case in COUNTED}
        assert found["few positions"] == 15  # all linear maps
        assert 0 < found["some positions"] < 15
        assert 0 < found["some positions, 16 bits"] < 15
        assert found["many positions"] == 0


@pytest.mark.parametrize("case", COMPARED)
def test_factors_give_what_the_loop_gives(two, case):
    for report in two:
        assert report[case]["error"] < 2e-7, report[case]["where"]  # the mean is rounded to float32
        assert report[case]["by factors"] == 15


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_error_is_seen(two, case):
    assert all(report["as it is"]["error"] < 2e-7 for report in two)
    assert all(report[case]["error"] > 0.05 for report in two)


def test_three_ranks_with_uneven_rows(tmp_path):
    cases = ["few, then many", "unequal lengths", "in blocks", "as it is", "features of other rows"]
    for report in launched(PROGRAM, 3, tmp_path, cases):
        for case in cases[:-1]:
            assert report[case]["error"] < 2e-7, report[case]["where"]
            assert report[case]["by factors"] >= 15
        assert report["features of other rows"]["error"] > 0.05


def test_each_replica_sends_to_its_own_ranks(tmp_path):
    for report in launched(PROGRAM, 4, tmp_path, ["unequal lengths, replicated"]):
        assert report["unequal lengths, replicated"]["error"] < 2e-7
        assert report["unequal lengths, replicated"]["by factors"] == 15
