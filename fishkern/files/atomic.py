"""Write one file of any kind so that it appears whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, Literal

_LONGEST = 40  # characters of its name that a temporary file has, since a name has at most 255 bytes


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears under its name only when it is complete.

    The bytes go to a hidden ``.<name>.<random>.tmp`` in the same folder, reach the disk (fsync), and are then renamed
    over ``path``. After any exception, also ``KeyboardInterrupt``, that file is gone and the old one is untouched; only
    a killed process leaves it behind, to be deleted by hand. A symbolic link is written through.

    Args:
        path: The file; its folder must exist.
        mode: ``"wb"`` for bytes, ``"w"`` for UTF-8 text.

    Yields:
        The open temporary file; ``.name`` is its path, for libraries that want one.

    Raises:
        OSError: The folder is missing or read-only, ``path`` cannot name a regular file, or the disk is full. The
            message names the path and what to do; ``errno`` and the subclass are those of the system's own error.
    """
    check_target(path)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{_prefix(path)}{token_hex(4)}.tmp")
    try:
        try:  # "x" fails where "w" would write into a file that is there
            file = open(temporary, mode.replace("w", "x"), encoding="utf-8" if mode == "w" else None)  # noqa: SIM115
        except OSError as error:
            raise OSError(error.errno, _advice(error, path)) from None
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # others may be the caller's own, about another file
                raise OSError(error.errno, _advice(error, path)) from None
            raise
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync(path.parent)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes have left behind of a file that only one process at a time writes.

    Args:
        path: As given to :func:`atomic_write`. Of a name that is cut there, nothing is removed, since it may be that of
            another file.
    """
    path = Path(os.path.realpath(path))
    if len(path.name) > _LONGEST:
        return
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}????????.tmp"):
        with suppress(OSError):
            left.unlink()


def _prefix(path: Path) -> str:
    """Say how the names of temporary files begin."""
    return f".{path.name[:_LONGEST]}."


def check_target(path: str | os.PathLike[str], name: str = "") -> None:
    """Check that a path names a file that exists or can be created.

    Args:
        path: The path. One that ends in a slash names a folder, which :class:`pathlib.Path` forgets.
        name: Name of an example file in a folder, for the message.

    Raises:
        IsADirectoryError: It names a folder.
        OSError: It names something else that is not a regular file.
    """
    text = os.fspath(path)
    if os.path.basename(text) in ("", ".", "..") or os.path.isdir(text):
        example = f", such as {os.path.join(text, name)}" if name else ""
        raise IsADirectoryError(errno.EISDIR, f"{text} names a folder: give the name of a file in it{example}.")
    if os.path.exists(text) and not os.path.isfile(text):  # renaming over /dev/null would replace the device
        raise OSError(errno.EINVAL, f"{text} is not a regular file and cannot be replaced: give the name of a file.")


def sync(folder: Path) -> None:
    """Make a rename durable where the system can (Windows cannot open folders).

    Args:
        folder: The folder of the renamed file.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _advice(error: OSError, path: Path) -> str:
    return {
        errno.ENOENT: f"the folder {path.parent} does not exist: create it, or write elsewhere.",
        errno.ENOTDIR: f"{path.parent} is not a folder: write elsewhere.",
        errno.EACCES: f"the folder {path.parent} may not be written to: change its permissions, or write elsewhere.",
        errno.EROFS: f"the folder {path.parent} is on a read-only disk: write elsewhere.",
        errno.ENOSPC: f"no space left for {path}; an older file is unchanged: free space, or write elsewhere.",
        errno.EDQUOT: f"the disk quota is used up for {path}; an older file is unchanged: write elsewhere.",
    }.get(error.errno, f"{path} cannot be written: {error.strerror}.")
