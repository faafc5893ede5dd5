"""Rows of data from a file, a folder or the hub, in the order in which they are drawn."""

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
        total: How many there are, or ``None`` if they are read from the start, one by one.
        features: Column name to its type in datasets.
        seed: Of the draw, or ``None`` if they are read from the start.
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
        """List the values of a column, or of the lists in it.

        Args:
            column: Its name.

        Returns:
            Every value once, or ``None`` if the rows are read from the start, so that not all of them are known.
        """
        if self.seed is None:
            return None
        values: set[Any] = set()
        for value in self._dataset[column]:
            values.update(value if isinstance(value, list) else [value])
        return values - {None}


@dataclass(frozen=True)
class _Query:
    """The data that the user named."""

    source: str
    name: str | None
    split: str
    first: bool
    seed: int

    @property
    def path(self) -> Path:
        return Path(self.source).expanduser()


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
        FileNotFoundError: It is not on this machine, and the hub cannot be asked.
        ValueError: It cannot be read, has no such part or configuration, or is empty.
    """
    query = _Query(source, name, split, first, seed)
    path = query.path
    if path.exists() and name is not None:
        raise ValueError(f"{source} is on this machine, and has no configuration {name!r}: leave out --subset.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _rows(query, _saved_dataset(path, split))
    if path.is_file():
        return _loaded(query, *_of_file(query))
    if path.is_dir():
        return _loaded(query, (str(path),), {"data_files": _patterns_in(path)} if glob.has_magic(str(path)) else {})
    return _loaded(query, _of_hub(query), {})


def _of_file(query: _Query) -> tuple[tuple[str], dict[str, Any]]:
    """Give the arguments and options with which load_dataset reads a file."""
    source, path = query.source, query.path
    if path.suffix.lower() not in BUILDERS:
        raise ValueError(f"data files end in {', '.join(BUILDERS)}, got {source}.")
    if query.split != "train":
        raise ValueError(
            f"{source} is one file, which has no part {query.split!r}: leave out --split, or put the files of all "
            "parts into a folder."
        )
    if not path.stat().st_size:
        raise ValueError(f"{source} is empty.")
    builder, options = BUILDERS[path.suffix.lower()]
    return (builder,), {"data_files": glob.escape(str(path)), **options}


def _of_hub(query: _Query) -> tuple[str, ...]:
    """Give the arguments with which load_dataset reads from the hub."""
    source, name = query.source, query.name
    if query.path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {source}.")
    if reason := unreachable():
        raise FileNotFoundError(f"there is no file or folder {source}, and the hub cannot be asked ({reason}).")
    return (source,) if name is None else (source, name)


def _loaded(query: _Query, arguments: tuple[str, ...], options: dict[str, Any]) -> Rows:
    import datasets

    try:
        dataset = datasets.load_dataset(*arguments, split=query.split, streaming=query.first, **options)
        rows = _rows(query, dataset)
        if query.path.suffix.lower() == ".csv" and len(rows.features) == 1 and ";" in next(iter(rows.features)):
            raise ValueError("its columns are separated by ';'. Save it with commas, or as .tsv with tabs.")
        return rows
    except Exception as error:  # each loader raises the errors of its own library
        raise ValueError(f"{query.source} cannot be read: {_innermost(error)}") from error


def _rows(query: _Query, dataset: Any) -> Rows:
    if query.first:
        dataset = dataset if dataset.features else dataset._resolve_features()
    elif not len(dataset):
        raise ValueError("it holds no row.")
    total, seed = (None, None) if query.first else (len(dataset), query.seed)
    features = dict(dataset.features or {})
    return Rows(query.source, query.split, total=total, features=features, seed=seed, _dataset=dataset)


def _patterns_in(folder: Path) -> dict[str, list[str]]:
    """Find the parts of a folder as datasets does, but with brackets in the folder's own name escaped."""
    from datasets.data_files import get_data_patterns

    place = glob.escape(folder.resolve().as_posix())
    try:
        parts = get_data_patterns(place)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} cannot be read: it holds no file of data.") from error
    return {str(split): [f"{place}/{pattern}" for pattern in patterns] for split, patterns in parts.items()}


def _saved_dataset(path: Path, split: str) -> Any:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"{path} holds no split {split!r}; it has {', '.join(loaded)}.")
    return loaded[split]


def _innermost(error: BaseException) -> str:
    """Say which error is beneath datasets' own "an error occurred"."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
    if isinstance(error, SystemError | StopIteration) or not str(error) or "corresponds to no data" in str(error):
        return "it holds no row."
    return " ".join(str(error).split())
