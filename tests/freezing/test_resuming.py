"""Stopping and going on is not stopping, to the bit; and the state of another training is refused by name."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.freezing.training import (
    CLASSES,
    EAGER,
    PROBE,
    adamw,
    assert_same,
    batches,
    freezer_of,
    network,
    train,
    values,
)

DATA = batches(20)


def interrupted(path, *, with_file: bool, **options) -> tuple[nn.Module, fk.Freezer, list]:
    """Ten steps, everything saved and thrown away, and ten more in new objects."""
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, **options)
    events = list(train(model, optimizer, freezer, DATA[:10]))
    assert freezer.selection.count < freezer.initial.count
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "f": freezer.state_dict()}, buffer)
    saved = freezer.save(path / "freezer.safetensors")
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    another = network()
    another.load_state_dict(state["model"])
    optimizer = adamw(another, fk.Freezer.saved_selection(saved))
    optimizer.load_state_dict(state["optimizer"])
    freezer = freezer_of(another, optimizer, **options)
    freezer.load(saved) if with_file else freezer.load_state_dict(state["f"])
    assert freezer.state_dict()["header"] == state["f"]["header"]
    assert [p.requires_grad for p in another.parameters()] == [p.requires_grad for p in model.parameters()]
    return another, freezer, events + list(train(another, optimizer, freezer, DATA[10:]))


@pytest.mark.parametrize(
    "with_file, options",
    [
        (False, {}),
        (True, {}),
        (True, {"slices": fk.Slices(axis="columns"), "drift": fk.JensenShannon(reference="histogram", score="mean")}),
        (True, {"estimator": fk.DiagonalKronecker(), "drift": fk.JensenShannon(reference="factors")}),
        (True, {"estimator": fk.DiagonalFisher("mc")}),
    ],
    ids=["state dict", "file", "columns and histograms", "factors", "draws"],
)
def test_going_on_is_not_stopping(tmp_path, with_file, options):
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, **options)
    events = list(train(model, optimizer, freezer, DATA))
    assert sum(event is not None and bool(event.frozen) for event in events[10:]) > 0
    other, resumed, others = interrupted(tmp_path, with_file=with_file, **options)
    assert events == others
    assert_same(values(model), values(other))
    ours, theirs = freezer.state_dict(), resumed.state_dict()
    assert ours["header"] == theirs["header"]
    assert_same(ours["tensors"], theirs["tensors"])
    assert resumed.initial == freezer.initial


def test_going_on_with_an_online_fisher_is_not_stopping(tmp_path):
    """Whose parameters are those that required a gradient when it was made: before the optimizer's state is loaded."""

    def freezer_on(model, online, optimizer) -> fk.Freezer:
        return fk.fisher_adaptune(model, online, optimizer=optimizer, every=4, read_every=2, rule=EAGER)

    model, another = network(), network()
    optimizer = adamw(model)
    events = []
    with fk.OnlineFisher(model) as online:
        freezer = freezer_on(model, online, optimizer)
        for event in train(model, optimizer, freezer, DATA[:13]):
            events.append(event)
        assert optimizer.frozen
        state = io.BytesIO()
        torch.save([model.state_dict(), online.state_dict(), optimizer.state_dict()], state)
        saved = freezer.save(tmp_path / "freezer")
        events += train(model, optimizer, freezer, DATA[13:])
    state.seek(0)
    weights, means, moments = torch.load(state)
    another.load_state_dict(weights)
    optimizer = adamw(another, fk.Freezer.saved_selection(saved))
    with fk.OnlineFisher(another) as online:
        online.load_state_dict(means)
        optimizer.load_state_dict(moments)
        resumed = freezer_on(another, online, optimizer)
        resumed.load(saved)
        assert list(train(another, optimizer, resumed, DATA[13:])) == events[13:]
    assert_same(values(model), values(another))
    with pytest.raises(
        ValueError, match=r"of other parameters: .*make it before some are frozen, or .*\(parameters=\)"
    ):
        fk.OnlineFisher(another).load_state_dict(means)


