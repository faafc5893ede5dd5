"""Freezing while a model trains: what is read, what an event says, what it does to the training, and what it leaves."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import fishkern as fk
from fishkern.freezing.sources import Probe
from tests.freezing.training import (
    CLASSES,
    EAGER,
    PROBE,
    adamw,
    assert_same,
    batches,
    everything,
    freezer_of,
    network,
    train,
    trained,
    values,
)

pytestmark = pytest.mark.matrix

PLAIN = fk.FreezeRule(margin=0.0, most=None, least=0, size_aware=False)  # the threshold alone


def test_it_reads_and_decides_when_it_is_due():
    _, freezer, events = trained(12, every=3, read_every=2)
    assert [event.step for event in events] == [3, 6, 9, 12]
    assert [event.number for event in events] == [1, 2, 3, 4]
    assert [read.step for read in freezer.history] == [0, 2, 4, 6, 8, 10, 12]  # the first when it was made
    assert (freezer.count, freezer.number) == (12, 4)


def test_a_still_model_scores_exactly_zero_and_nothing_stops():
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer)
    events = [freezer.step() for _ in range(12)]
    for event in filter(None, events):
        assert set(event.scores.values()) == {0.0}
        assert event.frozen == frozenset()
        assert event.selection == optimizer.selection == freezer.initial
    assert sum(event is not None for event in events) == 3


def test_scores_are_those_of_the_drift_and_what_is_low_stops():
    """J <- 0.9 J + 0.1 d and TV <- TV + |J - J before|, of distances from a reference of 0.9 ref + 0.1 reading."""
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, rule=PLAIN)
    slices = {name: fk.Slices().of(name, parameter.shape) for name, parameter in model.named_parameters()}

    def rows() -> dict[tuple[str, int], Tensor]:
        statistics = fk.estimate(model, PROBE, likelihood=CLASSES, parameters="all")
        return {
            (name, n): torch.cat([statistics[name][start:stop].flatten() for start, stop in piece.bounds])
            for name, pieces in slices.items()
            for n, piece in enumerate(pieces)
        }

    references, smoothed, variation = rows(), {}, {}
    events = []
    for step, event in enumerate(train(model, optimizer, freezer, batches(4)), 1):
        events.append(event)
        if step % 2 == 0:
            for key, reading in rows().items():
                distance = fk.JensenShannon.distance(references[key], reading)
                before = smoothed.get(key, 0.0)
                smoothed[key] = 0.9 * before + 0.1 * distance
                variation[key] = variation.get(key, 0.0) + abs(smoothed[key] - before)
                references[key] = 0.9 * references[key] + 0.1 * reading
    event = events[-1]
    assert event.scores.keys() == variation.keys()
    for key, score in event.scores.items():
        assert score == pytest.approx(variation[key], rel=1e-3)
    limit = sum(event.scores.values()) / len(event.scores)
    assert event.frozen == {key for key, score in event.scores.items() if score < limit}
    assert 0 < len(event.frozen) < len(event.scores)


def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves():
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer)
    events = train(model, optimizer, freezer, batches(24))
    event = next(event for event in events if event is not None)
    assert event.frozen
    before = values(model)
    freezer.every = 1000  # no second event
    assert list(events) == [None] * 20
    for name, value in values(model).items():
        mask = event.selection.mask(name)
        assert torch.equal(value[~mask], before[name][~mask]), name
        assert (value != before[name])[mask].all(), name


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **kwargs or {})


def products(model: nn.Module) -> int:
    x, y = PROBE[0]
    loss = nn.functional.cross_entropy(model(x), y)
    with Products() as counted:
        loss.backward()
    model.zero_grad()
    return counted.count


def test_an_event_says_what_is_saved():
    """Of a tensor in one slice each, weights stop whole: each of them is one product less in backward, at least."""
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, slices=fk.Slices(axis="tensor"), rule=replace(EAGER, most=0.9))
    before = products(model)
    events = [event for event in train(model, optimizer, freezer, batches(4)) if event]
    assert len(events) == 1
    (event,) = events
    weights = [name for name in event.stopped if name.endswith("weight")]
    assert weights
    assert products(model) <= before - len(weights)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (name not in event.stopped)
        if name in event.stopped:
            assert parameter.grad is None
    kept = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (event.entries_kept, event.entries_kept + event.entries_frozen) == (kept, freezer.initial.count)
    moments = [tensor for held in optimizer.state.values() for key, tensor in held.items() if key.startswith("exp")]
    assert sum(tensor.nbytes for tensor in moments) == 8 * kept
    assert event.state_bytes == optimizer.state_bytes
    followed = {(name, n) for name, n, *_ in freezer.state_dict()["header"]["tracks"]}
    assert followed == event.scores.keys() - event.frozen  # no reference of what has stopped
    freezer.read()  # on what is left, whose products are others
    shown = f"event 1 after 4 steps, {len(event.frozen)} of 6 slices stop, {kept} of 467 entries stay"
    assert repr(event).startswith(f"Freezing({shown}, ")
    assert repr(event).endswith(f"{len(event.stopped)} parameters without a gradient from here)")


@pytest.mark.parametrize("axis", ["rows", "columns", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "optimizer_of",
    [
        partial(fk.MaskedAdamW, lr=1e-2),
        partial(fk.MaskedAdamW, lr=1e-2, master_weights=False),
        partial(fk.MaskedSGD, lr=1e-2, momentum=0.9),
        partial(fk.MaskedSGD, lr=1e-2),
    ],
    ids=["adamw", "no master", "momentum", "sgd"],
)
def test_an_event_foretells_the_memory_of_the_state(optimizer_of, dtype, axis):
    """Moments, masters, steps, and the indices or rows that say which entries they are of."""
    model = network().to(dtype)
    optimizer = optimizer_of(model, everything(model))
    probe, data = ([(x.to(dtype), y) for x, y in some] for some in (PROBE, batches(5)))
    freezer = freezer_of(model, optimizer, probe, slices=fk.Slices(axis=axis))
    before = freezer.preview().state_bytes
    event = None
    for step, happened in enumerate(train(model, optimizer, freezer, data)):
        assert step or before == optimizer.state_bytes
        event = event or happened
    assert event.frozen
    assert event.state_bytes == optimizer.state_bytes


def test_no_more_than_most_of_the_pool_stops_at_once():
    _, freezer, events = trained(20, rule=fk.FreezeRule(margin=2.0, most=0.1))
    assert all(event.entries_frozen <= 0.1 * freezer.initial.total for event in events)
    assert any(event.frozen for event in events)


def test_preview_changes_nothing_and_is_the_event_that_follows():
    model = network()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, every=5, read_every=2)
    for step, _ in enumerate(train(model, optimizer, freezer, batches(4)), 1):
        before, random = copy.deepcopy(freezer.state_dict()), torch.get_rng_state()
        event = freezer.preview()
        assert event.scores.keys() == freezer.preview().scores.keys()
        assert (event.step, event.number) == (step, 1)
        after = freezer.state_dict()
        assert after["header"] == before["header"]
        assert_same(after["tensors"], before["tensors"])
        assert torch.equal(torch.get_rng_state(), random)
        assert optimizer.selection == freezer.initial
    event = freezer.preview()
    assert event.frozen
    assert freezer.step() == replace(event, step=5)


def test_before_the_first_reading_an_event_has_no_scores():
    model = network()
    optimizer = adamw(model)
    source = Probe(model, PROBE, fk.DiagonalFisher(), CLASSES, names=lambda: optimizer.selection.names)
    parts = {"slices": fk.Slices(), "drift": fk.JensenShannon(), "rule": EAGER}
    freezer = fk.Freezer(source, optimizer, every=4, read_every=2, **parts)
    event = freezer.preview()
    assert (event.scores, event.frozen, event.number) == ({}, frozenset(), 1)
    assert event.selection == freezer.selection


def test_readings_without_events_leave_a_training_as_it_is():
    """To the bit, dropout's draws included, and those of a DataLoader on the probe."""
    finals = []
    for with_freezer in (False, True):
        model = network(dropout=0.3)
        optimizer = adamw(model)
        probe = DataLoader(TensorDataset(*PROBE[0]), batch_size=4)
        freezer = freezer_of(model, optimizer, probe, every=1000, read_every=1) if with_freezer else None
        list(train(model.train(), optimizer, freezer, batches(6)))
        assert model.training
        finals.append({**values(model), "random": torch.get_rng_state()})
    assert_same(*finals)


