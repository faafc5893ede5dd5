"""``fishkern show`` and ``fishkern select``: what a file holds, and what is chosen out of it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch

import fishkern as fk
from tests.support.command import command, refused

NAMES = ["embed.weight", *(f"layers.{n}.{m}.weight" for n in range(3) for m in ("up", "down"))]


@pytest.fixture
def saved(tmp_path):
    scores = {name: torch.rand(8, 25) for name in NAMES}
    definition = {"estimator": "DiagonalFisher", "fisher_type": "empirical", "unit": "example"}
    runs = [{"model": "LlamaForCausalLM", "dtype": ["float32"], "data": "glue/cola"}]
    statistics = fk.Statistics(scores, count=7, provenance={"definition": definition, "runs": runs})
    return statistics.save(tmp_path / "fisher.safetensors")


def test_statistics(capsys, saved):
    status, output, error = command(capsys, "show", saved)
    assert (status, error) == (0, "")
    assert all(word in output for word in ("embed", "layer 2", "down", "glue/cola", "mean over 7 examples"))


def test_statistics_as_json(capsys, saved):
    status, output, _ = command(capsys, "show", saved, "--json", "--density", 0.1)
    found = json.loads(output)
    assert status == 0
    assert found["count"] == 7
    assert found["whole"]["coordinates"] == 1400
    assert found["whole"]["selected"] == 140
    assert found["runs"][0]["data"] == "glue/cola"


def test_what_no_fisher_holds_is_pointed_out(capsys, tmp_path):
    definition = {"estimator": "DiagonalFisher", "fisher_type": "empirical"}
    scores = {"layers.0.up.weight": torch.tensor([1.0, torch.inf, -2.0, 3.0])}
    path = fk.Statistics(scores, count=1, provenance={"definition": definition}).save(tmp_path / "bad")
    status, output, error = command(capsys, "show", path)
    assert status == 0
    assert "infinite" in output
    infinite, negative = error.splitlines()
    assert infinite.startswith("note: 1 of 4 entries are infinite and stand in no sum")
    assert negative.startswith("note: 1 of 4 entries are negative, which no mean of squares is")
    assert "Infinity" not in command(capsys, "show", path, "--json")[1]
    scores = {"w": torch.tensor([1.0, -2.0])}
    path = fk.Statistics(scores, count=1, provenance={"definition": {"estimator": "Own"}}).save(tmp_path / "own")
    assert command(capsys, "show", path)[::2] == (0, "")


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_picture(capsys, saved, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    status, output, error = command(capsys, "show", saved, "--plot", tmp_path / f"a{suffix}")
    assert (status, error) == (0, "")
    assert f"a{suffix}" in output
    assert (tmp_path / f"a{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((), fk.GlobalTopK(density=0.005)),
        (("--density", 0.1, "--never", "embed.*"), fk.GlobalTopK(density=0.1, never="embed.*")),
        (("--rule", "per-tensor", "--k", 3, "--smallest"), fk.PerTensorTopK(k=3, order="smallest")),
        (("--rule", "per-row", "--k", 2, "--always", "*.up.*"), fk.PerRowTopK(2, always="*.up.*")),
        (("--rule", "random", "--density", 0.1, "--seed", 4), fk.Random(density=0.1, seed=4)),
    ],
    ids=str,
)
def test_a_selection_is_that_of_its_rule(capsys, saved, tmp_path, arguments, rule):
    out = tmp_path / "selection.safetensors"
    status, output, _ = command(capsys, "select", saved, *arguments, "--out", out)
    assert status == 0
    assert str(out) in output
    chosen = fk.select(fk.Statistics.load(saved), rule)
    assert fk.Selection.load(out) == chosen
    assert fk.Selection.load(out).provenance == chosen.provenance


@pytest.mark.parametrize(
    ("rule", "times"), [("global", 1), ("per-tensor", 1), ("per-row", 1), ("random", 0)], ids=lambda value: str(value)
)
def test_the_share_that_is_read_is_shown(capsys, tmp_path, monkeypatch, rule, times):
    """Entry by entry as they are read, and whole at the end."""
    told = []

    @contextmanager
    def progress(what, unit):
        assert (what, unit) == ("reading", "entries")
        yield lambda *done: told.append(done)

    monkeypatch.setattr(import_module("fishkern.commands.select"), "progress", progress)
    scores = {"a": torch.rand(3, 2**19), "b": torch.rand(2, 5)}
    saved = fk.Statistics(scores, count=7).save(tmp_path / "fisher")
    total = 3 * 2**19 + 10
    assert command(capsys, "select", saved, "--rule", rule, "--k", 2, "--out", tmp_path / "selection")[0] == 0
    assert told == sorted(told)
    assert all(of == total for _, of in told)
    assert [done for done, _ in told][-1:] == [total] * times
    if rule == "random":
        assert not told
    else:
        assert len(told) >= 3


def test_a_second_reading_is_counted_on(capsys, tmp_path, monkeypatch):
    told = []

    @contextmanager
    def progress(what, unit):
        yield lambda *done: told.append(done)

    monkeypatch.setattr(import_module("fishkern.commands.select"), "progress", progress)
    saved = fk.Statistics({"w": torch.zeros(50)}, count=7).save(tmp_path / "fisher")
    status, _, error = command(capsys, "select", saved, "--k", 2, "--out", tmp_path / "selection")
    assert (status, told) == (0, [(50, 50), (100, 100)])  # once more to count what is not zero
    assert "exceeds the 0 non-zero scores" in error


def test_a_selection_is_shown_drawn_and_compared(capsys, saved, tmp_path):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    status, output, _ = command(capsys, "select", saved, "--density", 0.1, "--out", one, "--json")
    assert status == 0
    assert json.loads(output)["count"] == 140
    command(capsys, "select", saved, "--density", 0.05, "--out", other)
    status, output, _ = command(capsys, "show", one)
    assert status == 0
    assert "140 of 1,400" in output
    assert "layer 2" in output
    found = json.loads(command(capsys, "show", one, "--json")[1])
    assert sum(part["selected"] for part in found["layers"].values()) == 140
    status, output, _ = command(capsys, "show", one, other)
    assert status == 0
    assert "overlap 50.00%" in output
    assert json.loads(command(capsys, "show", one, other, "--json")[1])["shared"] == 70
    pytest.importorskip("matplotlib")
    assert command(capsys, "show", one, "--plot", tmp_path / "a.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_shown_is_refused(capsys, saved, tmp_path):
    assert "nothing to load" in refused(capsys, "show", tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:-10])
    assert "truncated" in refused(capsys, "show", tmp_path / "cut.safetensors")
    assert ".png" in refused(capsys, "show", saved, "--plot", tmp_path / "a.gif")
    assert "does not exist" in refused(capsys, "show", saved, "--plot", tmp_path / "none" / "a.png")
    assert "--density" in refused(capsys, "show", saved, "--density", 2)
    nan = fk.Statistics({"fine": torch.ones(2), "norm.bias": torch.tensor([torch.nan])}, count=1).save(tmp_path / "nan")
    assert "norm.bias holds NaN" in refused(capsys, "show", nan)
    chosen = fk.select(fk.Statistics.load(saved), fk.GlobalTopK(k=3)).save(tmp_path / "chosen")
    for files in ([chosen], [chosen, chosen]):
        assert "--density" in refused(capsys, "show", *files, "--density", 0.1)
    assert "only two selections" in refused(capsys, "show", saved, saved)


def test_what_cannot_be_selected_is_refused(capsys, saved, tmp_path):
    out = ("--out", tmp_path / "selection.safetensors")
    assert "--rule" in refused(capsys, "select", saved, "--rule", "best", *out)
    assert "--k" in refused(capsys, "select", saved, "--rule", "per-row", *out)
    assert "either --k or --density" in refused(capsys, "select", saved, "--k", 1, "--density", 0.1, *out)
    assert "--density" in refused(capsys, "select", saved, "--density", 0, *out)
    assert "--smallest" in refused(capsys, "select", saved, "--rule", "random", "--smallest", *out)
    for rule in ("global", "per-tensor", "per-row"):
        assert "--seed" in refused(capsys, "select", saved, "--rule", rule, "--k", 1, "--seed", 0, *out)
    assert "2,000" in refused(capsys, "select", saved, "--k", 2000, *out)
    assert "no.such" in refused(capsys, "select", saved, "--always", "no.such", *out)
    assert "not overwritten" in refused(capsys, "select", saved, "--out", saved)
    assert [path.name for path in tmp_path.iterdir()] == ["fisher.safetensors"]
