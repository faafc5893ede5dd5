"""``fishkern merge`` writes what the function gives, and refuses what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fishkern as fk
from tests.support import zoo
from tests.support.command import command, refused


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory) -> tuple[list[Path], list[Path]]:
    folder = tmp_path_factory.mktemp("made")
    other = AutoModelForCausalLM.from_pretrained(models / "llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += torch.randn_like(parameter) / 10
    other.save_pretrained(folder / "other")
    folders, files = [models / "llama", folder / "other"], []
    for n, path in enumerate(folders):
        fisher = fk.estimate(AutoModelForCausalLM.from_pretrained(path), [zoo.text_batch()])
        files.append(fisher.save(folder / f"fisher-{n}.safetensors"))
    return folders, files


def test_the_command_merges_as_the_function_does(capsys, made, tmp_path):
    (first, second), (fisher, other) = made
    arguments = ["--fisher", fisher, "--fisher", other, "--weight", 1, "--weight", 2, "--floor", 1e-9]
    own = ["--own", "lm_head.*"]
    status, output, _ = command(
        capsys, "merge", first, second, *arguments, *own, "--out", tmp_path / "merged", "--json"
    )
    assert status == 0
    assert json.loads(output)["folder"] == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (first, second)]
    statistics = [fk.Statistics.load(file) for file in (fisher, other)]
    expected = fk.fisher_merge(dict(zip(models, statistics, strict=True)), weights=[1, 2], floor=1e-9, own="lm_head.*")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(stored.pop("lm_head.weight"), models[0].lm_head.weight)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)


def test_what_is_refused(capsys, made, tmp_path):
    (first, second), (fisher, other) = made
    out = ["--out", tmp_path / "merged"]
    both = ["--fisher", fisher, "--fisher", other]
    cases = [
        ((first, second, "--fisher", fisher), ("--fisher", "2 models and 1 files")),
        ((first, second, *both, "--weight", 1), ("--weight", "2 models and 1 weights")),
        ((first, first, *both), ("named twice",)),
        ((first, *both[:2]), ("at least two models, got 1",)),
        ((first, tmp_path, *both), ("holds no model.safetensors",)),
        ((first, second, *both, "--own", "haed"), ("--own haed", "matches no name")),
    ]
    for arguments, words in cases:
        line = refused(capsys, "merge", *arguments, *out)
        assert all(word in line for word in words), line
    assert "new or empty" in refused(capsys, "merge", first, second, *both, "--out", first)
    assert not (tmp_path / "merged").exists()
