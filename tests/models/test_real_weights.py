"""Trained weights and real sentences: a LLaMA of 260,032 parameters on GLUE."""

from __future__ import annotations

import copy

import pytest
import torch

import fishkern as fk
from tests.support import oracle, zoo
from tests.support.exactness import assert_exact, paths

transformers = pytest.importorskip("transformers")
pandas = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def stories(shared_data) -> zoo.Specimen:
    model = transformers.AutoModelForCausalLM.from_pretrained(shared_data / "models" / "stories260K")
    return zoo.Specimen(model, zoo.text_batch, oracle.next_token)


@pytest.fixture(scope="module")
def sentences(shared_data) -> list[dict]:
    """Twelve sentences of unequal length in batches of four, padded right."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    texts = pandas.read_parquet(shared_data / "glue" / "cola" / "train.parquet")["sentence"][:12].tolist()
    batches = []
    for start in range(0, 12, 4):
        rows = [torch.tensor(tokenizer(text)["input_ids"][:48]) for text in texts[start : start + 4]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ones = [torch.ones_like(row) for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_equals_the_loop(stories, sentences, dtype):
    statistics = assert_exact(stories, sentences, dtype)
    assert paths(statistics).keys() == {"fused"}
    assert statistics.count == 12
    assert statistics.total == 260_032


def test_starts_in_16_bits_choose_as_in_float32(stories, sentences):
    """Directions and projections in bfloat16 are exact enough; their sums are float32."""
    model = copy.deepcopy(stories.model).float()
    full, half = (fk.filet(one, sentences, rank=8) for one in (model, copy.deepcopy(model).bfloat16()))
    shared = [len(set(full[path].chosen.tolist()) & set(half[path].chosen.tolist())) for path in full]
    assert sum(shared) >= 0.95 * 8 * len(full)
    ranks = fk.InverseImportance(average=8, most=16)
    full, half = (fk.farss(one, sentences, shallow=1, rank=16, ranks=ranks).ranks for one in (model, model.bfloat16()))
    assert sum(full.values()) == sum(half.values()) == 8 * 14 + 16 * 21
    assert all(abs(full[path] - half[path]) <= 1 for path in full)
    assert min(full.values()) < 8


def test_survives_a_file(stories, sentences, tmp_path):
    statistics = fk.estimate(stories.model.float(), sentences)
    assert fk.Statistics.load(statistics.save(tmp_path / "fisher.safetensors")) == statistics
