"""What is no selection, or no delta, is refused where one is expected."""

from __future__ import annotations

import pytest
import torch

import fishkern as fk

NO_SELECTION = {
    "prune_": lambda model, scores: fk.prune_(model, scores),
    "delta": lambda model, scores: fk.delta(model, scores),
    "save_start": lambda model, scores: fk.selection.save_start(model, scores, "start"),
    "MaskedAdamW": lambda model, scores: fk.MaskedAdamW(model, scores),
    "overlap": lambda model, scores: fk.select(scores, fk.GlobalTopK(k=1)).overlap(scores),
}


@pytest.mark.parametrize("given", NO_SELECTION)
def test_scores_in_place_of_a_selection_are_refused_with_the_way(given):
    model = torch.nn.Linear(2, 3)
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    with pytest.raises(TypeError, match=r"expected a fishkern.Selection, got dict: .*fishkern.select\(scores, rule\)"):
        NO_SELECTION[given](model, scores)


def test_a_selection_in_place_of_a_delta_is_refused():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"expected a fishkern.Delta, .*got Selection"):
        fk.apply_delta(model, fk.select(dict(model.named_parameters()), fk.GlobalTopK(k=1)))
