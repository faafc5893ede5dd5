"""Indices in the code of Elias and Fano: exact, of the size that is promised, and refused where it is damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

import fishkern as fk
from fishkern.selection import _elias_fano
from fishkern.selection._elias_fano import coded, coded_size, decoded, low_bits


def by_hand(code: bytes, count: int, numel: int, low: int) -> list[int]:
    """Read a code bit by bit, from the description on the page of file formats."""
    bits = [code[i // 8] >> i % 8 & 1 for i in range(8 * len(code))]
    width = -(-count // 8) * 8
    steps = -(-((numel >> low) + count + 1) // 8) * 8
    high, indices = 0, []
    for bit in bits[:steps]:
        if bit:
            number = len(indices)
            indices.append((high << low) + sum(bits[steps + width * b + number] << b for b in range(low)))
        else:
            high += 1
    return indices


@given(st.integers(1, 400), st.data())
def test_a_code_is_read_bit_by_bit(numel: int, data: st.DataObject):
    indices = sorted(data.draw(st.sets(st.integers(0, numel - 1), min_size=1)))
    low = data.draw(st.integers(0, numel.bit_length() - 1))
    code = coded(torch.tensor(indices, dtype=torch.int32), numel, low)
    assert len(code) == coded_size(len(indices), numel, low)
    assert by_hand(bytes(code.tolist()), len(indices), numel, low) == indices
    assert decoded(code, len(indices), numel, low).tolist() == indices


@pytest.mark.parametrize("numel", [100_003, 2**31, 2**33 + 5])
def test_in_pieces_and_of_both_index_dtypes(monkeypatch, numel):
    monkeypatch.setattr(_elias_fano, "PIECE", 64)
    at = torch.randint(0, numel, (999,), generator=torch.Generator().manual_seed(0)).unique()
    at = torch.cat([torch.tensor([0]), at[(at > 0) & (at < numel - 1)], torch.tensor([numel - 1])])
    at = at.to(torch.int32 if numel <= 2**31 else torch.int64)
    low = low_bits(len(at), numel)
    back = decoded(coded(at, numel, low), len(at), numel, low)
    assert back.dtype == at.dtype
    assert torch.equal(back, at)


@pytest.mark.parametrize("density", [0.005, 0.01, 0.026, 0.03])
def test_about_a_byte_for_each_entry(density):
    """Within 0.6 bits of what any code needs for entries that are spread at random."""
    numel = 1_000_000
    count = int(density * numel)
    bits = 8 * coded_size(count, numel, low_bits(count, numel)) / count
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    assert entropy < bits < entropy + 0.6
    assert 7 < bits < 9.6


def spread(density: float, numel: int = 40_000) -> fk.Selection:
    at = torch.randperm(numel, generator=torch.Generator().manual_seed(1))[: int(density * numel)]
    return fk.Selection({"weight": (200, numel // 200)}, {"weight": at})


@pytest.mark.parametrize(
    ("density", "form"),
    [(0.00001, "none"), (0.0003, "indices"), (0.005, "elias-fano"), (0.03, "elias-fano"), (0.4, "bits")],
)
def test_a_delta_has_the_smallest_form(tmp_path: Path, density, form):
    selection = spread(density)
    net = torch.nn.Linear(200, 200, bias=False)
    delta = fk.delta(net, selection)
    file = delta.save(tmp_path / "d")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    (_, stored, _) = json.loads(metadata["pool"])["weight"]
    assert (next(iter(stored)) if isinstance(stored, dict) else stored) == form
    assert metadata["format_version"] == ("3" if form == "elias-fano" else "1")
    assert fk.Delta.load(file).selection == selection
    with safe_open(selection.save(tmp_path / "s"), "pt") as opened:
        assert opened.metadata()["format_version"] == "1", "a selection's file stays as older versions read it"


def test_a_delta_takes_three_bytes_for_each_16_bit_value(tmp_path: Path):
    """At 2.6 %, of which six bytes would be the 32 bits of an index and the value."""
    net = torch.nn.Linear(1024, 1024, bias=False).bfloat16()
    at = torch.randperm(2**20, generator=torch.Generator().manual_seed(0))[: int(0.026 * 2**20)]
    delta = fk.delta(net, fk.Selection({"weight": (1024, 1024)}, {"weight": at}))
    assert delta.save(tmp_path / "d").stat().st_size < 2.92 * len(at) + 1000


def test_damage_is_refused_by_name(tmp_path: Path):
    selection = spread(0.01)
    file = fk.delta(torch.nn.Linear(200, 200, bias=False), selection).save(tmp_path / "d")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    good = load_file(file)

    def changed(code=None, form=None):
        tensors = good if code is None else good | {"entries:weight": code}
        pool = json.loads(metadata["pool"])
        if form is not None:
            pool["weight"][1] = {"elias-fano": form}
        save_file(tensors, tmp_path / "bad.safetensors", metadata | {"pool": json.dumps(pool)})
        with pytest.raises(ValueError, match="holds no valid delta: weight|weight") as error:
            fk.Delta.load(tmp_path / "bad")
        assert "\n" not in str(error.value)
        return str(error.value)

    code = good["entries:weight"]
    count, low = len(selection.indices("weight")), low_bits(400, 40_000)
    assert "steps are coded for 400 indices" in changed(code.index_fill(0, torch.tensor([3]), 255))
    swapped = code.clone()
    swapped[-50:] ^= 255  # the highest of the low bits: entries of the same step change places
    assert "ascending" in changed(swapped)
    assert "is said to be a code" in changed(code[:-1].clone())
    assert "is said to be a code" in changed(code.to(torch.int8))
    for odd in ([count], [count, low, 1], [count, "6"], [float(count), low], [True, low], "400", [[], []]):
        assert "has a count and a number of bits" in changed(form=odd)
    for odd in ([0, low], [-1, low], [40_001, low], [count, -1], [count, 16], [count, 2**70]):
        assert "coordinates, and a code of" in changed(form=odd)
    assert "is said to be a code" in changed(form=[count - 9, low])
