"""Columns of data: which one plays which role in a task, and which labels a classifier finds in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fishkern.integrations.data import Rows
from fishkern.integrations.tasks import TASKS

CANDIDATES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "premise", "question1", "question", "prompt", "content", "document",
             "article", "review", "tweet", "input"),
    "text_pair": ("sentence2", "hypothesis", "question2"),
    "target": ("target", "summary", "highlights", "completion", "response", "answer", "output"),
    "label": ("label", "labels", "target", "ner_tags", "tags", "fine_label", "coarse_label", "class"),
    "words": ("tokens", "words"),
    "image": ("image", "img"),
}  # fmt: skip
"""For each role, the columns to use if the user names none: the first one that the data has."""

MOST_CLASSES = 10_000  # larger numbers in a column are no labels


@dataclass(frozen=True)
class Head:
    """The labels of a classifier, read from the data.

    Attributes:
        size: How many.
        problem: transformers' ``problem_type``, or ``None`` for its own choice.
        names: Their names, where the data has them.
    """

    size: int
    problem: str | None = None
    names: tuple[str, ...] = ()


def choose_columns(task: str, rows: Rows, named: Mapping[str, str | None]) -> dict[str, str]:
    """Decide which column plays which role.

    A second text is used only where the user names it or, for classification, where it has a usual name and the first
    text has one, too.

    Args:
        task: One of :data:`fishkern.integrations.tasks.TASKS`.
        rows: The data.
        named: Role to the column that the user named, or ``None``.

    Returns:
        Role to column.

    Raises:
        ValueError: The data lacks a named column, a role finds none, or the task does not use a role.
    """
    available = list(rows.features)
    columns = _named_columns(task, available, named)
    for role in TASKS[task].columns:
        if role in columns:
            continue
        usual = _usual_column(role, available, columns.values())
        if usual is None:
            raise ValueError(
                f"{task} needs a column for {option_of(role)}, and the data has {', '.join(available) or 'none'}: "
                "name it."
            )
        columns[role] = usual
    if task == "sequence-classification" and named.get("text") is None and "text_pair" not in columns:
        pair = _usual_column("text_pair", available)
        if pair is not None:
            columns["text_pair"] = pair
    return columns


def unused_label(task: str, columns: Mapping[str, str], rows: Rows) -> str | None:
    """Look for a column of labels that a task does not use.

    Args:
        task: One of :data:`fishkern.integrations.tasks.TASKS`.
        columns: Role to column, as :func:`choose_columns` gives them.
        rows: The data.

    Returns:
        The column, or ``None`` where there is none, or the task uses labels.
    """
    if "label" in TASKS[task].columns:
        return None
    usual = [name for name in CANDIDATES["label"] if name not in CANDIDATES["target"]]
    return next((name for name in usual if name in rows.features and name not in columns.values()), None)


def task_of_labels(column: str, rows: Rows) -> str:
    """Say which task would use a column of labels.

    Args:
        column: One that :func:`unused_label` found.
        rows: The data.

    Returns:
        One of :data:`fishkern.integrations.tasks.TASKS`.
    """
    if any(name in rows.features for name in CANDIDATES["image"]):
        return "image-classification"
    listed = getattr(rows.features[column], "feature", None) is not None
    words = any(name in rows.features for name in CANDIDATES["words"])
    return "token-classification" if listed and words else "sequence-classification"


def read_head(rows: Rows, columns: Mapping[str, str], num_labels: int | None = None) -> Head | None:
    """Read the labels of a classifier from the data.

    Args:
        rows: The data.
        columns: Role to column.
        num_labels: How many there are, if the user says so.

    Returns:
        The labels, or ``None`` where the task has none.

    Raises:
        ValueError: The data does not tell how many there are.
    """
    import datasets

    if "label" not in columns:
        return None
    feature = rows.features[columns["label"]]
    inner = getattr(feature, "feature", feature)  # that of a list
    several = inner is not feature and "words" not in columns
    if isinstance(inner, datasets.ClassLabel):
        return Head(inner.num_classes, None, tuple(inner.names))
    if getattr(inner, "dtype", "").startswith("float") and not several:
        return Head(1, "regression")
    if num_labels is not None:
        return Head(num_labels, "multi_label_classification" if several else None)
    values = rows.distinct(columns["label"])
    if values is None or several:
        raise ValueError("the data does not say how many labels there are: give --num-labels.")
    return _head_of_values(values, columns["label"])


def option_of(role: str) -> str:
    """Spell the option that names a column.

    Args:
        role: A key of :data:`CANDIDATES`.

    Returns:
        Such as ``"--text-pair"``.
    """
    return "--" + role.replace("_", "-")


def _named_columns(task: str, available: Sequence[str], named: Mapping[str, str | None]) -> dict[str, str]:
    roles = (*TASKS[task].columns, *TASKS[task].optional)
    columns = {role: column for role, column in named.items() if column is not None}
    for role, column in columns.items():
        if role not in roles:
            usable = ", ".join(map(option_of, roles))
            raise ValueError(f"{task} has no use for {option_of(role)}; its columns are {usable}.")
        if column not in available:
            raise ValueError(f"the data has no column {column!r} for {option_of(role)}; it has {', '.join(available)}.")
    return columns


def _usual_column(role: str, available: Sequence[str], used: Collection[str] = ()) -> str | None:
    return next((name for name in CANDIDATES[role] if name in available and name not in used), None)


def _head_of_values(values: set[Any], column: str) -> Head:
    if any(isinstance(value, str) for value in values):
        return Head(len(values), None, tuple(sorted(map(str, values))))
    if not values or max(values) > MOST_CLASSES:
        raise ValueError(f"the column {column!r} does not hold labels 0, 1, ...: name another with --label.")
    return Head(int(max(values)) + 1)
