"""FisherAdapTune with ``compat="reference"`` against the numpy oracle, from the batches to the masks."""

from __future__ import annotations

import pytest
import torch

import fishkern as fk
from fishkern.freezing import ReferenceRule
from tests.freezing import published_code
from tests.freezing.test_reference import Watched, back_propagate, net

pytestmark = pytest.mark.skipif(not hasattr(fk, "fisher_adaptune"), reason="this revision has no fisher_adaptune")


@pytest.mark.parametrize("margin, stops", [(1.0, [8, 69, 0, 0]), (-0.5, [8, 23, 17, 9])], ids=["paper", "mild"])
def test_a_dozen_steps_equal_the_oracle(margin, stops):
    """Readings of every second batch, decisions at every fourth, inside the step that comes after the backward pass."""
    model = net()
    watched = Watched(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    published = published_code.Published({name: tuple(shape) for name, shape in shapes.items()}, 4, 2, margin)
    optimizer = fk.MaskedSGD(model, fk.Selection(shapes, {}, whole=[*shapes]), lr=0.1, momentum=0.9, weight_decay=0.1)
    freezer = fk.fisher_adaptune(
        model, None, optimizer=optimizer, every=4, read_every=2, rule=ReferenceRule(margin), compat="reference"
    )
    found, still = [], {}
    for step in range(13):
        back_propagate(model, step)
        scored = set(published.active)
        fishers = watched.fishers()
        optimizer.step()
        event = freezer.step()
        expected = published.before_update(fishers, frozenset(freezer.preview().scores))
        assert set(event.frozen if event else ()) == expected, step
        if event:
            found.append(len(event.frozen))
            assert set(event.scores) == scored
            assert event.waiting == (set() if step else scored - expected)
        for name, parameter in model.named_parameters():
            mask = torch.from_numpy(published.mask(name))
            assert torch.equal(freezer.selection.mask(name), mask), (step, name)
            assert parameter.requires_grad == bool(mask.any())
            if name in still:  # and neither momentum nor decay moves it on
                before, mask_before = still[name]
                assert torch.equal(parameter[~mask_before], before[~mask_before]), (step, name)
                if not step % 4:
                    assert torch.equal(parameter[~mask], before[~mask]), "frozen before the update of its own step"
            still[name] = (parameter.detach().clone(), mask)
    assert found == stops
    freezer.close()
