"""``fishkern demo`` prints true statements."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fishkern as fk
from fishkern import cli
from tests.support.command import command

for package in ("transformers", "typer", "rich"):
    pytest.importorskip(package)


@pytest.fixture
def few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard library of forty files: to parse all of them takes longer than the rest."""
    from fishkern.demo import text

    whole, part = Path(text.sysconfig.get_path("stdlib")), tmp_path / "stdlib"
    part.mkdir()
    for path in sorted(whole.glob("*.py"))[:40]:
        shutil.copy(path, part)
    monkeypatch.setattr(text, "sysconfig", SimpleNamespace(get_path=lambda name: str(part)))


@pytest.mark.usefixtures("few_files")
def test_a_short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One demo shows all of it: it takes longer than any of the checks."""
    from typer.testing import CliRunner

    from fishkern.demo import tuning

    monkeypatch.setattr(tuning, "FISHER_EXAMPLES", 16)
    monkeypatch.setattr(tuning, "MEASURED", 16)
    folder = tmp_path / "made" / "on the way"
    arguments = ["demo", "--seconds", "1", "--examples", "20", "--steps", "6", "--device", "cpu", "--out", str(folder)]
    done = CliRunner().invoke(cli.application(), arguments, catch_exceptions=False)
    assert done.exit_code == 0
    check_the_file_is_there_and_loads(done.output, folder)
    check_the_table_names_layers_and_modules(done.output, folder)
    check_the_verification_holds(done.output, folder)
    check_a_part_is_tuned_with_less_and_learns(done.output, folder)
    check_the_last_line_says_what_to_try(done.output, folder)


def check_the_file_is_there_and_loads(output: str, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names - {"fisher.png", "tuning.png"} == {"fisher.safetensors", "delta.safetensors"}
    if find_spec("matplotlib"):
        for name in ("fisher.png", "tuning.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    statistics = fk.Statistics.load(folder / "fisher.safetensors")
    assert statistics.count == 20
    assert statistics.provenance["definition"]["unit"] == "example"
    assert statistics.provenance["runs"][0]["checked"] is True
    assert {covered.path for covered in statistics.coverage.values()} == {"fused"}
    assert all(value.any() for value in statistics.values())


def check_the_table_names_layers_and_modules(output: str, folder: Path) -> None:
    statistics = fk.Statistics.load(folder / "fisher.safetensors")
    parts = {line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")}
    assert {"embed_tokens", "layer 0", "layer 3", "q_proj", "down_proj", "lm_head"} <= parts
    assert {name.split(".")[-2] for name in statistics} <= parts
    shares = [float(share) for share in re.findall(r"│ +([\d.]+)% │ [\d.]+e", output)]
    assert sum(shares) == pytest.approx(200, abs=2)  # by layer, and by type of module


def check_the_verification_holds(output: str, folder: Path) -> None:
    (error,) = re.findall(r"largest relative error (\S+),", output)
    assert float(error) < 1e-4
    assert "the largest 0.5% of all entries: 100.00% the same" in output


def check_a_part_is_tuned_with_less_and_learns(output: str, folder: Path) -> None:
    rows = {cells[0].strip(): cells[1:] for cells in (line.strip("│").split("│") for line in output.splitlines())
            if cells[0].strip().startswith(("everything", "2% by"))}  # fmt: skip
    assert len(rows) == 3
    everything, *parts = ([float(cell.replace(",", "").split()[0]) for cell in cells] for cells in rows.values())
    total = sum(value.numel() for value in fk.Statistics.load(folder / "fisher.safetensors").values())
    delta = fk.Delta.load(folder / "delta.safetensors")
    assert everything[:3] == [total, round(8 * total / 1e6, 2), round(4 * total / 1e6, 2)]
    for trained, state, kept, before, after in parts:
        assert trained == delta.selection.count == int(0.02 * total)
        assert state < everything[1] / 10
        assert kept == round((folder / "delta.safetensors").stat().st_size / 1e6, 2) < everything[2] / 10
        assert before == everything[3]  # nothing has changed
        assert after < before


def check_the_last_line_says_what_to_try(output: str, folder: Path) -> None:
    assert "fishkern estimate ./your-model --data" in output.rstrip().splitlines()[-1]


@pytest.mark.usefixtures("few_files")
def test_text_is_the_same_every_time():
    from fishkern.demo.text import LONGEST, SHORTEST, read_text

    text, held_out = read_text()
    again, held_out_again = read_text()
    assert text == again
    assert all(map(torch.equal, held_out, held_out_again))
    assert len({len(row) for row in held_out}) > 10
    assert all(SHORTEST <= len(row) <= LONGEST and row.min() > 0 for row in held_out)


def test_a_file_of_another_kind_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "fisher.safetensors").write_text("precious")
    status, output, error = command(capsys, "demo", "--out", str(tmp_path))
    assert (status, output) == (2, "")
    assert "--out" in error
    assert (tmp_path / "fisher.safetensors").read_text() == "precious"


@pytest.mark.usefixtures("few_files")
def test_an_interrupt_leaves_no_file(capsys, tmp_path, monkeypatch):
    from fishkern.demo import steps

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "train", interrupted)
    status, _, error = command(capsys, "demo", "--out", str(tmp_path / "demo"), "--examples", "2")
    assert status == 130
    assert "interrupted" in error
    assert not list(tmp_path.glob("demo/*"))