def test_what_had_stopped_has_no_gradient_without_a_saved_optimizer_either():
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, slices=fk.Slices(axis="tensor"))
    events = [event for event in train(model, optimizer, freezer, DATA[:8]) if event]
    stopped = {name for event in events for name in event.stopped}
    assert stopped
    another = network()
    resumed = freezer_of(another, adamw(another, freezer.selection), slices=fk.Slices(axis="tensor"))
    resumed.load_state_dict(freezer.state_dict())
    assert {name for name, parameter in another.named_parameters() if not parameter.requires_grad} == stopped
    assert set(resumed.optimizer.frozen) == stopped


def saved_state(**options) -> dict:
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, **options)
    list(train(model, optimizer, freezer, DATA[:2]))
    return freezer.state_dict()


def message(state: dict, selection: fk.Selection | None = None, model: nn.Module | None = None, **options) -> str:
    model = network() if model is None else model
    freezer = freezer_of(model, adamw(model, selection), **options)
    before = freezer.state_dict()
    with pytest.raises(ValueError, match="state") as raised:
        freezer.load_state_dict(state)
    after = freezer.state_dict()
    assert after["header"] == before["header"]
    return str(raised.value)


def test_the_state_of_another_training_is_refused():
    state = saved_state()
    other_probe = batches(2, seed=9)
    assert re.match(
        r"the state was made on another probe \(\w{8}, .*Give the same batches", message(state, probe=other_probe)
    )
    assert message(state, slices=fk.Slices(count=2)).startswith(
        "the state was made with another slices: Slices(count=4"
    )
    assert "with another drift" in message(state, drift=fk.JensenShannon(decay=0.5))
    assert "with another statistic" in message(state, estimator=fk.DiagonalFisher("type-2"))
    wider = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    assert "of other parameters: 6 are not in both pools in one shape, such as 2.weight" in message(state, model=wider)
    shapes = {name: parameter.shape for name, parameter in network().named_parameters()}
    fewer = fk.Selection(shapes, {}, whole=["0.weight"])
    assert "trains 128 entries, and 467 others were in training" in message(state, selection=fewer)


def test_what_is_no_state_is_refused():
    state = saved_state()
    assert message({}).startswith("this is no state of a freezer: 'header' is missing")
    header = {**state["header"], "tracks": [["0.weight", 9, *track[2:]] for track in state["header"]["tracks"][:1]]}
    assert "this is no state of a freezer" in message({**state, "header": header})


def test_the_rule_and_the_times_are_those_of_the_new_freezer():
    state = saved_state()
    model = network()
    freezer = freezer_of(model, adamw(model), every=3, rule=fk.FreezeRule(margin=9.0))
    freezer.load_state_dict(state)
    assert (freezer.count, freezer.every) == (2, 3)
    event = freezer.step()
    assert event.step == 3


def test_a_file_appears_whole_and_not_over_another(tmp_path):
    model = network()
    freezer = freezer_of(model, adamw(model))
    everything_else = adamw(model).selection.save(tmp_path / "freezer.safetensors")
    with pytest.raises(FileExistsError, match="holds no fishkern freezer"):
        freezer.save(everything_else)
    assert fk.Selection.load(everything_else) == freezer.selection
    path = freezer.save(tmp_path / "other")
    assert path.name == "other.safetensors"
    with pytest.raises(ValueError, match="holds no fishkern selection"):
        fk.Selection.load(path)


def test_readings_are_kept_as_history(tmp_path):
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, rule=EAGER)
    events = [event for event in train(model, optimizer, freezer, DATA[:8]) if event]
    path = freezer.save(tmp_path / "freezer")
    again = freezer_of(model, adamw(model, freezer.selection), PROBE, likelihood=CLASSES)
    again.load(path)
    assert again.history == freezer.history
    assert [read.step for read in again.history] == [0, 2, 4, 6, 8]
    assert again.history[2].scores == events[0].scores
    assert [read.kept for read in again.history] == [467, 467, 467, *[events[0].entries_kept] * 2]
