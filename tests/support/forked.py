"""Processes that are fresh but for their imports, which take longer than what most tests ask of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Imports, then forks a child for each case, one after the other, and prints how each ended.
PARENT = """
import json, os, sys, tempfile
imports, code, cases = sys.argv[1:]
exec(imports)
ended = []
for case in json.loads(cases):
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(error.fileno(), 2)
            exec(code, {"__name__": "__main__", **case})
            sys.exit()
        _, status = os.waitpid(child, 0)
        said = []
        for file in (output, error):
            file.seek(0)
            said.append(file.read())
        ended.append([os.waitstatus_to_exitcode(status), *said])
print(json.dumps(ended))
"""


def forked(
    code: str, cases: Sequence[dict[str, Any]], *, imports: str = "import torch, fishkern", **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run code for each case in a process of its own, all of them forked from one that only has imported.

    Args:
        code: Python that finds what a case holds as its global names.
        cases: The names and plain values of each.
        imports: What all of them have imported before.
        environment: Variables besides those of this process.

    Returns:
        Status, output and standard error of each case, in order.
    """
    command = [sys.executable, "-c", PARENT, imports, code, json.dumps(cases)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [subprocess.CompletedProcess(command, *ended) for ended in json.loads(done.stdout)]


# The first lines of code that measures how far a peak rises.
PEAK = """
import re, torch

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
"""
