"""A file that is not statistics, or is damaged, is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fishkern.statistics import Covered, Statistics

THREE_SHARDS = 12  # bytes per shard of the statistics below


def make() -> Statistics:
    tensors = {"z": torch.ones(5, 2), "a": torch.ones(3), "m": torch.tensor(1.0)}
    coverage = {name: Covered("fused", tensor.numel()) for name, tensor in tensors.items()}
    return Statistics(tensors, count=3, provenance={"runs": [{"seed": 0}]}, coverage=coverage)


@pytest.mark.parametrize("form", [None, THREE_SHARDS])
def test_a_model_is_not_overwritten(tmp_path: Path, form: int | None):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "large.safetensors.index.json").write_text('{"metadata": {"total_size": 8}, "weight_map": {"w": "x"}}')
    before = sorted(tmp_path.iterdir())
    for name in ("model", "large"):
        with pytest.raises(FileExistsError, match=r"holds no fishkern statistics and is not overwritten: choose"):
            make().save(tmp_path / name, max_shard_size=form)
    assert sorted(tmp_path.iterdir()) == before


def test_a_shard_is_not_overwritten(tmp_path: Path):
    make().save(tmp_path / "s", max_shard_size=THREE_SHARDS)
    with pytest.raises(FileExistsError, match=r"is a shard of s.safetensors.index.json and is not overwritten"):
        make().save(tmp_path / "s-00001-of-00003.safetensors")


def test_index_of_a_model_beside_a_single_file(tmp_path: Path):
    make().save(tmp_path / "s")
    (tmp_path / "s.safetensors.index.json").write_text('{"metadata": {"total_size": 8}, "weight_map": {"w": "x"}}')
    assert Statistics.load(tmp_path / "s") == make()
    (tmp_path / "s.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"s.safetensors.index.json holds no fishkern statistics: its header names no format"
    ):
        Statistics.load(tmp_path / "s")


def damaged(path: Path, **metadata: str | None) -> None:
    with safe_open(path, framework="pt") as file:
        said = {key: value for key, value in (file.metadata() | metadata).items() if value is not None}
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, said)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (dict(format=None), "holds no fishkern statistics: its header names no format, expected format=fish"),
        (dict(format="pt"), "holds no fishkern statistics: its header says format=pt, .*Write one with Statistics"),
        (dict(format_version="2"), "in fishkern.statistics format 2, this fishkern reads up to 1: update fishkern"),
        (dict(format_version="x"), "is damaged: its header says format_version='x'"),
        (dict(provenance="{oops"), "has a damaged header"),
        (dict(provenance="[1]"), "holds no valid statistics: provenance is "),
        (dict(coverage='{"z": 3}'), "has a damaged header"),
        (dict(coverage='{"z": ["fused", 10]}'), "holds no valid statistics: a has a statistic, but coverage does not"),
        (dict(count=None), "has a damaged header: 'count' is missing"),
        (dict(count="many"), "has a damaged header"),
        (dict(count="0"), "holds no valid statistics: count must be at least 1"),
        (dict(dtype="bfloat16"), "holds a as float32, its header says bfloat16"),
    ],
)
def test_damaged_header(tmp_path: Path, metadata: dict, says: str):
    path = make().save(tmp_path / "s")
    damaged(path, **metadata)
    with pytest.raises(ValueError, match=says) as raised:
        Statistics.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"short", b"some text, and more of it\n" * 9, None])
def test_truncated_or_no_safetensors(tmp_path: Path, content: bytes | None):
    path = make().save(tmp_path / "s")
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    with pytest.raises(ValueError, match=r"is truncated, damaged or no .safetensors file .*: copy or save it again"):
        Statistics.load(path)
    make().save(path)  # a damaged file may be overwritten
    assert Statistics.load(path)["m"] == 1.0


def test_foreign_dtypes_are_foreign_first(tmp_path: Path):
    save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors holds no fishkern statistics"):
        Statistics.load(tmp_path / "model.safetensors")


def test_wrong_dtype(tmp_path: Path):
    path = make().save(tmp_path / "s")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"z": torch.ones(5, 2).int()}, path, metadata)
    with pytest.raises(ValueError, match=r"holds z as int32, its header says float32"):
        Statistics.load(path)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing to load at .*/s: no s.safetensors, no s.safetensors.index"):
        Statistics.load(tmp_path / "s")


def test_broken_sets(tmp_path: Path):
    index = make().save(tmp_path / "s", max_shard_size=THREE_SHARDS)
    shard = tmp_path / "s-00002-of-00003.safetensors"
    with pytest.raises(ValueError, match=r"is one shard of several: load s.safetensors.index.json"):
        Statistics.load(shard)
    content = shard.read_bytes()
    damaged(shard, count="4")
    with pytest.raises(ValueError, match=r"belongs to another save than s.safetensors.index.json: copy all files"):
        Statistics.load(index)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00003.safetensors is missing, which s.safetensors.index"):
        Statistics.load(index)
    shard.write_bytes(content)
    contents = json.loads(index.read_text())
    for weight_map, says in [
        ({"nowhere": shard.name}, "its shards hold no tensor 'nowhere'"),
        ({"z": "../s.safetensors"}, "names the shard '../s.safetensors', which is not a plain file name"),
        ({"z": 3}, "is not an index of shards"),
    ]:
        index.write_text(json.dumps(contents | {"weight_map": weight_map}))
        with pytest.raises(ValueError, match=f"s.safetensors.index.json is damaged: .*{says}"):
            Statistics.load(index)
    index.write_text("{oops")
    with pytest.raises(ValueError, match=r"s.safetensors.index.json is damaged: it is not an index of shards"):
        Statistics.load(tmp_path / "s")
    make().save(tmp_path / "s")
    assert Statistics.load(tmp_path / "s")["m"] == 1.0


def test_failed_save_over_a_damaged_index_removes_nothing(tmp_path: Path):
    """Shards of a damaged index may still be recovered by hand."""
    make().save(tmp_path / "s", max_shard_size=THREE_SHARDS).write_text("{oops")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="becomes zero in float16"):
        Statistics({"w": torch.tensor([1e-9])}, count=1).save(tmp_path / "s", dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == before
