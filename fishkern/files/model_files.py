"""The weights of a model on disk, as transformers writes them: opened without reading a value."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fishkern.files.loading import DTYPES, LARGEST_INDEX, read_header
from fishkern.files.parsing import checked_shape, in_brief, parsing, read_json
from fishkern.files.tensors import StoredTensor

_NAME = "model.safetensors"
# What from_pretrained reads beside the weights: config, tokenizer, processor, code of the model.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".codes")
_NOT_OF_THE_MODEL = ("trainer_state.json", "report.json", ".index.json")


@dataclass(frozen=True)
class ModelFiles:
    """The tensors of a model in a folder.

    Attributes:
        folder: The folder.
        shards: The names of the tensors in each file, by the file's name, in the order of the files.
        tensors: The tensors by name.
        metadata: The header's own entries, by the file's name.
        index: The file that lists several ones, ``None`` for a single one.
    """

    folder: Path
    shards: dict[str, list[str]]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, dict[str, str]]
    index: Path | None


def open_model(folder: str | os.PathLike[str]) -> ModelFiles:
    """Open the weights of a model, reading headers only.

    Args:
        folder: With ``model.safetensors``, or with ``model.safetensors.index.json`` and the files that it names.

    Returns:
        The tensors, which stay on disk.

    Raises:
        FileNotFoundError: There are no such files.
        ValueError: A file is damaged, or has a dtype that is not read.
    """
    folder = Path(folder)
    index, single = folder / f"{_NAME}.index.json", folder / _NAME
    contents = None
    if single.is_file():  # as transformers decides where both are there
        files = [_NAME]
    elif index.is_file():
        contents = _index(index)
        files = list(dict.fromkeys(contents["weight_map"].values()))
    else:
        raise FileNotFoundError(
            errno.ENOENT,
            f"{folder} holds no {_NAME} and no {index.name}: give the folder of a model that save_pretrained wrote.",
        )
    shards: dict[str, list[str]] = {}
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in files:
        header, start, stamp = read_header(folder / file)
        metadata[file] = header.pop("__metadata__")
        shards[file] = list(header)
        for name, entry in header.items():
            shown = in_brief(name, 80)
            if (dtype := DTYPES.get(entry["dtype"])) is None:
                raise ValueError(f"{folder / file} holds {shown} as {entry['dtype']}; read are {', '.join(DTYPES)}.")
            if name in tensors:
                raise ValueError(f"{folder} holds {shown} in two files: save the model again.")
            with parsing(f"{folder / file} is damaged: of {shown}"):
                shape = checked_shape(entry["shape"])
            path = (folder / file).absolute()
            tensors[name] = StoredTensor(path, stamp, dtype, shape, start + entry["data_offsets"][0])
    if contents and (odd := contents["weight_map"].keys() ^ tensors.keys()):
        raise ValueError(f"{index} and its files disagree on {in_brief(min(odd), 80)}: copy or save the model again.")
    return ModelFiles(folder, shards, tensors, metadata, index if contents else None)


def copy_beside(folder: str | os.PathLike[str], target: Path) -> None:
    """Copy what belongs to a model beside its weights, such as its tokenizer, into a folder that lacks it.

    Args:
        folder: A model's.
        target: Another folder; what it has stays as it is.
    """
    for path in sorted(Path(folder).iterdir()):
        of_an_adapter = path.name.startswith("adapter_")
        of_the_model = path.suffix in _BESIDE and not path.name.endswith(_NOT_OF_THE_MODEL) and not of_an_adapter
        if path.is_file() and of_the_model and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _index(path: Path) -> dict[str, Any]:
    with parsing(f"{path} is damaged"):
        contents = read_json(path.read_bytes()) if path.stat().st_size <= LARGEST_INDEX else None
        for name, file in contents["weight_map"].items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
                raise ValueError(f"it says {in_brief(repr(file), 80)} of {in_brief(name, 80)}, which is no file's name")
        return contents
