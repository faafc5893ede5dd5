"""``fishkern tune --method fisher-adaptune`` and what ``fishkern show`` says of its freezer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fishkern as fk
from fishkern.freezing.saved import FreezerState
from tests.commands.test_resuming import UNFINISHED, assert_same, interrupted  # noqa: F401 - a fixture
from tests.support.command import command, refused

STEPS = 12  # 12 rows, 2 in a batch, 2 epochs
EVERY = ["--read-every", 1, "--freeze-every", 3]
SELECTION, FREEZER = "selection.safetensors", "freezer.safetensors"


@pytest.fixture
def arguments(models, rows) -> list:
    """A classifier with dropout, decay and momentum."""
    data = ["--data", rows / "text.jsonl", "--batch-size", 2, "--epochs", 2, "--lr", 1e-2, "--weight-decay", 0.1]
    return ["tune", models / "classifier", *data, "--method", "fisher-adaptune"]


@pytest.fixture(scope="module")
def frozen(models, rows, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run, and the lines that it has printed on standard error."""
    import contextlib
    import io

    from fishkern import cli

    folder, error = tmp_path_factory.mktemp("frozen") / "run", io.StringIO()
    data = ["--data", rows / "text.jsonl", "--batch-size", 2, "--epochs", 2, "--lr", 1e-2, "--eval-split", "train"]
    line = ["tune", models / "classifier", *data, "--method", "fisher-adaptune", *EVERY, "--json", "--out", folder]
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in line])
    assert not end.value.code, error.getvalue()
    return folder, error.getvalue()


def test_the_folder_holds_what_began_and_what_is_left(frozen):
    folder, _ = frozen
    assert {file.name for file in folder.iterdir()} == {
        "adapter", "delta.safetensors", FREEZER, "report.json", SELECTION, "start.safetensors"
    }  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    state = FreezerState.load(folder / FREEZER)
    left, delta = fk.Selection.load(folder / SELECTION), fk.Delta.load(folder / "delta.safetensors")
    assert state.initial.whole == state.initial.names, "everything is in training at first"
    assert any("lora_A" in name for name in state.initial.names)
    assert any("classifier" in name for name in state.initial.names)
    assert report["trained"] == report["pool"] == state.initial.count == delta.count
    assert report["left"] == left.count == state.selection.count < state.initial.count
    assert left == state.selection
    heads = [name for name in left.names if ".classifier." in name]
    assert heads
    assert all(left.counts[name] == left.shapes[name].numel() for name in heads), "the head never stops"
    assert (report["method"], report["read_every"], report["freeze_every"]) == ("fisher-adaptune", 1, 3)
    assert (report["margin"], report["most"], report["slices"], report["fisher_samples"]) == (1.0, 0.25, 4, 32)
    assert not {"density", "k", "trainable", "order", "allow_zeros"} & report.keys()
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["seconds"]["reading"] <= report["seconds"]["training"]


def test_every_decision_is_in_the_report(frozen):
    folder, _ = frozen
    report = json.loads((folder / "report.json").read_text())
    events = report["events"]
    assert [event["step"] for event in events] == [3, 6, 9, 12]
    assert events[-1]["entries_left"] == report["left"]
    total = report["trained"]
    for event in events:
        assert event["entries_stopped"] <= 0.25 * report["trained"]
        total -= event["entries_stopped"]
        assert event["entries_left"] == total
        moments = 2 * 4 * total  # both moments of each entry, in float32; beside them steps, and rows or indices
        assert moments <= event["state_bytes"] <= 1.05 * moments
    assert sum(event["slices_stopped"] for event in events) > 0
    stopped = [name for event in events for name in event["gradients_stopped"]]
    left = fk.Selection.load(folder / SELECTION)
    assert sorted(stopped) == sorted(name for name, count in left.counts.items() if not count)


def test_every_decision_is_a_line_while_it_trains(frozen):
    folder, error = frozen
    events = json.loads((folder / "report.json").read_text())["events"]
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    heading, *told = lines
    assert heading.split("  ")[-1] == "gradients no longer computed"
    assert len(told) == len(events)
    for line, event in zip(told, events, strict=True):
        assert line.split()[0] == str(event["step"])
        assert f"{event['slices_stopped']} of {event['slices']}" in line
        assert f"{event['entries_left']:,} of {event['entries_at_first']:,}" in line
        assert " MiB " in line
        assert line.endswith("none") == (not event["gradients_stopped"])


