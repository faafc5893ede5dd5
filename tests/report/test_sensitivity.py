"""The cost of few bits against its formula in float64, and its table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.report import round_to_nearest, sensitivity


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 7) for _ in range(2)]), "head": nn.Linear(7, 3)})


def fisher_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.rand(p.shape) ** 4 for name, p in model.named_parameters()}


def levels(row: torch.Tensor, bits: int) -> torch.Tensor:
    """Each value's nearest of the 2^bits - 1 levels, found by trying all."""
    most = 2 ** (bits - 1) - 1
    grid = torch.arange(-most, most + 1).double() * row.abs().max() / most
    return grid[(row[:, None] - grid).abs().argmin(1)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_half_the_fisher_times_the_squared_error(bits):
    model = net().double()
    fisher = fisher_of(model)
    found = sensitivity(model, fisher, bits=[bits])
    assert list(found.parameters) == [name for name in fisher if name.endswith("weight")]
    for name, part in found.parameters.items():
        w = model.get_parameter(name).detach()
        rounded = torch.stack([levels(row, bits) for row in w])
        torch.testing.assert_close(round_to_nearest(w, bits), rounded)
        truth = (fisher[name].double() * (w - rounded) ** 2).sum().item() / 2
        assert part.costs == {bits: pytest.approx(truth, rel=1e-9)}
        assert part.costs[bits] != pytest.approx(2 * truth, rel=1e-3)


def test_parts_add_up_and_more_bits_cost_less():
    model = net()
    found = sensitivity(model, fk.Statistics(fisher_of(model), count=1))
    by_parameter = [part.costs[3] for part in found.parameters.values()]
    for group in (found.layers, found.modules):
        assert sum(part.costs[3] for part in group.values()) == pytest.approx(sum(by_parameter))
    costs = found.whole.costs
    assert costs[2] > costs[3] > costs[4] > costs[8] > 0
    assert found.to_dict()["whole"]["coordinates"] == 5 * 7 * 2 + 21
    pytest.importorskip("rich")
    from fishkern.report.tables import sensitivity_table

    table = sensitivity_table(found)
    assert [column.header for column in table.columns][1:3] == ["coordinates", "cost in 2 bits"]


def test_a_quantiser_of_ones_own():
    model = net()
    fisher = fisher_of(model)
    free = sensitivity(model, fisher, bits=[4], quantise=lambda weight, bits: weight)
    assert free.whole.costs == {4: 0.0}
    with pytest.raises(ValueError, match=r"quantise gave \(7,\) for layers.0.weight"):
        sensitivity(model, fisher, quantise=lambda weight, bits: weight[:, 0])


def test_rows_of_zeros_and_what_is_refused():
    assert torch.equal(round_to_nearest(torch.zeros(2, 3), 4), torch.zeros(2, 3))
    model = net()
    fisher = fisher_of(model)
    with pytest.raises(ValueError, match="bits must be at least 2, got 1"):
        sensitivity(model, fisher, bits=[1])
    with pytest.raises(ValueError, match="ModuleDict has no parameter body: give statistics of this model"):
        sensitivity(model, {"body": torch.ones(1)})
    with pytest.raises(ValueError, match="the statistics hold no matrix"):
        sensitivity(model, {"head.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"hold head.weight with shape \(3,\), in the model it has \(3, 7\)"):
        sensitivity(model, {"head.weight": torch.ones(3)})
    for wrong in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"statistics of head.weight are negative or not finite"):
            sensitivity(model, {"head.weight": torch.full((3, 7), wrong)})


def test_a_sharded_model_is_refused(monkeypatch):
    model = net()
    monkeypatch.setattr("fishkern.hosts.sharded", lambda model: "FSDP shards the parameters of 'head'")
    with pytest.raises(fk.UnsupportedModuleError, match=r"FSDP shards the parameters of 'head'\."):
        sensitivity(model, fisher_of(model))


def test_a_quantised_weight_is_refused_by_name():
    """Its stored integers are no weights."""
    model = nn.Sequential(nn.Linear(4, 3))
    stored = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    model[0].weight = stored
    with pytest.raises(fk.UnsupportedModuleError, match="0.weight is quantised and stored in another form"):
        sensitivity(model, {"0.weight": torch.ones(3, 4)})
