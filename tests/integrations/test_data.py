"""Rows by file and folder: all of them once, drawn by the seed."""

from __future__ import annotations

import json

import pytest

datasets = pytest.importorskip("datasets")

from fishkern.integrations.data import read  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def table():
    return datasets.Dataset.from_dict({"text": [f"text {n}" for n in range(20)], "label": [n % 3 for n in range(20)]})


def write(table, path):
    match path.suffix:
        case ".parquet":
            table.to_parquet(path)
        case ".csv":
            table.to_csv(path, index=False)
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            table.to_json(path)
        case ".json":
            path.write_text(json.dumps(table.to_list()))
        case ".txt":
            path.write_text("\n".join(table["text"]))
    return str(path)


@pytest.mark.parametrize("first", [False, True], ids=["drawn", "first"])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl", ".json", ".txt"])
def test_every_row_once(table, tmp_path, suffix, first):
    rows = read(write(table, tmp_path / f"rows{suffix}"), first=first)
    found = list(rows)
    assert sorted(place for place, _ in found) == list(range(20))
    assert all(row["text"] == f"text {place}" for place, row in found)
    assert ([place for place, _ in found] == list(range(20))) is first


@pytest.mark.parametrize("first", [False, True], ids=["drawn", "first"])
@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_brackets_in_a_path_are_no_pattern(table, tmp_path, kind, first):
    folder = tmp_path / "rows [v1]*"
    if kind == "saved":
        table.save_to_disk(folder)
    else:
        folder.mkdir()
        write(table, folder / "train.csv")
        write(table.select(range(3)), folder / "validation.csv")
    source = str(folder / "train.csv" if kind == "file" else folder)
    assert len(list(read(source, first=first))) == 20
    if kind == "folder":
        assert len(list(read(source, first=first, split="validation"))) == 3
        with pytest.raises(ValueError, match="test"):
            read(source, split="test")


def test_a_folder_without_data_says_so(tmp_path):
    (tmp_path / "[v1]").mkdir()
    with pytest.raises(ValueError, match=r"\[v1\] cannot be read: it holds no file of data"):
        read(str(tmp_path / "[v1]"))


def test_the_seed_decides(table, tmp_path):
    path = write(table, tmp_path / "rows.csv")
    one, again, other = ([place for place, _ in read(path, seed=seed)] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("kind", ["saved", "saved with splits", "files"])
def test_a_folder(table, tmp_path, kind):
    folder = tmp_path / "folder"
    if kind == "saved":
        table.save_to_disk(folder)
    elif kind == "saved with splits":
        datasets.DatasetDict(train=table, validation=table.select(range(3))).save_to_disk(folder)
    else:
        folder.mkdir()
        write(table, folder / "train.parquet")
        write(table.select(range(3)), folder / "validation.parquet")
    assert len(list(read(str(folder)))) == 20
    if kind != "saved":
        assert len(list(read(str(folder), split="validation"))) == 3
        with pytest.raises(ValueError, match="test"):
            read(str(folder), split="test")


def test_distinct_values(tmp_path):
    table = datasets.Dataset.from_dict({"tags": [[0, 2], [], [1]], "label": [5, None, 5]})
    rows = read(write(table, tmp_path / "rows.jsonl"))
    assert rows.distinct("tags") == {0, 1, 2}
    assert rows.distinct("label") == {5}
