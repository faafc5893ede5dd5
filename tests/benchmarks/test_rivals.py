"""The comparison with rivals: results are exact, gaps are reported, and models come back as found."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.cases.rivals import ON_CPU, ON_GPU
from benchmarks.engine.process import in_short
from benchmarks.rivals import as_found
from benchmarks.rivals.oracle import coverage, float64_loop, largest_error
from benchmarks.rivals.providers import PASSES, Provider, squares
from benchmarks.subjects.transformers import (
    BERT_BASE,
    BERT_MINI,
    LLAMA_1B,
    LLAMA_7B,
    LLAMA_8B,
    LLAMA_21M,
    LLAMA_32M,
    LLAMA_104M,
    Workload,
)

MISSED = {  # on BERT and LLaMA, without a word; the rest is right
    "backpack": {"LayerNorm", "LlamaRMSNorm"},
    "kronfluence": {"Embedding", "LayerNorm", "LlamaRMSNorm"},
}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", PASSES)
def test_every_way_is_exact_where_it_gives_anything(name, kind):
    rival = PASSES[name]
    if rival.why_not:
        pytest.skip(rival.why_not)
    case = Workload(BERT_MINI if kind == "bert" else LLAMA_21M, 128).small()
    model, data = case.model(), case.data()
    truth = float64_loop(model, data)
    if name == "nngeometry":
        with as_found(model), pytest.raises(RuntimeError):  # its rules of 0.4 are for vectors, not for sequences
            rival.run(model, data)
        return
    with as_found(model):
        result = rival.run(model, data)
    squared = squares(result)
    assert largest_error(squared, truth)["wrong"] == []
    covered = coverage(model, squared)
    assert set(covered["missed"]) <= MISSED.get(name, set())
    assert (covered["entries"] == 1) == (name not in MISSED)


def test_a_model_comes_back_as_found():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).eval()
    before = list(model.modules())
    with as_found(model):
        model.train()
        model[1].p = 0.0
        model[0].register_forward_hook(lambda *_: pytest.fail("the hook is there"))
        model[0].weight.grad_sample = 1
        model[0].weight.requires_grad_(False)
        model[0] = torch.nn.Identity()
    model(torch.ones(1, 2))
    assert list(model.modules()) == before
    assert not model[0].training
    assert model[1].p == 0.5
    assert model[0].weight.requires_grad
    assert not hasattr(model[0].weight, "grad_sample")


def test_what_is_not_installed_says_so():
    rival = Provider(lambda model, batches: {}, package="no-such-distribution")
    assert rival.why_not == "no-such-distribution is not installed"
    for other in PASSES.values():
        assert (other.why_not is None) == (other.package is None or other.version is not None)


def test_errors_in_short():
    assert in_short(ValueError("first line\nsecond")) == "ValueError: first line"
    assert in_short(KeyError()) == "KeyError"
    assert len(in_short(RuntimeError("word " * 100))) < 140


def test_coverage_and_errors():
    """A missing tensor is counted, a wrong one is named, and rounding of what has no gradient is no error."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    truth = {"0.weight": torch.full((2, 3), 4.0), "0.bias": torch.full((2,), 1e-30), "1.weight": torch.ones(2)}
    squared = {"0.weight": truth["0.weight"], "0.bias": torch.full((2,), 1e-16), "1.weight": torch.tensor([1.0, 1.1])}
    assert coverage(model, squared) == {"entries": round(10 / 12, 6), "parameters": "3 of 4", "missed": ["LayerNorm"]}
    errors = largest_error(squared, {name: values.double() for name, values in truth.items()})
    assert errors["worst"] == "1.weight"
    assert errors["wrong"] == ["1.weight"]
    assert errors["error"] == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize("case", [*ON_CPU, *ON_GPU], ids=str)
def test_cases_are_what_they_are_called(case):
    assert case.small().shape.kind == case.shape.kind
    assert case.fields.keys() == vars(case).keys() - {"shape", "lora"} | vars(case.shape).keys()


def test_shapes_are_what_they_are_called():
    """Parameters of the real ones, from their model cards; BERT's is without a head, with two classes here."""
    assert sum(BERT_BASE.sizes()) == 109_482_240 + 2 * 769
    assert sum(LLAMA_1B.sizes()) == 1_235_814_400
    assert sum(LLAMA_8B.sizes()) == 8_030_261_248
    assert sum(LLAMA_7B.sizes()) == 6_738_415_616
    assert [round(sum(shape.sizes()) / 1e6) for shape in (LLAMA_104M, LLAMA_32M, LLAMA_21M)] == [104, 32, 21]


def test_every_rival_is_in_the_extra():
    """``pip install fishkern[rivals]`` brings all packages of the comparison, and nothing else brings them."""
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {rival.package for rival in PASSES.values()} - {None, "torch"}
    assert packages <= set(extras["rivals"])
    assert not packages & {name for extra in ("all", "bench", "dev") for name in extras[extra]}
    pinned = {line.split("==")[0] for line in (root / "constraints.txt").read_text().splitlines()}
    assert set(extras["rivals"]) <= pinned


def test_the_picture_names_what_is_left_out():
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    from benchmarks.plots import rivals

    case = Workload(LLAMA_21M, 128).fields
    common = {"op": "rivals", "case": case, "machine": "a machine", "commit": "0" * 40, "time": "2026-01-01"}
    records = [
        {
            **common,
            "provider": "fishkern",
            "quantity": "time",
            "examples_per_second": 10.0,
            "coverage": {"entries": 1.0},
        },
        {
            **common,
            "provider": "kronfluence",
            "quantity": "time",
            "examples_per_second": 5.0,
            "coverage": {"entries": 0.8},
        },
        {**common, "provider": "opacus", "quantity": "time", "left out": "opacus is not installed"},
        {**common, "provider": "fishkern", "quantity": "memory", "peak_mib": 100.0},
        {**common, "provider": "opacus", "quantity": "memory", "left out": "opacus is not installed"},
    ]
    left, right = rivals.draw(records).axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["fishkern", "kronfluence (80 % of entries)", "Opacus"]
    assert [text.get_text() for text in left.texts] == ["10.0 examples/s", "5.00 examples/s", "opacus is not installed"]
    assert [text.get_text() for text in right.texts] == ["100 MiB", "opacus is not installed"]
