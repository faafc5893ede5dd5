"""The kernels compile for GPUs that are not here, and take what ``resources.json`` says and no more than there is.

After a change of a kernel or its tiles: ``python -m tests.kernels.offline record``, and read the difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
RECORDS = json.loads(Path(__file__).with_name("resources.json").read_text())
OLDEST = "3.6.0"  # that pyproject.toml allows

# Bytes of shared memory that one program may have, which the compiler does not check; registers of a thread. The tiles
# of sm_80 are also for the chips of its kind and after with least of it (sm_86, sm_89, sm_120).
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "gfx942": 65_536}
REGISTERS = {"sm_80": 255, "sm_90": 255, "gfx942": 512}
# What a thread may spill: bytes, all of them after an example's last chunk (an accumulator of these tiles is hundreds);
# on AMD registers.
SPILLED = {"sm_80": 96, "sm_90": 96, "gfx942": 0}
# Of the instructions on the way round the loop over chunks, so many may save or restore an address; none an
# accumulator, that is, none may move a register that a product is added to.
LOOP_SPILLS = 8
# Kernels that stream, for which matrix units have no work; bytes that a thread may spill, once in its short life.
STREAMING = ("topk", "histogram", "adamw", "sgd", "lines", "scales")
STREAMING_SPILLED = 16
# Chips that take the tables of another, with the shared memory that they have.
RELATIVES = {
    "sm_86": 101_376, "sm_89": 101_376, "sm_120": 101_376, "sm_100": 232_448, "gfx90a": 65_536, "gfx950": 163_840,
}  # fmt: skip


def offline(*arguments: str, first_on_path: str = "") -> dict:
    """What ``tests.kernels.offline`` prints; in a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [first_on_path, str(ROOT)]))
    command = [sys.executable, "-m", "tests.kernels.offline", *arguments]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(version: str, taken: dict[str, dict[str, int]]) -> None:
    """Demand the limits from every version of Triton, and the recorded figures from those with a record."""
    wrong = []
    for case, values in taken.items():
        family, dtype, *rest = case.split()
        streams = rest[0] in STREAMING
        spilled = min(SPILLED[family], STREAMING_SPILLED) if streams else SPILLED[family]
        if values["shared"] > SHARED[family]:
            wrong.append(f"{case}: {values['shared']} bytes of shared memory")
        if values["registers"] > REGISTERS[family] or values["spilled"] > spilled:
            wrong.append(f"{case}: {values['registers']} registers, {values['spilled']} spilled")
        if not streams and (values["loop_spills"] > LOOP_SPILLS or values["accumulator_spills"] > 0):
            spills = f"{values['loop_spills']} spills, {values['accumulator_spills']} of accumulators"
            wrong.append(f"{case}: {spills} in the loop over chunks")
        few = any(word.startswith("T=") for word in rest)
        # Matrix units would round float32 to tf32; AMD's multiply it exactly.
        float32 = dtype == "fp32" or rest[-1] == "groups"  # Gram matrices are
        uses_matrix_units = not few and not streams and (not float32 or "tf32" in rest or family == "gfx942")
        if (values["matrix"] > 0) is not uses_matrix_units:
            wrong.append(f"{case}: {values['matrix']} matrix instructions")
        if (values["double"] > 0) is not (rest[0] == "adamw"):  # its bias corrections
            wrong.append(f"{case}: {values['double']} instructions of float64")
        # 16 bytes at a time where addresses allow it: passes over scores are bound by memory.
        wide = rest[-1] in ("select", "ties", "histogram", "sums") if streams else rest[0] == "vectors" and not few
        narrow = "odd" in rest or rest[0] == "elements"
        if (wide and not narrow and values["wide"] == 0) or (narrow and values["wide"] > 0):
            wrong.append(f"{case}: {values['wide']} loads of 16 bytes")
        record = RECORDS.get(version)
        if record is not None and record[case] != values:
            wrong.append(f"{case}: recorded {record[case]}, took {values}")
    assert not wrong, "\n".join(wrong)


def test_widest_tiles():
    """For each architecture and way of loading, with the installed Triton."""
    result = offline("compile")
    assert len(result["taken"]) > 20
    check(result["triton"], result["taken"])


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_planted_tiles_are_caught(which: str):
    """Tiles that cannot be held: the counter of accumulators in the loop counts whatever multiplies them."""
    taken = offline("planted", which)["taken"]
    assert {case.split()[0] for case in taken} == SHARED.keys()
    for case, values in taken.items():
        assert values["accumulator_spills"] > 4, case
        with pytest.raises(AssertionError, match=r"[1-9]\d* of accumulators in the loop over chunks"):
            check("no record", {case: values})


def test_records_hold_every_configuration():
    """For the oldest Triton that we allow and the one that is pinned, with the same cases."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = next(line.removeprefix("triton==") for line in lines if line.startswith("triton=="))
    assert {OLDEST, pinned} <= RECORDS.keys()
    assert len({frozenset(record) for record in RECORDS.values()}) == 1


@pytest.mark.slow
def test_every_configuration():
    result = offline("compile", "all")
    assert result["taken"].keys() == RECORDS[OLDEST].keys()
    check(result["triton"], result["taken"])


@pytest.mark.slow
def test_chips_that_take_the_tables_of_another():
    """All tiles compile for them, and fit the shared memory that they have."""
    taken = offline("relatives")
    assert {case.split()[0] for case in taken} == RELATIVES.keys()
    for case, shared in taken.items():
        assert shared <= RELATIVES[case.split()[0]], case


@pytest.mark.slow
def test_every_call_of_the_benchmark():
    """No compiler fails on what will be measured."""
    assert offline("calls")["compiled"] > 150


@pytest.mark.slow
def test_every_configuration_with_the_oldest_triton(tmp_path: Path):
    """Triton alone comes from a folder of its own; torch does not mind while nothing is launched."""
    folder = str(tmp_path / "triton")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={OLDEST}"]
    if subprocess.run(install).returncode:
        pytest.skip(f"triton {OLDEST} could not be downloaded")
    result = offline("compile", "all", first_on_path=folder)
    assert result["triton"] == OLDEST
    assert result["taken"].keys() == RECORDS[OLDEST].keys()
    check(OLDEST, result["taken"])
    assert offline("calls", first_on_path=folder)["triton"] == OLDEST
