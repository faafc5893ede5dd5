"""Records: one JSON line for each measurement, with its origin, in ``<results>/<machine>/<name>.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine.origin import origin

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All records of a file, which need not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class Records:
    """The records of one file that share some fields.

    Args:
        path: The file; it is made with its first record.
        origin: Gives the fields that tell where a record comes from.
        **shared: Fields of every record. Records of the file that differ in one of them are no part of this.
    """

    def __init__(self, path: Path, *, origin: Callable[[], Record] = origin, **shared: Any) -> None:
        self._path, self._origin, self._shared = path, origin, shared
        self._read: list[Record] | None = None

    def find(self, **fields: Any) -> list[Record]:
        """Those that have these values, in the order of the file."""
        if self._read is None:
            self._read = [record for record in read(self._path) if _has(record, self._shared)]
        return [record for record in self._read if _has(record, fields)]

    def append(self, *measurements: Record) -> list[Record]:
        """Write measurements at once, so that an interruption leaves all of them or none."""
        lines = [json.dumps({**self._shared, **measured, **self._origin()}) for measured in measurements]
        records = [json.loads(line) for line in lines]
        if lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        if self._read is not None:
            self._read += records
        return records


def _has(record: Record, fields: Record) -> bool:
    plain = json.loads(json.dumps(fields))  # a file has lists where the fields may have tuples
    return all(name in record and record[name] == value for name, value in plain.items())
