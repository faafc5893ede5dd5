"""The kernels compile for GPUs that are not here, and take what ``resources.json`` says and no more than there is.

What the loops of the main tiles execute is in ``instructions.json``. After a change of a kernel or its tiles: ``make
kernels`` records both for each version of Triton, and read the difference.
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
RECORDS, INSTRUCTIONS = (
    json.loads(Path(__file__).with_name(f"{name}.json").read_text()) for name in ("resources", "instructions")
)
OLDEST = "3.6.0"  # that pyproject.toml allows
NEWEST = max(RECORDS, key=lambda version: tuple(map(int, version.split("."))))

# Bytes of shared memory that one program may have, which the compiler does not check; registers of a thread. The tiles
# of sm_80 are also for the chips of its kind and after with least of it (sm_86, sm_89, sm_120).
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "gfx942": 65_536}
REGISTERS = {"sm_80": 255, "sm_90": 255, "gfx942": 512}
# What a thread may spill: bytes, all of them after an example's last chunk (an accumulator of these tiles is hundreds);
# on AMD registers.
SPILLED = {"sm_80": 96, "sm_90": 96, "gfx942": 0}
# Of the instructions on the way round the loop over chunks, so many may save or restore an address; none an
# accumulator, that is, none may move a register that a product is added to. Where each example is one chunk the squares
# are on this way, and the widest tiles leave no register for addresses.
LOOP_SPILLS, LOOP_SPILLS_OF_ONE = 8, 40
# The most instructions of a warp in the loop, by columns of a tile: round it for a chunk; in all of it, which a chunk
# takes with which an example ends; the same where each example is one chunk. And so many with the sum of the gradients.
CHUNK = {16: 115, 32: 115, 64: 125, 128: 110, 256: 110}
EXAMPLE = {16: 160, 32: 200, 64: 290, 128: 310, 256: 540}
EXAMPLE_OF_ONE = {16: 125, 32: 140, 64: 175, 128: 160, 256: 265}
WITH_MEAN = 70
# Kernels that stream, for which matrix units have no work; bytes that a thread may spill, once in its short life.
STREAMING = ("topk", "histogram", "adamw", "sgd", "lines", "scales")
STREAMING_SPILLED = 24
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
        most = LOOP_SPILLS_OF_ONE if "single" in rest else LOOP_SPILLS
        if not streams and (values["loop_spills"] > most or values["accumulator_spills"] > 0):
            spills = f"{values['loop_spills']} spills, {values['accumulator_spills']} of accumulators"
            wrong.append(f"{case}: {spills} in the loop over chunks")
        few = any(word.startswith("T=") for word in rest)
        # Matrix units would round float32 to tf32; AMD's multiply it exactly.
        float32 = dtype == "fp32" or rest[-1] == "groups"  # Gram matrices are
        uses_matrix_units = not few and not streams and (not float32 or "tf32" in rest or family == "gfx942")
        if (values["matrix"] > 0) is not uses_matrix_units:
            wrong.append(f"{case}: {values['matrix']} matrix instructions")
        if values["double"] > 0:  # which consumer chips compute 64 times slower
            wrong.append(f"{case}: {values['double']} instructions of float64")
        # 16 bytes at a time where addresses allow it: passes over scores are bound by memory. Of 16-bit scores a thread
        # selects among four neighbours, which are 8 bytes.
        of_scores = rest[-1] in ("ties", "histogram", "sums") or (rest[-1] == "select" and float32)
        wide = of_scores if streams else rest[0] == "vectors" and not few
        narrow = "odd" in rest or rest[0] == "elements"
        if (wide and not narrow and values["wide"] == 0) or (narrow and values["wide"] > 0):
            wrong.append(f"{case}: {values['wide']} loads of 16 bytes")
        if version in RECORDS and RECORDS[version][case] != values:
            wrong.append(f"{case}: recorded {RECORDS[version][case]}, took {values}")
    assert not wrong, "\n".join(wrong)
    assert version in RECORDS, f"Triton {version} has no table: make kernels records it, once it is in the Makefile"


def check_instructions(version: str, counted: dict[str, dict[str, int]]) -> None:
    """Demand that the loops multiply by matrix units fed by TMA, with no more instructions than are due."""
    wrong = []
    for case, values in counted.items():
        *_, tile = case.split()[:4]
        columns, mean, single = int(tile.split("x")[1]), "mean" in case.split(), "single" in case.split()
        limits = {
            "chunk": (EXAMPLE_OF_ONE if single else CHUNK)[columns] + WITH_MEAN * (mean and single),
            "example": (EXAMPLE_OF_ONE if single else EXAMPLE)[columns] + WITH_MEAN * mean,
            "selects": 0,  # one of an accumulator in flight would wait for it, or read it early
        }
        wrong += [
            f"{case}: {values[name]} {name}, at most {most}" for name, most in limits.items() if values[name] > most
        ]
        if values["loads"] < 2 or (values["stores"], values["adds"]) != (0, 1 + mean):
            wrong.append(f"{case}: TMA loads, stores and adds {values['loads']}, {values['stores']}, {values['adds']}")
        if version in INSTRUCTIONS and INSTRUCTIONS[version][case] != values:
            wrong.append(f"{case}: recorded {INSTRUCTIONS[version][case]}, counted {values}")
    assert not wrong, "\n".join(wrong)
    assert version in INSTRUCTIONS, (
        f"Triton {version} has no table: make kernels records it, once it is in the Makefile"
    )


@pytest.mark.slow
def test_widest_tiles():
    """For each architecture and way of loading, with the installed Triton."""
    result = offline("compile")
    assert len(result["taken"]) > 20
    check(result["triton"], result["taken"])
    assert any("single" in case for case in result["instructions"])
    check_instructions(result["triton"], result["instructions"])


def test_what_a_loop_must_not_do_is_caught():
    """Each limit, on a recorded case that is changed by hand; and a version of Triton without a table."""
    for case in ("sm_90 bf16 tma 128x256x64", "sm_90 bf16 tma 128x256x16 single", "sm_90 bf16 tma 128x128x64 mean"):
        values = INSTRUCTIONS[OLDEST][case]
        check_instructions(OLDEST, {case: values})
        planted = {"chunk": 600, "example": 900, "selects": 1, "loads": 0, "stores": 1, "adds": 0}
        for name, count in planted.items():
            with pytest.raises(AssertionError, match=rf"{name}|TMA"):
                check_instructions("no record", {case: values | {name: count}})
        with pytest.raises(AssertionError, match="recorded"):
            check_instructions(OLDEST, {case: values | {"chunk": values["chunk"] - 1}})
        for check_of_table, recorded in ((check_instructions, INSTRUCTIONS), (check, RECORDS)):
            with pytest.raises(AssertionError, match="Triton 9.9 has no table: make kernels"):
                check_of_table("9.9", {case: recorded[OLDEST][case]})


def test_tiles_that_share_a_multiprocessor_fit_it():
    """As many programs as the table of them says, by registers and shared memory, which each version must leave."""
    pytest.importorskip("triton")
    from fishkern.kernels._sum_grad_squared_configs import TOGETHER

    for config, together in TOGETHER.items():
        tile = f"{config.BLOCK_O}x{config.BLOCK_I}x{config.BLOCK_T}"
        words = " of few registers" if config.maxnreg else ""
        for record in RECORDS.values():
            taken = record[f"sm_90 bf16 tma {tile}{words}"]
            threads = 32 * config.num_warps * together
            assert -(-taken["registers"] // 8) * 8 * threads <= 65_536
            assert (taken["shared"] + 1024) * together <= 233_472  # 1 KiB of each is the driver's


@pytest.mark.slow
def test_planted_tiles_are_caught():
    """Tiles that cannot be held: the counter of accumulators in the loop counts whatever multiplies them."""
    taken = offline("planted")["taken"]
    assert {case.split()[0] for case in taken} == SHARED.keys()
    for case, values in taken.items():
        assert values["accumulator_spills"] > 4, case
        with pytest.raises(AssertionError, match=r"[1-9]\d* of accumulators in the loop over chunks"):
            check("no record", {case: values})


def test_records_hold_every_configuration():
    """For the oldest Triton that we allow and the one that is pinned, with the same cases."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = next(line.removeprefix("triton==") for line in lines if line.startswith("triton=="))
    makefile = (ROOT / "Makefile").read_text().splitlines()
    made = next(line.removeprefix("TRITONS := ").split() for line in makefile if line.startswith("TRITONS := "))
    for records in (RECORDS, INSTRUCTIONS):
        assert {OLDEST, pinned} <= records.keys() == set(made)
        assert len({frozenset(record) for record in records.values()}) == 1


@pytest.mark.slow
def test_every_configuration():
    result = offline("compile", "all")
    assert result["taken"].keys() == RECORDS[OLDEST].keys()
    assert result["instructions"].keys() == INSTRUCTIONS[OLDEST].keys()
    check(result["triton"], result["taken"])
    check_instructions(result["triton"], result["instructions"])


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
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_configuration_with_other_versions(version: str, tmp_path: Path):
    """Triton alone comes from a folder of its own; torch does not mind while nothing is launched."""
    folder = str(ROOT / ".triton" / version)  # of make kernels
    if not Path(folder).is_dir():
        folder = str(tmp_path / "triton")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={version}"]
        if subprocess.run(install).returncode:
            pytest.skip(f"triton {version} could not be downloaded")
    result = offline("compile", "all", first_on_path=folder)
    assert result["triton"] == version
    assert result["taken"].keys() == RECORDS[version].keys()
    check(version, result["taken"])
    check_instructions(version, result["instructions"])
    assert offline("calls", first_on_path=folder)["triton"] == version