def test_a_selection_loses_the_entries_of_frozen_slices():
    """Lists stay lists and ranges of columns stay ranges; what was not selected is never trained."""
    model = network()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    start = fk.Selection(
        shapes,
        {"0.weight": torch.arange(0, 128, 3)},
        whole=["3.weight", "3.bias", "5.bias"],
        ranges={"5.weight": fk.Columns((2, 11)), "0.bias": fk.Rows((4, 8))},
    )
    before = values(model)
    optimizer = adamw(model, start)
    slices = fk.Slices(axis="columns")
    freezer = freezer_of(model, optimizer, slices=slices)
    events = [event for event in train(model, optimizer, freezer, batches(12)) if event and event.frozen]
    assert len(events) > 1
    present = {name: start.mask(name) for name in start.names}
    for event in events:
        for name, n in event.frozen:
            mask = torch.zeros(shapes[name], dtype=torch.bool)
            view = mask if mask.ndim == 2 else mask[None]
            for first, last in slices.of(name, shapes[name])[n].bounds:
                view[:, first:last] = True
            present[name] &= ~mask
        for name in start.names:
            assert torch.equal(event.selection.mask(name), present[name]), name
    final = events[-1].selection
    assert final.total == start.total
    assert all(final.entries(name).ranges is not None for name in ("3.weight", "5.weight"))
    assert all(event.scores.keys() <= events[0].scores.keys() for event in events)
    assert all(("0.bias", 0) in event.scores for event in events[:1])
    for name, value in values(model).items():
        assert torch.equal(value[~start.mask(name)], before[name][~start.mask(name)]), name


