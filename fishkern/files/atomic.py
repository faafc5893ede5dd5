"""One file of any kind, which appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, Literal


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears under its name only when it is complete.

    The bytes go to a hidden ``.<name>.<random>.tmp`` in the same folder, reach the disk (fsync), and are then renamed
    over ``path``. After any exception, also ``KeyboardInterrupt``, that file is gone and the old one is untouched; only
    a killed process leaves it behind, to be deleted by hand. A symbolic link is written through.

    Args:
        path: Where the file shall stand; its folder must exist.
        mode: ``"wb"`` for bytes, ``"w"`` for UTF-8 text.

    Yields:
        The open temporary file; ``.name`` is its path, for libraries that want one.

    Raises:
        OSError: The folder is missing or read-only, ``path`` is no name of a regular file, or the disk is full. The
            message names the path and what to do; ``errno`` and the subclass are those of the system's own error.
    """
    check_target(path)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:40]}.{token_hex(4)}.tmp")
    try:
        try:
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


def check_target(path: str | os.PathLike[str], name: str = "") -> None:
    """Demand the name of a file: one that is there, or that can be made.

    Args:
        path: Where it shall stand. A slash at its end says that it is a folder, which :class:`pathlib.Path` forgets.
        name: What a file in a folder might be called, for the message.

    Raises:
        IsADirectoryError: It is a folder, or says so.
        OSError: Something else stands there.
    """
    given = os.fspath(path)
    if os.path.basename(given) in ("", ".", "..") or os.path.isdir(given):
        example = f", such as {os.path.join(given, name)}" if name else ""
        raise IsADirectoryError(errno.EISDIR, f"{given} names a folder: give the name of a file in it{example}.")
    if os.path.exists(given) and not os.path.isfile(given):  # renaming over /dev/null would replace the device
        raise OSError(errno.EINVAL, f"{given} is not a regular file and cannot be replaced: give the name of a file.")


def sync(folder: Path) -> None:
    """Make a rename durable where the system can (Windows cannot open folders).

    Args:
        folder: What was renamed in.
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
        errno.ENOSPC: f"no space left for {path}; what stood there is unchanged: free space, or write elsewhere.",
        errno.EDQUOT: f"the disk quota is used up for {path}; what stood there is unchanged: write elsewhere.",
    }.get(error.errno, f"{path} cannot be written: {error.strerror}.")
