"""The part of a tensor that a process holds: its entries are numbered as slices of the whole say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishkern.files import Format, Region, open_tensors, read_region, region_of, save_tensors

FORMAT = Format("fishkern.test", version=1, saved_by="the test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("regions")


@st.composite
def regions(draw) -> Region:
    shape = torch.Size(draw(st.lists(st.integers(0, 5), max_size=4)))
    ranges = tuple(tuple(sorted(draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape)
    return Region(shape, ranges)


@given(regions())
def test_numbers_in_the_part_and_in_the_whole(region: Region):
    numbers = torch.arange(region.shape.numel()).view(region.shape)
    own = numbers[tuple(slice(*bounds) for bounds in region.ranges)]
    assert own.shape == region.sizes
    own = own.reshape(-1)
    places = torch.arange(len(own))
    assert torch.equal(region.in_whole(places), own)
    assert torch.equal(region.in_part(own), places)
    assert torch.equal(region.holds(numbers.view(-1)), torch.isin(numbers.view(-1), own))
    assert region.is_whole == (own.numel() == numbers.numel() and region.sizes == region.shape)


@settings(max_examples=15)
@given(regions())
def test_a_part_is_read_from_disk_alone(folder: Path, region: Region):
    whole = torch.arange(region.shape.numel(), dtype=torch.float32).view(region.shape)
    save_tensors(folder / "one", {"before": torch.ones(3), "w": whole}, format=FORMAT, metadata={})
    _, stored = open_tensors(folder / "one", format=FORMAT)
    part = read_region(stored["w"], region, torch.float64)
    assert torch.equal(part, whole[tuple(slice(*bounds) for bounds in region.ranges)].double())
    assert sum(stop - start for start, stop in region.spans()) == part.numel()


@given(regions(), st.integers(1, 6))
def test_neighbours_that_belong_together_are_split(region: Region, width: int):
    row = region.shape[1:].numel()
    if not row or row % width:
        return
    groups = torch.arange(region.shape.numel()).view(region.shape) // width
    own = groups[tuple(slice(*bounds) for bounds in region.ranges)].reshape(-1)
    counts = own.unique(return_counts=True)[1]
    if len(own) and region.ranges[2:] == tuple((0, size) for size in region.shape[2:]):
        assert region.splits(width) == bool((counts != width).any())


def test_an_ordinary_tensor_is_held_whole():
    region = region_of("w", torch.zeros(2, 3))
    assert region == Region(torch.Size([2, 3]), ((0, 2), (0, 3)), counted=True)
    assert region.is_whole
    with pytest.raises(AttributeError):
        region.counted = False
