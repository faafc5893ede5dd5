"""Masked training of models that tensor parallel splits, with FSDP2 beside it or not (gloo), as in one process.

Two processes try one axis (``test_sharded.py``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.optim.test_sharded import check
from tests.support.ranks import launched

PROGRAM = "tests.optim.mesh_program"
TRAINED = ["adamw", "adamw, ranges", "sgd", "nesterov, ranges", "norm"]
REST = ["resumed", "state", "groups", "delta", "start", "selected on ranks", "16 bits"]
PLANTED = ["norm of the own part", "replicas counted"]


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict]:
    cases = [f"{case}, {layout}" for layout in ("split", "both") for case in TRAINED + REST]
    cases += [f"{case}, both" for case in PLANTED]
    return launched(PROGRAM, 4, tmp_path_factory.mktemp("four"), cases)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["split", "both"])
@pytest.mark.parametrize("case", TRAINED)
def test_twenty_steps_of_four_processes_are_those_of_one(four, case, layout):
    check(four, f"{case}, {layout}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["split", "both"])
def test_states_deltas_starts_and_selections_are_those_of_one_process(four, layout):
    for report in ({case: one[f"{case}, {layout}"] for case in REST} for one in four):
        assert report["resumed"] == {"own form": True, "torch's form": True}
        state, selected = report["state"], report["selected on ranks"]
        assert all(state["alike"])
        assert state["changes"]
        assert state["again"]
        assert state["frozen"]
        assert state["without gradient"]
        assert max(one["error"] for one in (state, selected, report["groups"])) < 1e-12
        assert all(selected[key] for key in ("sharded", "alike", "loaded", "bytes", "changed", "bound"))
        assert all(report["delta"][key] for key in ("bytes", "applied", "undone"))
        assert report["delta"]["another base"].startswith("ValueError: the model is not the delta's base")
        assert all(report["start"][key] for key in ("as in one process", "loaded", "bytes"))
        assert report["start"]["another start"].startswith("ValueError: the selection was made for another start")
        assert report["16 bits"] == {"still": True, "masters": True, "moved": True}


@pytest.mark.slow
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_error_on_two_axes_is_seen(four, case):
    assert max(report[f"{case}, both"]["error"] for report in four) > 1e-3


@pytest.fixture(scope="module")
def handed_on(tmp_path_factory) -> list[list[dict]]:
    """Four processes on two axes begin, two on one axis go on, and one ends."""
    folder: Path = tmp_path_factory.mktemp("handed on")
    runs = [(4, "steps 0 to 8, handed on"), (2, "steps 8 to 14, handed on"), (1, "steps 14 to 20")]
    reports = []
    for world, case in runs:
        (into := folder / str(world)).mkdir()
        reports.append([report[case] for report in launched(PROGRAM, world, into, [case])])
    return reports


@pytest.mark.slow
def test_a_checkpoint_goes_on_where_the_model_is_split_otherwise(handed_on):
    for report in (report for reports in handed_on for report in reports):
        assert report["error"] < 1e-12
        assert report["still"]
        assert report["whole"]
