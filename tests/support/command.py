"""The command inside this process, and without some of its packages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fishkern import cli
from tests.support.forked import forked

ROOT = Path(__file__).resolve().parents[2]


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    return exit.value.code or 0, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line with which the command refuses, at status 2 and with nothing on standard output."""
    status, output, error = command(capsys, *arguments)
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert (status, output, len(lines)) == (2, "", 1), error
    assert lines[0].startswith("fishkern: ")
    return lines[0]


def fresh(arguments: list[str], *, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter of its own, where some packages are not installed."""
    (done,) = fresh_each([(arguments, without)])
    return done


def fresh_each(calls: list[tuple[list[str], tuple[str, ...]]]) -> list[subprocess.CompletedProcess[str]]:
    """Several commands like that, each with its missing packages; torch is there in all of them."""
    code = """
import sys
sys.modules |= dict.fromkeys(without)  # what import takes for a missing package
from fishkern.cli import main
main(arguments)
"""
    cases = [{"arguments": arguments, "without": without} for arguments, without in calls]
    return forked(code, cases, imports="import torch")
