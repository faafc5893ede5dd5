"""Counts and percentiles of products that are not formed equal those of products that are."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishkern.freezing import Factors, JensenShannon, histograms
from fishkern.freezing.histograms import counts_of, edges_of, span_of
from fishkern.freezing.products import count_products, products_at
from tests.freezing.oracle import log_normal

# Few values, so that there are zeros, ties and products that are equal though their factors are not.
FACTOR = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 4.0, -3.0, 1e-7, 1e-20]), st.floats(-60_000, 60_000, width=16))
PAIR = st.tuples(*[st.lists(FACTOR, min_size=1, max_size=12)] * 2)


def formed(factors: Factors) -> torch.Tensor:
    return torch.outer(*(part.double() for part in factors))


def of(pair: tuple[list[float], list[float]]) -> Factors:
    return Factors(*(torch.tensor(part) for part in pair))


@settings(max_examples=60)
@given(PAIR, st.sampled_from(["log", "raw"]), st.integers(1, 20))
def test_all_bins_equal(pair, scale, bins):
    factors = of(pair)
    edges = edges_of(span_of((formed(factors),), scale, (0.01, 0.99)), bins)
    assert torch.equal(count_products(factors, edges, scale), counts_of(formed(factors), edges, scale))


@settings(max_examples=30)
@given(PAIR, PAIR)
def test_every_place_equals(first, second):
    """Of two sets of products together, as reference and reading are."""
    pool = [of(first), of(second)]
    ordered = torch.cat([formed(factors).abs().view(-1) for factors in pool]).sort().values.tolist()
    places = sorted({0, len(ordered) // 7, len(ordered) // 2, len(ordered) - 1})
    assert products_at(pool, places) == [ordered[place] for place in places]


@pytest.mark.parametrize("scale", ["log", "raw"])
@pytest.mark.parametrize("rows, columns", [(200, 300), (1, 20_000), (20_000, 1), (130, 127)])
def test_distances_equal(scale, rows, columns):
    """To the bit, with nothing formed on one side."""
    pair = [Factors(log_normal(rows, seed=seed, center=-3.0), log_normal(columns, seed=seed + 5)) for seed in (0, 1)]
    with patch.object(histograms, "_SMALL", 0):
        counted = histograms.distance_between(*pair, 64, scale, (0.01, 0.99))
    expected = JensenShannon.distance(*map(formed, pair), scale=scale)
    assert counted == expected > 0
    assert histograms.distance_between(*pair, 64, scale, (0.01, 0.99)) == expected


def test_overflowing_products_are_refused():
    """In float64, where products of float32 factors do not overflow."""
    large = Factors(torch.full((200,), 1e200, dtype=torch.float64), torch.full((200,), 1e200, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN or infinite"):
        products_at([large], [0])
    largest = Factors(torch.full((200,), 3e38), torch.full((200,), 3e38))
    assert products_at([largest], [0]) == [float(largest.rows[0].double() ** 2)]
    with pytest.raises(ValueError, match="NaN or infinite"):
        products_at([Factors(torch.tensor([1.0, math.nan]), torch.ones(2))], [0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded():
    """A slice of 2^26 products would take 256 MiB; a peak never falls, so this is a process of its own."""
    code = """
import re, torch
from fishkern.freezing import Factors
from fishkern.freezing.histograms import counts_of, edges_of

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
small, large = (Factors(torch.rand(n) + 0.1, torch.rand(n) + 0.1) for n in (300, 2**13))
edges = edges_of((-2.0, 0.5), 8)
counts_of(small, edges, "log")
before = peak()
assert counts_of(large, edges, "log").sum() == 2**26
print(peak() - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed is not counted
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64
