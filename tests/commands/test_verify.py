"""``fishkern verify``: status 0 where the loop agrees, 1 where it does not, 2 where nothing can be compared."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

import fishkern as fk
from tests.support.command import command, refused


@pytest.fixture
def arguments(models, rows) -> tuple:
    return (models / "lora", "--data", rows / "text.jsonl")


@pytest.fixture
def saved(capsys, tmp_path, arguments):
    path = tmp_path / "fisher.safetensors"
    assert command(capsys, "estimate", *arguments, "--samples", 6, "--out", path)[0] == 0
    return path


def test_an_estimate_holds(capsys, tmp_path, arguments):
    report = tmp_path / "report.json"
    status, output, error = command(capsys, "verify", *arguments, "--samples", 6, "--json", report)
    assert (status, error) == (0, "")
    assert "q_proj.lora_A" in output
    assert "It holds." in output
    found = json.loads(report.read_text())
    assert found["ok"] is True
    assert found["examples"] == 6
    assert found["coverage"].keys() == {"fused", "left out"}


def test_the_report_alone(capsys, arguments):
    status, output, _ = command(capsys, "verify", *arguments, "--samples", 3, "--json", "-")
    assert status == 0
    assert json.loads(output)["ok"] is True


def test_a_file_holds(capsys, saved, arguments):
    status, output, _ = command(capsys, "verify", *arguments, "--statistics", saved)
    assert status == 0
    assert "6 examples" in output


def test_a_wrong_file_fails_by_name(capsys, saved, arguments):
    held = fk.Statistics.load(saved)
    name = next(iter(held))
    wrong = {key: value * (1.5 if key == name else 1.0) for key, value in held.items()}
    fk.Statistics(wrong, count=held.count, provenance=held.provenance, coverage=held.coverage).save(saved)
    status, output, _ = command(capsys, "verify", *arguments, "--statistics", saved)
    assert status == 1
    assert "FAILS" in output
    assert f"{name}: error 5.0e-01" in output


def test_a_file_of_other_examples_is_refused(capsys, saved, arguments, rows):
    assert "seed 1" in refused(capsys, "verify", *arguments, "--statistics", saved, "--seed", 1)
    assert "these options give 3" in refused(capsys, "verify", *arguments, "--statistics", saved, "--samples", 3)
    other = (arguments[0], "--data", rows / "table.csv", "--statistics", saved)
    assert "table.csv" in refused(capsys, "verify", *other)


def test_a_file_of_another_fisher_is_refused(capsys, tmp_path, models, rows):
    arguments, path = (models / "classifier", "--data", rows / "table.csv"), tmp_path / "type-2.safetensors"
    assert command(capsys, "estimate", *arguments, "--fisher-type", "type-2", "--samples", 3, "--out", path)[0] == 0
    line = refused(capsys, "verify", *arguments, "--statistics", path)
    assert "type-2" in line
    assert line.endswith("in Python, pass another recipe as estimator=.")


def test_only_some_parameters(capsys, arguments):
    status, output, _ = command(capsys, "verify", *arguments, "--samples", 3, "--parameters", "*lora_B*")
    assert status == 0
    assert "lora_A" not in output


def test_bfloat16_is_judged_by_its_own_noise(capsys, arguments):
    assert command(capsys, "verify", *arguments, "--samples", 4, "--dtype", "bfloat16")[0] == 0


def test_a_report_that_cannot_be_written(capsys, arguments, tmp_path):
    status, _, error = command(capsys, "verify", *arguments, "--samples", 2, "--json", tmp_path / "none" / "r.json")
    assert status == 2
    assert "does not exist" in error
    assert not list(tmp_path.iterdir())


def test_a_model_whose_statistics_are_not_the_loops(capsys, arguments, monkeypatch):
    """The purpose of the command: a wrong estimate does not pass."""

    def batch_gradient(model, batches, **options):
        return dict(fk.estimate(model, batches, fk.DiagonalFisher(unit="batch"), parameters=options["parameters"]))

    monkeypatch.setattr(import_module("fishkern.statistics.verify"), "estimate", batch_gradient)
    status, output, _ = command(capsys, "verify", *arguments, "--samples", 6)
    assert status == 1
    assert "It does not hold" in output


def test_how_many_rows_are_left_out_is_said(capsys, models, rows):
    arguments = ("verify", models / "llama", "--data", rows / "text.jsonl", "--samples", 3)
    few, every = command(capsys, *arguments)[1], command(capsys, *arguments, "--all")[1]
    count = sum("model." in line or "lm_head" in line for line in every.splitlines())
    assert count > 12
    assert few.startswith(f"the 12 largest errors of {count} (--all shows each)\n")
    assert sum("model." in line or "lm_head" in line for line in few.splitlines()) == 12
    assert "largest errors" not in every


def test_a_file_of_an_older_version_holds(capsys, saved, arguments):
    """There a sentence said which rows were taken."""
    held = fk.Statistics.load(saved)
    provenance = held.provenance
    provenance["runs"][0]["rows"] = "6, drawn at random with seed 0 from 12 rows"
    fk.Statistics(dict(held), count=held.count, provenance=provenance, coverage=held.coverage).save(saved)
    assert command(capsys, "verify", *arguments, "--statistics", saved)[0] == 0
    assert "rows = 6, drawn at random with seed 0" in refused(
        capsys, "verify", *arguments, "--statistics", saved, "--seed", 1
    )


def test_a_report_replaces_nothing_but_a_report(capsys, tmp_path, models, rows):
    """Least of all the data, where its name was given twice."""
    data = tmp_path / "texts.jsonl"
    data.write_text((rows / "text.jsonl").read_text())
    before = data.read_bytes()
    for path in (data, models / "llama" / "config.json"):
        line = refused(capsys, "verify", models / "llama", "--data", data, "--json", path)
        assert line == f"fishkern: {path} holds no report and is not overwritten: choose another name with --json."
    assert data.read_bytes() == before
    report = tmp_path / "report.json"
    report.touch()
    for _ in range(2):
        assert command(capsys, "verify", models / "llama", "--data", data, "--samples", 2, "--json", report)[0] == 0
