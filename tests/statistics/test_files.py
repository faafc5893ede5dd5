"""Statistics on disk: loading gives the saved ones, and an interrupted save leaves the old or the new."""

import errno
import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fishkern.statistics import Covered, Statistics, merge

SINGLE, SHARDED = None, 12  # bytes per shard: three shards
FORMS = [SINGLE, SHARDED]


def make(value: float = 1.0, count: int = 3) -> Statistics:
    tensors = {"z": torch.full((5, 2), value), "a": value + torch.arange(3) / 7, "m": torch.tensor(value)}
    tensors["e"] = torch.ones(0)
    coverage = {name: Covered("fused", tensor.numel()) for name, tensor in tensors.items()}
    coverage["head"] = Covered("left out", 9, "by the caller: ä")
    provenance = {"definition": {"estimator": "DiagonalFisher"}, "runs": [{"value": value, "shape": (1, 2)}]}
    return Statistics(tensors, count=count, provenance=provenance, coverage=coverage)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip(tmp_path: Path, form: int | None, lazy: bool):
    statistics = make()
    saved = statistics.save(tmp_path / "s", max_shard_size=form)
    for path in (saved, tmp_path / "s", tmp_path / "s.safetensors", str(saved)):
        loaded = Statistics.load(path, lazy=lazy)
        assert loaded == statistics
        assert list(loaded) == list(statistics)  # ties between scores are broken by this order
        assert loaded.provenance == statistics.provenance
        assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
        assert "head" not in loaded
        assert repr(loaded).endswith(", on disk)") == lazy
    assert names(tmp_path) == (
        ["s.safetensors"] if form is SINGLE else [*(f"s-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), saved.name]
    )


def test_anyone_can_read_it(tmp_path: Path):
    statistics = make()
    path = statistics.save(tmp_path / "s.safetensors")
    loaded = load_file(path)
    assert loaded.keys() == statistics.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in statistics.items())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "fishkern.statistics"
    assert metadata["format_version"] == "1"
    assert metadata["count"] == "3"
    assert metadata["dtype"] == "float32"
    assert json.loads(metadata["provenance"]) == statistics.provenance
    assert json.loads(metadata["coverage"])["head"] == ["left out", 9, "by the caller: ä"]


def test_shards_follow_the_convention_of_transformers(tmp_path: Path):
    index = json.loads(make().save(tmp_path / "s", max_shard_size=SHARDED).read_text())
    assert index["metadata"]["total_size"] == 4 * make().total
    assert index["metadata"]["format"] == "fishkern.statistics"
    assert list(index["weight_map"]) == list(make())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)


def test_same_statistics_same_bytes(tmp_path: Path):
    assert make().save(tmp_path / "a").read_bytes() == make().save(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype, lazy: bool):
    path = make().save(tmp_path / "s", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    for name, tensor in Statistics.load(path, lazy=lazy).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, make()[name].to(dtype).float())


