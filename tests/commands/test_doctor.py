"""``fishkern doctor`` lists what is installed, and does not wait for a network or a GPU that is missing."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch

import fishkern as fk
from tests.support.command import command, fresh


def test_it_says_what_is_there(capsys):
    status, output, error = command(capsys, "doctor")
    assert (status, error) == (0, "")
    assert f"{torch.get_num_threads()} threads" in output
    found = json.loads(command(capsys, "doctor", "--json")[1])
    assert found["versions"]["fishkern"] == fk.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["triton on cpu"] == f"cannot run: {fk.why_not_triton(torch.ones(1))}"
    assert "transformers" in found["extras"]["hf"]
    assert found["hub"]["reachable"].startswith("no: HF_HUB_OFFLINE is set")


def test_it_says_what_to_install(capsys, monkeypatch):
    doctor = import_module("fishkern.commands.doctor")
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "missing" if name == "matplotlib" else installed(name))
    assert 'pip install "fishkern[plot]"' in command(capsys, "doctor")[1]


@pytest.mark.slow
def test_it_runs_without_the_other_extras():
    done = fresh(["doctor"], without=("transformers", "datasets", "peft", "matplotlib"))
    assert done.returncode == 0, done.stderr
