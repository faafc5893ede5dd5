"""``fishkern init``: from a model and data to the start of a LoRA, equal to calls in Python on the same examples."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

import fishkern as fk
from tests.support.command import command, refused

FILES = {"adapter_config.json", "adapter_init.safetensors", "adapter_model.safetensors"}


def made(capsys, out, *arguments: object) -> tuple[fk.AdapterInit, dict]:
    """The start that the command writes, and what it prints as JSON."""
    status, output, error = command(capsys, "init", *arguments, "--out", out, "--json")
    assert status == 0, error
    assert {path.name for path in out.iterdir()} == FILES
    found = json.loads(output)
    assert found["files"] == {name: (out / name).stat().st_size for name in found["files"]}
    return fk.AdapterInit.load(out / "adapter_init.safetensors"), found


def llama(models) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models / "llama")


def batches(models, rows, count: int) -> list[dict]:
    """The first rows one by one, tokenised by hand."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    texts = [json.loads(line)["text"] for line in (rows / "text.jsonl").read_text().splitlines()[:count]]
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


METHODS = {
    "farss": (
        ("--shallow", 0, "--rank", 3, "--average", 2, "--most", 5, "--fisher", "joint"),
        dict(shallow=0, rank=3, ranks=fk.InverseImportance(2, most=5), fisher="joint"),
    ),
    "filet": (
        (
            "--rank",
            2,
            "--order",
            "largest",
            "--magnitude",
            "uniform",
            "--size",
            0.1,
            "--targets",
            "o_proj",
            "--alpha",
            4,
        ),
        dict(rank=2, order="largest", magnitude="uniform", size=0.1, targets="o_proj", scaling=2.0),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_it_equals_the_library(capsys, tmp_path, models, rows, method):
    options, arguments = METHODS[method]
    data = ("--data", rows / "text.jsonl", "--first", "--samples", 8)
    init, found = made(capsys, tmp_path / "out", models / "llama", "--method", method, *data, *options)
    model = llama(models)
    expected = getattr(fk, method)(model, batches(models, rows, 8), **arguments)
    assert init.ranks == expected.ranks == found["ranks"]
    for path, start in expected.items():
        assert torch.equal(init[path].chosen, start.chosen), path
        torch.testing.assert_close(init[path].delta(), start.delta())
        assert init[path].scaling == start.scaling
    init.check(model)
    assert init.provenance["inputs"]["rows"]["used"] == 8
    assert init.provenance["method"] | {"importances": {}} == expected.provenance["method"] | {"importances": {}}


def test_pissa_needs_no_data(capsys, tmp_path, models):
    init, found = made(capsys, tmp_path / "out", models / "llama", "--method", "pissa", "--rank", 3)
    assert init == fk.pissa(llama(models), rank=3)
    assert found["method"] == {"name": "PiSSA", "rank": 3}
    assert "data" not in found


@pytest.mark.parametrize(
    ("model", "more"),
    [("llama", ()), ("bert", ()), ("classifier", ()), ("t5", ()), ("vit", ()),
     ("llama", ("--task", "sequence-classification")), ("llama", ("--dtype", "bfloat16"))],
    ids=str,
)  # fmt: skip
def test_peft_loads_the_plain_lora_and_it_changes_nothing(capsys, tmp_path, models, model, more):
    from peft import PeftModel

    from fishkern.integrations import models as loading

    out = tmp_path / "out"
    made(capsys, out, models / model, "--method", "pissa", "--rank", 2, *more)
    task = dict([more]).get("--task") if "--task" in more else None
    source = loading.find(str(models / model))
    base, _ = loading.load(source, task or source.task, device="cpu")
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    loaded = PeftModel.from_pretrained(base, out).merge_and_unload()
    assert loaded.state_dict().keys() == weights.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name]), name
    halves = [tensor for name, tensor in load_file(out / "adapter_model.safetensors").items() if "lora_B" in name]
    assert halves
    assert all(tensor[:, 2:].any() and not tensor[:, :2].any() for tensor in halves)


