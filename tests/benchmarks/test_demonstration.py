"""The demonstration in small: every stage, what it refuses, and that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.cases import demonstration
from benchmarks.cases.demonstration import SHAPES, table
from benchmarks.engine.memory import GIB
from benchmarks.engine.process import ProcessError
from benchmarks.subjects import demonstration as subject

STAGES = [
    "build", "estimate one batch", "estimate", "select", "save the statistics", "select from the file", "verify",
    "train", "delta", "apply to a fresh model",
]  # fmt: skip
TINY = ["--shape", "tiny", "--device", "cpu", "--examples", "5", "--batch-size", "2", "--tokens", "6"]
TINY += ["--steps", "3", "--density", "0.05", "--lr", "0.01", "--rival-examples", "3", "--revision", "some"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command, with its arms in this process; gives its records, its output, and the arms that ran."""
    if torch.cuda.is_available():
        pytest.skip("the figures of a CPU would be recorded as this GPU's")
    ran: list[str] = []

    def here(arm, setting, folder, lines) -> None:
        ran.append(arm)
        demonstration.run_arm(arm, setting, folder, lines)

    monkeypatch.setattr(demonstration, "in_process_of_its_own", here)

    def command(*options: str) -> tuple[list[dict], str, list[str]]:
        ran.clear()
        status = demonstration.main([*TINY, "--results", str(tmp_path / "results"), *options])
        files = list((tmp_path / "results").glob("*/demonstration.jsonl"))
        records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        assert status == (0 if records else 1)
        return records, capsys.readouterr().out, list(ran)

    return command


