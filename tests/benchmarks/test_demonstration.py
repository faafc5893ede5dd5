"""The demonstration in small: every stage, what it refuses, and that it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import demonstration
from benchmarks.demonstration import arms
from benchmarks.demonstration.setting import GIB, SHAPES, Needs
from benchmarks.demonstration.table import table

STAGES = [
    "build", "estimate one batch", "estimate", "select", "save the statistics", "select from the file", "verify",
    "train", "delta", "apply to a fresh model",
]  # fmt: skip
TINY = ["--shape", "tiny", "--device", "cpu", "--examples", "5", "--batch-size", "2", "--tokens", "6"]
TINY += ["--steps", "3", "--density", "0.05", "--lr", "0.01", "--rival-examples", "3", "--revision", "some"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command, with its arms in this process; gives its records and what it prints."""
    if torch.cuda.is_available():
        pytest.skip("the figures of a CPU would stand among this GPU's")
    ran: list[str] = []

    def here(arm, setting, folder, lines) -> int:
        ran.append(arm)
        return arms.main(arm, json.dumps(asdict(setting)), str(folder), str(lines))

    monkeypatch.setattr(demonstration, "in_process_of_its_own", here)

    def command(*options: str) -> tuple[list[dict], str, list[str]]:
        ran.clear()
        status = demonstration.main([*TINY, "--results", str(tmp_path / "results"), *options])
        files = list((tmp_path / "results").glob("*/demonstration.jsonl"))
        records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        assert status == (0 if records else 1)
        return records, capsys.readouterr().out, list(ran)

    return command


def test_the_whole_way(run, tmp_path):
    """Every stage has its figures; that it is recorded says that verify holds and that the delta restores."""
    records, out, _ = run("--out", str(tmp_path / "kept"), "--arms", "fishkern", "one_by_one", "dense_adamw")
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
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"selection.safetensors", "delta.safetensors", "statistics.safetensors"}
    assert ours["delta"]["file_bytes"] == (tmp_path / "kept" / "delta.safetensors").stat().st_size
    loop = next(record for record in records if (record["arm"], record["stage"]) == ("one_by_one", "estimate"))
    assert (loop["examples"], loop["batch_size"]) == (3, 1)
    assert all(len(line) <= 100 for line in out.splitlines())
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith(tuple(STAGES))] == STAGES


