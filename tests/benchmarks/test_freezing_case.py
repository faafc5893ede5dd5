"""The case of freezing: what it counts, in small."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")
import fishkern as fk
from benchmarks.cases import freezing
from benchmarks.subjects.transformers import LLAMA_TINY, Workload

SMALL = Workload(replace(LLAMA_TINY, layers=4), T=7, N=3, batches=1)

pytestmark = pytest.mark.skipif(not hasattr(fk.MaskedOptimizer, "frozen"), reason="this fishkern freezes no parameters")


def test_frozen_layers_keep_one_of_three_products():
    """The forward one; and no activation, but for what all layers share."""
    saved = freezing.saved_of_layers(SMALL, freezing.parts(SMALL))
    forward = saved[0.0]["flops"]["forward"]
    linears, attention = sum(O * I for O, I in LLAMA_TINY.linears()), 2 * SMALL.T * LLAMA_TINY.hidden
    assert forward == 4 * 2 * SMALL.N * SMALL.T * (linears + attention)  # each position with all, twice
    for s, figures in saved.items():
        assert figures["flops"]["forward"] == forward
        assert figures["flops_ratio"] == pytest.approx(freezing.arithmetic(s), rel=0.02)
        assert figures["skipped_layers"] == s * 4
        assert figures["activations_ratio"] == pytest.approx(1 - s, rel=0.05)
        assert figures["activations_at_best"] == 1 - s


def test_activations_are_those_that_autograd_keeps():
    """Of one linear layer its input; its weight is no activation."""
    trained = freezing.training(SMALL)
    whole = freezing.kept_bytes(trained)
    freezing.freeze(trained, lambda name: "mlp.down_proj" in name)
    per_token = 4 * SMALL.N * SMALL.T * SMALL.shape.intermediate
    assert whole - freezing.kept_bytes(trained) == 4 * per_token


def test_each_event_saves_something():
    costs = [freezing.costs(trained) for trained in freezing.after_events(SMALL)]
    entries, frozen, skipped = zip(
        *((c["entries"], c["frozen_parameters"], c["skipped_layers"]) for c in costs), strict=True
    )
    assert list(entries) == sorted(set(entries), reverse=True)
    assert frozen == (0, 1, 1 + 2 * 4, 1 + 2 * 9)
    assert skipped == (0, 0, 0, 2)
    backward = [c["flops"]["backward"] for c in costs]
    assert backward[3] < backward[2] < backward[1] == backward[0]
    peaks = [c["peak_mib"] for c in costs]
    assert peaks[3] < peaks[0]  # in tenths of a MiB
