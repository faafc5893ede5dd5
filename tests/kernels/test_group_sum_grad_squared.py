"""What the tests of the operation do not reach: each way the kernel cuts, loads and splits, and how it adds up sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishkern.ops.group_sum_grad_squared import group_sum_grad_squared_torch as reference
from tests.support.closeness import assert_as_accurate, matrix_steps

pytest.importorskip("triton")

from fishkern.kernels._hardware import A100, H100, INTERPRETER, MI300, Hardware, hardware

from fishkern.kernels import _group_by_grams as grams
from fishkern.kernels import _sum_grad_squared_configs as configs
from fishkern.kernels import group_sum_grad_squared as kernels

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HERE = hardware(torch.device(DEVICE, 0) if ON_GPU else torch.device(DEVICE))
TABLE = list(configs.configs(HERE))
GROUPS = ("row", "column", "tensor")


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(x: Tensor, g: Tensor, by: str, **options) -> None:
    """Compare with float64, added to a result and alone."""
    truth, plain = (reference(x.to(dtype), g.to(dtype), by=by, **options) for dtype in (torch.float64, torch.float32))
    offsets = options.get("offsets")
    steps = matrix_steps(x, x.shape[1] if offsets is None else int(offsets.diff().max()))
    alone = kernels.group_sum_grad_squared(x, g, by=by, **options)
    assert_as_accurate(alone, plain, truth, steps=steps)
    out = torch.full_like(alone, 0.5)
    assert kernels.group_sum_grad_squared(x, g, by=by, out=out, **options) is out
    assert_as_accurate(out, 0.5 + plain, 0.5 + truth, steps=steps)


# [N, T, I, O]: several tiles each way, several chunks, parts of one example and of several, the long side either way,
# odd pitches, more lines than are added up at a time.
SHAPES = [
    (5, 40, 72, 88), (7, 33, 8, 40), (3, 17, 136, 8), (3, 17, 8, 136), (9, 20, 24, 16), (4, 40, 71, 88),
    (4, 40, 72, 87), (4, 20, 1, 40), (4, 20, 40, 1), (70, 3, 70, 40), (1, 16, 40, 1100),
]  # fmt: skip


# The interpreter takes seconds for these: the other shapes show what it does in 16 bits, and with the sides swapped.
LARGE = [(70, 3, 70, 40), (1, 16, 40, 1100)]


def cells(shapes: list[tuple[int, ...]], *narrow: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """Shape, dtype and groups: every group in float32, and one in 16 bits, which differ in what is loaded alone."""
    whole = [(shape, torch.float32, by) for shape in shapes for by in GROUPS if by != "column" or shape not in LARGE]
    return whole + [(shape, dtype, "row") for shape in shapes if shape not in LARGE for dtype in narrow]


def named(value: object) -> str:
    """Without the word by which the tests of the references are left out."""
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("shape, dtype, by", cells(SHAPES, torch.bfloat16), ids=named)
def test_dense(shape, dtype, by):
    """Also bfloat16, which the launcher lets the interpreter multiply in float32."""
    N, T, I, O = shape
    check(make(N, T, I, dtype=dtype), make(N, T, O, dtype=dtype), by)


def computed_by(x: Tensor, g: Tensor) -> set[str]:
    """Names of the kernels that a call would launch."""
    out = torch.empty(g.shape[-1], device=x.device)
    return {launch.kernel.fn.__name__ for launch in kernels.launches(kernels.Operands(x, g, None, out), HERE)}


@pytest.fixture
def by_grams(monkeypatch):
    """Gram matrices whatever they cost."""
    monkeypatch.setattr(grams, "MULTIPLICATION", 0)
    assert "group_by_grams_kernel" in computed_by(make(2, 3, 4), make(2, 3, 4))


# [N, T, I, O]: ones, each size of a Gram matrix and one off it, several blocks of features, parts of several examples.
SHORT = [(1, 1, 1, 1), (3, 1, 7, 5), (5, 16, 72, 88), (7, 17, 70, 131), (2, 64, 9, 67), (70, 3, 70, 40)]


@pytest.mark.usefixtures("by_grams")
@pytest.mark.parametrize("shape, dtype, by", cells(SHORT, torch.float16, torch.bfloat16), ids=named)
def test_short_examples(shape, dtype, by):
    N, T, I, O = shape
    check(make(N, T, I, dtype=dtype), make(N, T, O, dtype=dtype), by)


@pytest.mark.usefixtures("by_grams")
@pytest.mark.parametrize("by", GROUPS)
def test_short_examples_of_any_strides(by):
    x, g = make(5, 3, 21).transpose(0, 1)[..., ::2], make(3, 70, 5).mT
    check(x, g, by)
    check(x[:1].expand_as(x), g[:, :1].expand_as(g), by)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.usefixtures("by_grams")
@pytest.mark.parametrize("by", GROUPS)
def test_short_examples_with_padding(by):
    """Products of the activations overflow where the output gradients are zero."""
    x, g = make(3, 9, 20), make(3, 9, 12)
    expected = kernels.group_sum_grad_squared(x[:, :7], g[:, :7], by=by)
    x[:, 7:], g[:, 7:] = 1e30, 0
    torch.testing.assert_close(kernels.group_sum_grad_squared(x, g, by=by), expected)


@pytest.mark.usefixtures("by_grams")
@pytest.mark.parametrize("by", GROUPS)
def test_short_examples_that_cancel(by):
    """Rounding brings no sum of squares below zero."""
    x, g = make(4, 6, 60), make(4, 6, 40)
    x, g = torch.cat([x, -x], dim=1), torch.cat([g, g], dim=1)
    result = kernels.group_sum_grad_squared(x, g, by=by)
    assert (result >= 0).all()
    assert (result <= 1e-5 * kernels.group_sum_grad_squared(x.abs(), g.abs(), by=by)).all()


def test_which_calls_take_grams():
    """Short examples of large layers, unless they are packed or too many."""
    for (N, T, I, O), expected in {
        (8, 16, 4096, 4096): True, (8, 64, 512, 512): True, (8, 65, 4096, 4096): False, (8, 64, 500, 500): False,
        (8, 1, 4096, 16): False, (4096, 64, 4096, 4096): True, (4097, 64, 4096, 4096): False,
    }.items():  # fmt: skip
        x, g = torch.empty(N, T, I, device="meta"), torch.empty(N, T, O, device="meta")
        out = torch.empty(O, device="meta")
        assert grams.takes_grams(kernels.Operands(x, g, None, out).problem) is expected, (N, T, I, O)
        packed = kernels.Operands(x.flatten(0, 1), g.flatten(0, 1), torch.arange(N + 1) * T, out)
        assert not grams.takes_grams(packed.problem)


@pytest.mark.parametrize("by", GROUPS)
@pytest.mark.parametrize("lengths", [[0, 1, 3, 130, 0], [33, 32, 31, 64, 1, 1, 1]], ids=str)
def test_packed(lengths, by):
    x, g = make(sum(lengths), 72), make(sum(lengths), 40)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    check(x, g, by, offsets=offsets)
    check(x[:, :3], g, by, offsets=offsets)


def test_addresses_past_int32(tmp_path):
    """Sparse files stand for tensors of which single rows are read."""
    far = 2**30
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * far + 512, dtype=torch.float16)
    x_far = x.as_strided((3, 20, 11), (far, 11, 1)).copy_(torch.randn(3, 20, 11))
    g = torch.randn(3, 20, 5).half()
    if ON_GPU:
        pytest.skip("files are not on a GPU")
    for by in GROUPS:
        torch.testing.assert_close(kernels.group_sum_grad_squared(x_far, g, by=by), reference(x_far, g, by=by))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("lines, groups", [(1, 1), (3, 300), (40, 5), (2500, 1), (16, 128), (17, 129)])
@pytest.mark.parametrize("add", [True, False])
def test_lines_are_added_up(lines, groups, add, rows):
    """For any number of them, into any strides; lines of one group as those of many."""
    values = make(lines, groups)
    out = torch.full((groups, 2), 3.0, device=DEVICE)[:, int(rows)]
    kernels._sum_lines(values, out, add=add).run()
    torch.testing.assert_close(out, values.double().sum(0).float() + 3 * add, rtol=1e-5, atol=1e-5)
    assert out._base[:, 1 - int(rows)].eq(3).all()


@pytest.mark.parametrize("on", [A100, H100, MI300, INTERPRETER], ids=lambda on: on.family)
def test_plan(on: Hardware):
    """A line for each tile on the other side and each part; no tile is transposed but small ones."""
    for (O, I), (N, T) in (((4096, 4096), (8, 512)), ((256, 4096), (64, 16)), ((16, 4096), (8, 512)), ((1, 1), (1, 1))):
        x, g = (torch.empty(N, T, width, dtype=torch.bfloat16, device="meta") for width in (I, O))
        for rows in (True, False):
            out = torch.empty(O if rows else I, device="meta")
            operands = kernels.Operands(x, g, None, out, rows=rows).long_side_first()
            cut = kernels.plan(operands.problem, on, rows=operands.rows)
            assert cut.groups == len(out)
            across, down = -(-operands.problem.I // cut.config.BLOCK_I), -(-operands.problem.O // cut.config.BLOCK_O)
            assert cut.grid == (across * down, cut.parts)
            assert cut.lines == cut.parts * (across if operands.rows else down)
            assert cut.parts <= N
            assert cut.config.BLOCK_T >= 16


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(TABLE) if ON_GPU else 1))
@pytest.mark.parametrize("rows", [True, False])
def test_every_tile_of_the_table(number, rows):
    """On the device, at sizes off the tile; the interpreter has tiles of its own."""
    itemsize, loads, config = TABLE[number]
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    O, I = 2 * config.BLOCK_O + 8 - (loads == "elements"), config.BLOCK_I + 8
    x, g = make(5, 150, I, dtype=dtype), make(5, 150, O, dtype=dtype)
    if loads == "vectors":
        g = make(5, O, 152, dtype=dtype).mT[:, :150]
    by, out = ("row", torch.ones(O, device=DEVICE)) if rows else ("column", torch.ones(I, device=DEVICE))
    operands = kernels.Operands(x, g, None, out, rows=rows)
    assert configs.loads(operands.problem, HERE) == loads
    for launch in kernels.launches(operands, HERE, config):
        launch.run()
    truth, plain = (1 + reference(x.to(kind), g.to(kind), by=by) for kind in (torch.float64, torch.float32))
    assert_as_accurate(out, plain, truth, steps=matrix_steps(x, 150))


@pytest.mark.gpu
@pytest.mark.parametrize("by", GROUPS)
def test_bits_repeat_at_the_size_of_a_layer(by):
    """With tiles that go round the device several times, and with parts."""
    for O, I in ((4096, 4096), (1024, 256), (4096, 16)):
        x, g = make(8, 300, I, dtype=torch.bfloat16), make(8, 300, O, dtype=torch.bfloat16)
        first = kernels.group_sum_grad_squared(x, g, by=by)
        assert all(torch.equal(first, kernels.group_sum_grad_squared(x, g, by=by)) for _ in range(10))
