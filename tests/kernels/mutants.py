"""Plants errors in the kernel of ``sum_grad_squared`` and says which of them the ordinary tests find.

``python -m tests.kernels.mutants`` prints one line for each and ends with 1 if one survives. Each runs the kernel's
tests on a copy of the sources, in the interpreter or on the device, whichever is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVICE, LAUNCHER = "kernels/_sum_grad_squared_device.py", "kernels/sum_grad_squared.py"
TESTS = ["tests/kernels/test_sum_grad_squared.py", "tests/ops/test_sum_grad_squared.py"]

# What goes wrong -> the file, what stands there, and what is planted.
MUTANTS: dict[str, tuple[str, str, str]] = {
    "squared before the sum over positions": (DEVICE, "last = remaining <= BLOCK_T\n", "last = remaining > 0\n"),
    "last chunk skipped": (DEVICE, "* tl.cdiv(T, BLOCK_T)\n", "* (T // BLOCK_T)\n"),
    "mask of positions one too long": (DEVICE, "(offs_t < remaining)", "(offs_t <= remaining)"),
    "mask of columns forgotten": (DEVICE, "& (offs_i < I)\n        first", "\n        first"),
    "addresses of examples in int32": (DEVICE, "source + example.to(tl.int64)", "source + example"),
    "addresses of columns in int32": (DEVICE, "offs_c.to(tl.int64) * stride_c", "offs_c * stride_c"),
    "gradient not reset after an example": (
        DEVICE, "            grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)\n        # Known", "        # Known"
    ),
    "last part of a split dropped": (LAUNCHER, '"parts": len(parts),', '"parts": len(parts) - 1,'),
    "examples between parts lost": (DEVICE, "(part.to(tl.int64) * N // parts)", "(part.to(tl.int64) * (N // parts))"),
    "out overwritten": (LAUNCHER, "add = out is not None", "add = False"),
    "out not initialised": (LAUNCHER, '"ADD": add and parts == 1', '"ADD": parts == 1'),
    "mean gradient of the last example": (DEVICE, "mean += grad\n            grad", "mean = grad\n            grad"),
    "packed chunks one behind": (DEVICE, "            chunk += 1\n            t = tl.load", "            t = tl.load"),
    "strides of activations ignored": (LAUNCHER, '"stride_xi": x.strides[-1]', '"stride_xi": 1'),
    "few positions: the second forgotten": (DEVICE, "tl.static_range(T)", "tl.static_range(1)"),
}  # fmt: skip


def survivors(names: list[str]) -> list[str]:
    """Run the tests on each mutant.

    Args:
        names: Which of :data:`MUTANTS`.

    Returns:
        Those that no test found.
    """
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("fishkern", "kernels", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if failure := _failure(copy):
            raise RuntimeError(f"the tests fail without a mutant, repair that first:\n{failure}")
        for name in names:
            file, right, wrong = MUTANTS[name]
            source = (copy / file).read_text()
            if source.count(right) != 1:
                raise RuntimeError(f"{name}: {right!r} stands {source.count(right)} times in {file}; adapt the mutant")
            (copy / file).write_text(source.replace(right, wrong))
            failure = _failure(copy)
            (copy / file).write_text(source)
            print(f"{'killed' if failure else 'SURVIVED'}  {name}", flush=True)
            alive += [] if failure else [name]
    return alive


def _failure(copy: Path) -> str | None:
    chosen = ["-q", "-x", "-p", "no:cacheprovider", *TESTS, "-k", "not torch and not memory"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *chosen]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(bool(survivors(sys.argv[1:] or list(MUTANTS))))
