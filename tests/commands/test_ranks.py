"""``fishkern ranks``: from a model and data to the ranks of a LoRA, equal to calls in Python on the same examples."""

from __future__ import annotations

import json
from contextlib import contextmanager
from importlib import import_module

import pytest

import fishkern as fk
from fishkern.report.tables import ranks_tables
from tests.support.command import command, refused


def ranked(capsys, tmp_path, *arguments: object, samples: int = 6) -> tuple[dict, dict]:
    """What the command prints as JSON, and the fields that it writes."""
    out = tmp_path / "ranks.json"
    status, output, error = command(capsys, "ranks", *arguments, "--samples", samples, "--out", out, "--json")
    assert status == 0, error
    return json.loads(output), json.loads(out.read_text())


def in_python(models, rows, estimator: fk.DirectionEnergy) -> fk.Energies:
    """The energies of the first six rows, tokenised by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    texts = [json.loads(line)["text"] for line in (rows / "text.jsonl").read_text().splitlines()[:6]]
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    batches = [{"input_ids": row, "labels": row} for row in ids]
    return fk.estimate(model, batches, estimator, parameters="*_proj.weight")


@pytest.mark.parametrize("importance", ["kronecker", "exact"])
def test_they_equal_those_of_the_library(capsys, tmp_path, models, rows, importance):
    options = ("--average", 3, "--rule", "proportional", "--least", 2, "--importance", importance)
    found, _ = ranked(capsys, tmp_path, models / "llama", "--data", rows / "text.jsonl", "--first", *options)
    energies = in_python(models, rows, fk.DirectionEnergy(importance=importance))
    importances = {name: energies[name].importance for name in energies}
    assert found["importances"] == pytest.approx(importances, rel=1e-4)
    largest = {name: min(energies[name].shape) for name in energies}
    rule = fk.ProportionalImportance(3, least=2)
    assert found["ranks"] == fk.allocate_ranks(importances, rule, largest=largest)
    assert found["total"] == sum(found["ranks"].values()) == 3 * len(energies)
    assert found["entries"] == sum(rank * sum(energies[name].shape) for name, rank in found["ranks"].items())


def test_peft_makes_a_lora_of_these_ranks(capsys, tmp_path, models, rows):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = ("--average", "5/2", "--alpha", 5, "--targets", "q_proj", "--targets", "*.mlp.*")
    found, fields = ranked(capsys, tmp_path, models / "llama", "--data", rows / "text.jsonl", *options)
    assert len(found["ranks"]) == 8
    assert found["total"] == 20
    assert found["scaling"] == 2
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "llama"), LoraConfig(**fields))
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert {f"{name}.weight": layer.r["default"] for name, layer in layers.items()} == found["ranks"]
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    assert fields["task_type"] == "CAUSAL_LM"


def test_axolotl_gets_its_lines(capsys, tmp_path, models, rows):
    yaml = pytest.importorskip("yaml")
    out = tmp_path / "ranks.yaml"
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--average", 2, "--format", "axolotl", "--out", out)
    status, output, _ = command(capsys, "ranks", *arguments, "--alpha", 4)
    assert status == 0
    assert f"copy the lines of {out}" in output
    lines = yaml.safe_load(out.read_text())
    assert lines["lora_alpha"] == 2 * lines["lora_r"]
    assert len(lines["lora_target_modules"]) == 14
    assert command(capsys, "ranks", *arguments)[0] == 0  # an older file of its own is replaced
    assert yaml.safe_load(out.read_text())["lora_alpha"] == lines["lora_r"]


def test_what_is_shown(capsys, tmp_path, models, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", rows / "text.jsonl", "--samples", 6, "--average", 2, "--energies", "energies")
    status, output, _ = command(capsys, "ranks", models / "llama", *arguments)
    assert status == 0
    assert "total     28 = 2 x 14 matrices, from" in output
    assert all(
        words in output for words in ("inverse to the kronecker importance", "layer 1", "down_proj", "ranks.json")
    )
    assert max(map(len, output.splitlines()[5:])) <= 100
    energies = fk.Energies.load("energies")
    assert (energies.count, energies.provenance["runs"][0]["from"]) == (6, str(models / "llama"))
    assert command(capsys, "show", "energies.safetensors")[0] == 0


def test_what_no_example_reaches_gets_the_median(capsys, tmp_path, rows):
    """As in FARSS: an expert that is never chosen would else have the largest rank."""
    import torch

    from fishkern.commands.ranks import _reached
    from tests.support import zoo

    assert _reached({"a": 4.0, "b": 0.0, "c": 1.0, "d": 2.0}) == {"a": 4.0, "b": 2.0, "c": 1.0, "d": 2.0}
    assert "no example gives 1 of 4 matrices any importance (b)" in capsys.readouterr().err
    model = zoo.llama().model
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()  # so nothing of o_proj's input is left
    model.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", "--data", rows / "text.jsonl", "--average", 2, "--targets", "o_proj")
    found, _ = ranked(capsys, tmp_path, *arguments)
    assert found["importances"]["model.layers.0.self_attn.o_proj.weight"] > 0
    assert set(found["ranks"].values()) == {2}


def test_many_columns_go_into_several_tables(capsys):
    from rich.console import Console

    names = [f"layers.{n}.attention.part_{letter}.dense.weight" for n in range(12) for letter in "abcdefghijkl"]
    tables = ranks_tables({name: n % 40 for n, name in enumerate(names)})
    assert len(tables) > 1
    for table in tables:
        Console(width=200).print(table)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert all(f"part_{letter}." in shown for letter in "abcdefghijkl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--average", "many"), ("--average", "33/2", "'many'")),
        (("--average", 2.25), ("--average 2.25 of 14 matrices is 31.5 ranks", "--average 31/14 or 32/14")),
        (("--average", 100), ("--average 100 must be between --least 1 and --most 64",)),
        (("--average", 60), ("14 matrices is 840 ranks", "an average of at most")),
        (("--average", 2, "--least", 3), ("--average 2 must be between --least 3",)),
        (("--rule", "best"), ("--rule", "inverse, proportional", "'best'")),
        (("--importance", "best"), ("--importance is kronecker or exact", "'best'")),
        (("--positions", "some"), ("--positions", "'some'")),
        (("--format", "toml"), ("--format", "peft, axolotl", "'toml'")),
        (("--alpha", 0), ("--alpha must be positive",)),
        (("--alpha", 24, "--format", "axolotl"), ("whole numbers", "--alpha 24", "a multiple of --average")),
        (("--targets", "nothing"), ("--targets nothing matches none of 14 weights",)),
        (("--targets", "lm_head"), ("--targets lm_head matches none",)),
        (("--energies", "energies.json"), ("--energies energies.safetensors",)),
    ],
    ids=str,
)
def test_what_is_refused(capsys, tmp_path, models, rows, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "ranks", models / "llama", "--data", rows / "text.jsonl", "--samples", 4, *arguments)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_an_adapter_has_its_ranks(capsys, models, rows):
    line = refused(capsys, "ranks", models / "lora", "--data", rows / "text.jsonl")
    assert "is an adapter, and ranks are dealt out for a model without one: name its base" in line
    assert str(models / "llama") in line


@pytest.mark.parametrize(("format", "content"), [("peft", '{"r": 8}'), ("axolotl", "base_model: llama\n")])
def test_another_file_is_not_overwritten(capsys, tmp_path, models, rows, format, content):
    path = tmp_path / "config"
    path.write_text(content)
    arguments = ("--data", rows / "text.jsonl", "--format", format, "--out", path)
    assert "is not overwritten: choose another name with --out" in refused(
        capsys, "ranks", models / "llama", *arguments
    )
    assert path.read_text() == content
    assert f"such as {tmp_path}/ranks." in refused(capsys, "ranks", models / "llama", *arguments[:-1], tmp_path)


def test_the_share_that_is_done_is_shown(capsys, tmp_path, models, rows, monkeypatch):
    """Of the examples of all passes over the data."""
    told = []

    @contextmanager
    def progress(what, unit, **options):
        yield lambda *done: told.append(done)

    monkeypatch.setattr(import_module("fishkern.commands.ranks"), "progress", progress)
    arguments = (
        "--average",
        2,
        "--layers-per-pass",
        1,
        "--samples",
        6,
        "--batch-size",
        4,
        "--out",
        tmp_path / "out.json",
    )
    assert command(capsys, "ranks", models / "llama", "--data", rows / "text.jsonl", *arguments)[0] == 0
    assert told == [(4, 12), (6, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize("verb", ["ranks", "init"])
def test_experts_in_one_tensor_are_pointed_out(capsys, tmp_path, rows, verb):
    from tests.support import zoo

    zoo.mixtral().model.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    method = ("--method", "pissa", "--rank", 2) if verb == "init" else ("--data", rows / "text.jsonl", "--average", 2)
    arguments = (verb, tmp_path / "model", *method, "--out", tmp_path / "out")
    capsys.readouterr()
    status, _, error = command(capsys, *arguments)
    assert status == 0
    assert "4 weights in the layers are no matrices and left out" in error
    assert "model.layers.0.mlp.experts.gate_up_proj" in error
