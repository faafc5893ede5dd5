"""FisherAdapTune: its arguments, LoRA, the published code's order, and which parts it takes by default."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.freezing import published_code
from tests.freezing.test_reference import Watched, back_propagate, net
from tests.freezing.training import CLASSES, PROBE, adamw, batches, everything, freezer_of, network, train
from tests.support import zoo


def test_a_dozen_steps_of_the_published_code_equal_the_oracle():
    """With AdamW, scores and steps included; tests/freezing/test_published.py has the masks with momentum."""
    model = net()
    watched, shapes = Watched(model), {name: tuple(one.shape) for name, one in model.named_parameters()}
    published = published_code.Published(shapes, every=4, read_every=2, margin=-0.5)
    optimizer = fk.MaskedAdamW(model, everything(model), lr=1e-2, weight_decay=0.1)
    rule = fk.freezing.ReferenceRule(-0.5)
    freezer = fk.fisher_adaptune(model, None, optimizer=optimizer, every=4, read_every=2, rule=rule, compat="reference")
    steps = []
    for step in range(13):
        back_propagate(model, step)
        frozen, scores = published.before_update(watched.fishers()), published.scores()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        event = freezer.step()
        for name, parameter in model.named_parameters():
            mask = torch.from_numpy(published.mask(name))
            assert torch.equal(parameter[~mask], before[name][~mask]), name
            assert torch.equal(freezer.selection.mask(name), mask), name
        if event is not None:
            steps.append(event.step)
            assert event.frozen == frozen
            if step:
                kept = {key: score for key, score in event.scores.items() if key not in frozen}
                assert kept == pytest.approx(scores, rel=1e-9, abs=1e-12)
        else:
            assert not frozen
    assert steps == [0, 4, 8, 12]
    assert 1 < len(scores) < 70
    freezer.close()
    assert not any(one._forward_hooks for name, one in model.named_modules() if name not in watched.seen)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_published_order_takes_no_closure():
    model = network()
    optimizer = adamw(model)
    fk.fisher_adaptune(model, None, optimizer=optimizer, every=2, read_every=1, compat="reference")
    with pytest.raises(ValueError, match="closure computes them inside: call backward"):
        optimizer.step(lambda: 0.0)


def test_the_published_order_goes_on_from_a_state():
    """The event of step 0 does not come again, and the readings go on where they were."""
    finals = []
    for stop in (False, True):
        model = network()
        optimizer = fk.MaskedAdamW(model, everything(model), lr=1e-2)
        options = dict(every=4, read_every=2, rule=fk.freezing.ReferenceRule(-0.5), compat="reference")
        freezer = fk.fisher_adaptune(model, None, optimizer=optimizer, **options)
        events = list(train(model, optimizer, freezer, batches(6)))
        if stop:
            state, moments = freezer.state_dict(), optimizer.state_dict()
            freezer.close()
            another = network()
            another.load_state_dict(model.state_dict())
            model, optimizer = another, fk.MaskedAdamW(another, freezer.selection, lr=1e-2)
            optimizer.load_state_dict(moments)
            freezer = fk.fisher_adaptune(model, None, optimizer=optimizer, **options)
            freezer.load_state_dict(state)
        events += list(train(model, optimizer, freezer, batches(12)[6:]))
        finals.append((events, [parameter.detach() for parameter in model.parameters()]))
        freezer.close()
    assert finals[0][0] == finals[1][0]
    assert [event.step for event in finals[0][0] if event] == [0, 4, 8]
    assert all(map(torch.equal, finals[0][1], finals[1][1]))


def lora() -> tuple[nn.Module, list]:
    peft = pytest.importorskip("peft")
    model = zoo.bert_classifier().model
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    rows = zoo.class_batch(20)
    data = [{key: value[n : n + 4] for key, value in rows.items()} for n in range(0, 20, 4)]
    return peft.get_peft_model(model, config), data


def test_an_ordinary_lora_does_not_lose_all_of_a_at_the_start():
    """With B = 0 the Fisher of A is 0 in the first reading, and anything is infinitely far from that."""
    torch.manual_seed(0)
    model, data = lora()
    shapes = {fk.canonical_name(name): one.shape for name, one in model.named_parameters() if one.requires_grad}
    optimizer = fk.MaskedAdamW(model, fk.Selection(shapes, {}, whole=shapes), lr=1e-2)
    rule = fk.FreezeRule(margin=1.0, most=None, least=0)
    freezer = fk.fisher_adaptune(
        model, data[:1], optimizer=optimizer, every=2, read_every=1, slices=fk.Slices(2), rule=rule
    )
    events = []
    for batch in data[1:]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        events.append(freezer.step())
    _, first, _, second = events
    of_a = {key for key in first.scores if "lora_A" in key[0]}
    assert len(of_a) == 8
    # they have been read twice since B moved, and the others three times
    assert first.waiting == of_a
    assert first.frozen
    assert of_a <= second.scores.keys()
    assert not second.waiting
    assert all(0 < second.scores[key] < math.sqrt(math.log(2)) * (1 - 0.9**3) for key in of_a)


def test_what_is_spared_never_stops_also_while_it_waits():
    torch.manual_seed(0)
    model, data = lora()
    shapes = {fk.canonical_name(name): one.shape for name, one in model.named_parameters() if one.requires_grad}
    optimizer = fk.MaskedAdamW(model, fk.Selection(shapes, {}, whole=shapes), lr=1e-2)
    options = dict(optimizer=optimizer, every=1, read_every=1, slices=fk.Slices(1))
    rule = fk.FreezeRule(margin=9.0, most=None, least=0, spare="*lora_A*")
    freezer = fk.fisher_adaptune(model, data[:1], rule=rule, **options)
    for batch in data[1:3]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        event = freezer.step()
    assert event.selection.count == sum(shape.numel() for name, shape in shapes.items() if "lora_A" in name)
    with pytest.raises(ValueError, match="spare"):
        fk.fisher_adaptune(model, data[:1], rule=fk.FreezeRule(spare="hed.*"), **options)


def test_permuting_the_probe_changes_nothing():
    scores = []
    rows = [(x[None], y[None]) for batch in PROBE for x, y in zip(*batch, strict=True)]
    for order in (rows, rows[::-1], [rows[n] for n in torch.randperm(16).tolist()]):
        model = network().double()
        optimizer = adamw(model)
        data = [(x.double(), y) for x, y in batches(4)]
        freezer = freezer_of(model, optimizer, [(x.double(), y) for x, y in order])
        event = list(train(model, optimizer, freezer, data))[-1]
        scores.append(event.scores)
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)
    assert scores[0] == pytest.approx(scores[2], abs=2e-3)


def test_the_default_statistic_is_that_of_the_pool_s_size(monkeypatch):
    model = network()
    optimizer = adamw(model)
    small = freezer_of(model, optimizer)
    assert (type(small._source._estimator), small._drift) == (fk.DiagonalFisher, fk.JensenShannon())
    monkeypatch.setattr(import_module("fishkern.methods.fisher_adaptune"), "LARGE", 466)  # the network has 467
    large = freezer_of(model, optimizer)
    assert type(large._source._estimator) is fk.DiagonalKronecker
    assert large._drift == fk.JensenShannon(reference="factors")
    with pytest.raises(ValueError, match=r"references of 467 entries .*reference='histogram'\), or reference='values'"):
        freezer_of(model, optimizer, estimator=fk.DiagonalFisher())
    assert freezer_of(model, optimizer, estimator=fk.DiagonalKronecker())._drift == large._drift
    asked = freezer_of(model, optimizer, estimator=fk.DiagonalFisher(), drift=fk.JensenShannon(reference="values"))
    assert asked.preview().scores


def test_arguments_that_do_not_go_together_are_refused():
    model = network()
    options = dict(optimizer=adamw(model), every=2, read_every=1)
    for changes, message in [
        (dict(probe=None), "probe must be batches"),
        (dict(probe=PROBE, compat="intended"), "compat must be one of"),
        (dict(probe=PROBE, compat="reference"), r"probe= does not go with compat='reference'"),
        (dict(probe=None, compat="reference", likelihood=CLASSES), "likelihood= does not go with compat"),
        (dict(probe=fk.OnlineFisher(model), estimator=fk.DiagonalFisher()), "estimator= does not go with an OnlineF"),
        (dict(probe=PROBE, every=0), "every must be at least 1, got 0"),
        (dict(probe=PROBE, read_every=-1), "read_every must be at least 1, got -1"),
    ]:
        arguments = {**options, **changes}
        with pytest.raises(ValueError, match=message):
            fk.fisher_adaptune(model, arguments.pop("probe"), **arguments)
    with pytest.raises(ValueError, match=r"trains 6 parameters that are not the model's \(0.weight.* was made with"):
        fk.fisher_adaptune(network(), PROBE, **options)
    with pytest.raises(TypeError, match="every must be an integer"):
        fk.fisher_adaptune(model, PROBE, **{**options, "every": 1.5})
