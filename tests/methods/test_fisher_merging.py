"""Fisher-weighted averages of models against the formula in float64, in memory and on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fishkern as fk
from fishkern.methods import fisher_merging, weighted_means
from tests.support import zoo


class Net(nn.Module):
    """With a tied weight, a norm's running statistics, a counter, and a head."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(4, classes)


def fisher_of(model: nn.Module, seed: int, zeros: bool = False) -> dict[str, torch.Tensor]:
    """Over many magnitudes, as a Fisher is; with ``zeros``, every other entry is zero."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, p in model.named_parameters():
        scores[name] = 10 ** (-10 * torch.rand(p.shape, generator=generator))
        if zeros:
            scores[name].view(-1)[::2] = 0
    return scores


def formula(values: list, fishers: list | None, shares=None, floor: float = 0.0) -> torch.Tensor:
    """Entry by entry in Python's own floats."""
    shares = shares or [1.0] * len(values)
    merged = []
    for n in range(values[0].numel()):
        w = [value.double().flatten()[n].item() for value in values]
        F = [max(fisher.double().flatten()[n].item(), floor) for fisher in fishers] if fishers else [0.0] * len(w)
        parts = [share * one for share, one in zip(shares, F, strict=True)]
        parts = parts if sum(parts) else shares
        merged.append(sum(part * one for part, one in zip(parts, w, strict=True)) / sum(parts))
    return torch.tensor(merged, dtype=torch.float64).view(values[0].shape)


