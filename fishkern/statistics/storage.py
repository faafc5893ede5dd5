"""Where tensors are kept: on the device of their parameter, on another, or in files that are mapped into memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fishkern import hosts
from fishkern.files import mapped_zeros

Where = str | torch.device | os.PathLike[str] | None
"""A device, a folder, or ``None`` for where something is anyway."""


@dataclass(frozen=True)
class Storage:
    """A place for tensors.

    Args:
        device: The device; ``None`` for that of whatever is kept.
        folder: The folder of the files; ``None`` for memory.
    """

    device: torch.device | None = None
    folder: Path | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether anything is moved at all."""
        return self.device is not None

    def device_for(self, tensor: Tensor) -> torch.device:
        """Say on which device something is kept.

        Args:
            tensor: What it belongs to, such as a parameter.

        Returns:
            The device.
        """
        return tensor.device if self.device is None else self.device

    def keep(self, result: Any) -> Any:
        """Move tensors there.

        Args:
            result: A nest with tensors.

        Returns:
            The nest with tensors of the same values.
        """

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not self.is_elsewhere:
                return leaf
            if (local := hosts.local_part(leaf)) is not leaf:  # of a sharded parameter: this rank's part
                return hosts.placed(moved(local), leaf)
            return leaf.to(self.device) if self.folder is None else in_file(self.folder, leaf).copy_(leaf)

        return tree_map(moved, result)


def in_file(folder: Path, like: Tensor) -> Tensor:
    """Make zeros in a file.

    Args:
        folder: Where the file lies.
        like: Has the shape and dtype.

    Returns:
        The zeros, mapped into memory.
    """
    return mapped_zeros(folder, like.shape, like.dtype)


def storage_of(where: Where, argument: str) -> Storage:
    """Read an argument that names a device or a folder.

    Args:
        where: A string is a device if torch knows it as one, else a folder.
        argument: Its name, for the message.

    Returns:
        The place.

    Raises:
        TypeError: It is something else.
        ValueError: It is a string that is neither, or the meta device, which holds no values.
        FileNotFoundError: There is no such folder.
    """
    if where is None:
        return Storage()
    if isinstance(where, str):
        try:
            where = torch.device(where)
        except RuntimeError:
            if not Path(where).is_dir():
                raise ValueError(
                    f"{argument} names a device such as 'cpu' or 'cuda:1', or a folder that exists, got {where!r}."
                ) from None
    if isinstance(where, torch.device):
        if where.type == "meta":
            raise ValueError(f"{argument} cannot be the meta device, which holds no values: name 'cpu' or a folder.")
        return Storage(where)
    if not isinstance(where, str | os.PathLike):
        raise TypeError(f"{argument} must be a device or a folder, got {type(where).__name__}.")
    folder = Path(where)
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} of {argument} does not exist: create it.")
    return Storage(torch.device("cpu"), folder)
