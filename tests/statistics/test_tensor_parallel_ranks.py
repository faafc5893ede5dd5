"""Models that processes compute together (gloo): the statistics are those of one process with the whole model."""

from __future__ import annotations

import pytest

from tests.support.ranks import launched
from tests.support.slow import but_slowly

pytest.importorskip("transformers")

PROGRAM = "tests.statistics.mesh_program"
CASES = ["whole", "tied", "sequence", "every style", "experts"]
MORE = ["few heads", "positions", "mc", "type-2", "checkpointed", "packed", "pairs", "generic"]
OF_TRANSFORMERS = ["plan of transformers", "plan of transformers, tied", "norms of own heads"]
PLANTED = ["squared first", "rows of another"]
ELSEWHERE = ["experts elsewhere", "verified"]
BESIDE = ["both, one team", "both, teams of one"]
PLANTED_BESIDE = ["no reduction over the data, teams of one", "counted once for each process, one team"]


QUICK = ["whole", "sequence", "every style", "squared first", "squared first, unchecked", "both, one team"]
QUICK += ["no reduction over the data, teams of one", "both, files", "bytes"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    unchecked = [f"{case}, unchecked" for case in (*PLANTED, "counted by all")]
    others = ["examples of each process", "files", "bytes", "looped", *BESIDE, *PLANTED_BESIDE, "both, files"]
    others += ["bytes of sequences", "few positions", *MORE, *OF_TRANSFORMERS, "partial gradients", "refused"]
    every = [*CASES, *PLANTED, *unchecked, *others, *ELSEWHERE]
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("two"), QUICK, [one for one in every if one not in QUICK])


@pytest.mark.parametrize("case", but_slowly(CASES, QUICK))
def test_two_processes_give_what_the_loop_gives(two, case):
    for report in two:
        assert report[case]["error"] < 2e-7  # the mean is rounded to float32
        assert report[case]["paths"] == ["fused"]
        assert report[case]["count"] == report[case]["examples"]
        assert report[case].get("placed", True)


@pytest.mark.parametrize("case", but_slowly(BESIDE, QUICK))
def test_an_axis_of_fsdp2_beside_that_of_one_model(two, case):
    test_two_processes_give_what_the_loop_gives(two, case)


@pytest.mark.parametrize("case", but_slowly(PLANTED_BESIDE, QUICK))
def test_a_planted_error_on_one_of_two_axes_is_seen(two, case):
    assert all(report[case] > 0.4 for report in two)


@pytest.mark.parametrize("case", but_slowly(PLANTED, QUICK))
def test_the_self_check_sees_a_planted_error_and_autograd_takes_over(two, case):
    for report in two:
        assert report[case]["noted"]
        assert report[case]["paths"] == ["fused", "loop"]
        assert report[case]["error"] < 2e-7


@pytest.mark.parametrize("case", but_slowly([*PLANTED, "counted by all"], QUICK))
def test_a_planted_error_is_seen(two, case):
    assert all(report[f"{case}, unchecked"]["error"] > 0.2 for report in two)


@pytest.mark.slow
def test_processes_that_compute_one_model_need_the_same_batches(two):
    for report in two:
        messages = report["examples of each process"]
        assert "batch 0 differs between processes 0 and 1 of the 2 that compute one model" in messages["other"]
        assert "batch 1 differs" in messages["fewer"]
        assert "no batch" in messages["fewer"]
        assert "by a DataLoader without a sampler" in messages["sampled"]
        assert messages["alike"] == "nothing"


@pytest.mark.slow
def test_the_file_is_that_of_one_process(two):
    assert all(report["files"] == {"alike": True, "provenance": True, "equal": True} for report in two)


def test_files_and_selections_of_two_axes_are_those_of_one_process(two):
    for report in two:
        assert report["both, files"] == {"bytes": True, "placed": True, "whole": True, "selected": True}


