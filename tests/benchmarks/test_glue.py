"""The comparison on GLUE: its metrics, its patience, and that a stopped one goes on where it stopped."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("datasets")
from benchmarks.studies import glue
from benchmarks.studies.glue.scores import ranks


def logits(predicted: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), 2).float()


def test_metrics():
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    predicted = [1, 1, 0, 0, 0, 1, 0, 1]  # 3 true and 3 false ones right, one of each wrong
    matthews = (3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4)
    assert glue.metric("cola", logits(predicted), labels) == pytest.approx(matthews)
    assert glue.metric("cola", logits([1] * 8), labels) == 0.0
    assert glue.metric("rte", logits(predicted), labels) == 6 / 8
    assert glue.metric("mrpc", logits(predicted), labels) == pytest.approx((6 / 8 + 2 * 3 / 8) / 2)


def test_correlations():
    """Of a monotone curve the ranks correlate fully, the values less; equal values share their rank."""
    values = torch.tensor([[1.0], [2.0], [3.0], [10.0]])
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    pearson = torch.corrcoef(torch.stack([values[:, 0], labels]))[0, 1].item()
    assert glue.metric("stsb", values, labels) == pytest.approx((pearson + 1) / 2)
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


@pytest.mark.parametrize(
    ("scores", "out"),
    [([], False), ([0.1], False), ([0.3, 0.2], False), ([0.3, 0.2, 0.1], True), ([0.3, 0.2, 0.3], True),
     ([0.3, 0.2, 0.4], False), ([0.0, 0.0, 0.0], True)],
)  # fmt: skip
def test_patience(scores, out):
    assert glue._patience_is_out(scores, 2) is out


def test_it_goes_on_where_it_stopped(shared_data, tmp_path, monkeypatch, capsys):
    """With a small real model; the arms differ in what they train, not in how much."""
    trained = []

    def run(arm, lr, seed, setting, encoder, data):
        trained.append((arm, lr, seed))
        return {"score": lr * (seed + 1), "trained": 10, "seconds": 1.0, "selecting": 0.5}

    monkeypatch.setattr(glue, "run", run)
    monkeypatch.setattr(glue, "load", lambda *_: None)
    options = ["--data", str(shared_data / "glue"), "--encoder", str(tmp_path), "--results", str(tmp_path)]
    options += ["--seeds", "2", "--arms", "original", "fish"]
    glue.main(options)
    rates = glue.Setting().rates
    assert len(trained) == 2 * (len(rates) + 2)
    assert trained[2 * len(rates)] == ("original", max(rates), 0)  # the best of the choosing runs
    table = capsys.readouterr().out
    assert "fish - arm" in table
    (path,) = tmp_path.glob("*/glue.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")  # as if stopped before the last run
    del trained[:]
    glue.main(options)
    assert trained == [("fish", max(rates), 1)]
    assert capsys.readouterr().out == table
    assert [json.loads(line)["arm"] for line in path.read_text().splitlines()].count("fish") == 5


def test_the_average_leaves_wnli_out(tmp_path, monkeypatch, capsys):
    scores = {"cola": 0.2, "rte": 0.6, "wnli": 0.9}

    def run(arm, lr, seed, setting, encoder, data):
        return {"score": scores[setting.task], "trained": 10, "seconds": 1.0, "selecting": 0.5}

    monkeypatch.setattr(glue, "run", run)
    monkeypatch.setattr(glue, "load", lambda *_: None)
    options = ["--data", str(tmp_path), "--encoder", str(tmp_path), "--results", str(tmp_path)]
    glue.main([*options, "--task", *scores, "--arms", "fish", "--seeds", "2"])
    printed = capsys.readouterr().out
    assert all(f"{100 * score:.2f} +- 0.00" in printed for score in scores.values())
    assert printed.splitlines()[-1].split() == ["fish", "40.00", "+-", "0.00"]


def test_one_run_of_each_arm(shared_data, tmp_path):
    """A few rows, one epoch: every arm trains as many entries, of the adapter or of the base, and the head."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    setting = glue.Setting(layers=1, pool=2, examples=16, epochs=1, batch_size=8, max_length=32, fisher_examples=8)
    data = glue.load(shared_data / "glue" / "cola", tmp_path, setting)
    data = glue.Data(data.train, data.validation[:16], data.pad or 0)
    arms = (*glue.ARMS, "mask-lift")
    runs = {arm: glue.run(arm, 1e-3, 0, setting, encoder=tmp_path, data=data) for arm in arms}
    assert {record["trained"] for record in runs.values()} == {3 * 2 * 16 + 2 * 16 + 2}
    assert all(-1 <= record["score"] <= 1 for record in runs.values())


def test_what_is_chosen_of_the_base():
    """The scores by their formulas, in float64, from what goes into each layer."""
    import transformers

    from benchmarks.studies.glue import base_weights

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForSequenceClassification(config).eval()
    base_weights.freeze_all_but_pool(model, glue.Setting(layers=1, pool=2))
    batches = [{"input_ids": torch.randint(1, 20, (4, 5)), "labels": torch.tensor([0, 1, 1, 0])}]
    inputs: dict[str, torch.Tensor] = {}
    for name in (pool := [name for name, p in model.named_parameters() if p.requires_grad and "layer" in name]):
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, given, name=name: inputs.update({name: given[0].detach().double().flatten(0, 1)})
        )
    with torch.no_grad():
        model(**batches[0])
    norms = {name: inputs[name].norm(dim=0) for name in pool}  # later passes run the rows in parts
    weights = {name: model.get_parameter(name).detach().double() for name in pool}
    assert len(pool) == 6
    assert base_weights.budget(model, glue.Setting(layers=1, pool=2)) == 3 * 32

    def parts(matrix: torch.Tensor) -> torch.Tensor:
        U, S, Vh = torch.linalg.svd(matrix)
        return (U[:, :2] * S[:2]) @ Vh[:2]  # an eighth of 16 ranks

    def indices(scores: torch.Tensor, k: int) -> list[int]:
        return scores.abs().flatten().topk(k).indices.sort().values.tolist()

    def together(scores: dict[str, torch.Tensor]) -> list[int]:
        return indices(torch.cat([scores[name].flatten() for name in pool]), 96)

    def selected(arm: str, seed: int = 0) -> dict[str, list[int]]:
        selection = base_weights.select(arm, model, batches, 96, seed)
        assert selection.whole == ("classifier.weight", "classifier.bias")
        assert selection.count == 96 + 2 * 16 + 2
        return {name: selection.indices(name).tolist() for name in pool}

    def flat(selection: dict[str, list[int]]) -> list[int]:
        return [256 * n + index for n, name in enumerate(pool) for index in selection[name]]

    assert selected("mask-lift") == {name: indices(parts(weight), 16) for name, weight in weights.items()}
    assert flat(selected("mask-magnitude")) == together(weights)
    assert flat(selected("mask-wanda")) == together({n: w * norms[n] for n, w in weights.items()})
    assert flat(selected("mask-fish")) != flat(selected("mask-magnitude"))
    assert flat(selected("mask-random")) == flat(selected("mask-random")) != flat(selected("mask-random", 1))
