"""Slices cover each parameter once, and are where the published ones are."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fishkern as fk
from fishkern.freezing import Slices
from fishkern.selection import Entries

NAMES = ["layers.0.mlp.weight", "h.0.attn.qkv.weight", "h.0.attn.c_attn.weight", "h.0.attn.in_proj_bias", "scale"]


@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 13), max_size=4),
    st.integers(1, 9),
    st.sampled_from(["rows", "columns", "tensor"]),
    st.booleans(),
)
def test_together_all_of_it(name, shape, count, axis, split_qkv):
    """Each entry is in exactly one slice, whatever the shape; slices ascend, and none is empty."""
    shape = torch.Size(shape)
    slices = Slices(count, axis, split_qkv=split_qkv).of(name, shape)
    covered = torch.zeros(shape.numel(), dtype=torch.int64)
    for piece in slices:
        entries = Entries.of(shape, piece)
        assert entries.count > 0
        covered[entries.indices().long()] += 1
    assert covered.eq(1).all()
    starts = [piece.bounds[0][0] for piece in slices]
    assert starts == sorted(starts)
    assert len({type(piece) for piece in slices}) <= 1
    if axis == "tensor":
        assert len(slices) == min(1, shape.numel())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 768, 4097])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_bounds_are_the_published_ones(size, count):
    """floor(linspace(0, size, blocks + 1)) of min(blocks, size) blocks."""
    published = np.floor(np.linspace(0, size, min(count, size) + 1) + 1e-9).astype(int).tolist()
    rows = Slices(count).of("weight", torch.Size([size, 3]))
    columns = Slices(count, "columns").of("weight", torch.Size([3, size]))
    for slices, axis in ((rows, fk.Rows), (columns, fk.Columns)):
        assert slices == tuple(axis(pair) for pair in pairwise(published))


def test_columns_are_those_of_the_second_axis():
    """Of a convolution too, whose slices hold whole kernels; a vector stays whole."""
    slices = Slices(2, "columns").of("conv.weight", torch.Size([4, 3, 5, 5]))
    assert slices == (fk.Columns((0, 25)), fk.Columns((25, 75)))
    assert Slices(4, "columns").of("norm.weight", torch.Size([8])) == (fk.Rows((0, 8)),)
    assert Slices(4, "tensor").of("norm.weight", torch.Size([])) == (fk.Rows((0, 1)),)


def test_queries_keys_and_values_are_apart():
    of = Slices(2).of
    thirds = tuple(fk.Rows(pair) for pair in [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)])
    for name in ("blocks.0.attn.qkv.weight", "encoder.in_proj_weight", "h.1.Wqkv.weight", "h.1.query_key_value.weight"):
        assert of(name, torch.Size([12, 4])) == thirds
    assert of("blocks.0.attn.qkv.bias", torch.Size([12])) == thirds
    assert of("h.0.attn.c_attn.weight", torch.Size([4, 12])) == tuple(fk.Columns(*piece.bounds) for piece in thirds)


@pytest.mark.parametrize(
    "slices, name, shape",
    [
        (Slices(2, split_qkv=False), "attn.qkv.weight", [12, 4]),
        (Slices(2), "attn.qkv.weight", [13, 4]),
        (Slices(2), "attn.qkv_norm.weight", [12, 4]),
        (Slices(2), "qkv.0.mlp.weight", [12, 4]),
    ],
)
def test_other_parameters_are_not_cut_in_thirds(slices, name, shape):
    assert len(slices.of(name, torch.Size(shape))) == 2


def test_settings_are_plain():
    assert Slices().settings == {"count": 4, "axis": "rows", "split_qkv": True}


def test_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Slices(0)
    with pytest.raises(TypeError, match="count must be an integer"):
        Slices(math.pi)
    with pytest.raises(ValueError, match="axis must be one of"):
        Slices(axis="row")
