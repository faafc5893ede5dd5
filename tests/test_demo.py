"""The ``fishkern`` command: the demo holds what it says, and an error is one line and a status."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fishkern as fk
from fishkern import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short demo prints, and the folder that it writes to."""
    for package in ("transformers", "typer", "rich"):
        pytest.importorskip(package)
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("demo") / "made" / "on the way"
    command = ["demo", "--seconds", "1", "--examples", "20", "--device", "cpu", "--out", str(folder)]
    done = CliRunner().invoke(cli.application(), command, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output, folder


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    pytest.importorskip("typer")
    with pytest.raises(SystemExit) as exit:
        cli.main(list(arguments))
    return exit.value.code or 0, *capsys.readouterr()


def without(*packages: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of the command where some packages are not installed."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules |= dict.fromkeys({packages!r})  # what import takes for a missing package
from fishkern.cli import main
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    return done.returncode, done.stderr


def test_the_file_is_there_and_loads(shown):
    _, folder = shown
    assert [path.name for path in folder.iterdir()] == ["fisher.safetensors"]
    statistics = fk.Statistics.load(folder / "fisher.safetensors")
    assert statistics.count == 20
    assert statistics.provenance["definition"]["unit"] == "example"
    assert statistics.provenance["runs"][0]["checked"] is True
    assert {covered.path for covered in statistics.coverage.values()} == {"fused"}
    assert all(value.any() for value in statistics.values())


def test_the_table_names_layers_and_modules(shown):
    output, folder = shown
    statistics = fk.Statistics.load(folder / "fisher.safetensors")
    parts = {line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")}
    assert {"embed_tokens", "layer 0", "layer 3", "q_proj", "down_proj", "lm_head"} <= parts
    assert {name.split(".")[-2] for name in statistics} <= parts
    shares = [float(share) for share in re.findall(r"│ +([\d.]+)% │ [\d.]+e", output)]
    assert sum(shares) == pytest.approx(200, abs=2)  # by layer, and by type of module


def test_the_comparison_finds_the_loop(shown):
    output, _ = shown
    (error,) = re.findall(r"largest relative error (\S+),", output)
    assert float(error) < 1e-4


def test_the_last_lines_say_what_to_try(shown):
    output, _ = shown
    lines = [line.strip() for line in output.rstrip().splitlines()[-3:]]
    assert lines[0] == "import fishkern as fk"
    assert lines[1].startswith("statistics = fk.estimate(model, batches")


def test_text_is_the_same_every_time():
    from fishkern.demo import LONGEST, SHORTEST, read_text

    text, held_out = read_text()
    again, held_out_again = read_text()
    assert text == again
    assert all(map(torch.equal, held_out, held_out_again))
    assert len({len(row) for row in held_out}) > 10
    assert all(SHORTEST <= len(row) <= LONGEST and row.min() > 0 for row in held_out)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fishkern {fk.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_the_commands(capsys, arguments):
    status, output, _ = run(capsys, *arguments)
    assert status == 0
    assert all(command.__name__ in output for command in cli.COMMANDS)
    assert "fishkern demo --seconds 10" in output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["selct"], "selct"),
        (["demo", "--wrong"], "--wrong"),
        (["demo", "--seconds", "soon"], "--seconds"),
        (["demo", "--seconds", "0"], "--seconds"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, word):
    status, output, error = run(capsys, *arguments)
    assert (status, output) == (2, "")
    assert re.fullmatch(r"fishkern: .+\n", error)
    assert word in error


def test_debug_shows_the_traceback(capsys):
    status, _, error = run(capsys, "selct", "--debug")
    assert status == 2
    assert error.startswith("Traceback")


def test_a_file_of_another_kind_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "fisher.safetensors").write_text("precious")
    status, output, error = run(capsys, "demo", "--out", str(tmp_path))
    assert (status, output) == (2, "")
    assert "--out" in error
    assert (tmp_path / "fisher.safetensors").read_text() == "precious"


def test_an_interrupt_leaves_no_file(capsys, tmp_path, monkeypatch):
    from fishkern import demo

    def interrupted(*arguments):
        raise KeyboardInterrupt

    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "train", interrupted)
    status, _, error = run(capsys, "demo", "--out", str(tmp_path), "--examples", "2")
    assert status == 130
    assert "interrupted" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing):
    status, error = without(missing, arguments=["demo"])
    assert status != 0
    assert re.fullmatch(r'fishkern: .*pip install "fishkern\[cli\]"\n', error)


def test_without_transformers_the_demo_says_what_to_install(tmp_path):
    pytest.importorskip("typer")
    status, error = without("transformers", arguments=["demo", "--out", str(tmp_path)])
    assert status == 2
    assert error == 'fishkern: this needs transformers: pip install "fishkern[hf]"\n'
