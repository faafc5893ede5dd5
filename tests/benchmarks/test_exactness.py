"""The study of what exactness buys: its laws on a tiny random LLaMA, and that nothing is measured twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fishkern as fk

pytest.importorskip("transformers")
import transformers

from benchmarks.engine.records import Records, read
from benchmarks.studies import exactness
from benchmarks.studies.exactness.subjects import HEAD_ROWS, Loaded, Subject, distinct, sst2, train_head
from benchmarks.studies.exactness.verdicts import standing

SETTING = exactness.Setting(pairs=2, batch_sizes=(2, 4), passes=4, densities=(0.05, 0.2))
SIZES = (4, 8)


def tiny(count: int, seed: int, *, shortest: int = 4) -> Loaded:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    lengths = torch.randint(shortest, 10, (count,)) if shortest < 9 else torch.full((count,), 9)
    rows = [(torch.randint(1, 23, (length,)).tolist(), None) for length in lengths.tolist()]
    return Loaded(model, rows, {"model": "tiny", "text": "random"})


def subject(**options) -> Subject:
    return Subject("tiny", SIZES, True, lambda count, seed: tiny(count, seed, **options))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results") / "machine" / "exactness.jsonl"


@pytest.fixture(scope="module")
def log(path) -> Records:
    log = exactness.log_of(path, SETTING)
    exactness.measure(subject(), SETTING, log)
    return log


def records(log, **wanted) -> list[dict]:
    return exactness.of(log, subject(), **wanted)


def only(monkeypatch, label: str) -> None:
    arms = exactness.arms
    monkeypatch.setattr(exactness, "arms", lambda *options: [arm for arm in arms(*options) if arm.label == label])


@pytest.mark.slow
def test_batches_of_one_are_exact(log):
    matching = records(log, label="batch gradient, N = 1")
    assert len(matching) == SETTING.pairs
    for record in matching:
        assert record["relative_l2"] < 1e-5
        assert all(top["overlap"] == top["jaccard"] == 1.0 for top in record["top"].values())


def test_other_examples_differ(log):
    matching = records(log, quantity="floor")
    assert len(matching) == SETTING.pairs * len(SIZES)
    for record in matching:
        assert record["relative_l2"] > 0.01
        assert all(0 < top["overlap"] < 1 for top in record["top"].values())
    largest = records(log, quantity="floor", examples=SIZES[-1])
    assert all(record["top"] == record["others"]["top"] for record in largest)


def test_every_estimate_is_of_one_pool(log):
    (total,) = {record["pool"] for record in records(log)}
    assert total == sum(parameter.numel() for parameter in tiny(1, 0).model.parameters())
    for record in records(log):
        for density, top in record["top"].items():
            assert top["k"] == int(float(density) * total)
            assert top["jaccard"] == pytest.approx(top["overlap"] / (2 - top["overlap"]))


def test_a_batch_gradient_of_all_examples_differs_most(log):
    """Distances grow with the batch; the scale is taken out of one of the two."""
    for pair in range(SETTING.pairs):
        matching = [records(log, label=f"batch gradient, N = {n}", examples=4, pair=pair)[0] for n in (1, 2, 4)]
        scaled = [record["relative_l2_scaled"] for record in matching]
        assert scaled == sorted(scaled)
        assert all(record["relative_l2_scaled"] <= record["relative_l2"] + 1e-9 for record in matching)


def test_sums_in_bfloat16_are_close_but_not_equal(log):
    for record in records(log, label="sums in bfloat16, N = 1"):
        assert 1e-4 < record["relative_l2"] < 0.05


def test_sum_and_mean_rank_rows_of_one_length_alike(monkeypatch, tmp_path):
    only(monkeypatch, "token-sum losses")
    equal = exactness.log_of(tmp_path / "exactness.jsonl", SETTING)
    exactness.measure(subject(shortest=9), SETTING, equal)
    for record in records(equal, label="token-sum losses"):
        assert record["scale"] == pytest.approx(1 / 8**2, rel=1e-4)
        assert record["relative_l2_scaled"] < 1e-5
        assert all(top["overlap"] > 0.98 for top in record["top"].values())  # rounding may part two equal scores


def test_sets_are_disjoint_and_seeds_differ(monkeypatch, tmp_path):
    seen, seeds = {}, []
    estimates = exactness.estimates

    def noted(loaded, arm, rows, setting):
        seen.setdefault(arm.label, []).append(rows)
        seeded = replace(arm, estimator=lambda seed: seeds.append(seed) or arm.estimator(seed))
        return estimates(loaded, seeded, rows, setting)

    monkeypatch.setattr(exactness, "estimates", noted)
    only(monkeypatch, "drawn labels (mc)")
    exactness.measure(subject(), SETTING, exactness.log_of(tmp_path / "exactness.jsonl", SETTING))
    exact = seen.pop("exact")
    assert sorted(n for rows in exact for n in rows) == list(range(2 * SETTING.pairs * SIZES[-1]))
    assert all(rows == exact[::2] for rows in seen.values())
    assert len(set(seeds)) == 2 * SETTING.pairs * len(SIZES)


def test_nothing_is_measured_twice(log, path, monkeypatch, tmp_path):
    estimates = []
    monkeypatch.setattr(fk, "estimate", lambda *_, **__: estimates.append(1))
    exactness.measure(subject(), SETTING, exactness.log_of(path, SETTING))
    assert not estimates
    monkeypatch.undo()
    lines = path.read_text().splitlines()
    (tmp_path / "exactness.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as if stopped before the last
    again = exactness.log_of(tmp_path / "exactness.jsonl", SETTING)
    exactness.measure(subject(), SETTING, again)
    written = read(tmp_path / "exactness.jsonl")
    assert len(written) == len(lines)
    assert written[-1]["relative_l2"] == json.loads(lines[-1])["relative_l2"]
    assert not exactness.log_of(path, replace(SETTING, seed=1)).find()
    assert not exactness.of(log, replace(subject(), sizes=(4, 16)))


def test_verdicts_come_from_the_records(log):
    assert standing([0.5, 0.6], [0.7, 0.8]) == "beyond"
    assert standing([0.5, 0.7], [0.7, 0.8]) == "within"
    assert standing([0.9, 0.81], [0.7, 0.8]) == "closer"
    matching = records(log)
    lines = list(exactness.verdicts(matching))
    above = [line for line in lines if "above the floor" in line]
    assert len(above) == len(SIZES) * len(SETTING.densities)
    assert "batch gradient, N = 1" in above[0]
    assert exactness.FLOOR in exactness.table(matching)
    for record in (changed := json.loads(json.dumps(matching))):
        if record["label"] == "batch gradient, N = 1":
            record["top"]["0.05"]["overlap"] = 0.0
    (below,) = [line for line in list(exactness.verdicts(changed))[:3] if "below the floor" in line]
    assert "batch gradient, N = 1" in below


def test_rows_that_repeat_are_refused():
    loaded = tiny(3, 0)
    exactness.refuse_repeated(loaded)
    with pytest.raises(ValueError, match="1 rows appear twice"):
        exactness.refuse_repeated(replace(loaded, rows=[*loaded.rows, loaded.rows[0]]))


def test_texts_in_one_another_are_dropped():
    texts = ["the cat sat", "The cat sat.", "now the cat sat down", "sat", "the dog", "the cats", "a b"]
    assert distinct(texts, 3) == ["the cat sat", "the dog", "the cats"]
    with pytest.raises(ValueError, match="only 4"):
        distinct(texts, 5)


def test_the_head_learns_on_other_rows(shared_data, tmp_path):
    """A random BERT with real sentences: the head moves, the encoder does not."""
    pytest.importorskip("datasets")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = sst2(tmp_path, shared_data / "glue" / "sst2", 8, 0)
    assert len(loaded.rows) == 8
    assert loaded.about["head"]["rows"] == HEAD_ROWS
    chosen = [name for name, p in loaded.model.named_parameters() if loaded.parameters(name, p)]
    assert not any(".layer.0." in name or "embeddings" in name for name in chosen)
    assert any(".layer.1." in name for name in chosen)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    train_head(loaded, range(8), range(8))
    moved = {name for name, p in loaded.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if ".pooler." in name or "classifier." in name}


def test_the_picture_shows_every_estimator(log):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    figure = draw("exactness", records(log))
    written = {label.get_text() for axes in figure.axes for label in axes.get_yticklabels()}
    assert {record["label"] for record in records(log)} - {exactness.FLOOR} <= written
