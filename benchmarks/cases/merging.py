"""``fishkern merge`` of two checkpoints of 2 GB with their Fishers: against the disk, which reads and writes as much.

Checkpoints in 16 bits, in shards, and Fishers in float32 are made in a temporary folder and removed afterwards. Before
each run what the system keeps of the files is dropped, so that they come from the disk. The command runs in a process
of its own, whose peak of resident memory is measured above what it has before; the disk reads the same files in pieces
of 16 MiB and writes one as large as the result, in turns with it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import pytest
import torch

import fishkern as fk
from benchmarks.engine.memory import peak_mib
from benchmarks.engine.process import in_process
from benchmarks.engine.records import Record
from benchmarks.engine.turns import spread

TESTS = {"run": ["tests/methods/test_fisher_merging.py", "tests/commands/test_merge.py"]}
ROUNDS = 2
SECONDS = 600  # that a merge may take
PIECE = 2**24  # bytes that the disk is asked for at once
SHARE = 0.5  # of the disk's speed, at least
PEAK_MIB = 1024  # at most

pytestmark = pytest.mark.skipif(not hasattr(fk, "merge_checkpoints"), reason="this fishkern merges no checkpoints")


@dataclass(frozen=True)
class Case:
    """Two checkpoints.

    Args:
        tensors: Matrices of each.
        size: Rows and columns of a matrix.
        shards: Files of each.
    """

    tensors: int = 66
    size: int = 4096
    shards: int = 2

    @property
    def checkpoint_bytes(self) -> int:
        """Of one of them, in 16 bits."""
        return 2 * self.tensors * self.size**2


CASE = Case()


@contextmanager
def inputs(case: Case) -> Iterator[Path]:
    """A folder with the checkpoints ``a`` and ``b`` and their Fishers, as long as it is needed."""
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < 8 * case.checkpoint_bytes:
        pytest.skip(f"needs {8 * case.checkpoint_bytes / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
    with tempfile.TemporaryDirectory(prefix="merging-") as folder:
        for seed, name in enumerate("ab"):
            write_checkpoint(case, Path(folder) / name, seed)
            torch.manual_seed(10 + seed)
            squares = torch.rand(case.size, case.size)  # one for all: what is in it takes no time
            fisher = fk.Statistics(dict.fromkeys(names(case), squares), count=8)
            fisher.save(Path(folder) / f"{name}-fisher", max_shard_size="5GB")
        yield Path(folder)


def names(case: Case) -> list[str]:
    """Those of the tensors."""
    return [f"layers.{number}.weight" for number in range(case.tensors)]


def write_checkpoint(case: Case, folder: Path, seed: int) -> None:
    """Write the weights of a model as transformers does, and a config."""
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(seed)
    weight, weight_map = torch.randn(case.size, case.size).bfloat16(), {}
    per_shard = -(-case.tensors // case.shards)
    for shard in range(case.shards):
        inside = names(case)[shard * per_shard : (shard + 1) * per_shard]
        file = f"model-{shard + 1:05d}-of-{case.shards:05d}.safetensors"
        save_file({name: weight.roll(number) for number, name in enumerate(inside)}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(inside, file)
    index = {"metadata": {"total_size": case.checkpoint_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def files_in(folder: Path) -> list[Path]:
    """All of a folder and the folders in it, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def on_disk_alone(files: list[Path]) -> None:
    """Drop what the system keeps of files in memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def by_disk(folder: Path, target: Path, nbytes: int) -> float:
    """Seconds in which the disk reads all files and writes one of so many bytes."""
    on_disk_alone(files_in(folder))
    buffer, start = bytearray(PIECE), time.perf_counter()
    for path in files_in(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with target.open("wb", buffering=0) as file:
        for first in range(0, nbytes, PIECE):
            file.write(memoryview(buffer)[: min(PIECE, nbytes - first)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def by_command(folder: str, target: str) -> Record:
    """Seconds of the command and its peak of resident memory above what there was before."""
    from fishkern import cli

    on_disk_alone(files_in(Path(folder)))
    arguments = ["merge", f"{folder}/a", f"{folder}/b", "--out", target, "--json"]
    for name in "ab":
        (path,) = [
            one for one in Path(folder).glob(f"{name}-fisher*") if one.suffix == ".json" or "-of-" not in one.name
        ]
        arguments += ["--fisher", str(path)]

    def run() -> None:
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert not exit.value.code, "fishkern merge has failed"

    start = time.perf_counter()
    peak = peak_mib(run)
    return {"seconds": time.perf_counter() - start, "peak_mib": round(peak, 1)}


def measured(case: Case, rounds: int, say: Callable[[str], None] = lambda _: None) -> dict[str, Record]:
    """Seconds of both ways in turns, and the peak of the command."""
    with inputs(case) as folder, tempfile.TemporaryDirectory(prefix="merging-out-") as out:
        sizes = {"read_bytes": sum(path.stat().st_size for path in files_in(folder))}
        disk, command = [], []
        for number in range(rounds):
            disk.append(by_disk(folder, Path(out) / "plain", case.checkpoint_bytes))
            target = Path(out) / f"merged-{number}"
            command.append(in_process("benchmarks.cases.merging:by_command", str(folder), str(target), seconds=SECONDS))
            sizes["written_bytes"] = sum(path.stat().st_size for path in files_in(target))
            shutil.rmtree(target)
            say(f"the disk took {disk[-1]:.1f} s, the merge {command[-1]['seconds']:.1f} s")
    seconds = [one["seconds"] for one in command]
    ours = {"seconds": spread(seconds), "peak_mib": max(one["peak_mib"] for one in command), **sizes}
    share = round(median(disk) / median(seconds), 3)
    return {"fishkern": {**ours, "share_of_disk": share}, "disk": {"seconds": spread(disk), **sizes}}


def test_time_and_memory(record, capsys):
    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n    {line}", flush=True)

    figures = measured(CASE, ROUNDS, say)
    for name, one in figures.items():
        shared = {"op": "merging", "quantity": "time", "case": asdict(CASE), "provider": name, "rounds": ROUNDS}
        record("merging", {**shared, "checkpoint_bytes": CASE.checkpoint_bytes, **one})
    ours = figures["fishkern"]
    say(f"{ours['share_of_disk']:.0%} of the disk's speed, in {ours['peak_mib']} MiB")
    assert ours["share_of_disk"] >= SHARE
    assert ours["peak_mib"] <= PEAK_MIB
