"""The command inside this process, and without some of its packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fishkern import cli

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
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules |= dict.fromkeys({without!r})  # what import takes for a missing package
from fishkern.cli import main
main({arguments!r})
"""
    return subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