def test_a_batch_sends_what_its_backward_pass_sends(two):
    for report in two:
        estimate, training = report["bytes"]
        assert estimate == training > 0


@pytest.mark.slow
def test_norms_of_some_positions_send_their_sums_beside_that(two):
    """One sum over positions for each norm, example and feature, in the dtype of the sums (float64 here)."""
    for report in two:
        (estimate, training), sums = report["bytes of sequences"]["sent"], report["bytes of sequences"]["sums"]
        assert training > 0
        assert estimate == training + sums > training


@pytest.mark.slow
def test_positions_that_cannot_be_dealt_out_are_refused_before_any_process_waits(two):
    """By estimate in the first batch and in the second, and by verify."""
    for report in two:
        for case, message in report["few positions"].items():
            count = 1 if case == "one" else 3
            assert "model.embed_tokens deals out the positions of a batch to 2 processes" in message
            assert f"this one has {count} (axis 1 of (2, {count})): expected a multiple of 2" in message


@pytest.mark.slow
def test_the_slow_path_gives_each_process_its_part(two):
    for report in two:
        assert report["looped"]["error"] < 2e-7
        assert report["looped"]["paths"] == ["fused", "loop"]
        assert report["looped"]["noted"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MORE, *OF_TRANSFORMERS])
def test_more_models_and_recipes_give_what_one_process_gives(two, case):
    for report in two:
        assert report[case]["error"] < 2e-7
        assert report[case]["paths"] == (["fused", "generic"] if case == "generic" else ["fused"])
        assert report[case]["count"] == report[case]["examples"]


@pytest.mark.slow
def test_interleaved_experts_are_saved_and_verified_and_refused_by_name_elsewhere(two):
    for report in (one["experts elsewhere"] for one in two):
        assert report["interleaved"] == 2
        assert report["verified"]
        assert report["of a file"]
        assert "gate_up_proj is distributed as (_StridedShard(dim=1, sf=2),)" in report["selected"]
        assert "Save the statistics, and load the file on every process" in report["selected"]
        assert "Pieces that packed_colwise interleaves are not served" in report["trained"]
        assert report["trained without"] == "nothing"


@pytest.mark.slow
def test_verify_runs_every_example_on_all_processes_and_sees_an_error(two):
    for report in (one["verified"] for one in two):
        assert report["ok"]
        assert report["examples"] == 5
        assert not report["wrong"]
        assert report["sequence"]
        assert report["gradients of own heads"]
        assert "batch 0 differs between processes 0 and 1" in report["other"]


@pytest.mark.slow
def test_parts_of_a_gradient_that_autograd_takes_for_the_whole_are_refused(two):
    for report in two:
        assert "self_attn.q_norm.weight, and the processes 0 and 1 find other gradients" in report["partial gradients"]


@pytest.mark.slow
def test_what_is_not_served_is_refused_by_name(two):
    for report in two:
        for case, words in REFUSED.items():
            assert words in report["refused"][case], case


REFUSED = {
    "positions of norms": "unit='position' squares single positions",
    "another recipe": "SketchedFisher",
    "checkpoint": "checkpoint= is not built for tensor parallel models",
    "until": "until= is not built for tensor parallel models",
    "packed": "split in interleaved pieces",
    "experts": "expert parallel",
    "bare parameter": "is a DTensor of a module that neither parallelize_module nor a tp_plan has split",
    "context": "context parallel",
    "pipeline": "pipeline parallel",
    "logits in parts": "the model returns logits in parts",
}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict]:
    return launched(PROGRAM, 4, tmp_path_factory.mktemp("four"), ["replicas", "few heads", "sampled"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["replicas", "few heads", "sampled"])
def test_two_teams_count_each_example_once(four, case):
    for report in four:
        assert report[case]["error"] < 2e-7
        assert report[case]["paths"] == ["fused"]
        assert report[case]["count"] == report[case]["examples"]
