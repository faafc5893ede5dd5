"""The commands one after the other, as a person gives them, on a trained LLaMA, an adapter of it, and pictures."""

from __future__ import annotations

import json

import pytest
import torch

import fishkern as fk
from tests.support import zoo
from tests.support.command import command


@pytest.fixture
def stories(shared_data):
    return shared_data / "models" / "stories260K"


def test_sentences(capsys, tmp_path, shared_data, stories):
    data, out = ("--data", shared_data / "glue" / "cola"), tmp_path / "fisher.safetensors"
    assert command(capsys, "estimate", stories, *data, "--samples", 12, "--out", out)[0] == 0
    assert fk.Statistics.load(out).total == 260_032
    assert command(capsys, "verify", stories, *data, "--statistics", out)[0] == 0
    assert command(capsys, "select", out, "--out", tmp_path / "selection")[0] == 0
    for file in (out, tmp_path / "selection.safetensors"):
        status, output, _ = command(capsys, "show", file)
        assert status == 0
        assert "layer 4" in output


def test_an_adapter(capsys, tmp_path, shared_data, stories):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(stories, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    data = ("--data", shared_data / "glue" / "rte", "--split", "validation", "--samples", 6)
    report = tmp_path / "report.json"
    assert command(capsys, "verify", tmp_path / "lora", *data, "--json", report)[0] == 0
    compared = json.loads(report.read_text())["compared"]
    assert {one["name"].split(".")[-3] for one in compared} == {"lora_A", "lora_B", "modules_to_save"}


def test_pictures(capsys, tmp_path, shared_data):
    pytest.importorskip("PIL")
    torch.manual_seed(0)
    model = zoo.vit(image_size=32, patch_size=8, num_labels=10).model
    model.save_pretrained(tmp_path / "vit")
    data = ("--data", shared_data / "vision" / "cifar10_slice", "--samples", 6)
    out = tmp_path / "fisher.safetensors"
    status, _, error = command(capsys, "estimate", tmp_path / "vit", *data, "--out", out)
    assert status == 0
    assert "resized to 32 x 32" in error
    assert fk.Statistics.load(out).provenance["runs"][0]["columns"] == {"image": "img", "label": "label"}
    assert command(capsys, "verify", tmp_path / "vit", *data)[0] == 0
