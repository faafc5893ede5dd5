"""Plausible mistakes in calls: each message says what to write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.layers import Layer, OuterProductGrads

CLASSES = fk.Classification()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


NET = small()
BATCHES = [(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))]
ROWS = [{"input_ids": torch.ones(2, 4, dtype=torch.long)}] * 2
SCORES = {name: torch.rand_like(p) for name, p in NET.named_parameters()}
EVERYTHING = fk.select(SCORES, fk.GlobalTopK(density=1.0))
OTHER_HEAD = {**SCORES, "2.weight": torch.ones(5, 8)}


class Unfinished(fk.MaskedOptimizer):
    def __init__(self, model, selection):
        super().__init__(model, selection, dict(lr=0.1))


class NoUpdate(Unfinished):
    def _names(self, group):
        return ()


class Misnamed(Layer):
    def covers(self, module):
        return frozenset({"weigth"})

    def per_example_grads(self, call, output_grads, names):
        raise AssertionError("it covers nothing")


class Flat(Layer):
    def covers(self, module):
        return frozenset({"weight"})

    def per_example_grads(self, call, output_grads, names):
        yield "weight", OuterProductGrads(call.input, output_grads, call.module.weight.shape)


def estimated(estimator=None, rule=None, **options):
    net = small()
    net[0].fishkern_layer = rule
    return fk.estimate(net, BATCHES, estimator or fk.DiagonalFisher(), likelihood=CLASSES, **options)


def stepped(kind):
    net = small()
    nn.functional.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
    kind(net, EVERYTHING).step()


def parts_merged():
    return fk.merge(estimated(parameters="0.*"), estimated(parameters="2.*"))


MISTAKES = {
    "the class of an estimator": (lambda: estimated(fk.DiagonalFisher), TypeError, "class DiagonalFisher: call it"),
    "the labels as an estimator": (lambda: estimated("type-2"), TypeError, r"DiagonalFisher\('type-2'\)"),
    "statistics in the place of the model": (lambda: fk.QuadraticPenalty(NET, SCORES, 1.0), TypeError,
                                             r"got Sequential: QuadraticPenalty\(statistics, model, weight\)"),
    "scores in the place of a model": (lambda: fk.estimate(SCORES, BATCHES), TypeError, "got 'dict'.$"),
    "a function in the place of a model": (lambda: fk.estimate(lambda x: x, BATCHES), TypeError, "wrap it in a module"),
    "a head of another size": (lambda: fk.QuadraticPenalty(OTHER_HEAD, NET, 1.0), ValueError, "leave it out"),
    "a percentage": (lambda: fk.GlobalTopK(density=5), ValueError, r"got 5.0 \(5 percent is 0.05\)\.$"),
    "a file of statistics to select by": (lambda: fk.select("f.safetensors", fk.GlobalTopK(k=1)), TypeError,
                                          r"fishkern.Statistics.load\('f.safetensors'\)"),
    "parts to merge": (parts_merged, ValueError, "joined by fishkern.union"),
    "several batches to plan": (lambda: fk.plan(NET, ROWS), TypeError, "got a list of 2: pass the largest of them"),
    "update and model swapped": (lambda: fk.DeltaReader().apply(NET, NET), TypeError, "fishkern.DeltaUpdate, got Seq"),
    "an optimizer without names": (lambda: stepped(Unfinished), NotImplementedError, r"Unfinished .*_names\(group\)"),
    "an optimizer without a step": (lambda: stepped(NoUpdate), NotImplementedError, "NoUpdate .* _update_"),
    "a rule for a name that is not there": (lambda: estimated(rule=Misnamed()), ValueError,
                                            "Misnamed.covers names weigth, and a Linear has weight, bias"),
    "a rule without positions": (lambda: estimated(rule=Flat()), ValueError, "fishkern.layers.positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_what_to_write(name):
    call, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=words):
        call()


def test_one_batch_of_two_tensors_in_a_list_is_planned():
    assert fk.plan(NET, list(BATCHES[0]), likelihood=CLASSES).passes == 1
