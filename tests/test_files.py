"""Files appear whole or not at all, and the reason for a failure is one line."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fishkern.files import Format, StoredTensor, atomic_folder, atomic_write, open_tensors, save_tensors
from fishkern.files.loading import DTYPES

FORMAT = Format("fishkern.test", version=1, saved_by="Test.save")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str, error: BaseException | None = None) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)
        if error is not None:
            raise error


def test_writes_bytes_and_text(tmp_path: Path):
    with atomic_write(tmp_path / "a") as file:
        file.write(b"\x00\xff")
        assert Path(file.name).parent == tmp_path  # a rename across disks would not be atomic
    write(str(tmp_path / "b"), "ä")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "ä"
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), FileNotFoundError(errno.ENOENT, "mine")])
@pytest.mark.parametrize("old", [None, "old"])
def test_exception_leaves_the_old_file(tmp_path: Path, error: BaseException, old: str | None):
    path = tmp_path / "a"
    if old is not None:
        path.write_text(old)
    with pytest.raises(type(error)) as raised:
        write(path, "half", error)
    assert raised.value is error  # the caller's own errors pass unchanged
    assert names(tmp_path) == ([] if old is None else ["a"])
    assert old is None or path.read_text() == old


def test_permissions_follow_the_umask(tmp_path: Path):
    """A colleague can read the file where an ordinary one could be read; tempfile's are private."""
    with atomic_write(tmp_path / "a"):
        pass
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_writes_through_a_symbolic_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "second"


def test_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*/none does not exist: create it"):
        atomic_write(tmp_path / "none" / "a").__enter__()


def test_folder_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is not a folder"):
        atomic_write(tmp_path / "file" / "a").__enter__()


def test_only_files_are_replaced():
    with pytest.raises(OSError, match=r"is not a regular file and cannot be replaced"):
        atomic_write("/dev/null").__enter__()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("end", ["", "/", "/.", "/.."])
def test_a_folder_is_no_file(tmp_path: Path, end: str, there: bool):
    """Nor is a path that ends in a slash; the message says how to name a file."""
    if not there and not end:
        pytest.skip("that is the name of a file")
    (tmp_path / "data").mkdir()
    path = f"{tmp_path}/data/runs{end}"
    if there:
        (tmp_path / "data" / "runs").mkdir()
    with pytest.raises(IsADirectoryError, match=r"names a folder: give the name of a file in it.$"):
        atomic_write(path).__enter__()
    with pytest.raises(IsADirectoryError, match=r"names a folder: .* such as .*/test.safetensors.$") as raised:
        save_tensors(path, {"a": torch.ones(2)}, format=FORMAT, metadata={})
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == ["runs"] * there


