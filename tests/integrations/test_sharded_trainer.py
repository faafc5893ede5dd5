"""LoRA under transformers' Trainer with accelerate's FSDP2: masked training is that of one process."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tests.support.ranks import launched

pytestmark = pytest.mark.slow
PROGRAM = "tests.integrations.sharded_program"
MORE = ["trained, sharded states", "trained, from one rank"]
CASES = ["trained", "saved by parts", *MORE, "trained, 16 bits", "selected"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("two"), CASES)


def check(report: dict) -> None:
    assert report["sharded"]
    assert report["error"] < 1e-6 < report["moved"]  # in float32
    assert not report["outside"]
    assert report["resumed"] == 0.0  # to the bit, from the checkpoint in the middle
    assert report["steps"] == 2
    assert report["saved"]
    assert len(report["logged"]) == 4


def test_training_goes_on_from_a_checkpoint_as_in_one_process(two):
    for report in two:
        check(report["trained"])


def test_a_selection_of_which_each_rank_has_its_entries_is_saved_by_all(two):
    assert all(report["saved by parts"] == {"sharded": True, "equal": True} for report in two)


@pytest.mark.parametrize("case", MORE)
def test_checkpoints_by_parts_and_models_that_one_rank_loads(two, case):
    for report in two:
        check(report[case])


def test_a_model_in_16_bits_trains_its_selected_entries_in_32(two):
    for report in (one["trained, 16 bits"] for one in two):
        assert report["resumed"] == 0.0 < report["moved"]
        assert report["sharded"]
        assert not report["outside"]


def test_selected_inside_train_on_the_data_of_all_ranks(two):
    for report in two:
        assert report["selected"]["error"] < 1e-6
        assert report["selected"]["count"] > 50
