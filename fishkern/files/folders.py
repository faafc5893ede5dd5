"""Writing a folder so that it appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


def check_new_folder(path: str | os.PathLike[str]) -> Path:
    """Check that a folder can be made.

    Args:
        path: New, or an empty folder.

    Returns:
        The path.

    Raises:
        FileExistsError: It is there and not an empty folder.
        FileNotFoundError: The folder that it is to be in does not exist.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, f"{path} is there already: name a new or empty folder.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder {path.absolute().parent} does not exist: create it.")
    return path


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder that appears under its name only when it is complete.

    Its files go to a hidden ``.<name>.<random>.tmp`` beside it, which is then renamed. After any exception that folder
    is gone. A symbolic link is written through.

    Args:
        path: New, or an empty folder.

    Yields:
        The temporary folder.

    Raises:
        OSError: As in :func:`check_new_folder`, or it cannot be written to.
    """
    path = check_new_folder(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:40]}.{token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()  # it is empty
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
