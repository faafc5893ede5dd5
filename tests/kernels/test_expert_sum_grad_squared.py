"""What the operation's own tests do not reach: each way the kernel cuts, loads and writes, and its table of chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishkern.ops.expert_sum_grad_squared import expert_sum_grad_squared_torch as reference
from tests.support.closeness import assert_as_accurate, matrix_steps

pytest.importorskip("triton")

from fishkern.kernels._chunks import chunk_table, expert_chunk_table
from fishkern.kernels._hardware import A100, H100, INTERPRETER, MI300, Hardware, hardware

from fishkern.kernels import _sum_grad_squared_configs as configs
from fishkern.kernels import expert_sum_grad_squared as kernels

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HERE = hardware(torch.device(DEVICE, 0) if ON_GPU else torch.device(DEVICE))
TABLE = list(configs.configs(HERE))
LENGTHS, EXPERT = [3, 1, 0, 40, 2, 17], [0, 0, 1, 1, 1, 4]


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(x: Tensor, g: Tensor, out: Tensor | None = None, on: Tensor | None = None, **options) -> None:
    """Compare with float64, added to a result and alone."""
    expert, offsets = torch.tensor(EXPERT), torch.tensor([0, *LENGTHS]).cumsum(0)
    groups = {"expert": expert, "offsets": offsets}
    truth, plain = (reference(x.to(dtype), g.to(dtype), 6, **groups) for dtype in (torch.float64, torch.float32))
    steps = matrix_steps(x, max(LENGTHS))
    for device in {"cpu", DEVICE}:
        there = {name: value.to(device) for name, value in groups.items()}
        alone = kernels.expert_sum_grad_squared(x, g, 6, **there)
        assert_as_accurate(alone, plain, truth, steps=steps)
    out = torch.empty_like(alone) if out is None else out
    out.fill_(0.5)
    assert kernels.expert_sum_grad_squared(x, g, 6, **groups, out=out, **options) is out
    assert_as_accurate(out, 0.5 + plain, 0.5 + truth, steps=steps)


# [I, O]: several tiles each way, the long side either way, odd pitches, sides of one entry.
SHAPES = [(72, 88), (8, 40), (136, 8), (8, 136), (71, 40), (40, 71), (1, 40), (40, 1)]


@pytest.mark.parametrize("I, O, dtype", [
    *((I, O, torch.float32) for I, O in SHAPES), (72, 40, torch.float16), (72, 40, torch.bfloat16),
])  # fmt: skip
def test_shapes(I, O, dtype):
    """Also bfloat16, which the launcher lets the interpreter multiply in float32."""
    check(make(sum(LENGTHS), I, dtype=dtype), make(sum(LENGTHS), O, dtype=dtype))


@pytest.mark.parametrize("I, O", [(72, 88), (136, 8), (40, 72)])
def test_results_stored_by_columns(I, O):
    """The sides change places, so that neighbours are written together."""
    check(make(sum(LENGTHS), I), make(sum(LENGTHS), O), out=torch.empty(6, I, O, device=DEVICE).mT)


@pytest.mark.parametrize("lengths, expert", [
    (LENGTHS, EXPERT), ([1] * 20, [0] * 7 + [2] * 13), ([0, 0], [1, 3]), ([16, 17, 15], [5, 5, 5]), ([100], [0]),
], ids=str)  # fmt: skip
def test_chunk_table(lengths, expert):
    """Chunks are those of the groups as examples, and each expert has those of its own groups."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rows, cuts = expert_chunk_table(torch.tensor(expert), offsets, sum(lengths), 6, 16, torch.device("cpu"))
    plain, _ = chunk_table(offsets, sum(lengths), 1, 16, torch.device("cpu"))
    assert torch.equal(rows, plain)
    counts = [0] * 6
    for e, length in zip(expert, lengths, strict=True):
        counts[e] += -(-length // 16)
    assert cuts.diff().tolist() == counts
    assert cuts[0] == 0


@pytest.mark.parametrize("on", [A100, H100, MI300, INTERPRETER], ids=lambda on: on.family)
def test_plan(on: Hardware):
    """One launch for all experts; results are written by TMA where they allow it, also those stored by columns."""
    for by_columns in (False, True):
        for O, I in ((4096, 4096), (16, 4096), (1024, 256), (1, 1)):
            x, g = (torch.empty(640, width, dtype=torch.bfloat16, device="meta") for width in (I, O))
            out = torch.empty(64, I, O, device="meta").mT if by_columns else torch.empty(64, O, I, device="meta")
            groups = torch.arange(64), torch.arange(65) * 10
            operands = kernels.Operands(x, g, *groups, out).turned()
            cut = kernels.plan(operands.problem, on)
            _, rows, columns = operands.out.shape
            assert {rows, columns} == {O, I}
            assert rows >= columns or columns > 64
            assert cut.grid == (-(-rows // cut.config.BLOCK_O) * -(-columns // cut.config.BLOCK_I), 64)
            assert cut.arguments["TMA_OUT"] is configs.takes_tma(on) or min(O, I) <= 64


def test_addresses_past_int32(tmp_path):
    """Sparse files stand for tensors of which single rows are read and written."""
    if ON_GPU:
        pytest.skip("files are not on a GPU")
    far = 2**30
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * far + 512, dtype=torch.float16)
    x_far = x.as_strided((3, 11), (far, 1)).copy_(torch.randn(3, 11))
    out = torch.from_file(str(tmp_path / "out"), shared=True, size=2 * far + 512, dtype=torch.float32)
    out_far = out.as_strided((3, 5, 11), (far, 11, 1)).zero_()
    g = torch.randn(3, 5).half()
    groups = {"expert": torch.tensor([0, 2]), "offsets": torch.tensor([0, 1, 3])}
    kernels.expert_sum_grad_squared(x_far, g, 3, **groups, out=out_far)
    torch.testing.assert_close(out_far, reference(x_far, g, 3, **groups))


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(TABLE) if ON_GPU else 1))
def test_every_tile_of_the_table(number):
    """On the device, at sizes off the tile; the interpreter has tiles of its own."""
    itemsize, loads, config = TABLE[number]
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    O, I = 2 * config.BLOCK_O + 8 - (loads == "elements"), config.BLOCK_I + 8
    S = sum(LENGTHS)
    x, g = make(S, I, dtype=dtype), make(S, O, dtype=dtype)
    if loads == "vectors":
        g = make(O, S, dtype=dtype).mT
    groups = {"expert": torch.tensor(EXPERT), "offsets": torch.tensor([0, *LENGTHS]).cumsum(0)}
    out = torch.ones(6, O, I, device=DEVICE)
    operands = kernels.Operands(x, g, *groups.values(), out)
    assert configs.loads(operands.problem, HERE) == loads
    kernels.launch_of(operands, HERE, config).run()
    truth, plain = (1 + reference(x.to(kind), g.to(kind), 6, **groups) for kind in (torch.float64, torch.float32))
    assert_as_accurate(out, plain, truth, steps=matrix_steps(x, max(LENGTHS)))


@pytest.mark.gpu
def test_bits_repeat_at_the_size_of_a_layer():
    lengths = torch.randint(0, 90, (64,))
    groups = {
        "expert": torch.arange(16).repeat_interleave(4),
        "offsets": torch.cat([torch.zeros(1), lengths.cumsum(0)]).long(),
    }
    x, g = (make(int(lengths.sum()), width, dtype=torch.bfloat16) for width in (2048, 1024))
    first = kernels.expert_sum_grad_squared(x, g, 16, **groups)
    assert all(torch.equal(first, kernels.expert_sum_grad_squared(x, g, 16, **groups)) for _ in range(10))