def test_it_goes_on_where_it_stopped(run, monkeypatch):
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
    def fails(setting, watch, folder):
        with watch.stage("estimate"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 29 GiB.\nand more")

    monkeypatch.setitem(arms.ARMS, "opacus", fails)
    monkeypatch.setitem(arms.ARMS, "opacus_single", fails)
    records, out, ran = run("--arms", "opacus", "opacus_single")
    assert ran == ["opacus", "opacus_single"]  # one example at a time is tried where a batch is too much
    assert {record["left out"] for record in records} == {
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 29 GiB."
    }
    assert "Tried to allocate 29 GiB" in " ".join(out.split())


@pytest.mark.parametrize("what", ["verify", "apply_delta"])
def test_nothing_is_recorded_of_ours_when_it_does_not_hold(run, monkeypatch, what):
    if what == "verify":
        honest = arms.fk.estimate
        monkeypatch.setattr(arms.fk, "estimate", lambda *args, **how: _scaled(honest(*args, **how)))
    else:
        monkeypatch.setattr(arms.fk, "apply_delta", lambda model, delta: delta)
    records, *_ = run("--arms", "fishkern")
    assert not records


def _scaled(statistics):
    more = {name: 1.01 * values for name, values in statistics.items()}
    how = {"count": statistics.count, "provenance": statistics.provenance, "coverage": statistics.coverage}
    return arms.fk.Statistics(more, **how)


@pytest.mark.parametrize(
    ("options", "free", "message"),
    [
        (["--shape", "llama-3.2-1b"], 4 * GIB, r"llama-3.2-1b in float32 .* needs about .* \(4.00 are free\)"),
        (["--shape", "tiny"], 1000, r"tiny in float32 .* Take less: --shape"),
        (["--shape", "tiny", "--steps", "0"], 4 * GIB, "--steps must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, free, message, monkeypatch, tmp_path):
    monkeypatch.setattr(demonstration, "available_memory", lambda: free)
    how = demonstration._parser().parse_args(["--device", "cpu", *options])
    with pytest.raises(demonstration.RefusedError, match=message):
        demonstration.plan(how, tmp_path)


@pytest.mark.parametrize(
    ("device_gib", "host_gib", "shape", "accumulate_on"),
    [(78, 120, "llama-3.1-8b", "cuda"), (40, 120, "llama-3.1-8b", "cpu"), (40, 20, "llama-3.2-1b", "cuda"),
     (10, 20, "llama-3.2-1b", "cpu"), (6, 20, "small", "cuda")],
)  # fmt: skip
def test_the_largest_shape_that_fits_a_gpu(device_gib, host_gib, shape, accumulate_on, monkeypatch, tmp_path):
    """The accumulators go to the host before a smaller shape is taken."""
    sizes = {name: found.sizes() for name, found in SHAPES.items() if name != "llama-3.1-8b"}
    sizes["llama-3.1-8b"] = [525_336_576] * 2 + [217_487_077] * 32  # without making one
    names = {found: name for name, found in SHAPES.items()}
    monkeypatch.setattr(type(SHAPES["tiny"]), "sizes", lambda found: sizes[names[found]])
    monkeypatch.setattr(demonstration, "available_memory", lambda: host_gib * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (device_gib * GIB, 80 * GIB))
    how = demonstration._parser().parse_args(["--device", "cuda", "--tokens", "128"])
    found = demonstration.plan(how, tmp_path)
    assert (found.shape, found.accumulate_on, found.dtype) == (shape, accumulate_on, "bfloat16")
    assert found.save == (shape != "llama-3.1-8b")


def test_sources_without_git_must_be_named(monkeypatch):
    monkeypatch.setattr(demonstration, "software", lambda revision: {"commit": revision or "", "dirty": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    how = demonstration._parser().parse_args([])
    with pytest.raises(demonstration.RefusedError, match="--revision TEXT"):
        demonstration._origin(how)


def test_an_interrupted_arm_leaves_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demonstration.tempfile, "tempdir", str(tmp_path))

    def interrupted(setting, watch, folder):
        with watch.stage("build"):
            raise KeyboardInterrupt

    monkeypatch.setitem(arms.ARMS, "one_by_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--arms", "one_by_one")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_counts_of_the_shapes():
    """Of the models that they are named for, without making one of 8 billion entries."""
    assert sum(SHAPES["llama-3.2-1b"].sizes()) == 1_235_814_400
    needs = Needs.of(SHAPES["tiny"], torch.bfloat16, 1, 1)
    assert (needs.weights, needs.accumulators) == (2 * 27_360, 4 * 27_360)
    assert [arms.sampled(f"model.layers.{n}.mlp.up_proj.weight", 32) for n in (0, 1, 16, 31)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert arms.sampled("lm_head.weight", 32)


def test_a_killed_process_is_recorded(run, monkeypatch):
    """By the system, out of memory; what it measured before stands."""

    def killed(arm, setting, folder, lines) -> int:
        line = {"arm": arm, "stage": "build", "seconds": 1.0, "peak_mib": 1.0}
        lines.write_text(json.dumps(line) + "\n")
        return -9

    monkeypatch.setattr(demonstration, "in_process_of_its_own", killed)
    records, out, _ = run("--arms", "dense_adamw")
    assert [record["stage"] for record in records] == ["build", "ended"]
    assert "ended by signal 9, as when the system runs out of memory" in " ".join(out.split())


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    how = demonstration._parser().parse_args(TINY)
    lines = tmp_path / "lines"
    assert demonstration.in_process_of_its_own("one_by_one", demonstration.plan(how, tmp_path), tmp_path, lines) == 0
    assert [json.loads(line)["stage"] for line in lines.read_text().splitlines()] == ["build", "estimate"]


def test_the_table_names_who_is_ahead():
    """A rival that is faster shows as less than 1x."""
    setting = {"shape": "s", "dtype": "d", "device": "cuda", "examples": 4, "tokens": 5, "batch_size": 2}
    setting |= {"accumulate_on": "cuda", "density": 0.005, "steps": 3}
    shared = {"setting": setting, "machine": "some-gpu", "peak_mib": 1024.0}
    ours = {"arm": "fishkern", "stage": "estimate", "seconds": 4.0, "examples": 4, "coverage": {"fused": 7}, **shared}
    loop = {"arm": "one_by_one", "stage": "estimate", "seconds": 1.0, "examples": 2, "batch_size": 1, **shared}
    text = "\n".join(table([ours, loop]))
    assert "1000.0 ms an example; fused 7" in text
    assert "500.0 ms an example, 0.50x the time and 1.00x the peak of ours" in " ".join(text.split())


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
