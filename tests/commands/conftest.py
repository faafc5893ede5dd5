"""Models and data in files, as a user has them: small ones, and real ones where they are next to the checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support import zoo


@pytest.fixture(scope="session", autouse=True)
def packages() -> None:
    """Every command needs them all; before ``models`` is made, which does, too."""
    for package in ("transformers", "peft", "datasets", "typer", "rich"):
        pytest.importorskip(package)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to the user's own cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small models: llama, bert, classifier (3 labels), t5, vit, lora and lora-classifier."""
    from peft import LoraConfig, get_peft_model

    folder, tokenizer = tmp_path_factory.mktemp("models"), zoo.tokenizer()
    torch.manual_seed(0)
    made = {
        "llama": zoo.llama(),
        "bert": zoo.bert(),
        "classifier": zoo.bert_classifier(),
        "t5": zoo.t5(),
        "vit": zoo.vit(),
    }
    for name, specimen in made.items():
        specimen.model.save_pretrained(folder / name)
        if name != "vit":
            tokenizer.save_pretrained(folder / name)
    for name, task, base in (("lora", "CAUSAL_LM", "llama"), ("lora-classifier", "SEQ_CLS", "classifier")):
        targets = ["q_proj", "v_proj"] if base == "llama" else ["query", "value"]
        config = LoraConfig(task_type=task, r=2, target_modules=targets, init_lora_weights=False)
        made[base].model.config._name_or_path = made[base].model.name_or_path = str(folder / base)
        get_peft_model(made[base].model, config).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of twelve rows: text.jsonl (also with labels and pairs), table.csv, lines.txt, words.jsonl."""
    folder = tmp_path_factory.mktemp("rows")
    sentences = [" ".join(zoo.WORDS[4 + (n + i) % 10] for i in range(2 + n % 5)) for n in range(12)]
    records = [
        {"text": text, "other": "the sea", "label": n % 3, "score": n / 2, "name": ["low", "high"][n % 2],
         "summary": "rain falls"}
        for n, text in enumerate(sentences)
    ]  # fmt: skip
    tagged = [{"tokens": text.split(), "ner_tags": [n % 3] * len(text.split())} for n, text in enumerate(sentences)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, tagged)))
    (folder / "table.csv").write_text("sentence,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in records))
    (folder / "table.tsv").write_text("sentence\tlabel\n" + "\n".join(f"{r['text']}\t{r['label']}" for r in records))
    (folder / "lines.txt").write_text("\n\n".join(sentences) + "\n")
    return folder
