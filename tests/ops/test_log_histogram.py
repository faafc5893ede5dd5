"""numpy's histogram -> the reference -> the kernel: equal counts, whatever the values and edges."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishkern import BackendUnavailableError
from fishkern.ops import log_histogram, magnitudes

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EDGES = torch.linspace(-12, 2, 65, dtype=torch.float64)


def oracle(values: Tensor, edges: Tensor) -> list[int]:
    logs = np.log10(np.abs(values.detach().cpu().double().numpy()) + 1e-12)
    return np.histogram(logs[~np.isnan(logs)], edges.double().numpy())[0].tolist()


def make(entries: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes of 30 decades, of both signs, with zeros."""
    values = 10.0 ** torch.empty(entries, dtype=torch.float64).uniform_(-20, 10)
    return (values * torch.tensor([1, -1, 0])[torch.arange(entries) % 3]).to(DEVICE, dtype)


# Nothing, one, a chunk of the kernel and one off it, more than a program for each.
@pytest.mark.parametrize("entries", [0, 1, 7, 2047, 2048, 2049, 20_007])
def test_equals_numpy(entries, backend):
    values = make(entries)
    counts = log_histogram(values, EDGES, backend=backend)
    assert counts.tolist() == oracle(values, EDGES)
    assert counts.dtype == torch.int64
    assert counts.device == values.device


# Above 2^16 the reference counts by cells.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [1000, 2**16, 2**16 + 1, 200_003])
def test_dtypes_and_sizes_of_the_reference(dtype, entries):
    values = make(entries, dtype)
    assert log_histogram(values, EDGES, backend="torch").tolist() == oracle(values, EDGES)


def test_half(backend):
    values = make(3000, torch.float16)
    assert log_histogram(values, EDGES, backend=backend).tolist() == oracle(values, EDGES)


@pytest.mark.parametrize("bins", [1, 2, 3, 31, 32, 62, 63, 64, 127, 128, 200])
def test_any_number_of_bins(bins, backend):
    """Those that fill a table of a power of two, and those around it."""
    values, edges = make(5000), torch.linspace(-9, 3, bins + 1)
    assert log_histogram(values, edges, backend=backend).tolist() == oracle(values, edges)


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([-13.0, -12.0, -11.5, -5.0, -4.9999999, 0.0, 0.5, 38.0, 400.0]), min_size=2, max_size=9),
    st.lists(st.floats(width=32, allow_nan=True), max_size=30),
)
def test_any_edges_and_values(backend, edges, values):
    """Equal edges, edges that nothing reaches, infinities, NaN, denormals, both zeros."""
    edges, values = torch.tensor(sorted(edges), dtype=torch.float64), torch.tensor(values, device=DEVICE)
    assert log_histogram(values, edges, backend=backend).tolist() == oracle(values, edges)


@pytest.mark.parametrize("times", [5, 7000])
def test_values_on_the_edges(times, backend):
    """A bin has its lower edge and not its upper one, but for the last bin."""
    if times > 5 and backend == "triton":
        times = 300  # the reference alone counts many in another way
    values = (10.0 ** torch.arange(-6.0, 4.0)).repeat(times).to(DEVICE)
    edges = (values[:10].double().cpu() + 1e-12).log10()
    assert log_histogram(values, edges, backend=backend).tolist() == [times] * 8 + [2 * times]
    for direction in (0.0, math.inf):
        neighbours = values.nextafter(torch.full_like(values, direction))
        assert log_histogram(neighbours, edges, backend=backend).tolist() == [times] * 9


def test_infinite_edges_count_all_but_nan(backend):
    values = torch.tensor([0.0, 1.0, -2.0, math.inf, -math.inf, math.nan], device=DEVICE)
    edges = torch.tensor([-math.inf, 0.5, math.inf])
    assert log_histogram(values, edges, backend=backend).tolist() == [3 if math.log10(2) < 0.5 else 2, 2]


def test_order_shape_and_strides_make_no_difference(backend):
    values = make(7000).view(70, 100)
    expected = log_histogram(values, EDGES, backend=backend)
    assert torch.equal(log_histogram(values.mT, EDGES, backend=backend), expected)
    assert torch.equal(log_histogram(values.flatten()[torch.randperm(7000)], EDGES, backend=backend), expected)
    assert torch.equal(log_histogram(values[:, ::2], EDGES, backend=backend)
                       + log_histogram(values[:, 1::2], EDGES, backend=backend), expected)  # fmt: skip
    assert torch.equal(log_histogram(values[3:].flatten()[1:], EDGES, backend=backend),
                       log_histogram(values[3:].flatten()[1:].clone(), EDGES, backend=backend))  # fmt: skip
    assert log_histogram(values[0, 0], EDGES, backend=backend).sum() <= 1


@pytest.mark.parametrize("low, high", [(-12.5, 8.0), (-4.0, -3.9)])
def test_both_ways_of_the_reference_agree(low, high):
    """Cells of leading bits, several bounds in one cell and several cells between bounds; in pieces."""
    values, edges = make(70_000), torch.linspace(low, high, 65, dtype=torch.float64)
    by_cells = log_histogram(values, edges, backend="torch")
    with patch.object(magnitudes, "_PIECE", 1000):
        assert torch.equal(log_histogram(values, edges, backend="torch"), by_cells)
    with patch.object(magnitudes, "_FEW", 10**6):
        assert torch.equal(log_histogram(values, edges, backend="torch"), by_cells)


def test_gradients_are_not_recorded(backend):
    values = make(100).requires_grad_()
    assert not log_histogram(values, EDGES, backend=backend).requires_grad


def test_float64_is_not_for_triton():
    with pytest.raises(BackendUnavailableError, match="log_histogram cannot run on Triton"):
        log_histogram(make(10, torch.float64), EDGES, backend="triton")


@pytest.mark.parametrize(
    "values, edges, message",
    [
        (torch.arange(3), EDGES, "values must be of a floating dtype, got torch.int64"),
        (torch.ones(3), EDGES[:1], r"edges must be \[B \+ 1\], floating, at least two; got torch.float64 \(1,\)"),
        (torch.ones(3), EDGES.view(5, 13), r"\(5, 13\)"),
        (torch.ones(3), torch.arange(3), "edges must be"),
        (torch.ones(3), EDGES.flip(0), "edges must not fall nor be NaN"),
        (torch.ones(3), torch.tensor([0.0, math.nan]), "edges must not fall nor be NaN"),
    ],
)
def test_refused(values, edges, message):
    with pytest.raises(ValueError, match=message):
        log_histogram(values, edges)
