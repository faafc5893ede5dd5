"""Rows of data by file, folder or id, in the order in which they are drawn."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fishkern.integrations.hub import unreachable

BUILDERS = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
}
"""Which loader of datasets reads which file."""


@dataclass(frozen=True)
class Rows:
    """Rows in the order in which they are drawn, each with its place in the data.

    Attributes:
        source: The file, folder or id.
        split: Which part of it.
        total: How many there are, or ``None`` where they are read one by one and not all of them.
        features: Column name to the type that datasets has for it.
        seed: Of the draw, or ``None`` where they come from the start.
    """

    source: str
    split: str
    total: int | None
    features: Mapping[str, Any]
    seed: int | None
    _dataset: Any

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.seed is None:
            yield from enumerate(self._dataset)
            return
        generator = torch.Generator().manual_seed(self.seed)
        for place in torch.randperm(len(self._dataset), generator=generator).tolist():
            yield place, self._dataset[place]

    def distinct(self, column: str) -> set[Any] | None:
        """List the values of a column; where it holds lists, those in them.

        Args:
            column: Its name.

        Returns:
            Every value once, or ``None`` where the rows are read one by one and not all of them.
        """
        if self.seed is None:
            return None
        found: set[Any] = set()
        for value in self._dataset[column]:
            found.update(value if isinstance(value, list) else [value])
        return found - {None}


def read(source: str, *, name: str | None = None, split: str = "train", first: bool = False, seed: int = 0) -> Rows:
    """Open data.

    Args:
        source: A file (parquet, json, jsonl, csv, tsv, txt), a folder that datasets understands or has saved, or an id
            on the hub.
        name: Which configuration of the data on the hub.
        split: Which part.
        first: Take rows from the start and read no further than needed; else they are drawn at random from all.
        seed: Seed of the draw.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: It is neither here nor to be had.
        ValueError: It cannot be read, holds no such part or configuration, or is empty.
    """
    import datasets

    path = Path(source).expanduser()
    if path.exists() and name is not None:
        raise ValueError(f"{source} lies here, and has no configuration {name!r}: leave out --subset.")
    options: dict[str, Any] = {"split": split, "streaming": first}
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(f"data files end in {', '.join(BUILDERS)}, got {source}.")
        if split != "train":
            raise ValueError(
                f"{source} is one file, which has no part {split!r}: leave out --split, or put the files of all parts "
                "into a folder."
            )
        if not path.stat().st_size:
            raise ValueError(f"{source} is empty.")
        kind, more = BUILDERS[path.suffix.lower()]
        arguments, options = (kind,), {**options, "data_files": glob.escape(str(path)), **more}
    elif path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _rows(source, split, first, seed, _from_disk(path, split))
        arguments = (str(path),)
        if glob.has_magic(str(path)):
            options["data_files"] = _patterns_in(path)
    elif path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {source}.")
    else:
        arguments = (source,) if name is None else (source, name)
        if reason := unreachable():
            raise FileNotFoundError(f"there is no file or folder {source}, and the hub cannot be asked ({reason}).")
    try:
        rows = _rows(source, split, first, seed, datasets.load_dataset(*arguments, **options))
        if path.suffix.lower() == ".csv" and len(rows.features) == 1 and ";" in next(iter(rows.features)):
            raise ValueError("its columns are separated by ';'. Save it with commas, or as .tsv with tabs.")
        return rows
    except Exception as error:  # each loader raises what its own library raises
        raise ValueError(f"{source} cannot be read: {_innermost(error)}") from error


def _rows(source: str, split: str, first: bool, seed: int, dataset: Any) -> Rows:
    if first:
        dataset = dataset if dataset.features else dataset._resolve_features()
    if not first and not len(dataset):
        raise ValueError("it holds no row.")
    total = None if first else len(dataset)
    return Rows(source, split, total, dict(dataset.features or {}), None if first else seed, dataset)


def _patterns_in(folder: Path) -> dict[str, list[str]]:
    """Find the parts of a folder as datasets does, which takes a bracket in the folder's own name for a pattern."""
    from datasets.data_files import get_data_patterns

    place = glob.escape(folder.resolve().as_posix())
    try:
        found = get_data_patterns(place)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} cannot be read: it holds no file of data.") from error
    return {str(split): [f"{place}/{pattern}" for pattern in patterns] for split, patterns in found.items()}


def _from_disk(path: Path, split: str) -> Any:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"{path} holds no split {split!r}; it has {', '.join(loaded)}.")
    return loaded[split]


def _innermost(error: BaseException) -> str:
    """Say what lies under datasets' own "an error occurred"."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
    if isinstance(error, SystemError | StopIteration) or not str(error) or "corresponds to no data" in str(error):
        return "it holds no row."
    return " ".join(str(error).split())
