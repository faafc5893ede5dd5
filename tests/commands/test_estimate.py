"""``fishkern estimate``: from files to a file, equal to a call in Python on the same examples."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fishkern as fk
from fishkern.statistics.captured_pass import CapturedPass
from tests.support.command import command, fresh, refused


def estimated(capsys, tmp_path, *arguments: object, samples: int = 6) -> tuple[fk.Statistics, dict, str]:
    """The statistics that the command saves, its JSON, and its notes."""
    out = tmp_path / "fisher.safetensors"
    status, output, error = command(capsys, "estimate", *arguments, "--samples", samples, "--out", out, "--json")
    assert status == 0, error
    found = json.loads(output)
    assert found["file"] == str(out)
    assert [path.name for path in tmp_path.iterdir()] == ["fisher.safetensors"]
    return fk.Statistics.load(out), found, error


TASKS = {
    "causal-lm": ("llama", "text.jsonl", "CausalLM"),
    "masked-lm": ("bert", "lines.txt", "MaskedLM"),
    "seq2seq-lm": ("t5", "text.jsonl", "Seq2SeqLM"),
    "sequence-classification": ("classifier", "table.csv", "Classification"),
    "an adapter": ("lora", "text.jsonl", "CausalLM"),
    "an adapter that classifies": ("lora-classifier", "table.tsv", "Classification"),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_task_is_found(capsys, tmp_path, models, rows, task):
    model, data, likelihood = TASKS[task]
    statistics, found, _ = estimated(capsys, tmp_path, models / model, "--data", rows / data)
    assert statistics.count == 6
    assert found["task"] in (task, "causal-lm", "sequence-classification")
    assert statistics.provenance["definition"]["likelihood"].startswith(likelihood)
    assert statistics.provenance["runs"][0]["data"] == str(rows / data)
    if "adapter" in task:
        assert all("lora" in name or "classifier" in name for name in statistics)


@pytest.mark.parametrize(
    ("arguments", "likelihood", "lacking"),
    [
        (("llama", "--task", "sequence-classification", "--text-pair", "other"), "Classification", "score.weight"),
        (("llama", "--task", "sequence-classification", "--label", "score"), "Regression", "score.weight"),
        (("llama", "--task", "sequence-classification", "--label", "name"), "Classification", "score.weight"),
        (("bert", "--task", "token-classification"), "TokenClassification", "classifier.weight"),
    ],
    ids=str,
)
def test_a_fresh_head_is_announced(capsys, tmp_path, models, rows, arguments, likelihood, lacking):
    data = rows / ("words.jsonl" if "token-classification" in arguments else "text.jsonl")
    statistics, _, error = estimated(capsys, tmp_path, models / arguments[0], "--data", data, *arguments[1:])
    assert lacking in error
    assert "random weights" in error
    assert statistics.provenance["definition"]["likelihood"].startswith(likelihood)


def test_it_equals_the_library(capsys, tmp_path, models, rows):
    """The same rows, tokenised by hand, whatever the size of the batches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = (models / "llama", "--data", rows / "text.jsonl", "--first")
    ours, _, _ = estimated(capsys, tmp_path, *arguments, "--batch-size", 4)
    texts = [json.loads(line)["text"] for line in (rows / "text.jsonl").read_text().splitlines()[:6]]
    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    batch = dict(tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))
    batch.pop("token_type_ids", None)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    theirs = fk.estimate(AutoModelForCausalLM.from_pretrained(models / "llama"), [batch])
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


def test_the_seed_decides_which_rows(capsys, tmp_path, models, rows):
    arguments = (models / "bert", "--data", rows / "text.jsonl")
    first, again, other = (estimated(capsys, tmp_path, *arguments, "--seed", seed, samples=4)[0] for seed in (1, 1, 2))
    assert first == again
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_masks_do_not_depend_on_the_batch(capsys, tmp_path, models, rows):
    arguments = (models / "bert", "--data", rows / "text.jsonl")
    one, five = (estimated(capsys, tmp_path, *arguments, "--batch-size", size)[0] for size in (1, 5))
    for name in one:
        torch.testing.assert_close(one[name], five[name], rtol=1e-3, atol=1e-9)


