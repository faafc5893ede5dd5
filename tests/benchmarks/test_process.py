"""A process that measures ends with the one that started it, however that ends, and when its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.engine import ROOT
from benchmarks.engine.process import Process, in_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SLOW = """
import os, subprocess, time
from pathlib import Path

def sleep(numbers):
    other = subprocess.Popen(["sleep", "60"])
    Path(numbers + ".part").write_text(f"{os.getpid()} {other.pid}")
    os.rename(numbers + ".part", numbers)
    time.sleep(60)
"""

PARENT = """
import sys
from benchmarks.engine.process import in_process
in_process(sys.argv[1], sys.argv[2])
"""


@contextmanager
def begun(code: str, *arguments: str) -> Iterator[subprocess.Popen]:
    """A process that runs code, and is killed in the end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def waited(true: Callable[[], bool], seconds: float = 120) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    return true()


def runs(number: int) -> bool:
    """Whether a process is there that is no zombie."""
    try:
        return _state(number)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent_of(number: int) -> int:
    return int(_state(number)[1])


def _state(number: int) -> list[str]:
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()


@pytest.fixture
def slow(plant, tmp_path) -> tuple[str, Path]:
    """A function that does not return, and where it writes the numbers of its process and of one that it starts."""
    return f"{plant(slow=SLOW)}.slow:sleep", tmp_path / "numbers"


def numbers_in(path: Path) -> list[int]:
    assert waited(path.exists)
    return [int(number) for number in path.read_text().split()]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_process_ends_with_its_parent(slow, kind):
    name, path = slow
    with begun(PARENT, name, str(path)) as parent:
        started = numbers_in(path)
        assert all(map(runs, started))
        parent.send_signal(kind)
    assert waited(lambda: not any(map(runs, started)))


def test_a_process_ends_when_its_time_is_over(slow):
    name, path = slow
    with Process(quiet=True) as process:
        process.call("os:getpid")  # it has started
        with pytest.raises(TimeoutError, match="stopped after 1 s"):
            process.call(name, str(path), seconds=1)
        assert not any(map(runs, numbers_in(path)[:1]))
        assert waited(lambda: not any(map(runs, numbers_in(path))))
    path.unlink()
    with pytest.raises(TimeoutError):
        in_process(name, str(path), seconds=0.01)
    assert not path.exists() or waited(lambda: not any(map(runs, numbers_in(path))))


CASE = """
from benchmarks.engine.process import in_process
TESTS = {{"run": ["unread"]}}

def test_slow():
    in_process({name!r}, {path!r})
"""
RUN = """
import sys
from pathlib import Path
from benchmarks.engine import run
run.why_not = lambda *_: ""
run.run(["case"], Path(sys.argv[2]), package=sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_ends_what_it_waits_for(slow, plant, tmp_path):
    """``python -m benchmarks run``, ended by a time limit, leaves neither pytest nor what that started."""
    name, path = slow
    case = CASE.format(name=name, path=str(path))
    conftest = "def pytest_addoption(parser): parser.addoption('--record')"  # that of the benchmarks imports torch
    package = plant(case=case, conftest=conftest)
    with begun(RUN, package, str(tmp_path / "results")) as runner:
        started = numbers_in(path)
        its_pytest = parent_of(started[0])
        assert its_pytest != runner.pid
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(30) == 143
    assert waited(lambda: not any(map(runs, [its_pytest, *started])))
