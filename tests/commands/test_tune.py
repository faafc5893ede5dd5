"""``fishkern tune`` on real text: training, saving, and refusals."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import fishkern as fk
from tests.support.command import command, refused

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def arguments(shared_data) -> list:
    model, data = shared_data / "models" / "stories260K", shared_data / "glue" / "cola"
    return ["tune", model, "--data", data, "--task", "sequence-classification", "--samples", 48, "--epochs", 1]


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 500, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def base(shared_data: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        shared_data / "models" / "stories260K", num_labels=2
    )
    model.config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def whole_run(arguments, tmp_path_factory) -> SimpleNamespace:
    """A run with all that there is: its folder, its output, and how far each wait said that it was."""
    from fishkern import cli

    told: dict[str, list[tuple]] = {}

    @contextmanager
    def progress(what, unit, begun=0):
        told[what] = []
        yield lambda *done: told[what].append(done)

    folder = tmp_path_factory.mktemp("tuned") / "lora"
    with (
        patch.object(import_module("fishkern.commands.tuning"), "progress", progress),
        redirect_stdout(io.StringIO()) as output,
        pytest.raises(SystemExit) as exit,
    ):
        cli.main([str(argument) for argument in [*arguments, "--eval-split", "validation", "--out", folder]])
    assert not exit.value.code
    return SimpleNamespace(folder=folder, told=told, output=output.getvalue())


@pytest.fixture(scope="module")
def tuned(whole_run) -> Path:
    return whole_run.folder


def test_it_saves_all_that_it_takes_to_go_on(tuned):
    report = json.loads((tuned / "report.json").read_text())
    selection = fk.Selection.load(tuned / "selection.safetensors")
    delta = fk.Delta.load(tuned / "delta.safetensors")
    assert report["trained"] == selection.count == delta.count
    assert selection.whole == ("base_model.model.score.modules_to_save.default.weight",)
    assert selection.k == int(0.2 * (selection.total - 2 * 64))
    assert report["fisher_samples"] == 128
    assert report["after"]["loss"] < report["before"]["loss"]
    assert 0 <= report["after"]["accuracy"] <= 1


def test_the_adapter_loads_with_plain_peft_and_answers_the_same(tuned, shared_data):
    """PiSSA takes the residual out of the base again; the trained entries are those of the delta, the others stayed."""
    model = peft.PeftModel.from_pretrained(base(shared_data), tuned / "adapter")
    again = peft.PeftModel.from_pretrained(base(shared_data), tuned / "adapter")
    fk.selection.load_start(again, tuned / "start.safetensors")
    assert not torch.allclose(logits(again), logits(model))
    fk.apply_delta(again, fk.Delta.load(tuned / "delta.safetensors"))
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("adapter", ["ia3", "bottleneck", "prefix"])
def test_other_adapters(capsys, arguments, tmp_path, shared_data, adapter):
    options = ["--out", tmp_path / "a", *([] if adapter == "ia3" else ["--layers", "0-1", "--size", 4])]
    status, output, error = command(capsys, *arguments, "--adapter", adapter, *options, "--json")
    assert status == 0, error
    report = json.loads(output)
    assert report["adapter"] == adapter
    assert 0 < report["trained"] < report["pool"]
    if adapter != "ia3":
        model = base(shared_data)
        recipe = fk.adapters.load(model, tmp_path / "a" / "adapter.safetensors")
        assert recipe.layers == (0, 1)


def test_an_adapter_is_trained_further(capsys, arguments, tuned, shared_data, tmp_path):
    arguments = ["tune", tuned / "adapter", *arguments[2:]]
    status, output, error = command(capsys, *arguments, "--k", 100, "--out", tmp_path / "a")
    assert status == 0, error
    assert "is an adapter: no other is added" in error
    assert "of the given adapter and head" in output
    assert fk.Selection.load(tmp_path / "a" / "selection.safetensors").k == 100
    for option in (["--adapter", "lora"], ["--size", 4], ["--layers", "0"]):
        line = refused(capsys, *arguments, *option, "--out", tmp_path / "b")
        assert f"is an adapter, and no other is added: leave out {option[0]}." in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("kind", "other"), [("lora", "adapter.safetensors"), ("prefix", "adapter")])
def test_the_adapter_of_another_run_does_not_stay_beside(capsys, arguments, tmp_path, kind, other):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / other).touch()
    line = refused(capsys, *arguments, "--adapter", kind, "--out", tmp_path / "a")
    assert line.endswith(f"a/{other} is the adapter of another run: choose another --out, or delete it first.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "lore"], "--adapter is one of lora, dora"),
        (["--adapter", "ia3", "--size", 3], "ia3 has no size"),
        (["--layers", "1-x"], "--layers is like 0-4 or 0,2,5, got '1-x'"),
        (["--layers", "0,4-1"], "--layers 0,4-1 counts down: write 1-4."),
        (["--k", 0], "--k 0 selects nothing"),
        (["--k", 10**9], "asks for 1,000,000,000 entries"),
        (["--k", 5, "--density", 0.5], "give one of --density, --k and --trainable, got k, density"),
        (["--order", "best"], "--order is one of largest, smallest"),
        (["--order", "random", "--fisher-samples", 4], "--order random looks at no example"),
        (["--eval-split", "test"], "test"),
        (["--out", "missing/folder"], "the folder missing does not exist"),
        (["--parameters", "*"], "no use for --parameters"),
    ],
    ids=str,
)
def test_refusals(capsys, arguments, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments, *options)
    assert list(tmp_path.iterdir()) == []


def test_every_wait_shows_how_far_it_is(whole_run):
    told = whole_run.told
    assert list(told) == ["selecting", "measuring before", "training", "measuring after"]
    assert told["measuring before"] == told["measuring after"]
    assert told["measuring before"][-1] == (1043, 1043)
    seconds = json.loads((whole_run.folder / "report.json").read_text())["seconds"]
    assert all(seconds[part] > 0 for part in ("selecting", "training", "measuring"))
    took = next(line for line in whole_run.output.splitlines() if line.startswith("took"))
    assert all(words in took for words in (" s to select, ", " s to train, ", " s to measure"))


@pytest.mark.parametrize("adapter", ["lora", "bottleneck"])
def test_what_it_suggests_next_works_when_pasted(capsys, arguments, tmp_path, monkeypatch, adapter, shared_data):
    import shlex

    monkeypatch.chdir(tmp_path)
    status, output, error = command(capsys, *arguments, "--adapter", adapter, "--out", "my runs")
    assert status == 0, error
    lines = output.splitlines()
    shell = next(line.removeprefix("Next:  ") for line in lines if line.startswith("Next:"))
    program, *words = shlex.split(shell)
    assert program == "fishkern"
    status, shown, _ = command(capsys, *words)
    assert (status, "values in" in shown) == (0, True)
    python = next(line.removeprefix("or in Python:  ") for line in lines if line.startswith("or in Python:"))
    names: dict = {}
    exec(python, names)
    held = {fk.canonical_name(name): value for name, value in names["model"].named_parameters()}
    delta, seen = fk.Delta.load("my runs/delta.safetensors"), 0
    for name in delta.selection.names:
        if delta.selection.counts[name] and (adapter == "bottleneck" or "modules_to_save" in name):
            torch.testing.assert_close(held[name].detach().flatten()[delta.selection.indices(name)], delta.values(name))
            seen += 1
    assert seen