def close(merged: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal up to the rounding of the result's own dtype."""
    rounding = torch.finfo(merged.dtype).eps
    torch.testing.assert_close(merged.double(), truth, rtol=2 * rounding, atol=1e-15)


CASES = {
    "plain": {},
    "zeros": {"zeros": True},
    "weights": {"weights": [0.2, 3.0]},
    "weights and zeros": {"weights": [0.2, 3.0], "zeros": True},
    "floor": {"floor": 1e-3},
    "one model alone": {"weights": [0.0, 1.0]},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_every_entry_is_the_weighted_mean(case, dtype, monkeypatch):
    monkeypatch.setattr(fisher_merging, "PIECE", 7)
    monkeypatch.setattr(weighted_means, "_CHUNK", 3)
    options = dict(CASES[case])
    zeros = options.pop("zeros", False)
    models = [Net(seed=seed).to(dtype) for seed in (1, 2)]
    fishers = [fisher_of(model, seed, zeros) for seed, model in enumerate(models)]
    merged = fk.fisher_merge(dict(zip(models, fishers, strict=True)), **options)
    assert list(merged) == list(models[0].state_dict())
    for name in fishers[0]:
        values = [model.get_parameter(name).detach() for model in models]
        truth = formula(values, [one[name] for one in fishers], options.get("weights"), options.get("floor", 0.0))
        assert merged[name].dtype == dtype
        close(merged[name], truth)
    for model in models:
        model.load_state_dict(merged)
        assert model.out.weight is model.embed.weight
        torch.testing.assert_close(model.embed.weight.detach(), merged["embed.weight"], rtol=0, atol=0)


def test_errors_that_a_reader_would_make_are_found():
    """The comparison above sees sums instead of means, a floor that is added, and weights that are squared."""
    values = [torch.tensor([1.0]), torch.tensor([3.0])]
    fishers = [torch.tensor([1e-4]), torch.tensor([2e-2])]
    truth = formula(values, fishers, [2.0, 1.0], 1e-3)
    F = [max(f.item(), 1e-3) for f in fishers]
    assert truth.item() == (2 * F[0] * 1 + F[1] * 3) / (2 * F[0] + F[1])
    for other in (
        formula(values, fishers, None, 1e-3),
        formula(values, fishers, [2.0, 1.0]),
        formula(values, [f + 1e-3 for f in fishers], [2.0, 1.0]),
        formula(values, [16 * fishers[0], fishers[1]], [2.0, 1.0], 1e-3),
    ):
        with pytest.raises(AssertionError):
            close(truth.float(), other)


def test_three_models_and_what_has_no_statistics():
    models = [Net(seed=seed) for seed in range(3)]
    fishers = [{"body.weight": fisher_of(m, seed)["body.weight"]} for seed, m in enumerate(models)]
    merged = fk.fisher_merge(dict(zip(models, fishers, strict=True)), weights=[1, 2, 3])
    values = {name: [m.state_dict()[name] for m in models] for name in merged}
    close(merged["body.weight"], formula(values["body.weight"], [f["body.weight"] for f in fishers], [1, 2, 3]))
    close(merged["body.bias"], formula(values["body.bias"], None, [1, 2, 3]))
    assert torch.equal(merged["norm.running_var"], models[0].norm.running_var)


def test_a_tied_weight_is_merged_once_under_either_name():
    """With statistics of the first name alone, the second would else be the plain mean, and overwrite it."""
    models = [Net(seed=seed) for seed in (1, 2)]
    fishers = [fisher_of(model, seed) for seed, model in enumerate(models)]
    assert "out.weight" not in fishers[0]
    merged = fk.fisher_merge(dict(zip(models, fishers, strict=True)))
    assert merged["out.weight"] is merged["embed.weight"]
    renamed = [{"out.weight": one.pop("embed.weight"), **one} for one in fishers]
    again = fk.fisher_merge(dict(zip(models, renamed, strict=True)))
    assert torch.equal(again["embed.weight"], merged["embed.weight"])
    assert torch.equal(again["out.weight"], merged["embed.weight"])
    twice = [{**one, "embed.weight": one["out.weight"]} for one in renamed]
    with pytest.raises(ValueError, match="hold embed.weight twice, also as"):
        fk.fisher_merge(dict(zip(models, twice, strict=True)))
    kept = fk.fisher_merge(dict(zip(models, fishers, strict=True)), own="out.*")
    assert not {"out.weight", "embed.weight"} & kept.keys()


def test_heads_of_different_tasks_stay_with_their_models():
    models = [Net(classes=3, seed=1), Net(classes=2, seed=2)]
    heads = [copy.deepcopy(model.head) for model in models]
    fishers = [fisher_of(model, seed) for seed, model in enumerate(models)]
    given = dict(zip(models, fishers, strict=True))
    with pytest.raises(ValueError, match=r"head.weight is \(3, 4\) of torch.float32 in model 1 and \(2, 4\)"):
        fk.fisher_merge(given)
    merged = fk.fisher_merge(given, own="head.*")
    for model, head in zip(models, heads, strict=True):
        missing, unexpected = model.load_state_dict(merged, strict=False)
        assert sorted(missing) == ["head.bias", "head.weight"]
        assert not unexpected
        assert torch.equal(model.head.weight, head.weight)
    assert torch.equal(models[0].body.weight, models[1].body.weight)


def test_it_minimises_the_sum_of_the_penalties():
    """The merged model is where the gradients of both quadratic penalties cancel."""
    models = [Net(seed=seed).double() for seed in (1, 2)]
    fishers = [fisher_of(model, seed) for seed, model in enumerate(models)]
    merged = fk.fisher_merge(dict(zip(models, fishers, strict=True)))
    for name, F in fishers[0].items():
        slope = sum(f[name] * (merged[name] - m.get_parameter(name)) for f, m in zip(fishers, models, strict=True))
        assert slope.abs().max() < 1e-12 * F.max()


def test_of_estimates():
    models = [zoo.bert_classifier().model for _ in range(2)]
    with torch.no_grad():
        models[1].classifier.weight += 1
    statistics = [fk.estimate(model, [zoo.class_batch(4)]) for model in models]
    merged = fk.fisher_merge(dict(zip(models, statistics, strict=True)))
    name = "bert.encoder.layer.0.output.dense.weight"
    values = [model.get_parameter(name).detach() for model in models]
    close(merged[name], formula(values, [one[name] for one in statistics]))
    drawn = fk.estimate(models[1], [zoo.class_batch(4)], fk.DiagonalFisher("mc"))
    with pytest.raises(ValueError, match="only statistics of one definition are weights of one mean"):
        fk.fisher_merge(dict(zip(models, [statistics[0], drawn], strict=True)))


def test_what_is_refused():
    models = [Net(seed=seed) for seed in (1, 2)]
    fishers = [fisher_of(model, seed) for seed, model in enumerate(models)]

    def merge(first=None, second=None, **options):
        given = [fishers[0] if first is None else first, fishers[1] if second is None else second]
        return fk.fisher_merge(dict(zip(models, given, strict=True)), **options)

    without = {name: fisher for name, fisher in fishers[1].items() if name != "body.bias"}
    groups = fk.Statistics({"a": torch.ones(1)}, count=1, provenance={"definition": {"groups": {"a": ["body.bias"]}}})
    refused = [
        (TypeError, "models are given as {model: statistics", lambda: fk.fisher_merge([models])),
        (ValueError, "at least two models, got 1", lambda: fk.fisher_merge({models[0]: fishers[0]})),
        (TypeError, "the statistics of model 2 must be fishkern.Statistics or", lambda: merge(second=[1])),
        (ValueError, "the statistics of model 2 are of groups", lambda: merge(second=groups)),
        (ValueError, "statistics of model 2 lack body.bias, which others have", lambda: merge(second=without)),
        (ValueError, "hold no.such, which is no parameter there", lambda: merge({"no.such": torch.ones(1)})),
        (ValueError, "hold norm.running_var, which is no", lambda: merge({"norm.running_var": torch.ones(4)})),
        (ValueError, r"body.bias with shape \(1,\), the model has \(4,\)", lambda: merge({"body.bias": torch.ones(1)})),
        (ValueError, "floor must be at least 0", lambda: merge(floor=-1)),
        (ValueError, "weights must be one number of at least 0 for each of the 2", lambda: merge(weights=[1])),
        (ValueError, "not all of them 0", lambda: merge(weights=[0, 0])),
        (ValueError, "own='haed' matches no name", lambda: merge(own="haed")),
    ]  # fmt: skip
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
    for wrong in (-1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"the statistics of body.bias of model 2 hold {wrong:g}"):
            merge(second={**fishers[1], "body.bias": torch.full((4,), wrong)}, floor=1e-6)
    models[1].norm.running_mean += 1
    with pytest.raises(ValueError, match="norm.running_mean is no parameter and differs between model 1 and model 2"):
        merge()
    merge(own="norm.running_mean")
    models[1].norm.running_mean -= 1
    models[1].extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="model 1 has no extra, and another model has"):
        merge()
    del models[1].extra
    models[1].out.weight = nn.Parameter(models[1].out.weight.detach().clone())
    with pytest.raises(ValueError, match="out.weight is tied in one of model 1 and model 2 and not in the other"):
        merge()


@pytest.fixture
def saved(tmp_path: Path):
    """Two checkpoints of a transformers model in several shards, their statistics on disk, and the models."""
    pytest.importorskip("transformers")
    models, statistics, folders = [], [], []
    for n in range(2):
        torch.manual_seed(n)
        model = zoo.bert_classifier().model.to(torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p) / 10
        model.save_pretrained(tmp_path / f"model-{n}", max_shard_size="20KB")
        (tmp_path / f"model-{n}" / "trainer_state.json").write_text("{}")
        for name in ("source.spm", "bpe.codes"):  # of the tokenizers of Marian and PhoBERT
            (tmp_path / f"model-{n}" / name).write_text(name)
        one = fk.estimate(model, [zoo.class_batch(4)])
        statistics.append(fk.Statistics.load(one.save(tmp_path / f"fisher-{n}"), lazy=True))
        models.append(model)
        folders.append(tmp_path / f"model-{n}")
    return models, statistics, folders


def all_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_checkpoints_on_disk_merge_to_the_same_bits(saved, tmp_path):
    models, statistics, folders = saved
    expected = fk.fisher_merge(dict(zip(models, statistics, strict=True)), weights=[1, 3], floor=1e-9)
    told = []
    folder = fk.merge_checkpoints(
        dict(zip(folders, statistics, strict=True)),
        tmp_path / "merged",
        weights=[1, 3],
        floor=1e-9,
        progress=lambda *done: told.append(done),
    )
    stored = all_of(folder)
    assert stored.keys() <= expected.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name
    again = type(models[0]).from_pretrained(folder)
    for name, p in again.named_parameters():
        assert torch.equal(p, expected[name]), name
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in folders[0].iterdir()} - {"trainer_state.json"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
    assert told[-1] == (sum(t.numel() for t in stored.values()),) * 2
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_checkpoints_own_head_is_the_first_ones(saved, tmp_path):
    models, statistics, folders = saved
    for first in (0, 1):
        order = [first, 1 - first]
        given = {folders[n]: statistics[n] for n in order}
        stored = all_of(fk.merge_checkpoints(given, tmp_path / f"merged-{first}", own="classifier.*"))
        assert torch.equal(stored["classifier.weight"], models[first].classifier.weight)
        assert not torch.equal(stored["bert.pooler.dense.weight"], models[first].bert.pooler.dense.weight)


def test_a_buffer_on_disk_must_be_equal_where_the_coverage_tells(tmp_path):
    folders = []
    for n in range(2):
        (tmp_path / f"m{n}").mkdir()
        save_file(
            {"a.weight": torch.ones(2, 2), "mean": torch.full((2,), float(n))}, tmp_path / f"m{n}/model.safetensors"
        )
        folders.append(tmp_path / f"m{n}")
    covered = {"a.weight": fk.statistics.Covered("fused", 4)}
    statistics = fk.Statistics({"a.weight": torch.ones(2, 2)}, count=1, coverage=covered)
    with pytest.raises(ValueError, match="mean is no parameter and differs between"):
        fk.merge_checkpoints(dict.fromkeys(folders, statistics), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.tmp"))
    unknown = {"a.weight": torch.ones(2, 2)}
    folder = fk.merge_checkpoints(dict.fromkeys(folders, unknown), tmp_path / "out")
    assert load_file(folder / "model.safetensors")["mean"].tolist() == [0.5, 0.5]


def test_what_is_refused_on_disk(saved, tmp_path):
    _, statistics, folders = saved
    given = dict(zip(folders, statistics, strict=True))
    with pytest.raises(FileExistsError, match="is there already: name a new or empty folder"):
        fk.merge_checkpoints(given, folders[0])
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors and no model.safetensors.index.json"):
        fk.merge_checkpoints({**given, tmp_path: statistics[0]}, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="does not exist: create it"):
        fk.merge_checkpoints(given, tmp_path / "no" / "merged")
    with pytest.raises(TypeError, match="checkpoints are given as {folder: statistics"):
        fk.merge_checkpoints(list(given), tmp_path / "merged")
    index = folders[1] / "model.safetensors.index.json"
    text = index.read_text()
    for damaged in (
        "[]",
        "{",
        text.replace("bert.pooler.dense.bias", "bert.other"),
        text.replace("model-00001", "../x"),
    ):
        index.write_text(damaged)
        with pytest.raises((ValueError, FileNotFoundError), match="damaged|disagree|no file's name"):
            fk.merge_checkpoints(given, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
