"""``fishkern plan``: the figures of ``fk.plan`` from a config alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fishkern as fk
from fishkern.integrations.tasks import example_batch
from tests.support.command import command, refused


@pytest.mark.slow
def test_figures_without_weights(capsys, models, tmp_path):
    """The folder has a config and nothing else."""
    (tmp_path / "config.json").write_bytes((models / "llama" / "config.json").read_bytes())
    arguments = ("plan", tmp_path, "--batch-size", 2, "--length", 7, "--dtype", "float32")
    status, output, error = command(capsys, *arguments, "--ranks", 2, "--memory", "1GB", "--json")
    assert status == 0, error
    found = json.loads(output)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    planned = fk.plan(model, example_batch("causal-lm", model.config, 2, 7), ranks=2)
    assert found["peak_bytes"] == pytest.approx(planned.peak_bytes, abs=256)
    assert found["weight_bytes"] == planned.weight_bytes
    assert found["per_rank"] == vars(planned.per_rank) | {"peak_bytes": planned.per_rank.peak_bytes}
    assert found["parts"] == [list(planned.paths)]
    least = planned.beside_bytes + max(planned.state_bytes.values()) + 256
    status, output, _ = command(capsys, *arguments, "--memory", least, "--parameters", "*.weight")
    assert status == 0
    assert output.startswith("DiagonalFisher of LlamaForCausalLM: 1 pass over the data\n")
    assert f"within {least} above the weights: " in output


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "task"),
    [("bert", "masked-lm"), ("bert", "token-classification"), ("classifier", ""), ("t5", ""), ("vit", "")],
)
def test_each_task(capsys, models, model, task):
    status, output, error = command(
        capsys, "plan", models / model, *(("--task", task) if task else ()), "--length", 8, "--batch-size", 2
    )
    assert status == 0, error
    assert "the rest of a batch" not in output


def test_refusals(capsys, models):
    llama = models / "llama"
    assert "name its base model" in refused(capsys, "plan", models / "lora")
    assert "--task is none of these, got 'much'" in refused(capsys, "plan", llama, "--task", "much")
    assert "--dtype is one of" in refused(capsys, "plan", llama, "--dtype", "int3")
    assert "matches none of" in refused(capsys, "plan", llama, "--parameters", "typo*", "--length", 4)
    assert "--memory must be a positive number of bytes" in refused(
        capsys, "plan", llama, "--memory", "much", "--length", 4
    )