def test_the_whole_way(run):
    """Every stage has its figures; verify holds and the delta restores, or there would be no record."""
    records, out, _ = run("--arms", "fishkern", "one_by_one", "dense_adamw")
    ours = {record["stage"]: record for record in records if record["arm"] == "fishkern"}
    assert list(ours) == STAGES
    assert all(record["seconds"] > 0 and record["commit"] == "some" for record in records)
    P = sum(SHAPES["tiny"].sizes())
    assert ours["build"]["weights"] == P
    assert ours["estimate"]["coverage"] == {"fused": P}
    assert (ours["select"]["selected"], ours["select"]["pool"]) == (P // 20, P)
    assert ours["verify"]["ok"]
    assert ours["verify"]["compared"] == ours["select"]["tensors"]  # three layers are the first, middle and last
    assert ours["apply to a fresh model"]["restored"]
    assert 0 < ours["apply to a fresh model"]["moved"] <= P // 20
    assert ours["train"]["losses"][-1] < ours["train"]["losses"][0]
    assert len(ours["train"]["losses"]) == 4
    loop = next(record for record in records if (record["arm"], record["stage"]) == ("one_by_one", "estimate"))
    assert (loop["examples"], loop["batch_size"]) == (3, 1)
    rows = [line for line in out.splitlines() if line.startswith("fishkern ")]
    assert [row[15:39].strip() for row in rows] == STAGES


def test_it_goes_on_where_it_stopped(run):
    *_, ran = run("--arms", "fishkern", "one_by_one")
    assert ran == ["fishkern", "one_by_one"]
    _, out, ran = run("--arms", "fishkern", "one_by_one", "dense_adamw")
    assert ran == ["dense_adamw"]
    assert "apply to a fresh model" in out
    *_, ran = run("--arms", "one_by_one", "--tokens", "7")
    assert ran == ["one_by_one"]
    *_, ran = run("--arms", "one_by_one", "--revision", "another")
    assert ran == ["one_by_one"]


def test_a_rival_may_fail_and_says_how(run, monkeypatch):
    def fails(setting, stages, folder):
        with stages.measured("estimate"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 29 GiB.\nand more")

    monkeypatch.setitem(demonstration.ARMS, "opacus", fails)
    monkeypatch.setitem(demonstration.ARMS, "opacus_single", fails)
    records, out, ran = run("--arms", "opacus", "opacus_single")
    assert ran == ["opacus", "opacus_single"]  # one example at a time is tried where a batch is too much
    assert {record["left out"] for record in records} == {
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 29 GiB."
    }
    assert "out of memory" in out


@pytest.mark.parametrize("what", ["verify", "apply_delta"])
def test_nothing_is_recorded_of_ours_when_it_does_not_hold(run, monkeypatch, what):
    fk = demonstration.fk
    if what == "verify":
        honest = fk.estimate
        monkeypatch.setattr(fk, "estimate", lambda *args, **how: _scaled(honest(*args, **how)))
    else:
        monkeypatch.setattr(fk, "apply_delta", lambda model, delta: delta)
    records, *_ = run("--arms", "fishkern")
    assert not records


def _scaled(statistics):
    more = {name: 1.01 * values for name, values in statistics.items()}
    origin = {"count": statistics.count, "provenance": statistics.provenance, "coverage": statistics.coverage}
    return demonstration.fk.Statistics(more, **origin)


@pytest.mark.parametrize(
    ("options", "free", "message"),
    [
        (["--shape", "llama-3.2-1b"], 4 * GIB, r"llama-3.2-1b in float32 .* needs about .* \(4.00 are free\)"),
        (["--shape", "tiny"], 1000, r"tiny in float32 .* Take less: --shape"),
        (["--shape", "tiny", "--steps", "0"], 4 * GIB, "--steps must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, free, message, monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "available_memory", lambda: free)
    requested = demonstration._parser().parse_args(["--device", "cpu", *options])
    with pytest.raises(demonstration.RefusedError, match=message):
        demonstration.plan(requested, tmp_path)


@pytest.mark.parametrize(
    ("device_gib", "host_gib", "shape", "accumulate_on"),
    [(78, 120, "llama-3.1-8b", "cuda"), (40, 120, "llama-3.1-8b", "cpu"), (40, 20, "llama-3.2-1b", "cuda"),
     (10, 20, "llama-3.2-1b", "cpu"), (6, 20, "small", "cuda")],
)  # fmt: skip
def test_the_largest_shape_that_fits_a_gpu(device_gib, host_gib, shape, accumulate_on, monkeypatch, tmp_path):
    """The accumulators go to the host before a smaller shape is taken."""
    sizes = {shape: shape.sizes() for name, shape in SHAPES.items() if name != "llama-3.1-8b"}
    sizes[SHAPES["llama-3.1-8b"]] = [525_336_576] * 2 + [217_487_077] * 32  # without making one
    monkeypatch.setattr(type(SHAPES["tiny"]), "sizes", lambda shape: sizes[shape])
    monkeypatch.setattr(subject, "available_memory", lambda: host_gib * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (device_gib * GIB, 80 * GIB))
    requested = demonstration._parser().parse_args(["--device", "cuda", "--tokens", "128"])
    setting = demonstration.plan(requested, tmp_path)
    assert (setting.shape, setting.accumulate_on, setting.dtype) == (shape, accumulate_on, "bfloat16")
    assert setting.save == (shape != "llama-3.1-8b")


def test_sources_without_git_must_be_named(monkeypatch):
    monkeypatch.setattr(demonstration, "origin", lambda revision: {"commit": revision or "", "dirty": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(demonstration.RefusedError, match="--revision TEXT"):
        demonstration._origin(demonstration._parser().parse_args([]))


def test_verified_parameters():
    layers = [demonstration.sampled(f"model.layers.{n}.mlp.up_proj.weight", 32) for n in (0, 1, 16, 31)]
    assert layers == [True, False, True, True]
    assert demonstration.sampled("lm_head.weight", 32)


def test_an_interrupted_or_killed_arm(run, monkeypatch):
    """An interrupted one leaves nothing; of one that the system ends, the stages before that are recorded."""

    def interrupted(setting, stages, folder):
        with stages.measured("build"):
            pass
        raise KeyboardInterrupt

    monkeypatch.setitem(demonstration.ARMS, "one_by_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--arms", "one_by_one")

    def killed(arm, setting, folder, lines) -> None:
        lines.write_text(json.dumps({"arm": arm, "stage": "build", "seconds": 1.0, "peak_mib": 1.0}) + "\n")
        raise ProcessError("its process ended: SIGKILL")

    monkeypatch.setattr(demonstration, "in_process_of_its_own", killed)
    records, out, _ = run("--arms", "dense_adamw")
    assert [record["stage"] for record in records] == ["build", "ended"]
    assert "its process ended: SIGKILL" in out


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    setting = demonstration.plan(demonstration._parser().parse_args(TINY), tmp_path)
    lines = tmp_path / "lines"
    demonstration.in_process_of_its_own("one_by_one", setting, tmp_path, lines)
    stages = [json.loads(line)["stage"] for line in lines.read_text().splitlines()]
    assert stages == ["build", "first call", "estimate"]


def test_committed_records_have_a_table():
    """Those of an earlier layout of this file, too."""
    path = demonstration.RESULTS / "cpu-2-cores" / "demonstration.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    text = "\n".join(table(records))
    assert f"{records[0]['weights']:,} weights" in text
    assert "ms an example" in text


def test_the_table_names_who_is_ahead():
    """A rival that is faster shows as less than 1x."""
    setting = {"shape": "s", "dtype": "d", "examples": 4, "tokens": 5, "batch_size": 2, "density": 0.005}
    shared = {"setting": setting, "machine": "some-gpu", "stage": "estimate", "peak_mib": 1024.0}
    ours = {"arm": "fishkern", "seconds": 4.0, "examples": 4, **shared}
    loop = {"arm": "one_by_one", "seconds": 1.0, "examples": 2, **shared}
    text = "\n".join(table([ours, loop]))
    assert "1000.0 ms an example\n" in text
    assert "500.0 ms an example, 0.50x the time and 1.00x the peak of fishkern" in text


def test_the_picture(run):
    """One bar for each way that was measured, its reason for each that was not."""
    pytest.importorskip("matplotlib")
    from benchmarks.plots.demonstration import draw

    records, *_ = run()
    figure = draw(records)
    figure.draw_without_rendering()
    times, _, steps, _ = figure.axes
    assert [label.get_text() for label in times.get_yticklabels()] == ["fishkern", "batch-size-1 loop", "Opacus"]
    assert [label.get_text() for label in steps.get_yticklabels()] == ["fishkern", "everything, fused AdamW"]
    (weights,) = {record["weights"] for record in records if "weights" in record}
    assert f"{weights / 1e6:.1f} million parameters" in figure.get_suptitle()
