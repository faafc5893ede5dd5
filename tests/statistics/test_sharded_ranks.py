"""Models that FSDP2 shards over processes (gloo): the statistics are those of one process with the whole model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
# The imports take longer than most cases, so all ranks are forked from one process after them.
LAUNCH = """
import os, signal, sys
from importlib import import_module

program = import_module(sys.argv[1])
world, folder, cases = int(sys.argv[2]), sys.argv[3], sys.argv[4:]
others = []
rank = 0
for number in range(1, world):
    if not (child := os.fork()):
        rank = number
        break
    others.append(child)
try:
    program.main(rank, world, folder, cases)
except BaseException:
    for child in others if rank == 0 else ():
        os.kill(child, signal.SIGKILL)
    raise
if rank == 0:
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in others))
"""


def launched(
    world: int, folder: Path, cases: Sequence[str], program: str = "tests.statistics.sharded_program"
) -> list[dict]:
    """Run cases of a program in as many processes; what each process reports of each case."""
    python = [sys.executable, "-W", "error::UserWarning:fishkern"]
    command = [*python, "-c", LAUNCH, program, str(world), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


MORE = ["checkpointed", "checkpointed reentrantly", "checkpointed by torch", "lora", "lora, all", "positions", "gated"]
MORE += ["mc", "packed", "experts", "pairs", "large logits"]
PLANTED = ["no reduction, unchecked", "mean, unchecked"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    cases = [
        "whole",
        "tied, in blocks",
        "unequal",
        "judged alike",
        "looped",
        "failures",
        "mixed",
        "files",
        "bytes",
        "no reduction",
        *PLANTED,
    ]
    return launched(2, tmp_path_factory.mktemp("two"), cases)


@pytest.mark.parametrize("case", ["whole", "tied, in blocks", "unequal", "judged alike"])
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


def test_one_ranks_failure_ends_all(two):
    first, second = (report["failures"] for report in two)
    expected = {
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


def test_a_model_in_mixed_precision_trains_as_if_no_pass_had_been(two):
    for report in two:
        assert report["mixed"]["error"] < 1e-5  # against one process in bfloat16, with the same batches
        assert report["mixed"]["trained alike"]
        assert report["mixed"]["as found"]


def test_the_file_is_that_of_one_process(two):
    for report in two:
        assert report["files"] == {"bytes": True, "loaded": True, "equal": True, "full": True}


def test_a_batch_sends_each_entry_once(two):
    """Squares are sent in the dtype of their sums, here float64; what the ranks agree on beside is small."""
    for report in two:
        counted, formula = report["bytes"]
        assert abs(counted - formula) < 0.02 * formula


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
    return launched(3, tmp_path_factory.mktemp("three"), cases)


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
    return launched(4, tmp_path_factory.mktemp("four"), [*cases, "generic", "looped, replicated"])


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
