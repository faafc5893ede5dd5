"""Spills are counted where they are: on the way round the loop, of accumulators or not."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.kernels.disassembly import GCN, SASS, loop_spills

# A loop of three blocks: the products, the squares, which are passed over unless an example ends, and the way back.
NVIDIA = """
        /*0000*/      STL [R1], R40 ;
        /*0010*/      {multiply} ;
.L_x_0:
        /*0020*/      {spill} ;
        /*0030*/      {multiply} ;
        /*0040*/ @!P0 BRA `(.L_x_1) ;
        /*0050*/      STL [R1+0x4], R24 ;
        /*0060*/      FFMA R50, R24, R24, R50 ;
        /*0070*/      LDL R24, [R1+0x4] ;
.L_x_1:
        /*0080*/      IADD3 R2, R2, 0x1, RZ ;
        /*0090*/  @P1 BRA `(.L_x_0) ;
        /*00a0*/      LDL R40, [R1] ;
        /*00b0*/      EXIT ;
.L_x_2:
        /*00c0*/      BRA `(.L_x_2);
"""
AMD = """
.LBB0_1:
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	{spill}
	s_cbranch_scc1 .LBB0_3
	scratch_store_dword off, v9, off
	v_fmac_f32_e32 v1, v2, v2
.LBB0_3:
	s_cbranch_scc0 .LBB0_1
	s_endpgm
"""
HGMMA = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24].tnspA.tnspB, R24, gsb0"
HMMA = "HMMA.16816.F32.BF16 R24, R132.reuse, R142, R24"


@pytest.mark.parametrize(
    "multiply, spill, spills, accumulators",
    [
        (HGMMA, "LDL.LU R151, [R1+0x24]", 1, 1),
        (HGMMA, "LDL.LU R152, [R1+0x24]", 1, 0),
        (HGMMA, "STL.64 [R1+0x24], R22", 1, 0),
        (HGMMA, "STL.128 [R1+0x24], R20", 1, 0),
        (HGMMA, "STL.128 [R1+0x24], R21", 1, 1),
        (HMMA, "STL [R1], R27", 1, 1),
        (HMMA, "STL [R1], R28", 1, 0),
        (HMMA, "STL [R1], RZ", 1, 0),
        (HMMA, "LDG.E.128 R24, [R2.64]", 0, 0),
        ("FFMA R24, R2, R3, R24", "LDL R24, [R1]", 1, 1),
        ("FFMA R24, R2, R3, R24", "LDL R23, [R1]", 1, 0),
    ],
)
def test_of_the_way_round_that_ends_no_example(multiply, spill, spills, accumulators):
    """Whatever multiplies; the squares, and the code before and after the loop, are not on the way."""
    counts = loop_spills(NVIDIA.format(multiply=multiply, spill=spill), SASS)
    assert counts == {"loop_spills": spills, "accumulator_spills": accumulators}


def test_of_every_loop_that_multiplies_as_much():
    """A kernel that projects two factors has two."""
    one = NVIDIA.format(multiply=HGMMA, spill="LDL R152, [R1]").partition("        /*00b0*/")[0]
    other = NVIDIA.format(multiply=HGMMA, spill="STL [R1], R24").replace(".L_x_", ".L_x_1")
    assert loop_spills(one + other, SASS) == {"loop_spills": 2, "accumulator_spills": 1}
    smaller = other.replace(HGMMA, "NOP")
    assert loop_spills(one + smaller, SASS) == {"loop_spills": 1, "accumulator_spills": 0}


@pytest.mark.parametrize("spill, spills", [("s_nop 0", 0), ("scratch_load_dwordx4 v[4:7], off, off", 1)])
def test_of_amd_every_spill_counts(spill, spills):
    counts = loop_spills(AMD.format(spill=spill), GCN)
    assert counts == {"loop_spills": spills, "accumulator_spills": spills}


def test_without_a_loop_there_is_nothing_to_say():
    assert loop_spills("        /*0000*/      FFMA R1, R2, R3, R1 ;\n        /*0010*/      EXIT ;", SASS) == {}
    assert loop_spills("        /*0000*/      EXIT ;", SASS) == {}
