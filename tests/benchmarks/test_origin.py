"""Where a record comes from."""

import subprocess

import pytest

from benchmarks.engine import origin


@pytest.mark.parametrize(("changed", "dirty"), [("benchmarks/results/cpu/a.jsonl", False), ("benchmarks/a.py", True)])
def test_records_that_were_added_are_no_changes_of_the_sources(tmp_path, monkeypatch, changed, dirty):
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    path = tmp_path / changed
    path.parent.mkdir(parents=True)
    path.write_text("1\n")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    monkeypatch.setattr(origin, "_git", git)
    assert origin.software()["dirty"] is False
    path.write_text("2\n")
    assert origin.software()["dirty"] is dirty
