"""Bad input of every kind: one clear line, exit status 2, and no file is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import fishkern as fk
from tests.support.command import command, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the command would write; empty when the test ends."""
    out = tmp_path / "out"
    out.mkdir()
    yield out
    assert not list(out.iterdir())


def estimate(capsys, folder, model, data, *arguments: object) -> str:
    return refused(capsys, "estimate", model, "--data", data, "--samples", 4, "--out", folder / "f", *arguments)


@pytest.mark.parametrize(
    ("model", "data", "arguments", "words"),
    [
        ("none", "text.jsonl", (), ("no folder", "none")),
        ("llama/config.json", "text.jsonl", (), ("is a file", "folder")),
        ("llama", "none.csv", (), ("no file or folder", "none.csv")),
        ("llama", "text.jsonl", ("--task", "poetry"), ("--task", "causal-lm", "'poetry'")),
        ("llama", "text.jsonl", ("--task", "image-classification"), ("--image", "text, other")),
        ("vit", "text.jsonl", ("--task", "causal-lm"), ("vit", "causal-lm")),
        ("llama", "text.jsonl", ("--text", "body"), ("'body'", "--text", "text, other")),
        ("llama", "text.jsonl", ("--label", "label"), ("causal-lm", "--label", "--text")),
        ("llama", "text.jsonl", ("--text", "label"), ("int", "'label'", "--text")),
        ("bert", "text.jsonl", ("--task", "token-classification"), ("--words",)),
        ("llama", "text.jsonl", ("--task", "masked-lm"), ("llama", "masked-lm")),
        ("llama", "text.jsonl", ("--dtype", "int4"), ("--dtype", "'int4'")),
        ("llama", "text.jsonl", ("--device", "abacus"), ("--device", "abacus")),
        ("llama", "text.jsonl", ("--max-length", 5000), ("5000", "2048")),
        ("llama", "text.jsonl", ("--parameters", "zzz"), ("zzz", "model.embed_tokens.weight")),
        ("llama", "text.jsonl", ("--fisher-type", "true"), ("--fisher-type", "'true'")),
        ("llama", "text.jsonl", ("--mc-samples", 2), ("--mc-samples", "--fisher-type mc")),
        ("llama", "text.jsonl", ("--split", "validation"), ("one file", "'validation'", "--split")),
        ("llama", "text.jsonl", ("--subset", "cola"), ("text.jsonl", "'cola'", "--subset")),
        ("llama", "text.jsonl", ("--num-labels", 3), ("causal-lm", "--num-labels")),
        ("classifier", "text.jsonl", ("--num-labels", 5), ("--num-labels 5", "3")),
        ("vit", "text.jsonl", ("--max-length", 5), ("image-classification", "--max-length")),
        ("llama", "text.jsonl", ("--tokenizer", "nowhere/at/all"), ("tokenizer", "nowhere/at/all")),
        ("llama", "text.jsonl", ("--base", "llama"), ("adapter_config.json", "--base")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_named_wrongly(capsys, folder, models, rows, model, data, arguments, words):
    line = estimate(capsys, folder, models / model, rows / data, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", ("empty",)),
        ("a.csv", "text,label\n", ("no row",)),
        ("a.jsonl", '{"text": "sea"', ("cannot be read",)),
        ("a.parquet", "no parquet", ("cannot be read",)),
        ("a.xlsx", "?", (".parquet", ".csv")),
        ("a.txt", "\n\n\n", ("no row with something to learn from",)),
        ("a.csv", '\ufefftext;label\r\n"the sea; old";1\r\n', ("separated by ';'", "commas")),
    ],
    ids=str,
)
def test_data_that_cannot_be_used(capsys, folder, tmp_path, models, name, content, words):
    (tmp_path / name).write_text(content)
    line = estimate(capsys, folder, models / "llama", tmp_path / name)
    assert all(word in line for word in (*words, name)), line


def test_a_split_that_is_not_there(capsys, folder, tmp_path, models, rows):
    (tmp_path / "data").mkdir()
    shutil.copy(rows / "table.csv", tmp_path / "data" / "train.csv")
    assert "validation" in estimate(capsys, folder, models / "llama", tmp_path / "data", "--split", "validation")


@pytest.mark.parametrize("label", [3, -1, None, "blue", 0.5], ids=str)
def test_labels_out_of_range(capsys, folder, tmp_path, models, label):
    rows = [{"text": "the sea", "label": label}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = estimate(capsys, folder, models / "classifier", tmp_path / "a.jsonl", "--first")
    assert "label" in line
    assert "the model knows" in line


@pytest.mark.parametrize("columns", [{"text": "the sea word59"}, {"text": "the sea", "target": "word59"}], ids=list)
def test_another_models_tokenizer(capsys, folder, tmp_path, models, columns):
    """Its tokens are beyond the embedding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    tokenizer.add_tokens([f"word{n}" for n in range(60)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text(json.dumps(columns))
    named = [word for role in columns for word in (f"--{role}", role)]
    line = estimate(
        capsys, folder, models / "llama", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "tokenizer", *named
    )
    assert "--tokenizer" in line
    assert "41" in line


def test_a_model_without_tokenizer(capsys, folder, tmp_path, models, rows):
    shutil.copytree(models / "llama", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "--tokenizer" in estimate(capsys, folder, tmp_path / "bare", rows / "text.jsonl")


def test_a_damaged_model(capsys, folder, tmp_path, models, rows):
    shutil.copytree(models / "llama", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 100)
    assert "damaged" in estimate(capsys, folder, tmp_path / "damaged", rows / "text.jsonl")


def test_code_of_a_model_is_not_run(capsys, folder, tmp_path, models, rows):
    """Nor asked for on the terminal."""
    shutil.copytree(models / "llama", tmp_path / "custom")
    config = json.loads((tmp_path / "custom" / "config.json").read_text())
    config |= {"model_type": "of-its-own", "auto_map": {"AutoConfig": "custom.Config"}}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom" / "custom.py").write_text("raise SystemExit('it was run')")
    assert "no model can be loaded" in estimate(capsys, folder, tmp_path / "custom", rows / "text.jsonl")


def test_an_adapter_whose_base_has_moved(capsys, folder, tmp_path, models, rows):
    shutil.copytree(models / "lora", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/moved/away"
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    line = estimate(capsys, folder, tmp_path / "lora", rows / "text.jsonl")
    assert "/moved/away" in line
    assert "--base" in line
    arguments = ("--base", models / "llama", "--samples", 2, "--out", tmp_path / "f")
    assert command(capsys, "estimate", tmp_path / "lora", "--data", rows / "text.jsonl", *arguments)[0] == 0


@pytest.mark.parametrize("name", ["model.bin", "cola.csv", "fisher.v2", "fisher.SAFETENSORS"])
def test_a_name_of_another_kind_of_file_is_noticed_before_the_work(capsys, folder, name):
    line = refused(capsys, "estimate", "never/loaded", "--data", "never/loaded", "--out", folder / name)
    assert line.endswith(f"names another kind: --out {(folder / name).with_suffix('.safetensors')}.")


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("llama", ("--reduction", "median"), ("--reduction is mean or sum", "'median'")),
        ("classifier", ("--reduction", "sum"), ("sequence-classification", "--reduction")),
        ("llama", ("--max-label-passes", 5), ("--fisher-type empirical", "--max-label-passes")),
        ("llama", ("--fisher-type", "type-2", "--max-label-passes", 5), ("more than --max-label-passes 5",)),
        ("llama", ("--draws", 2, "--unit", "batch"), ("--draws",)),
        ("llama", ("--accumulate-on", "scores.bin"), ("--accumulate-on scores.bin",)),
    ],
    ids=str,
)
def test_options_that_do_not_fit(capsys, folder, models, rows, model, arguments, words):
    line = estimate(capsys, folder, models / model, rows / "text.jsonl", *arguments)
    assert all(word in line for word in words), line


def test_no_hub(capsys, folder, models, rows):
    """At once: the libraries' own attempts take half a minute."""
    assert "the hub cannot be asked" in estimate(capsys, folder, "nobody/nothing", rows / "text.jsonl")
    assert "the hub cannot be asked" in estimate(capsys, folder, models / "llama", "nobody/nothing")


def test_no_space_left(capsys, folder, models, rows, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left" in estimate(capsys, folder, models / "llama", rows / "text.jsonl")


def test_a_read_only_folder_is_noticed_before_the_work(capsys, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    assert "may not be written to" in estimate(capsys, folder, "never/loaded", "never/loaded")


def test_a_missing_folder_is_noticed_before_the_work(capsys, folder):
    line = estimate(capsys, folder / "none", "never/loaded", "never/loaded")
    assert "does not exist" in line


@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        (("estimate", "never", "--data", "never", "--out"), "statistics.safetensors"),
        (("select", "statistics", "--out"), "selection.safetensors"),
        (("verify", "never", "--data", "never", "--json"), "report.json"),
        (("show", "statistics", "--plot"), "picture.png"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_folder_is_noticed_before_the_work(capsys, tmp_path, monkeypatch, arguments, example, end):
    """No other file is written; a path that ends in a slash is a folder even if there is none."""
    monkeypatch.chdir(tmp_path)
    fk.Statistics({"w": torch.rand(3)}, count=1).save("statistics")
    if not end:
        (tmp_path / "cli").mkdir()
    line = refused(capsys, *arguments, f"cli{end}")
    assert line == f"fishkern: cli{end} names a folder: give the name of a file in it, such as cli/{example}."
    assert sorted(path.name for path in tmp_path.iterdir()) == [*["cli"] * (not end), "statistics.safetensors"]


@pytest.mark.parametrize(
    "arguments",
    [("estimate", "never", "--data", "never", "--out"), ("verify", "never", "--data", "never", "--json")],
    ids=lambda value: value[0],
)
def test_what_is_no_file_is_noticed_before_the_work(capsys, tmp_path, arguments):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is not a regular file" in refused(capsys, *arguments, tmp_path / "pipe")
    os.rename(tmp_path / "pipe", tmp_path / "pipe.safetensors")
    if arguments[0] == "estimate":
        assert "pipe.safetensors is not a regular file" in refused(capsys, *arguments, tmp_path / "pipe")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_made_of_no_file(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "is not a folder: choose another" in refused(capsys, "demo", "--out", tmp_path / "file")
    assert "choose another folder" in refused(capsys, "tune", "never", "--data", "never", "--out", tmp_path / "file")


def test_a_model_is_not_overwritten(capsys, models):
    path = models / "llama" / "model.safetensors"
    before = path.read_bytes()
    assert "not overwritten" in refused(capsys, "estimate", "never", "--data", "never", "--out", path)
    assert path.read_bytes() == before


def test_an_interrupt_leaves_nothing(capsys, folder, models, rows, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fk, "estimate", interrupted)
    status, _, error = command(
        capsys, "estimate", models / "llama", "--data", rows / "text.jsonl", "--out", folder / "f", "--samples", 2
    )
    assert status == 130
    assert "interrupted" in error
