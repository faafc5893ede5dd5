"""What readings come from: the same batches each time, or an error; and the steps of the training themselves."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishkern as fk
from fishkern.freezing.sources import Digested, Probe, demand_shapes
from tests.freezing.training import CLASSES, EAGER, PROBE, adamw, batches, freezer_of, network, train

ROWS = TensorDataset(torch.cat([x for x, _ in PROBE]), torch.cat([y for _, y in PROBE]))


def probe_of(model: nn.Module, given, estimator=None) -> Probe:
    names = [name for name, _ in model.named_parameters()]
    return Probe(model, given, estimator or fk.DiagonalFisher(), CLASSES, names=lambda: names)


def test_a_probe_is_what_estimate_reads_of_what_is_in_training():
    model = network()
    names = ["3.weight", "5.bias"]
    reading = Probe(model, PROBE, fk.DiagonalFisher(), CLASSES, names=lambda: names).read()
    expected = fk.estimate(model, PROBE, likelihood=CLASSES)
    assert list(reading) == names
    assert all(torch.allclose(reading[name], expected[name], rtol=1e-5, atol=0.0) for name in names)


@pytest.mark.parametrize("given", [iter(PROBE), (batch for batch in PROBE)], ids=["iterator", "generator"])
def test_an_iterator_is_read_once(given):
    probe = probe_of(network(), given)
    first, second = probe.read(), probe.read()
    assert first.count == second.count == 16
    assert first == second


def test_a_loader_that_shuffles_is_refused():
    probe = probe_of(network(), DataLoader(ROWS, 8, shuffle=True))
    probe.read()
    torch.rand(1)  # as a training draws between two readings
    with pytest.raises(ValueError, match=r"other batches than at the first reading .*such as list\(loader\)"):
        probe.read()


def test_a_loader_in_order_is_read_each_time():
    probe, listed = probe_of(network(), DataLoader(ROWS, 8)), probe_of(network(), list(DataLoader(ROWS, 8)))
    assert probe.read() == probe.read() == listed.read()
    assert probe.digest == listed.digest


def test_a_changed_probe_is_refused():
    given = [(x.clone(), y.clone()) for x, y in PROBE]
    probe = probe_of(network(), given)
    probe.read()
    given[1][0][3, 2] += 1e-3
    with pytest.raises(ValueError, match="other batches than at the first reading"):
        probe.read()


def digest(value: object) -> str:
    digested = Digested([{"x": value}])
    assert next(iter(digested))["x"] is value
    list(digested)
    return digested.digest


def test_a_digest_is_of_every_kind_of_entry():
    values = [
        torch.zeros(4), torch.zeros(4, dtype=torch.bool), torch.zeros(4, 1), torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(4).numpy(), ["a", "b", "c", "d"], ["a", "b", "c", "e"], 1, 1.5, None, {"z": 1}, {"y": 1},
        torch.zeros(4, 1).to_sparse(), torch.zeros(4, 2).T.contiguous().T,
    ]  # fmt: skip
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digest(UserDict(z=1)) == digest({"z": 1})
    assert digest(object()) == digest(object())  # whose repr has an address


def test_one_batch_is_no_probe():
    with pytest.raises(TypeError, match="batches is one batch"):
        probe_of(network(), {"x": ROWS[:4][0]}).read()
    with pytest.raises(TypeError, match="must be an iterable of batches"):
        probe_of(network(), 3).read()


def test_statistics_that_are_not_of_the_parameters_shapes_are_refused():
    with pytest.raises(TypeError, match=r"another shape than the parameter for .*0.weight"):
        probe_of(network(), PROBE, fk.GroupFisher(by="row")).read()
    with pytest.raises(ValueError, match="1 parameters in training are not in the reading"):
        demand_shapes(fk.Statistics({"0.weight": torch.ones(16, 8)}, count=1), ["1.weight"], network())


def test_factors_are_read_without_their_product():
    """The same as of the products, since the histograms of factors count them exactly."""
    scores = []
    for reference in ("values", "factors"):
        model = network()
        optimizer = adamw(model)
        drift = fk.JensenShannon(reference=reference, decay=0.0)  # with which a product of means is a mean of products
        freezer = freezer_of(model, optimizer, estimator=fk.DiagonalKronecker(), drift=drift)
        event = list(train(model, optimizer, freezer, batches(4)))[-1]
        scores.append(event.scores)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert len(set(scores[0].values())) > 10


def test_an_online_fisher_gives_the_readings():
    model = network()
    optimizer = adamw(model)
    with fk.OnlineFisher(model) as online:
        freezer = fk.fisher_adaptune(model, online, optimizer=optimizer, every=4, read_every=2, rule=EAGER)
        assert freezer.preview().scores == {}
        events = [event for event in train(model, optimizer, freezer, batches(16)) if event]
    assert [read.step for read in freezer.history] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert sum(bool(event.frozen) for event in events) > 1
    assert online.statistics.count == 16 * 8


def test_an_online_fisher_of_too_little_is_refused():
    model = network()
    optimizer = adamw(model)
    with fk.OnlineFisher(model, parameters=lambda name, parameter: name.startswith("0")) as online:
        freezer = fk.fisher_adaptune(model, online, optimizer=optimizer, every=1, read_every=1)
        with pytest.raises(ValueError, match=r"4 parameters in training are not in the reading .*\(parameters=\)"):
            list(train(model, optimizer, freezer, batches(1)))