@pytest.mark.parametrize("adapter", ["lora", pytest.param("bottleneck", marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_as_a_whole_one(capsys, arguments, interrupted, tmp_path, adapter):  # noqa: F811
    """Stopped after an event in the first epoch, and in the second epoch after another."""
    arguments = [*arguments, *EVERY, "--adapter", adapter, "--save-every", 0]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    status, _, error = command(capsys, *arguments, "--out", whole)
    assert (status, interrupted.steps) == (0, STEPS), error
    for at, seen in ((5, 0), (8, 10)):
        interrupted.at, interrupted.steps = at, seen // 2
        status, output, error = command(capsys, *arguments, "--out", stopped)
        assert (status, output) == (130, "")
        assert (f"{seen} of 24 examples seen" in error) == (seen > 0)
    held = torch.load(stopped / UNFINISHED, weights_only=True)["state"]
    assert [event["step"] for event in held["stopping"]["events"]] == [3, 6]
    assert any(event["slices_stopped"] for event in held["stopping"]["events"])
    interrupted.at = None
    status, _, error = command(capsys, *arguments, "--out", stopped)
    assert "16 of 24 examples seen" in error
    assert (status, interrupted.steps) == (0, STEPS)
    assert_same(whole, stopped)
    assert_only_what_was_in_training_has_moved(held, fk.Delta.load(whole / "delta.safetensors"))


def assert_only_what_was_in_training_has_moved(held: dict, delta: fk.Delta) -> None:
    """After the step at which the state was kept, decay and momentum included."""
    left = FreezerState.from_plain(held["stopping"]["freezer"]).selection
    for name, values in held["values"].items():
        moved = (delta.values(name) != values.flatten()).nonzero().flatten()
        assert set(moved.tolist()) <= set(left.indices(name).tolist()), name
        assert not left.counts[name] or len(moved)


@pytest.mark.slow
def test_a_run_of_one_method_is_not_resumed_by_the_other(capsys, arguments, interrupted, tmp_path):  # noqa: F811
    out = ["--out", tmp_path / "out"]
    interrupted.at = 3
    assert command(capsys, *arguments, *EVERY, *out)[0] == 130
    line = refused(capsys, *arguments[:-2], *out)
    assert "holds an unfinished run with" in line
    assert "method fisher-adaptune" in line
    line = refused(capsys, *arguments, *EVERY, "--most", 0.5, *out)
    assert "holds an unfinished run with most 0.25, not most 0.5" in line
    path = tmp_path / "out" / UNFINISHED
    whole = path.read_bytes()
    held = torch.load(path, weights_only=True)
    for damage in ({}, {"stopping": {}}, {"stopping": {**held["state"]["stopping"], "freezer": {}}}):
        state = {key: value for key, value in held["state"].items() if key != "stopping"}
        torch.save({**held, "state": {**state, **damage}}, path)
        assert "is not the file of an interrupted tune" in refused(capsys, *arguments, *EVERY, *out)
    path.write_bytes(whole)
    interrupted.at = None
    status, _, error = command(capsys, *arguments, *EVERY, "--most", 0.25, "--margin", 1, "--slices", 4, *out)
    assert "resuming" in error, "a default that is given is the same"
    assert status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", 0.1], "selects nothing: leave out --density."),
        (["--density", 0], "leave out --density."),
        (["--k", 5, "--allow-zeros"], "leave out --k and --allow-zeros."),
        (["--trainable", 5], "leave out --trainable."),
        (["--order", "largest"], "leave out --order."),
        (["--most", 2], "--most"),
        (["--margin", "nan"], "--margin must be finite"),
        (["--spare", "*.nowhere.*"], "nowhere"),
        (["--freeze-every", 13], "--freeze-every 13 is more than the 12 steps of this training"),
        (["--freeze-every", 4, "--read-every", 5], "--read-every 5 is more than the 4 steps from one decision"),
        (["--read-every", 3], "--read-every 3 is more than the 2 steps from one decision"),
        (["--method", "best"], "--method is fish, fisher-adaptune or tr-pts, got 'best'."),
        (["--method", "fish", "--margin", 0], "with --method fish nothing stops: leave out --margin, or take"),
        (["--method", "fish", "--freeze-every", 3, "--slices", 2], "leave out --freeze-every and --slices"),
        (["--method", "fish", "--spare", "*"], "leave out --spare, or take"),
    ],
    ids=str,
)
def test_refusals(capsys, arguments, tmp_path, options, message):
    assert message in refused(capsys, *arguments, *options, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_by_default_it_decides_five_times(capsys, arguments, tmp_path):
    status, output, error = command(capsys, *arguments, "--epochs", 4, "--out", tmp_path / "out")
    assert status == 0, error
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read_every"], report["freeze_every"]) == (1, 4)
    assert [event["step"] for event in report["events"]][:5] == [4, 8, 12, 16, 20]
    assert f"{report['left']:,} of them in training at the end" in output
    assert "along with selection, start, delta, freezer and report" in output
    assert "gradients no longer computed" in output
    assert f"Next:  fishkern show {tmp_path / 'out' / FREEZER} --plot" in output


def test_a_freezer_is_shown(capsys, frozen, tmp_path):
    folder, _ = frozen
    status, output, error = command(capsys, "show", folder / FREEZER)
    assert (status, error) == (0, "")
    report = json.loads((folder / "report.json").read_text())
    assert f"after 12 steps, 4 decisions and 13 readings; {report['left']:,} of {report['trained']:,}" in output
    assert all(words in output for words in ("JensenShannon(", "slices stopped", "layer 1", "of them stopped"))
    assert "statistic estimator = DiagonalFisher, fisher_type = empirical" in output
    for event in report["events"]:
        assert not event["slices_stopped"] or f" {event['entries_left']:,} " in output
    found = json.loads(command(capsys, "show", folder / FREEZER, "--json")[1])
    assert found["whole"]["kept"] == report["left"]
    assert [event["left"] for event in found["events"]] == [
        event["entries_left"] for event in report["events"] if event["slices_stopped"]
    ]
    pytest.importorskip("matplotlib")
    status, output, _ = command(capsys, "show", folder / FREEZER, "--plot", tmp_path / "a.png")
    assert (status, output.endswith("a.png.\n")) == (0, True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_freezer_is_shown_alone(capsys, frozen, tmp_path):
    file = frozen[0] / FREEZER
    assert "holds a freezer: show it alone" in refused(capsys, "show", file, file)
    assert "--density is for statistics" in refused(capsys, "show", file, "--density", 0.1)
    state = FreezerState.load(file)
    early = FreezerState(**{**vars(state), "history": state.history[:1]}).save(tmp_path / "early.safetensors")
    line = refused(capsys, "show", early, "--plot", tmp_path / "a.png")
    assert "drawn from its second reading on" in line
    assert not (tmp_path / "a.png").exists()