@pytest.mark.parametrize(
    ("dtype", "value", "says"),
    [
        (torch.float16, 1e5, r"w holds 1e\+05, which float16 cannot \(largest 6.55e\+04\)"),
        (torch.float16, 1e-9, "w holds 1e-09, which becomes zero in float16: use bfloat16"),
        (torch.bfloat16, 3.4e38, "w holds 3.4e.38, which bfloat16 cannot"),
        (torch.float64, 1.0, "dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
    ],
)
def test_dtype_that_loses_values(tmp_path: Path, dtype: torch.dtype, value: float, says: str):
    with pytest.raises(ValueError, match=says):
        Statistics({"w": torch.tensor([1.0, value, 0.0])}, count=1).save(tmp_path / "s", dtype=dtype)
    assert names(tmp_path) == []


def test_infinities_and_the_smallest_pass_through(tmp_path: Path):
    tensors = {"w": torch.tensor([float("inf"), 0.0, 1e-44])}
    loaded = Statistics.load(Statistics(tensors, count=1).save(tmp_path / "s", dtype=torch.bfloat16))
    assert loaded["w"].tolist() == [float("inf"), 0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_lazy_reads_from_disk_on_access(tmp_path: Path, form: int | None):
    statistics = make()
    statistics.save(tmp_path / "s", max_shard_size=form)
    lazy = Statistics.load(tmp_path / "s", lazy=True)
    assert pickle.loads(pickle.dumps(lazy)) == statistics
    assert lazy.rename(lambda name: f"model.{name}") == statistics.rename(lambda name: f"model.{name}")
    assert merge(lazy, lazy) == merge(statistics, statistics)
    lazy["z"].zero_()
    assert torch.equal(lazy["z"], statistics["z"])
    assert torch.equal(torch.cat(list(lazy.pieces("z", 3))), statistics["z"].flatten())
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert lazy.total == statistics.total
    assert "z" in lazy
    with pytest.raises(FileNotFoundError, match=r"is gone since it was opened: load it again"):
        lazy["z"]


def test_lazy_notices_another_save(tmp_path: Path):
    path = make(1.0).save(tmp_path / "s")
    lazy = Statistics.load(path, lazy=True)
    make(2.0).rename(lambda name: f"model.{name}").save(path)
    with pytest.raises(RuntimeError, match=r"has changed since it was opened: load it again"):
        lazy["z"]


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_saving_onto_itself(tmp_path: Path, before: int | None, after: int | None):
    statistics = make()
    statistics.save(tmp_path / "s", max_shard_size=before)
    Statistics.load(tmp_path / "s", lazy=True).save(tmp_path / "s", max_shard_size=after)
    assert Statistics.load(tmp_path / "s") == statistics


class Fuse:
    """Raises at the n-th change of the disk, before or after it is made."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int, after: bool, error: BaseException) -> None:
        self.left, self.after, self.error = n, after, error
        for change in ("replace", "unlink", "fsync"):
            patch.setattr(os, change, partial(self.change, getattr(os, change)))

    def change(self, really, *args) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        try:
            really(*args)
        finally:
            if self.left == 0:
                raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before_form", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_cut_short_anywhere(tmp_path: Path, monkeypatch, error, after: bool, before_form, form):
    """One save after the other is cut short one step later, until one gets through; the old or the new one loads."""
    old, new, other = make(1.0), make(2.0), make(3.0)
    loads_new = set()
    for n in range(1, 100):
        old.save(tmp_path / "s", max_shard_size=before_form)
        with monkeypatch.context() as patch, suppress(type(error)):
            fuse = Fuse(patch, n, after, error)
            new.save(tmp_path / "s", max_shard_size=form)
        loaded = Statistics.load(tmp_path / "s")
        assert loaded in (old, new)
        loads_new.add(loaded == new)
        assert not list(tmp_path.glob(".*.tmp"))
        other.save(tmp_path / "s", max_shard_size=form)
        assert Statistics.load(tmp_path / "s") == other
        assert len(names(tmp_path)) == (1 if form is SINGLE else 4)  # nothing stale is left
        if fuse.left > 0:
            break
    assert loads_new == {False, True}
    assert fuse.left > 0


def test_a_single_file_that_cannot_be_removed_is_stale(tmp_path: Path):
    single = make(1.0).save(tmp_path / "s")
    content = single.read_bytes()
    make(2.0).save(single, max_shard_size=SHARDED)
    single.write_bytes(content)
    assert Statistics.load(single) == make(2.0)


@pytest.mark.parametrize("form", FORMS)
def test_interrupt_while_writing(tmp_path: Path, monkeypatch, form: int | None):
    """Interrupted within a tensor of the last shard, no new file is left."""
    old = make()
    old.save(tmp_path / "s", max_shard_size=SHARDED)
    before = names(tmp_path)
    real = torch.frombuffer

    def interrupt(buffer, dtype):
        if len(buffer) == 4:  # the scalar, saved last
            raise KeyboardInterrupt
        return real(buffer, dtype=dtype)

    monkeypatch.setattr(torch, "frombuffer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(2.0).save(tmp_path / "s", max_shard_size=form)
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert Statistics.load(tmp_path / "s") == old


KILLED = """
import os, signal, sys
import torch
from fishkern.statistics.result import Statistics

path = sys.argv[1] + "/s"

def make(value):
    return Statistics({"z": torch.full((5, 2), value), "a": torch.full((3,), value), "m": torch.tensor(value)}, count=1)

value = 0.0
make(value).save(path)
for form in [12, 12, None, None, 12]:
    for n in range(1000):
        value += 1
        child = os.fork()
        if child == 0:
            steps = 0
            for step in ("replace", "unlink", "fsync", "open"):
                def kill(*args, real=getattr(os, step)):
                    global steps
                    steps += 1
                    if steps == n + 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args)
                setattr(os, step, kill)
            make(value).save(path, max_shard_size=form)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        loaded = {x for tensor in Statistics.load(path).values() for x in tensor.flatten().tolist()}
        assert len(loaded) == 1, loaded
        assert loaded <= {value, last} if n else True, (loaded, value)
        last = loaded.pop()
        if status == 0:
            assert last == value
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
print("steps", n, "files", sorted(name for name in os.listdir(sys.argv[1]) if not name.endswith(".tmp")))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere(tmp_path: Path):
    """A process that is killed cannot clean up; yet the old set or the new one loads, and the next save tidies."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-of-00003.safetensors'") == 3, done.stdout
    assert "'s.safetensors'" not in done.stdout


def test_full_disk(tmp_path: Path, monkeypatch):
    path = make(1.0).save(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match=r"no space left for .*s.safetensors; an older file is unchanged"):
            make(2.0).save(path)
    assert Statistics.load(path)["m"] == 1.0


@pytest.mark.parametrize("form", FORMS)
def test_missing_folder(tmp_path: Path, form: int | None):
    with pytest.raises(FileNotFoundError, match=r"the folder .*/none does not exist: create it"):
        make().save(tmp_path / "none" / "s", max_shard_size=form)


def test_neighbours_are_left_alone(tmp_path: Path):
    """Only shards of this very set are stale, whatever the names look like."""
    model = {"w": torch.ones(2)}
    save_file(model, tmp_path / "s-00001-of-00002.safetensors", {"format": "pt"})
    make().save(tmp_path / "s-0123abcd", max_shard_size=SHARDED)
    before = names(tmp_path)
    for form in (SHARDED, SHARDED, SINGLE):
        make().save(tmp_path / "s", max_shard_size=form)
    assert set(names(tmp_path)) == {*before, "s.safetensors"}
