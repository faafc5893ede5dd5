"""``fishkern tune`` after an interrupt: the same command ends in the same bits, and nothing is mixed up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fishkern as fk
from tests.support.command import ROOT, command, refused

STEPS = 12  # 12 rows, 2 in a batch, 2 epochs
UNFINISHED = "unfinished.pt"


@pytest.fixture
def arguments(models, rows) -> list:
    """A classifier with dropout, whose masks a run that goes on must draw as if it had not stopped."""
    data = ["--data", rows / "text.jsonl", "--eval-split", "train", "--batch-size", 2, "--epochs", 2, "--lr", 1e-2]
    return ["tune", models / "classifier", *data, "--weight-decay", 0.1, "--save-every", 0]


@pytest.fixture
def interrupted(monkeypatch):
    """Makes the given step of the optimizer the one at which control-C is pressed, and counts the steps."""

    class Pressed:
        at, steps = None, 0

    step = fk.MaskedAdamW.step

    def pressed(self, *args):
        if Pressed.steps == Pressed.at:
            raise KeyboardInterrupt
        Pressed.steps += 1
        return step(self, *args)

    monkeypatch.setattr(fk.MaskedAdamW, "step", pressed)
    return Pressed


def artefacts(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run has saved."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}: {name}": value for file in files for name, value in load_file(file).items()}


def report(folder: Path) -> dict:
    found = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in found.items() if key not in ("folder", "seconds")}


def assert_same(one: Path, other: Path) -> None:
    expected, found = artefacts(one), artefacts(other)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert report(one) == report(other)
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
    assert not (other / UNFINISHED).exists()


@pytest.mark.parametrize("adapter", ["lora", "bottleneck"])
def test_an_interrupted_run_ends_as_a_whole_one(capsys, arguments, interrupted, tmp_path, adapter):
    """Stopped within the first epoch, at once after going on, and within the second."""
    arguments = [*arguments, "--adapter", adapter]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    status, _, error = command(capsys, *arguments, "--out", whole)
    assert (status, interrupted.steps) == (0, STEPS), error
    for at, seen in ((2, 0), (2, 4), (7, 4)):
        interrupted.at, interrupted.steps = at, seen // 2
        status, output, error = command(capsys, *arguments, "--out", stopped)
        assert (status, output) == (130, "")
        assert "the same command resumes from there" in error
        assert (f"{seen} of 24 examples seen" in error) == (seen > 0)
        assert not (stopped / "report.json").exists()
    interrupted.at = None
    status, _, error = command(capsys, *arguments, "--out", stopped)
    assert "14 of 24 examples seen" in error
    assert (status, interrupted.steps) == (0, STEPS)
    assert_same(whole, stopped)


def test_what_is_drawn_is_the_runs_own(capsys, arguments, tmp_path):
    """Dropout has the seed of the run, not the state of the process; that is left alone."""
    for name, seed in (("one", 1), ("other", 2)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        assert command(capsys, *arguments, "--out", tmp_path / name)[0] == 0
        assert torch.equal(torch.get_rng_state(), before)
    assert_same(tmp_path / "one", tmp_path / "other")


def test_an_interrupt_while_the_run_is_saved_costs_one_step(capsys, arguments, interrupted, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(capsys, *arguments, "--out", whole)[0] == 0
    save, calls = torch.save, []

    def half(what, file):
        calls.append(what)
        save(what, file)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        assert command(capsys, *arguments, "--out", stopped)[0] == 130
    assert [file.name for file in stopped.iterdir() if file.name.endswith(".tmp")] == []
    status, _, error = command(capsys, *arguments, "--out", stopped)
    assert "6 of 24 examples seen" in error  # 4 steps are done, 3 of them kept
    assert status == 0
    assert_same(whole, stopped)


def test_an_interrupt_after_training_only_saves(capsys, arguments, interrupted, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(capsys, *arguments, "--out", whole)[0] == 0

    def pressed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fk.Delta, "save", pressed)
        assert command(capsys, *arguments, "--out", stopped)[0] == 130
    interrupted.steps = 0
    status, _, error = command(capsys, *arguments, "--out", stopped)
    assert "24 of 24 examples seen" in error
    assert (status, interrupted.steps) == (0, 0)
    assert_same(whole, stopped)


def test_other_settings_and_other_data_are_not_mixed(capsys, arguments, interrupted, tmp_path, rows):
    data = tmp_path / "data.jsonl"
    data.write_text((rows / "text.jsonl").read_text())
    arguments[arguments.index("--data") + 1] = data
    out = ["--out", tmp_path / "out"]
    interrupted.at = 3
    assert command(capsys, *arguments, *out)[0] == 130
    kept = (tmp_path / "out" / UNFINISHED).read_bytes()
    message = refused(capsys, *arguments, *out, "--lr", 1e-3, "--k", 9)
    assert "holds an unfinished run with k None, lr 0.01, not k 9, lr 0.001: resume it with its own options" in message
    assert "--restart" in message
    data.write_text(data.read_text().replace("sea", "rain"))
    assert "the data differs from that of the unfinished run in" in refused(capsys, *arguments, *out)
    assert (tmp_path / "out" / UNFINISHED).read_bytes() == kept
    interrupted.at, interrupted.steps = None, 0
    status, _, error = command(capsys, *arguments, *out, "--lr", 1e-3, "--restart")
    assert (status, interrupted.steps) == (0, STEPS)
    assert "unfinished" not in error
    assert report(tmp_path / "out")["lr"] == 1e-3


def test_another_model_at_the_same_place_is_refused(capsys, arguments, interrupted, tmp_path, models):
    model = shutil.copytree(models / "classifier", tmp_path / "model")
    arguments[1] = model
    interrupted.at = 3
    assert command(capsys, *arguments, "--out", tmp_path / "out")[0] == 130
    weights = load_file(model / "model.safetensors")
    save_file({name: value * 3 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert "the selection was made for another start" in refused(capsys, *arguments, "--out", tmp_path / "out")


def test_a_foreign_file_is_refused(capsys, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / UNFINISHED).write_bytes(b"notes")
    message = refused(capsys, *arguments, "--out", tmp_path / "out")
    assert "is not the file of an interrupted tune: choose another --out" in message


@pytest.mark.slow
def test_control_c_in_a_process_of_its_own(capsys, arguments, tmp_path):
    arguments = [*arguments, "--epochs", 60, "--save-every", 0.1]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(capsys, *arguments, "--out", whole)[0] == 0
    # a process whose parents a shell has started in the background would ignore the signal
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listening}; import sys; sys.path.insert(0, {str(ROOT)!r}); from fishkern.cli import main; main()"
    line = [sys.executable, "-c", code, *map(str, arguments), "--out", str(stopped)]
    # one thread, as in this process, so that the singular values have the same bits
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + 120
    while not (stopped / UNFINISHED).exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "the same command resumes from there" in error
    status, _, error = command(capsys, *arguments, "--out", stopped)
    assert status == 0
    assert "resuming the unfinished run" in error
    assert_same(whole, stopped)


def test_a_file_with_something_else_in_it_is_refused(capsys, arguments, interrupted, tmp_path):
    interrupted.at = 2
    assert command(capsys, *arguments, "--out", tmp_path / "a")[0] == 130
    path = tmp_path / "a" / UNFINISHED
    held = torch.load(path, weights_only=True)
    state = held["state"]
    without = {key: value for key, value in state.items() if key != "seen"}
    wrong = {"seconds": 3, "values": {"w": torch.zeros(2)}, "optimizer": {}, "generators": None, "epoch": {"taken": 1}}
    for changed in (without, *({**state, key: value} for key, value in wrong.items())):
        torch.save({**held, "state": changed}, path)
        line = refused(capsys, *arguments, "--out", tmp_path / "a")
        assert line.endswith(
            "is not the file of an interrupted tune: choose another --out, or start over with --restart."
        )


def test_the_seconds_before_an_interrupt_count():
    from fishkern.commands.output import Stopwatch

    first = Stopwatch()
    with first.adding("training"):
        time.sleep(0.02)
        held = first.seconds  # as a checkpoint of that moment saves it
    assert 0.02 <= held["training"] <= first.seconds["training"]
    second = Stopwatch(held)
    with second.adding("training"):
        time.sleep(0.02)
    assert second.seconds["training"] >= held["training"] + 0.02


def test_a_part_inside_another_counts_in_both_once(monkeypatch):
    from fishkern.commands.output import Stopwatch

    clock = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    with stopwatch.adding("training"), stopwatch.adding("measuring"):
        pass
    assert stopwatch.ended == {"measuring": 2.0, "training": 6.0}