def test_only_slices_in_training_are_scored():
    model = network()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    selection = fk.Selection(shapes, {"0.weight": torch.arange(32)}, ranges={"3.weight": fk.Rows((0, 6))})
    freezer = freezer_of(model, adamw(model, selection))
    assert freezer.preview().scores.keys() == {("0.weight", 0), ("3.weight", 0), ("3.weight", 1)}


def test_nothing_is_frozen_for_being_zero():
    """Readings are zeros at first of what gets a gradient late, and for ever of what gets none.

    What has been read twice is compared with what has; the others wait.
    """
    model = network()
    with torch.no_grad():
        model[5].weight.zero_()  # as B = 0 in a LoRA: no gradient reaches what is before it
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, every=1, read_every=1, rule=fk.FreezeRule(margin=3.0, most=1.0))
    steps = train(model, optimizer, freezer, batches(3))
    first = next(steps)
    before = {(name, n) for name, n in first.scores if not name.startswith("5")}
    assert first.waiting == before
    assert all(first.scores[key] == 0.0 for key in before)
    assert not first.frozen & before
    second = next(steps)
    assert not second.waiting
    assert all(second.scores[key] > 0 for key in before)


def test_a_plain_optimizer_is_refused_by_name():
    model = network()
    with pytest.raises(TypeError, match=r"this is AdamW, .* fishkern.MaskedAdamW"):
        freezer_of(model, torch.optim.AdamW(model.parameters()))


def test_schedulers_and_accumulation_go_on():
    """A step is one of the optimizer, of however many passes."""
    model = network()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    freezer = freezer_of(model, optimizer, every=2, read_every=1)
    for step in range(6):
        for x, y in batches(3, seed=step):
            (nn.functional.cross_entropy(model(x), y) / 3).backward()
        optimizer.step()
        event = freezer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert (event is not None) is (step % 2 == 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 7)
    assert freezer.number == 3


def test_a_scaler_of_the_loss_changes_no_bit_of_a_training_with_events():
    """By a power of two, and without overflow: the probe's losses are not scaled."""
    models, events = [network(), network()], []
    for model, scale in zip(models, (1.0, 2.0**12), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = adamw(model)
        freezer = freezer_of(model, optimizer)
        found = []
        for x, y in batches(10):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(freezer.step())
        events.append(found)
    assert events[0] == events[1]
    assert sum(bool(event and event.frozen) for event in events[0]) > 0
    assert_same(*map(values, models))