def test_tensors_do_not_replace_a_device(tmp_path: Path):
    """Nor are they written under a name near it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe is not a regular file and cannot be replaced: give the name of a file"):
        save_tensors(tmp_path / "pipe", {"a": torch.ones(2)}, format=FORMAT, metadata={})
    assert names(tmp_path) == ["pipe"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"may not be written to: change its permissions"):
        atomic_write(tmp_path / "a").__enter__()


@pytest.mark.parametrize(
    ("number", "subclass", "says"),
    [(errno.EACCES, PermissionError, "may not be written to"), (errno.EROFS, OSError, "is on a read-only disk")],
)
def test_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch, number: int, subclass: type, says: str):
    def refuse(*args, **kwargs):
        raise OSError(number, "refused")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(subclass, match=f"the folder .* {says}") as raised:
        atomic_write(tmp_path / "a").__enter__()
    assert raised.value.errno == number


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, monkeypatch, number: int):
    """Also when the disk says so only at fsync, as network disks do."""

    def full(descriptor):
        raise OSError(number, "full")

    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"for {path}; an older file is unchanged") as raised:
        write(path, "new")
    assert raised.value.errno == number
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["a"]
    assert path.read_text() == "old"


def test_every_dtype_and_shape_survives(tmp_path: Path):
    tensors = {
        f"{dtype}.{shape}".removeprefix("torch."): (torch.randn(shape) * 3).to(dtype)
        for dtype in DTYPES.values()
        for shape in [(), (0,), (1,), (7, 3), (2, 0, 3)]
    }
    tensors["strided"] = torch.randn(4, 6).T[::2]
    path = save_tensors(tmp_path / "a", tensors, format=FORMAT, metadata={"more": "ä"})
    assert path == tmp_path / "a.safetensors"
    metadata, stored = open_tensors(path, format=FORMAT)
    assert metadata == {"format": "fishkern.test", "format_version": "1", "more": "ä"}
    assert list(stored) == list(tensors)  # in their order, which the safetensors library loses
    with safe_open(path, framework="pt") as anyone:
        assert anyone.metadata() == metadata
        for name, tensor in tensors.items():
            for read in (anyone.get_tensor(name), stored[name].read()):
                assert read.dtype == tensor.dtype
                assert torch.equal(read, tensor)


def test_reads_what_the_library_writes(tmp_path: Path):
    tensors = {"b": torch.randn(5), "a": torch.randn(2, 3).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "fishkern.test", "format_version": "1"})
    _, stored = open_tensors(tmp_path / "a", format=FORMAT)
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("numel", [1, 3, 12, 100])
def test_pieces_are_the_tensor(tmp_path: Path, numel: int):
    tensor = torch.arange(12.0).view(3, 4)
    save_tensors(tmp_path / "a", {"a": tensor}, format=FORMAT, metadata={})
    stored = open_tensors(tmp_path / "a", format=FORMAT)[1]["a"]
    assert isinstance(stored, StoredTensor)
    pieces = list(stored.pieces(numel))
    assert max(map(len, pieces)) <= numel
    assert torch.equal(torch.cat(pieces), tensor.flatten())


def test_stored_tensor_outlives_a_change_of_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tensors("a", {"a": torch.ones(3)}, format=FORMAT, metadata={})
    stored = open_tensors("a", format=FORMAT)[1]["a"]
    monkeypatch.chdir("/")
    assert torch.equal(stored.read(), torch.ones(3))


def test_large_tensor_goes_piece_by_piece(tmp_path: Path):
    tensor = torch.arange(2**20 + 5, dtype=torch.float32)
    save_tensors(tmp_path / "a", {"a": tensor}, format=FORMAT, metadata={}, dtype=torch.bfloat16)
    stored = open_tensors(tmp_path / "a", format=FORMAT)[1]["a"]
    assert [len(piece) for piece in stored.pieces()] == [2**20, 5]
    assert torch.equal(stored.read(torch.float32), tensor.bfloat16().float())


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-1", "0", "0GB", 0, -3, "1.5GB"])
def test_no_size(tmp_path: Path, size: str | int):
    with pytest.raises(ValueError, match='max_shard_size must be a positive number of bytes or like "5GB"'):
        save_tensors(tmp_path / "a", {"a": torch.ones(3)}, format=FORMAT, metadata={}, max_shard_size=size)


@pytest.mark.parametrize(
    ("size", "files"), [(None, 1), ("5GB", 1), ("4kB", 2), ("4KiB", 1), (4000, 2), (4096, 1), (1, 4), ("1 kb", 4)]
)
def test_shards_by_size(tmp_path: Path, size: str | int | None, files: int):
    """A shard is at most that large, except for a tensor that is larger by itself."""
    tensors = {f"{n}": torch.full((256,), float(n)) for n in range(4)}  # 1024 bytes each
    path = save_tensors(tmp_path / "a", tensors, format=FORMAT, metadata={}, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert path.name == ("a.safetensors" if files == 1 else "a.safetensors.index.json")


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_written_through_a_symbolic_link(tmp_path, there: bool):
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("whole")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "half").write_text("")
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "whole").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
    with pytest.raises(FileExistsError, match="is there already"), atomic_folder(tmp_path / "out"):
        pass
    with pytest.raises(FileNotFoundError, match="does not exist: create it"), atomic_folder(tmp_path / "no" / "out"):
        pass
