"""Models that FSDP2 shards and tensor parallel splits (gloo): the statistics are those of one process.

On two processes each of the two axes is tried alone (``test_tensor_parallel_ranks.py``), on four both.
"""

from __future__ import annotations

import pytest

from tests.support.ranks import launched

pytest.importorskip("transformers")
pytest.importorskip("peft")

PROGRAM = "tests.statistics.mesh_program"
PLANTED = ["no reduction over the data", "mean instead of sum", "counted once for each process"]
MORE = ["tied", "columns", "replicas", "sequence", "LoRA", "positions", "mc", "by factors", "replicas, by factors"]


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict]:
    cases = [f"both, {case}" for case in (*MORE, "files", "looped", "refused", "one team fails")]
    return launched(PROGRAM, 4, tmp_path_factory.mktemp("four"), ["both", *cases, *PLANTED])


def check(reports: list[dict], case: str) -> None:
    for report in reports:
        assert report[case]["error"] < 2e-7  # the mean is rounded to float32
        assert report[case]["paths"] == ["fused"]
        assert report[case]["count"] == report[case]["examples"]
        assert report[case].get("placed", True)
        assert report[case].get("sent", 15) == 15  # all linear maps


@pytest.mark.slow
def test_two_teams_of_two_processes_give_what_the_loop_gives(four):
    check(four, "both")


@pytest.mark.slow
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_error_is_seen(four, case):
    assert all(report[case] > 0.4 for report in four)


@pytest.mark.slow
def test_files_have_the_bytes_of_one_process_and_selections_its_entries(four):
    for report in four:
        assert report["both, files"] == {"bytes": True, "placed": True, "whole": True, "selected": True}


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_models_and_recipes_give_what_one_process_gives(four, case):
    check(four, f"both, {case}")


@pytest.mark.slow
def test_the_slow_path_and_verify_run_every_example_of_every_team_once(four):
    for report in (one["both, looped"] for one in four):
        assert report["error"] < 2e-7
        assert report["paths"] == ["fused", "loop"]
        assert report["noted"] > 0
        assert report["verified"]
        assert not report["unchecked"]
        assert report["count"] == report["counted"] == 5


@pytest.mark.slow
def test_what_is_not_served_is_refused_on_all_processes(four):
    words = {
        "groups": "GroupFisher",
        "sketch": "SketchedFisher",
        "checkpoint": "checkpoint= is not built for tensor parallel models",
        "prepare": "prepare is not built for tensor parallel models",
        "batches": "batch 0 differs between processes 0 and 1 of the 2 that compute one model",
        "verified batches": "batch 0 differs between processes 0 and 1 of the 2 that compute one model",
        "max_examples": "max_examples counts the examples of one process, and 2 have examples of their own",
    }
    for report in four:
        for case, text in words.items():
            assert text in report["both, refused"][case], case


@pytest.mark.slow
def test_what_differs_in_one_team_ends_both(four):
    for rank, report in enumerate(one["both, one team fails"] for one in four):
        other = "rank 0 failed with RuntimeError: " if rank > 1 else ""
        assert report == {
            "held back": f"{other}team 0 is at odds",
            "other gradients": f"{other}team 0 has other gradients",
        }
