"""Adam's second moment as statistics: against the recursion written out, and never taken for a Fisher information."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batches(count: int = 3) -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(count)]


def trained(model: nn.Module, optimizer) -> list[dict[str, torch.Tensor]]:
    """Train; return the gradients of each step."""
    gradients = []
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("named", [True, False])
def test_it_is_the_running_mean_of_squared_batch_gradients(kind, named):
    model = net()
    optimizer = kind(model.named_parameters() if named else model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    gradients = trained(model, optimizer)
    statistics = fk.Statistics.from_optimizer(optimizer, *([] if named else [model]))
    assert list(statistics) == [name for name, _ in model.named_parameters()]
    assert statistics.count == 3
    for name, value in statistics.items():
        moment = torch.zeros_like(gradients[0][name])
        for gradient in gradients:
            moment = 0.95 * moment + 0.05 * gradient[name] ** 2
        torch.testing.assert_close(value.double(), moment / (1 - 0.95**3), rtol=1e-5, atol=0)
        with pytest.raises(AssertionError):  # without the correction it would be another number
            torch.testing.assert_close(value.double(), moment, rtol=1e-2, atol=0)
    definition = statistics.provenance["definition"]
    assert definition == {"estimator": "AdamSecondMoment", "unit": "batch", "decay": 0.95}
    assert {one.path for one in statistics.coverage.values()} == {"batch"}


def test_it_merges_with_no_other_statistic_and_survives_a_file(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    trained(model, optimizer)
    moment = fk.Statistics.from_optimizer(optimizer)
    for recipe in (fk.DiagonalFisher(), fk.DiagonalFisher(unit="batch")):
        exact = fk.estimate(model, batches(), recipe, likelihood=fk.Classification())
        for pair in ((moment, exact), (exact, moment)):
            for weights in (None, [1, 1]):
                with pytest.raises(ValueError, match="only statistics of one definition merge"):
                    fk.merge(*pair, weights=weights)
    with pytest.raises(ValueError, match="running means over a training do not merge"):
        fk.merge(moment, moment)
    assert fk.Statistics.load(moment.save(tmp_path / "moment")) == moment
    assert fk.select(moment, fk.GlobalTopK(k=3)).count == 3


def test_a_parameter_without_a_state_is_left_out_by_name():
    model = net()
    model.append(nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.named_parameters())

    class First(nn.Module):
        def forward(self, x):
            return model[2](model[1](model[0](x)))

    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(First()(x), y).backward()
        optimizer.step()
    statistics = fk.Statistics.from_optimizer(optimizer)
    assert list(statistics) == ["0.weight", "2.weight", "2.bias"]
    with pytest.raises(KeyError, match="3.weight was left out: AdamW has no state for it"):
        statistics["3.weight"]


def test_of_the_groups_of_a_trainer_in_the_models_order():
    model = net()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": [model[2].bias, model[0].bias], "weight_decay": 0.0}, {"params": [model[0].weight]}], lr=1e-2
    )
    trained(model, optimizer)
    statistics = fk.Statistics.from_optimizer(optimizer, model)
    assert list(statistics) == ["0.weight", "0.bias", "2.bias"]
    assert list(statistics.coverage) == [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyError, match="2.weight was left out: AdamW has no state for it"):
        statistics["2.weight"]


def test_rows_that_a_batch_leaves_out_make_no_mean():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()))
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="SparseAdam keeps no running mean: the rows that a batch leaves out"):
        fk.Statistics.from_optimizer(optimizer, table)


def test_the_weight_decay_of_adam_is_part_of_its_gradients():
    model = net()
    optimizer = torch.optim.Adam(model.named_parameters(), weight_decay=0.1)
    trained(model, optimizer)
    assert fk.Statistics.from_optimizer(optimizer).provenance["definition"]["l2"] == 0.1
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), weight_decay=0.1)
    trained(model, optimizer)
    assert "l2" not in fk.Statistics.from_optimizer(optimizer).provenance["definition"]


def test_what_is_refused():
    model = net()
    named = list(model.named_parameters())
    take = fk.Statistics.from_optimizer
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Sequential"):
        take(model)
    with pytest.raises(ValueError, match="AdamW has no state yet: take a step first"):
        take(torch.optim.AdamW(named))
    sgd, adamax, nameless = (
        torch.optim.SGD(named, lr=0.1),
        torch.optim.Adamax(named),
        torch.optim.AdamW(model.parameters()),
    )
    groups = torch.optim.AdamW(
        [{"params": named[:2], "betas": (0.9, 0.99)}, {"params": named[2:], "betas": (0.9, 0.999)}]
    )
    for optimizer in (sgd, adamax, nameless, groups):
        trained(model, optimizer)
    for optimizer, words in (
        (sgd, "SGD has no betas, so it is none of Adam's kind"),
        (adamax, "Adamax keeps no exp_avg_sq for 0.weight, but"),
        (nameless, "does not know the names of its parameters: pass model="),
        (groups, r"have the decays \[0.99, 0.999\]"),
    ):
        with pytest.raises(ValueError, match=words):
            take(optimizer)
    with pytest.raises(ValueError, match=r"a parameter \(7, 5\) of the optimizer is none of the model's"):
        take(nameless, net())
    two = torch.optim.AdamW([{"params": list(one.named_parameters())} for one in (model, net())])
    trained(model, two)
    with pytest.raises(ValueError, match="two parameters of one name, as of two models"):
        take(two)
    selection = fk.select(dict(named), fk.GlobalTopK(k=5, always="2.bias"))
    masked = fk.MaskedAdamW(model, selection, lr=0.1)
    trained(model, masked)
    with pytest.raises(ValueError, match="and not for each entry of|keeps no exp_avg_sq"):
        take(masked)