def test_patterns_types_and_dtypes(capsys, tmp_path, models, rows):
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--parameters", "*q_proj*", "--parameters", "*norm*")
    options = ("--fisher-type", "mc", "--mc-samples", 2, "--dtype", "bfloat16")
    statistics, _, _ = estimated(capsys, tmp_path, *arguments, *options)
    assert all("q_proj" in name or "norm" in name for name in statistics)
    assert statistics.provenance["definition"]["fisher_type"] == "mc"
    assert statistics.provenance["runs"][0]["dtype"] == ["bfloat16"]
    assert statistics.provenance["runs"][0]["mc_samples"] == 2


def test_only_the_answer_is_learned(capsys, tmp_path, models, rows):
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--target", "summary")
    statistics, found, _ = estimated(capsys, tmp_path, *arguments)
    assert found["columns"] == {"target": "summary", "text": "text"}
    assert statistics.count == 6


def test_empty_rows_are_passed_over_and_few_are_announced(capsys, tmp_path, models, rows):
    statistics, _, error = estimated(capsys, tmp_path, models / "llama", "--data", rows / "lines.txt", samples=50)
    assert statistics.count == 12
    assert "11 rows passed over" in error
    assert "12 examples, fewer than the 50 requested" in error


def test_a_batch_that_does_not_fit_is_halved(capsys, tmp_path, models, rows, monkeypatch):
    estimate, sizes = fk.estimate, []

    def small_memory(model, batches, *arguments, **options):
        sizes.append(len(batches[0]["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return estimate(model, batches, *arguments, **options)

    monkeypatch.setattr(fk, "estimate", small_memory)
    arguments = (models / "llama", "--data", rows / "text.jsonl")
    _, found, error = estimated(capsys, tmp_path, *arguments, samples=9)
    assert sizes == [8, 4, 2]
    assert found["batch_size"] == 2
    assert "batch size of 4" in error
    status, _, error = command(capsys, "estimate", *arguments, "--batch-size", 4, "--out", tmp_path / "b")
    assert status == 2
    assert "smaller --batch-size" in error


@pytest.fixture
def pressed(monkeypatch):
    """Control-C is pressed in the batch of this number, counted over all calls."""

    class Pressed:
        at, runs = None, 0

    run = CapturedPass.run

    def press(self, batch):
        Pressed.runs += 1
        if Pressed.runs == Pressed.at:
            raise KeyboardInterrupt
        return run(self, batch)

    monkeypatch.setattr(CapturedPass, "run", press)
    return Pressed


def test_an_interrupted_estimate_goes_on(capsys, tmp_path, models, rows, pressed):
    arguments = ("estimate", models / "llama", "--data", rows / "text.jsonl", "--samples", 10, "--fisher-type", "mc")
    assert command(capsys, *arguments, "--batch-size", 2, "--out", tmp_path / "whole.safetensors")[0] == 0
    arguments = (*arguments, "--out", tmp_path / "fisher.safetensors", "--save-every", 0)
    pressed.runs, pressed.at = 0, 4
    status, output, error = command(capsys, *arguments, "--batch-size", 2)
    assert (status, output) == (130, "")
    assert "the same command goes on from there" in error
    assert (tmp_path / "fisher.part").exists()
    other = refused(capsys, *arguments, "--batch-size", 3)
    assert "batch 0 is not the one" in other
    assert "Give the options of then, or --restart to begin at the first batch." in other
    pressed.runs = 0
    status, _, error = command(capsys, *arguments)  # with the batch size of then
    assert (status, pressed.runs) == (0, 3)  # of the first batch, which makes the plan, and of the last two
    assert f"going on from {tmp_path / 'fisher.part'}: 6 of 10 examples counted" in error
    whole, resumed = (fk.Statistics.load(tmp_path / f"{name}.safetensors") for name in ("whole", "fisher"))
    assert resumed == whole
    assert not (tmp_path / "fisher.part").exists()


def test_an_unfinished_estimate_is_discarded_on_demand_only(capsys, tmp_path, models, rows, pressed):
    arguments = ("estimate", models / "llama", "--data", rows / "text.jsonl", "--samples", 8, "--batch-size", 2)
    arguments = (*arguments, "--out", tmp_path / "fisher.safetensors", "--save-every", 0)
    pressed.at = 3
    assert command(capsys, *arguments)[0] == 130
    assert "is the checkpoint of another call: the argument check was True" in refused(capsys, *arguments, "--no-check")
    assert (tmp_path / "fisher.part").exists()
    pressed.runs, pressed.at = 0, None
    status, _, error = command(capsys, *arguments, "--no-check", "--restart")
    assert (status, pressed.runs) == (0, 4), error
    (tmp_path / "fisher.part").write_text("notes")
    message = refused(capsys, *arguments)
    assert message.startswith(f"fishkern: there is no unfinished estimate in {tmp_path / 'fisher.part'}: ")
    assert "Or give another --out, or --restart to begin at the first batch." in message


def test_sums_of_a_batch_that_did_not_fit_are_not_gone_on_from(capsys, tmp_path, models, rows, monkeypatch):
    run, sizes = CapturedPass.run, []

    def small_memory(self, batch):
        sizes.append(batch.num_examples)
        if len(sizes) == 2:  # the second batch of eight
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, batch)

    monkeypatch.setattr(CapturedPass, "run", small_memory)
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--save-every", 0)
    statistics, found, _ = estimated(capsys, tmp_path, *arguments, samples=12)
    assert sizes == [8, 4, 4, 4, 4]
    assert (found["batch_size"], statistics.count) == (4, 12)


@pytest.mark.slow
def test_in_parts_by_memory(capsys, tmp_path, models, rows, pressed):
    """The least memory gives several passes, and an interrupted run goes on at the right one."""
    arguments = ("estimate", models / "llama", "--data", rows / "text.jsonl", "--samples", 4, "--batch-size", 2)
    assert command(capsys, *arguments, "--out", tmp_path / "whole.safetensors")[0] == 0
    arguments = (*arguments, "--out", tmp_path / "fisher[1].safetensors", "--save-every", 0)
    too_little = refused(capsys, *arguments, "--memory", "1KiB")
    assert too_little.startswith("fishkern: --memory 1KiB is not enough for ")
    least = re.search(r"Give at least ([\d.]+) KiB above the model", too_little)[1]
    arguments = (*arguments, "--memory", int(float(least) * 1024) + 64)
    pressed.runs, pressed.at = 0, 5  # the plan rehearses a batch, which is the first run
    status, _, error = command(capsys, *arguments)
    passes = int(re.search(r"(\d+) passes over the data: the sums take", error)[1])
    assert (status, passes >= 2) == (130, True)
    assert "the same command goes on from there" in error
    assert {"fisher[1].part.pass-1", "fisher[1].part.pass-2"} <= {path.name for path in tmp_path.iterdir()}
    assert "was made with another --memory: give it as then, or --restart" in refused(capsys, *arguments[:-2])
    pressed.runs, pressed.at = 0, None
    status, _, error = command(capsys, *arguments)
    expected = 1 + 1 + 2 + 2 * (passes - 2)  # the plan, and both first batches again, for their paths
    assert (status, pressed.runs) == (0, expected), error
    assert f"going on from {tmp_path / 'fisher[1].part.pass-2'}: 2 of 4 examples of pass 2 counted" in error
    whole, parts = (fk.Statistics.load(tmp_path / f"{name}.safetensors") for name in ("whole", "fisher[1]"))
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fisher[1].safetensors", "whole.safetensors"]


@pytest.fixture
def of_an_adapter(models, rows, tmp_path) -> list[str]:
    arguments = ["estimate", str(models / "lora"), "--data", str(rows / "table.csv"), "--first", "--samples", "4"]
    return [*arguments, "--out", str(tmp_path / "fisher")]


def test_only_the_result_is_on_standard_output(capsys, of_an_adapter, tmp_path):
    status, output, error = command(capsys, *of_an_adapter)
    assert (status, error) == (0, "")
    check_output(output, tmp_path)


@pytest.mark.slow
def test_a_command_of_its_own(of_an_adapter, tmp_path):
    """Without any messages of the libraries that it imports."""
    done = fresh(of_an_adapter)
    assert done.returncode == 0, done.stderr
    if find_spec("torchao") is None:  # whose import by PEFT says which of its libraries do not load here
        assert done.stderr == ""
    check_output(done.stdout, tmp_path)


def check_output(output: str, folder: Path) -> None:
    assert "fused" in output
    assert output.rstrip().splitlines()[-1].startswith("Next:  fishkern show")
    assert [path.name for path in folder.iterdir()] == ["fisher.safetensors"]


def test_rows_are_numbers_for_machines(capsys, tmp_path, models, rows):
    arguments = (models / "llama", "--data", rows / "text.jsonl")
    statistics, found, _ = estimated(capsys, tmp_path, *arguments, "--seed", 3)
    assert found["rows"] == {"used": 6, "of": 12, "seed": 3}
    assert statistics.provenance["runs"][0]["rows"] == found["rows"]
    assert estimated(capsys, tmp_path, *arguments, "--first")[1]["rows"] == {"used": 6, "of": None, "seed": None}


def test_the_sum_over_tokens(capsys, tmp_path, models, rows):
    """-log p of the whole text: an example of T labels weighs T^2 times as much."""
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--first")
    mean, _, _ = estimated(capsys, tmp_path, *arguments, samples=1)
    total, found, _ = estimated(capsys, tmp_path, *arguments, "--reduction", "sum", samples=1)
    assert found["definition"]["likelihood"] == "CausalLM(reduction='sum')"
    labels = len(json.loads((rows / "text.jsonl").read_text().splitlines()[0])["text"].split()) - 1
    for name in mean:
        torch.testing.assert_close(total[name], mean[name] * labels**2, rtol=1e-4, atol=1e-9)
    options = ("--statistics", tmp_path / "fisher.safetensors")
    status, output, _ = command(capsys, "verify", *arguments, *options)
    assert (status, "It holds." in output) == (0, True)


def test_a_sketch_and_a_pass_without_check(capsys, tmp_path, models, rows):
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--accumulate-on", "cpu")
    statistics, _, _ = estimated(capsys, tmp_path, *arguments, "--draws", 3)
    assert statistics.provenance["definition"]["estimator"] == "SketchedFisher"
    assert statistics.provenance["runs"][0]["draws"] == 3
    checked, _, _ = estimated(capsys, tmp_path, *arguments)
    unchecked, _, _ = estimated(capsys, tmp_path, *arguments, "--no-check")
    assert [run.provenance["runs"][0]["checked"] for run in (checked, unchecked)] == [True, False]
    assert all(torch.equal(checked[name], unchecked[name]) for name in checked)


@pytest.mark.parametrize(
    ("model", "data", "options", "suggested"),
    [
        ("bert", "text.jsonl", (), "--task sequence-classification would"),
        ("bert", "words.jsonl", ("--text", "joined"), "--task token-classification would"),
        ("bert", "text.jsonl", ("--task", "masked-lm"), None),
        ("classifier", "text.jsonl", (), None),
        ("bert", "lines.txt", (), None),
        ("lora", "text.jsonl", (), None),
    ],
    ids=str,
)
def test_labels_that_the_task_does_not_use_are_pointed_out(
    capsys, tmp_path, tmp_path_factory, models, rows, model, data, options, suggested
):
    data = rows / data
    if "joined" in options:
        table = [json.loads(line) for line in data.read_text().splitlines()]
        data = tmp_path_factory.mktemp("rows") / "joined.jsonl"
        data.write_text("\n".join(json.dumps({**row, "joined": " ".join(row["tokens"])}) for row in table))
    _, _, error = estimated(capsys, tmp_path, models / model, "--data", data, *options)
    if suggested is None:
        assert "does not use" not in error
    else:
        assert "note: task masked-lm comes from the model's config; the data has a column" in error
        assert suggested in error


def test_it_stops_when_the_top_is_right(capsys, tmp_path, models, rows):
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--batch-size", 1)
    goal = ("--until", 0.01, "--until-density", 0.2)
    statistics, found, _ = estimated(capsys, tmp_path, *arguments, *goal, samples=12)
    assert statistics.count == 8  # batches, before which it does not stop
    assert found["precision"] == statistics.precision.plain()
    assert statistics.precision.overlap(0.2) > 0.01


def test_a_top_without_a_goal_is_refused(capsys, tmp_path, models, rows):
    arguments = (models / "llama", "--data", rows / "text.jsonl", "--until-density", 0.2)
    assert "give --until" in refused(capsys, "estimate", *arguments, "--out", tmp_path / "fisher")
