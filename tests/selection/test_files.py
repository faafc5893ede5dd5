"""Selections come back from a file as they were; other files are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fishkern as fk
from fishkern import Selection
from fishkern.files import saving
from fishkern.selection._packed import packed, unpacked

SHAPES = {"dense": (16, 5), "sparse": (1000,), "none": (3, 4), "all": (7,), "scalar": (), "empty": (0, 2)}


def make() -> Selection:
    indices = {
        "dense": torch.arange(0, 80, 3),
        "sparse": torch.tensor([999, 0, 500]),
        "scalar": torch.tensor([0]),
    }
    return Selection(SHAPES, indices, whole=["all"], provenance={"rule": {"name": "GlobalTopK", "k": 31}, "k": 31})


def test_round_trip(tmp_path: Path):
    selection = make()
    path = selection.save(tmp_path / "s")
    assert path == tmp_path / "s.safetensors"
    for name in (path, tmp_path / "s", str(path)):
        loaded = Selection.load(name)
        assert loaded == selection
        assert loaded.names == selection.names
        assert loaded.whole == selection.whole
        assert loaded.provenance == selection.provenance
        assert loaded.k == 31
    assert Selection.load(Selection({}, {}).save(tmp_path / "nothing")).names == ()


def test_the_smaller_form_is_stored(tmp_path: Path):
    """Bits above a density of 1/32, indices below, and nothing where all or none is selected."""
    make().save(tmp_path / "s")
    stored = load_file(tmp_path / "s.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "dense": (torch.uint8, (10,)),
        "sparse": (torch.int32, (3,)),
    }
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("fishkern.selection", "1")
    assert json.loads(metadata["pool"])["all"] == [[7], "whole"]


@given(st.sets(st.integers(0, 99)), st.integers(100, 120))
def test_bits(indices: set[int], numel: int):
    given = torch.tensor(sorted(indices), dtype=torch.int32)
    bits = packed(given, numel)
    assert len(bits) == -(-numel // 8)
    assert torch.equal(unpacked(bits, torch.int32), given)


def test_bits_go_piece_by_piece(monkeypatch: pytest.MonkeyPatch):
    from fishkern.selection import _packed

    monkeypatch.setattr(_packed, "PIECE", 64)
    given = torch.arange(0, 5000, 3)
    assert torch.equal(unpacked(packed(given, 5003), torch.int64), given)


def test_shards(tmp_path: Path):
    selection = make()
    index = selection.save(tmp_path / "s", max_shard_size=11)
    assert index.name == "s.safetensors.index.json"
    assert Selection.load(index) == selection


def test_a_selection_and_statistics_do_not_mix_up(tmp_path: Path):
    make().save(tmp_path / "s")
    with pytest.raises(ValueError, match="holds no fishkern statistics: its header says format=fishkern.selection"):
        fk.Statistics.load(tmp_path / "s")
    statistics = fk.Statistics({"w": torch.ones(2)}, count=1)
    with pytest.raises(FileExistsError, match="holds no fishkern statistics and is not overwritten"):
        statistics.save(tmp_path / "s")
    statistics.save(tmp_path / "t")
    with pytest.raises(ValueError, match="holds no fishkern selection: .* Write one with Selection.save"):
        Selection.load(tmp_path / "t")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FileExistsError, match="holds no fishkern selection and is not overwritten"):
        make().save(tmp_path / "model")


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make().save(tmp_path / "s")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Selection(SHAPES, {"sparse": torch.tensor([1])}).save(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    assert Selection.load(tmp_path / "s") == make()


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="the folder .*/none does not exist: create it"):
        make().save(tmp_path / "none" / "s")
    with pytest.raises(FileNotFoundError, match="nothing to load at"):
        Selection.load(tmp_path / "s")


def test_truncated(tmp_path: Path):
    path = make().save(tmp_path / "s")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"is truncated, damaged or no .safetensors file"):
        Selection.load(path)
    make().save(path)
    assert Selection.load(path) == make()


POOL = {name: [list(shape), "none"] for name, shape in SHAPES.items()}
HELD = {"dense": [[16, 5], "bits"], "sparse": [[1000], "indices"]}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (dict(format="pt"), "holds no fishkern selection: its header says format=pt"),
        (dict(format_version="3"), "in fishkern.selection format 3, this fishkern reads up to 2: update fishkern"),
        (dict(provenance="{oops"), "has a damaged header"),
        (dict(pool=None), "has a damaged header: 'pool' is missing"),
        (dict(pool="[1]"), "has a damaged header"),
        (dict(pool='{"dense": 3}'), "has a damaged header"),
        (dict(pool=json.dumps(POOL)), "its header and its tensors disagree on dense"),
        (
            dict(pool=json.dumps(POOL | {"dense": [[16, 5], "bits"], "sparse": [[600], "indices"]})),
            "holds no valid selection: sparse has 600 coordinates, but an index is 999",
        ),
        (
            dict(pool=json.dumps(POOL | {"dense": [[78], "bits"], "sparse": [[1000], "indices"]})),
            "holds no valid selection: dense has 78 coordinates, but an index is 78",
        ),
        (
            dict(pool=json.dumps(POOL | {"dense": [[80], "indices"], "sparse": [[1000], "indices"]})),
            "holds no valid selection: indices are .K., int64 or int32; those of dense are torch.uint8",
        ),
        (
            dict(pool=json.dumps(POOL | {"dense": [[80], "bits"], "sparse": [[1000], "bits"]})),
            "holds no valid selection: sparse is said to be bits of",
        ),
        (dict(provenance="3"), "has a damaged header: provenance is an object"),
        (dict(pool=json.dumps(POOL | HELD | {"none": [[3, 4], "indexes"]})), r"damaged header: none is stored as 'ind"),
        (
            dict(pool=json.dumps(POOL | HELD | {"none": [[3, 4], None]})),
            "damaged header: none is stored as None, which",
        ),
        (dict(pool=json.dumps(POOL | HELD | {"none": [[-5, 3], "none"]})), r"shape of none: \[-5, 3\] is the"),
        (dict(pool=json.dumps(POOL | HELD | {"all": [[-5, -3], "whole"]})), r"shape of all: \[-5, -3\] is the"),
    ],
)
def test_damaged_header(tmp_path: Path, metadata: dict[str, str | None], says: str):
    path = make().save(tmp_path / "s")
    with safe_open(path, framework="pt") as file:
        said = {key: value for key, value in (file.metadata() | metadata).items() if value is not None}
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, said)
    with pytest.raises(ValueError, match=says) as raised:
        Selection.load(path)
    assert "\n" not in str(raised.value)
