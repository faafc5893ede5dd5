"""The parameters to estimate: all, patterns, a predicate; and the message at a misspelt name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo

NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]
WANTED = {
    "a pattern": ("*.bias", ["0.bias", "1.bias"]),
    "a name": ("1.weight", ["1.weight"]),
    "patterns": (["0.*", "1.bias"], ["0.weight", "0.bias", "1.bias"]),
    "a tuple": (("1.*",), ["1.weight", "1.bias"]),
    "a set": ({"*.weight"}, ["0.weight", "1.weight"]),
    "all": ("all", NAMES),
    "a predicate": (lambda name, parameter: parameter.ndim == 1, ["0.bias", "1.bias"]),
}


@pytest.mark.parametrize("case", WANTED)
def test_parameters_are_chosen(case):
    wanted, expected = WANTED[case]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    batches, options = [(torch.randn(3, 4), torch.arange(3))], {"likelihood": fk.Classification()}
    whole = fk.estimate(model, batches, **options)
    found = fk.estimate(model, batches, parameters=wanted, **options)
    assert list(found) == expected
    assert all(torch.equal(found[name], whole[name]) for name in expected)
    assert fk.verify(model, batches, parameters=wanted, **options).ok


def test_a_pattern_that_matches_nothing():
    specimen = zoo.llama()
    with pytest.raises(ValueError, match=r"'\*.q_prj.weight' matches none of 21 names such as 'model.embed"):
        fk.estimate(specimen.model, [specimen.batch()], parameters=["*.k_proj.weight", "*.q_prj.weight"])
    with pytest.raises(ValueError, match="did you mean 'model.layers.0.self_attn.q_proj.weight'"):
        fk.estimate(specimen.model, [specimen.batch()], parameters="self_attn.q_proj")


def test_a_name_that_is_not_there_is_told_near_ones():
    specimen = zoo.llama()
    statistics = fk.estimate(specimen.model, [specimen.batch()], parameters="*q_proj*")
    with pytest.raises(KeyError, match="q_proj .did you mean 'model.layers.0.self_attn.q_proj.weight'"):
        statistics["model.layers.0.self_attn.q_proj"]
