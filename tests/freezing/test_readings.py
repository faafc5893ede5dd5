"""A reading is the slice of what a statistic says of a parameter."""

from __future__ import annotations

import pytest
import torch

import fishkern as fk
from fishkern.freezing import Factors, reading_of


class Factored(dict):
    """Statistics of which some parameters have factors."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        held = self[name]
        return held if isinstance(held, tuple) else None


@pytest.fixture
def factored() -> Factored:
    return Factored(weight=(torch.rand(6), torch.rand(5)), bias=torch.rand(6))


@pytest.mark.parametrize("piece", [fk.Rows((1, 3)), fk.Rows((0, 1), (4, 6)), fk.Columns((2, 5)), fk.Columns((0, 5))])
def test_values_and_factors_agree(factored, piece):
    """Cutting the factors cuts their products."""
    rows, columns = factored["weight"]
    values = {"weight": torch.outer(rows.double(), columns.double()).float()}
    cut = reading_of(factored, "weight", piece)
    assert isinstance(cut, Factors)
    assert cut.size == reading_of(values, "weight", piece).numel()
    assert torch.equal(cut.values(), reading_of(values, "weight", piece))


def test_a_parameter_without_factors_has_values(factored):
    assert torch.equal(reading_of(factored, "bias", fk.Rows((2, 4))), factored["bias"][2:4])


def test_values_are_flat_and_float32():
    statistics = {"conv": torch.rand(4, 3, 2, 2).half(), "double": torch.rand(4).double()}
    values = reading_of(statistics, "conv", fk.Columns((4, 8)))
    assert torch.equal(values, statistics["conv"][:, 1].float().reshape(-1))
    assert reading_of(statistics, "double", fk.Rows((0, 4))).dtype == torch.float64


def test_of_statistics():
    model = torch.nn.Linear(3, 4)
    batches = [(torch.randn(5, 3), torch.randint(4, (5,)))]
    statistics = fk.estimate(model, batches, likelihood=fk.Classification())
    (first, _) = fk.Slices(2).of("weight", model.weight.shape)
    assert torch.equal(reading_of(statistics, "weight", first), statistics["weight"][:2].reshape(-1))


def test_refused(factored):
    with pytest.raises(ValueError, match=r"weight \(6, 5\) has 6 rows, but a range stops at 7"):
        reading_of(factored, "weight", fk.Rows((5, 7)))
    with pytest.raises(KeyError):
        reading_of({}, "weight", fk.Rows((0, 1)))
