"""Files of earlier revisions load with the content that was saved, and interrupted training goes on the same.

Each folder of ``tests/old_files`` is of one revision; ``tests/support/samples.py`` has the content of its files.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import fishkern as fk
from fishkern import adapters
from fishkern.freezing.saved import FreezerState
from fishkern.selection import check_start, load_start
from fishkern.tokens import TokenReduction
from tests.support import oracle, samples
from tests.support.command import command

PACKAGE = Path(fk.__file__).parent
VERSIONS = sorted(folder.name for folder in samples.FOLDER.iterdir() if folder.name[0].isdigit())


@pytest.fixture(params=VERSIONS)
def files(request: pytest.FixtureRequest) -> Path:
    return samples.FOLDER / request.param


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of a step, which may differ between processors."""
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    roundings = 8 if expected.dtype == torch.float32 else 1
    torch.testing.assert_close(actual, expected, rtol=roundings * torch.finfo(expected.dtype).eps, atol=1e-7)


def test_every_version_of_every_format_has_a_sample():
    """The formats are those that the source names; a new one is missing here until its sample is written."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    newest = re.findall(r'Format\("(fishkern\.[^"]+)", version=(\d+)', source)
    named = {(name, version) for name, last in newest for version in map(str, range(1, int(last) + 1))}
    headers = [header_of(path) for path in samples.FOLDER.rglob("*") if path.suffix in (".safetensors", ".json")]
    assert len(newest) > 5
    # an estimate goes on only with the torch that wrote its checkpoint, so a sample would be of no use
    written = {(header["format"], header["format_version"]) for header in headers if "format_version" in header}
    assert named - {("fishkern.checkpoint", "1")} == written


def header_of(path: Path) -> dict:
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        return content.get("metadata", content)
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@pytest.mark.parametrize("lazy", [False, True], ids=["read", "lazy"])
@pytest.mark.parametrize("name", samples.STATISTICS)
def test_statistics(files, name, lazy):
    loaded = fk.Statistics.load(files / "statistics" / name, lazy=lazy)
    assert list(loaded) == list(samples.POOL)
    for key, shape in samples.POOL.items():
        assert torch.equal(loaded[key], samples.numbers(key, shape).abs())
        assert loaded[key].dtype == torch.float32
    assert loaded.count == 12
    assert loaded.coverage == ({} if name == "bare" else samples.COVERAGE)
    assert loaded.provenance == ({"definition": {}, "runs": []} if name == "bare" else samples.PROVENANCE)
    assert loaded == samples.statistics(name)


def test_precision(files):
    loaded = fk.Statistics.load(files / "precision" / "statistics")
    assert loaded == samples.precise_statistics()
    assert loaded.precision.plain() == samples.PRECISION.plain()
    assert loaded.precision.overlap(0.2) == pytest.approx(0.4705, abs=1e-4)


def test_statistics_merge_with_newer_ones(files):
    loaded = fk.Statistics.load(files / "statistics" / "float32", lazy=True)
    twice = fk.merge(loaded, samples.statistics("float32"))
    assert twice.count == 24
    assert all(torch.equal(twice[name], loaded[name]) for name in samples.POOL)


def test_an_estimate_of_tied_weights(files):
    pytest.importorskip("transformers")
    specimen = samples.tied_llama()
    loaded = fk.Statistics.load(files / "statistics" / "tied")
    truth = oracle.squares_one_by_one(specimen.model.double(), [specimen.batch()], specimen.loss)
    assert "lm_head.weight" not in truth
    error, name = oracle.worst_error(loaded, truth, torch.float32)
    assert error < 1e-4, name
    assert loaded.count == 5
    assert {covered.path for covered in loaded.coverage.values()} == {"fused"}
    expected = {"estimator": "DiagonalFisher", "fisher_type": "empirical", "unit": "example"}
    assert loaded.provenance["definition"].items() >= expected.items()


@pytest.mark.parametrize("name", samples.SELECTIONS)
def test_selections(files, name):
    loaded, expected = fk.Selection.load(files / "selections" / name), samples.selection(name)
    assert loaded == expected
    assert loaded.shapes == {key: torch.Size(shape) for key, shape in samples.POOL.items()}
    provenance, computed = loaded.provenance, expected.provenance
    for part in ("start", "start_unselected"):  # norms and sums, which are not rounded alike everywhere
        digests, ours = provenance.pop(part, {}), computed.pop(part, {})
        assert digests == {key: pytest.approx(digest) for key, digest in ours.items()}
    assert provenance == computed
    if name in ("forms", "shards", "bound"):
        assert loaded.counts == {"0.weight": 7, "0.bias": 0, "1.weight": 30, "1.bias": 3}
        assert loaded.whole == samples.WHOLE
        assert all(loaded.indices(key).tolist() == at.tolist() for key, at in samples.INDICES.items())
    else:
        assert loaded.count == (0 if name == "nothing" else loaded.total)


def test_starts_of_adapters(files):
    loaded, expected = fk.AdapterInit.load(files / "inits" / "adapter_init"), samples.adapter_init()
    assert loaded == expected
    assert loaded.provenance == expected.provenance
    assert loaded.ranks == {"0": 3, "1": 2}


def test_energies(files):
    loaded, expected = fk.Energies.load(files / "energies" / "energies"), samples.energies()
    assert loaded == expected
    assert loaded.basis == "svd"
    assert loaded["0.weight"].importance == expected["0.weight"].importance
    assert loaded["1.weight"].importance is None
    assert loaded["1.weight"].shape == tuple(samples.POOL["1.weight"])
    assert (loaded["1.weight"].positions, loaded["1.weight"].digest) == (6.5, (4.5, -0.125))


def test_factored_statistics(files):
    loaded, expected = fk.FactoredStatistics.load(files / "factored" / "factored"), samples.factored()
    assert loaded == expected
    assert loaded["0.weight"].shape == (20, 2, 8)
    assert torch.equal(loaded.factors("1.weight").rows, samples.numbers("1.weight rows", (3,)).abs() / 6.5)
    assert torch.equal(loaded["0.bias"], expected["0.bias"])
    assert loaded.factors("0.bias") is None


def test_a_freezer(files):
    loaded, expected = FreezerState.load(files / "freezer" / "freezer").to_plain(), samples.freezer_state().to_plain()
    assert loaded["header"] == expected["header"]
    assert loaded["tensors"].keys() == expected["tensors"].keys()
    assert all(torch.equal(tensor, expected["tensors"][name]) for name, tensor in loaded["tensors"].items())


def test_a_token_reduction(files):
    assert TokenReduction.load(files / "tokens" / "token_reduction.json") == samples.TOKEN_REDUCTION


def test_a_selection_knows_its_start(files):
    loaded = fk.Selection.load(files / "selections" / "bound")
    check_start(loaded, samples.small())
    check_start(loaded, samples.moved(samples.small()), trained=True)
    other = samples.small()
    other[0].weight.data *= -1
    with pytest.raises(ValueError, match="made for another start: 0.weight"):
        check_start(loaded, other)


@pytest.mark.parametrize(("name", "dtype"), samples.DELTAS.items())
def test_deltas(files, name, dtype):
    delta = fk.Delta.load(files / "values" / f"delta-{name}")
    assert delta.selection == samples.selection()
    model = samples.small(dtype)
    before = fk.apply_delta(model, delta)
    expected = samples.moved(samples.small(dtype))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    fk.apply_delta(model, before)
    with torch.no_grad():
        model[0].bias += 1  # which is not selected
    with pytest.raises(ValueError, match="not the delta's base: 1 of 4 parameters differ .* such as 0.bias"):
        fk.apply_delta(model, delta)


@pytest.mark.parametrize(("name", "dtype"), samples.DELTAS.items())
def test_starts(files, name, dtype):
    model = samples.small(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_start(model, files / "values" / f"start-{name}")
    for key, parameter in model.named_parameters():
        expected = samples.numbers(key, parameter.shape) if key in samples.POOL else torch.zeros(parameter.shape)
        assert torch.equal(parameter.float(), expected), key


def test_an_adapter(files):
    pytest.importorskip("transformers")
    model = samples.classifier()
    assert adapters.load(model, files / "values" / "adapter") == adapters.BottleneckAdapter(width=2)
    trained = samples.trained_values(model)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained} >= {"down", "up", "classifier"}
    for name, value in trained.items():
        assert torch.equal(value, samples.numbers(name, value.shape)), name


def test_a_selection_of_ranges(files):
    loaded, expected = fk.Selection.load(files / "ranges" / "selection"), samples.ranged_selection()
    assert loaded == expected
    assert loaded.provenance == expected.provenance
    assert loaded.entries("0.weight").ranges == fk.Rows((2, 5), (7, 20))
    assert loaded.entries("1.weight").ranges == fk.Columns((0, 8), (12, 13))
    assert loaded.counts == {"0.weight": 256, "0.bias": 3, "1.weight": 27, "1.bias": 3}


def test_a_delta_of_ranges(files):
    delta = fk.Delta.load(files / "ranges" / "delta")
    assert delta.selection == samples.ranged_selection()
    model = samples.small()
    fk.apply_delta(model, delta)
    expected = samples.moved(samples.small(), samples.ranged_selection())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_delta_of_coded_entries(files):
    assert header_of(files / "coded" / "delta.safetensors")["format_version"] == "3"
    delta = fk.Delta.load(files / "coded" / "delta")
    assert delta.selection == samples.coded_selection()
    model = samples.wide()
    fk.apply_delta(model, delta)
    expected = samples.moved(samples.wide(), samples.coded_selection())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_updates_of_a_stream(files):
    model, reader = samples.wide(), fk.DeltaReader()
    for name in samples.UPDATES:
        reader.apply(fk.DeltaUpdate.load(files / "updates" / name), model)
    expected, _ = samples.updates()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert not torch.equal(model[0].weight, samples.wide()[0].weight)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *(("optimizers", name) for name in samples.OPTIMIZERS),
        *(("ranges", name) for name in samples.OPTIMIZERS_OF_RANGES),
    ],
)
def test_optimizers_take_the_next_step(files, folder, name):
    training = (samples.OPTIMIZERS if folder == "optimizers" else samples.OPTIMIZERS_OF_RANGES)[name]
    recorded = load_file(files / folder / f"{name}.safetensors")
    model = samples.small(training.dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(recorded[f"before weight {key}"])
    optimizer = training.optimizer(model, training.selected)
    optimizer.load_state_dict(torch.load(files / folder / f"{name}.pt", weights_only=True))
    before = samples.tensors_of(model, optimizer)
    assert {f"before {key}" for key in before} == {key for key in recorded if key.startswith("before ")}
    assert all(torch.equal(value, recorded[f"before {key}"]) for key, value in before.items())
    samples.advance(model, optimizer, step=3)
    after = samples.tensors_of(model, optimizer)
    for key, value in after.items():
        assert_close(value, recorded[f"after {key}"])
    moving = [key for key in samples.POOL if training.selected.counts[key]]
    assert all(not torch.equal(after[f"weight {key}"], before[f"weight {key}"]) for key in moving)


@pytest.mark.parametrize("kind", ["trainer", "selecting-trainer"])
def test_a_checkpoint_of_a_trainer_goes_on(files, tmp_path, kind):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    from fishkern.integrations.trainer import FILE

    def select(model: nn.Module, batches: object) -> fk.Selection:
        pytest.fail("the selection is that of the checkpoint")

    checkpoint = shutil.copytree(files / kind / samples.CHECKPOINT, tmp_path / samples.CHECKPOINT)
    model, selection = samples.adapted(), fk.Selection.load(checkpoint / FILE)
    if kind == "trainer":
        training = samples.trainer(model, selection, tmp_path)
    else:
        training = samples.selecting_trainer(model, select, tmp_path)
    assert training.train(resume_from_checkpoint=str(checkpoint)).global_step == 4
    expected = load_file(files / kind / "expected.safetensors")
    trained = samples.trained_values(model)
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    optimizer = training.optimizer.optimizer
    assert optimizer.selection == selection
    assert sum(kept["exp_avg"].numel() for kept in optimizer.state.values()) == selection.count
    assert {kept["step"].item() for kept in optimizer.state.values()} == {4}, "two of these steps are the checkpoint's"


def test_a_tune_under_way_goes_on(files, tmp_path, monkeypatch, capsys):
    for package in ("transformers", "peft", "typer", "rich"):
        pytest.importorskip(package)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    samples.write_tune_inputs(tmp_path)
    shutil.copytree(files / "tune" / "run", tmp_path / "run")
    status, _, error = command(capsys, *samples.TUNE.split())
    assert status == 0, error
    assert "resuming the unfinished run in run: 8 of 12 examples seen" in error
    whole = files / "tune" / "whole"
    assert {file.name for file in whole.iterdir()} == {file.name for file in (tmp_path / "run").iterdir()}
    for file in whole.glob("*.safetensors"):
        expected, resumed = load_file(file), load_file(tmp_path / "run" / file.name)
        assert expected.keys() == resumed.keys()
        for name, value in resumed.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    assert fk.Delta.load("run/delta").selection == fk.Delta.load(whole / "delta").selection
    expected, resumed = (json.loads((folder / "report.json").read_text()) for folder in (whole, tmp_path / "run"))
    for report in (expected, resumed):
        del report["seconds"]
    assert resumed.keys() == expected.keys()
    for key, value in resumed.items():
        computed = key in ("loss", "before", "after")
        assert value == (pytest.approx(expected[key], abs=1e-5) if computed else expected[key]), key
