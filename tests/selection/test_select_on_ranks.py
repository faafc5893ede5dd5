"""Scores that are sharded over processes (gloo): the selection is that of one process with the whole scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import launched

PROGRAM = "tests.selection.sharded_program"
PLANTED = ["ties counted twice", "numbers of the part", "own scores alone", "equal ones of each rank"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    return {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (2, 3, 4)}


@pytest.fixture(scope="module")
def two(folders) -> list[dict]:
    cases = ["top of rows", "groups in columns", "contract of columns", "files of rows", "failures"]
    cases += ["bytes", "estimated"]
    return launched(PROGRAM, 2, folders[2], [*cases, *PLANTED])


@pytest.fixture(scope="module")
def three(folders) -> list[dict]:
    cases = ["all kinds", "top of columns", "top of mixed", "rules on rows", "rules on columns", "rules on mixed"]
    cases += ["contract of rows", "contract of mixed", "files of rows", "files of mixed", "estimated"]
    return launched(PROGRAM, 3, folders[3], cases)


@pytest.fixture(scope="module")
def four(folders) -> list[dict]:
    cases = ["top of replicated", "top of grid", "rules on replicated", "contract of replicated", "contract of grid"]
    cases += ["top of shards of rows", "top of shards of columns", "top of teams", "files of shards of rows"]
    cases += ["contract of shards of columns", "files of shards of columns", "files of teams"]
    return launched(PROGRAM, 4, folders[4], [*cases, "files of replicated", "replicas counted twice"])


def agree(reports: list[dict], case: str) -> None:
    assert [report[case] for report in reports] == [[]] * len(reports)


@pytest.mark.parametrize("case", ["top of rows", "groups in columns", "contract of columns"])
def test_two_ranks_select_what_one_process_does(two, case):
    agree(two, case)


def test_the_statistics_of_a_sharded_model_are_selected_from(two):
    assert all(all(report["estimated"].values()) for report in two)


def test_the_file_is_that_of_one_process(two):
    assert all(all(report["files of rows"].values()) for report in two)


def test_what_is_sent_does_not_grow_with_the_scores(two):
    """Histograms of 2^16 counts: two for a float32, two for an index where equal scores are cut; the rest is small."""
    for report in two:
        few, many, without_ties = report["bytes"]
        assert few == many
        assert 4 * 2**19 < many < 4 * 2**19 + 2**14
        assert 2 * 2**19 < without_ties < 2 * 2**19 + 2**14


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_error_is_seen(two, case):
    assert all(report[case] for report in two)


def test_an_error_ends_all_ranks_alike(two):
    first, second = (report["failures"] for report in two)
    assert first["afterwards"] == second["afterwards"] == "True"
    alike = {
        "nan": "ValueError: layers.0.bias holds NaN at flat index 29, which has no rank",
        "nan alone": "ValueError: layers.0.bias holds NaN at flat index 29, which has no rank",
        "nan in columns": "ValueError: embed.weight holds NaN at flat index 399, which has no rank",
        "nan in a row": "ValueError: layers.1.weight holds NaN at flat index 1440, which has no rank",
        "another k": "RuntimeError: rank ",
        "another name": "RuntimeError: rank ",
        "other values": "RuntimeError: rank 0 and rank 1 hold the same scores, and have selected different entries",
        "own rule": "TypeError: the scores are sharded over processes, and First does not say on_shards = True: save",
        "too many": "ValueError: k=2,",
        "density": "ValueError: ContributionTopK solves density= by following scores in their order",
        "rows in columns": "ValueError: each rank holds a part of every row of embed.weight, from which 8 entries",
        "groups in columns": "ValueError: each rank holds a part of every row of layers.0.weight, from which 4",
        "partial sums": "ValueError: w is distributed as (Partial(sum),) over a mesh of 2 processes: Shard and",
        "triton": "BackendUnavailableError: the top-k of scores that are sharded over processes cannot run on Triton",
        "triton by default": "BackendUnavailableError: the top-k of scores that are sharded over processes cannot run",
        "with a whole one": "ValueError: one selection has this rank's entries alone",
        "a whole one with it": "ValueError: one selection has this rank's entries alone",
        "in two ways": "ValueError: one selection has what was selected of ",
        "another model": "ValueError: this rank holds ",
        "a whole model": "ValueError: this rank holds [0:50, 0:8] of embed.weight, and the selection has what was",
    }
    for case, words in alike.items():
        assert first[case].startswith(words), first[case]
        assert second[case].startswith(words), second[case]
    on_the_second = {
        **{f"memory {number}": "MemoryError: no room" for number in (1, 9, 17, 24, 31)},
        "a pattern": "ValueError: never='lm*' matches no name of the pool",
        "no rule": "TypeError: rule must be a selection rule",
    }
    for case, words in on_the_second.items():
        assert second[case].startswith(words), second[case]
        assert first[case].startswith(f"RuntimeError: rank 1 failed with {words}"), first[case]
    assert first["a full disk"].startswith("FileNotFoundError: ")
    assert second["a full disk"].startswith("RuntimeError: rank 0 failed with FileNotFoundError: ")
    assert first["negative sums"].startswith("ValueError: share='sum' adds up scores")
    assert "w holds -9 at flat index 0:" in first["negative sums"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("all kinds", "top of columns", "top of mixed", "rules on rows", "rules on columns", "rules on mixed"),
        *("contract of rows", "contract of mixed"),
    ],
)
def test_three_ranks_with_uneven_and_empty_shards_select_what_one_process_does(three, case):
    agree(three, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("top of replicated", "top of grid", "rules on replicated", "contract of replicated", "contract of grid"),
        *("top of shards of rows", "top of shards of columns", "top of teams", "contract of shards of columns"),
    ],
)
def test_four_ranks_in_two_axes_select_what_one_process_does(four, case):
    agree(four, case)


@pytest.mark.slow
def test_replicas_counted_twice_are_seen(four):
    assert all(report["replicas counted twice"] for report in four)


@pytest.mark.slow
def test_files_of_two_three_and_four_ranks_are_equal(two, three, four, folders):
    for number in range(2):
        names = {2: "rows", 3: "mixed", 4: "replicated"}
        files = [(folders[world] / f"{layout}-{number}.safetensors").read_bytes() for world, layout in names.items()]
        files += [
            (folders[4] / f"{layout}-{number}.safetensors").read_bytes()
            for layout in ("shards of rows", "shards of columns", "teams")
        ]
        assert len(set(files)) == 1