def test_what_it_says_can_be_pasted(capsys, tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")  # no line is broken for a narrow terminal
    arguments = ("--method", "pissa", "--rank", 2, "--dtype", "bfloat16", "--out", "start")
    status, output, _ = command(capsys, "init", models / "llama", *arguments)
    assert status == 0
    assert "14 modules, rank 2" in output
    assert "Next:  fishkern show start/adapter_init.safetensors" in output
    *lines, last = (line.strip() for line in output.partition("or in Python:\n")[2].splitlines())
    scope = {}
    exec("\n".join(lines), scope)
    assert scope["model"].num_parameters(only_trainable=True) == sum(
        one.A.numel() + one.B.numel() for one in scope["init"].values()
    )
    assert "InitCallback(init)" in last
    assert scope["model"].dtype == torch.bfloat16
    assert all(name in scope for name in ("Trainer", "InitCallback"))


def test_the_named_part_of_the_data_is_read(capsys, tmp_path, models, rows):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(rows / "text.jsonl", data / "train.jsonl")
    (data / "validation.jsonl").write_text('{"text": "the sea"}\n' * 9)
    arguments = (models / "llama", "--method", "filet", "--rank", 1, "--samples", 8, "--dead", "skip", "--data", data)
    init, _ = made(capsys, tmp_path / "out", *arguments, "--split", "validation")
    assert init.provenance["inputs"]["split"] == "validation"
    assert init.provenance["inputs"]["rows"]["of"] == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "lora"), ("--method", "farss, filet, pissa", "'lora'")),
        (("--method", "filet"), ("--method filet chooses directions by data", "--data")),
        (("--method", "farss", "--data", "DATA"), ("--method farss needs --shallow",)),
        (("--method", "farss", "--data", "DATA", "--shallow", 2), ("--shallow", "from 0 to 1 in this model, got 2")),
        (("--method", "farss", "--data", "DATA", "--shallow", 0, "--basis", "svd"), ("farss takes no --basis",)),
        (("--method", "filet", "--data", "DATA", "--shallow", 0, "--least", 2), ("--shallow and --least",)),
        (
            ("--method", "filet", "--data", "DATA", "--samples", 1, "--rank", 4),
            ("4 * rank = 16", "(--samples and the data)"),
        ),
        (("--method", "filet", "--data", "DATA", "--order", "first"), ("order", "'first'")),
        (("--method", "filet", "--data", "DATA", "--basis", "power", "--magnitude", "sigma"), ("--basis power",)),
        (("--method", "filet", "--data", "DATA", "--targets", "none"), ("--targets none matches none of 14 weights",)),
        (("--method", "pissa", "--data", "DATA"), ("--method pissa reads no data: leave out --data",)),
        (("--method", "pissa", "--samples", 3), ("--method pissa takes no --samples",)),
        (("--method", "pissa", "--batch-size", 3), ("leave out --batch-size",)),
        (("--method", "pissa", "--rank", 100), ("rank 100", "smaller side")),
        (("--method", "pissa", "--targets", "lm_head"), ("--targets lm_head matches none",)),
        (("--method", "pissa", "--alpha", -1), ("--alpha must be positive",)),
        (("--method", "pissa", "--first", "False"), ("unexpected extra argument",)),
    ],
    ids=str,
)
def test_what_is_refused(capsys, tmp_path, models, rows, arguments, words):
    arguments = [rows / "text.jsonl" if one == "DATA" else one for one in arguments]
    line = refused(capsys, "init", models / "llama", "--out", tmp_path / "out", *arguments)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_a_start_is_made_for_a_model_without_adapter(capsys, tmp_path, models):
    line = refused(capsys, "init", models / "lora", "--method", "pissa", "--out", tmp_path / "out")
    assert "is an adapter, and a start is made for a model without one: name its base" in line
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else(capsys, tmp_path, models):
    arguments = (models / "llama", "--method", "pissa", "--rank", 2, "--out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mind")
    assert "holds notes.txt, which is no start" in refused(capsys, "init", *arguments, tmp_path / "notes")
    assert "is a file: name a folder" in refused(capsys, "init", *arguments, tmp_path / "notes" / "notes.txt")
    assert "does not exist: create it" in refused(capsys, "init", *arguments, tmp_path / "none" / "out")
    (tmp_path / "lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(models / "lora" / name, tmp_path / "lora" / name)
    assert "an adapter that fishkern init did not make" in refused(capsys, "init", *arguments, tmp_path / "lora")


def test_an_older_start_is_replaced_and_a_trained_one_is_not(capsys, tmp_path, models):
    from fishkern.integrations.lora import attach_init, plain_lora

    arguments = (models / "llama", "--method", "pissa", "--rank")
    out = tmp_path / "out"
    made(capsys, out, *arguments, 2)
    init, _ = made(capsys, out, *arguments, 3)
    assert set(init.ranks.values()) == {3}
    adapted = attach_init(llama(models), init, task_type="CAUSAL_LM")
    with torch.no_grad():
        next(value for name, value in adapted.named_parameters() if "lora_B" in name).add_(1)
    plain_lora(adapted, out)
    capsys.readouterr()
    assert "or that was trained since" in refused(capsys, "init", *arguments, 2, "--out", out)


@pytest.mark.parametrize("exists", [False, True])
def test_an_interruption_leaves_the_folder_as_it_was(capsys, tmp_path, models, monkeypatch, exists):
    out = tmp_path / "out"
    if exists:
        made(capsys, out, models / "llama", "--method", "pissa", "--rank", 2)
    before = {path.name: path.read_bytes() for path in out.glob("*")}
    lora = import_module("fishkern.integrations.lora")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "plain_lora", interrupted)
    status, output, error = command(capsys, "init", models / "llama", "--method", "pissa", "--rank", 3, "--out", out)
    assert (status, output) == (130, "")
    assert "no file is left half written" in error
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])


def test_progress_goes_on_when_all_examples_are_done(capsys, monkeypatch):
    """Directions are computed then, which takes a while in a large model."""
    from rich.console import Console

    output = import_module("fishkern.commands.output")
    monkeypatch.setattr(output, "Console", lambda **options: Console(**options, force_terminal=True, width=120))
    with output.progress("estimating", "examples", then="computing directions") as report:
        report(1, 2)
        report(2, 2)
    assert "2 examples done, computing directions" in capsys.readouterr().err


def test_the_share_that_is_done_is_shown(capsys, tmp_path, models, rows, monkeypatch):
    """Of the examples of all passes over the data."""
    told = []

    @contextmanager
    def progress(what, unit, **options):
        yield lambda *done: told.append(done)

    monkeypatch.setattr(import_module("fishkern.commands.init"), "progress", progress)
    arguments = (
        "--method",
        "farss",
        "--shallow",
        0,
        "--rank",
        2,
        "--layers-per-pass",
        1,
        "--samples",
        6,
        "--batch-size",
        4,
        "--out",
        tmp_path / "out",
    )
    assert command(capsys, "init", models / "llama", "--data", rows / "text.jsonl", *arguments)[0] == 0
    assert told == [(4, 12), (6, 12), (10, 12), (12, 12)]
