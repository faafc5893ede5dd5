"""The case of logits in chunks: both sides give the same statistics, and chunks take less memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from benchmarks.cases import logits
from benchmarks.subjects.transformers import LLAMA_TINY, Workload

SMALL = Workload(replace(LLAMA_TINY, layers=1, vocabulary=4000), T=8, N=4, batches=1, lora=2)
LIMIT = 4 * 4000 * 4  # four positions

pytestmark = logits.pytestmark


def test_both_sides_are_the_same():
    ours, theirs = (logits.passing(name, SMALL, LIMIT)() for name in logits.PROVIDERS)
    assert ours.provenance["runs"][0]["logits"] == f"in chunks of {LIMIT} bytes"
    assert "logits" not in theirs.provenance["runs"][0]
    assert any("lora" in name for name in ours)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_chunks_take_less():
    peaks = {name: logits.memory(name, SMALL, LIMIT)["peak_mib"] for name in logits.PROVIDERS}
    assert peaks["fishkern"] < peaks["whole"] / 1.5


def test_what_is_timed_is_above_the_limit():
    logits_bytes = logits.TIMED.N * logits.TIMED.T * logits.SHAPE.vocabulary * 4
    assert logits_bytes > logits.likelihood("fishkern").logits_bytes
