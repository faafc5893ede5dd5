"""The ``fishkern`` command as a whole: help, versions, and how it ends when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import fishkern as fk
from fishkern.cli import application
from tests.support.command import command, fresh_each, refused

pytest.importorskip("typer")

COMMANDS = (
    "estimate", "plan", "verify", "select", "show", "ranks", "init", "tune", "merge", "export", "doctor", "demo",
)  # fmt: skip


def test_version(capsys):
    assert command(capsys, "--version") == (0, f"fishkern {fk.__version__}\n", "")


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fishkern", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fishkern {fk.__version__}\n"), done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_the_commands(capsys, arguments):
    status, output, _ = command(capsys, *arguments)
    assert status == 0
    assert all(re.search(rf"{name}\b", output) for name in COMMANDS)
    assert "fishkern demo --seconds 10" in output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(capsys, name):
    status, output, _ = command(capsys, name, "--help")
    assert status == 0
    assert re.search(rf"Example:\s+fishkern {name}", output)


def test_paragraphs_of_a_help_text_are_wrapped_by_the_terminal_alone():
    texts = [command.help for command in application().registered_commands]
    assert len(texts) == len(COMMANDS)
    assert not [text for text in texts if any("\n" in paragraph for paragraph in text.split("\n\n"))]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["selct"], "selct"),
        (["demo", "--wrong"], "--wrong"),
        (["demo", "--seconds", "soon"], "--seconds"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["estimate", "model"], "--data"),
        (["estimate", "model", "--data", "rows.csv", "--samples", "0"], "--samples"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, word):
    assert word in refused(capsys, *arguments)


def test_debug_shows_the_traceback(capsys):
    status, _, error = command(capsys, "selct", "--debug")
    assert status == 2
    assert error.startswith("Traceback")


def test_without_an_extra_it_says_what_to_install(tmp_path):
    demo = ["demo", "--out", str(tmp_path)]
    calls = [(["doctor"], ("typer",)), (["doctor"], ("rich",)), (demo, ("transformers",))]
    *without_cli, without_transformers = fresh_each(calls)
    for done in without_cli:
        assert done.returncode == 1
        assert re.fullmatch(r'fishkern: .*pip install "fishkern\[cli\]"\n', done.stderr)
    assert without_transformers.returncode == 2
    assert without_transformers.stderr == 'fishkern: this needs transformers: pip install "fishkern[hf]"\n'
