"""What the tests of the operation do not reach: how the kernel cuts, loads and prepares, and how it adds up sums."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from fishkern.ops.project_sum_squared import project_sum_squared_torch as reference
from tests.support.closeness import assert_as_accurate, matrix_steps

pytest.importorskip("triton")

from fishkern.kernels._hardware import A100, H100, INTERPRETER, MI300, Hardware, hardware
from fishkern.kernels._project_sum_squared_configs import Config, Cut
from fishkern.kernels._project_sum_squared_device import sum_tiles_kernel

from fishkern.kernels import _project_sum_squared_configs as configs
from fishkern.kernels import project_sum_squared as kernels

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HERE = hardware(torch.device(DEVICE, 0) if ON_GPU else torch.device(DEVICE))
TABLE = list(configs.configs(HERE))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def inputs(
    N: int, T: int, I: int, O: int, K: int, dtype: torch.dtype = torch.float32, of_directions: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    of_directions = of_directions or dtype
    sizes = ((N, T, I), dtype), ((N, T, O), dtype), ((I, K), of_directions), ((O, K), of_directions)
    return tuple(make(*shape, dtype=of) for shape, of in sizes)


def operands(*factors: Tensor, **options) -> kernels.Operands:
    """Those of the first launch, prepared for this device, or ``on`` another."""
    on, allow_tf32 = options.pop("on", HERE), options.pop("allow_tf32", False)
    out = torch.empty(3, factors[2].shape[1], device=factors[0].device)
    return next(kernels.prepared(*factors, options.get("counted"), out, allow_tf32=allow_tf32, on=on))


def on_meta(N: int, T: int, I: int, O: int, K: int, dtype: torch.dtype = torch.bfloat16, **options) -> kernels.Operands:
    shapes = (N, T, I), (N, T, O), (I, K), (O, K)
    return operands(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), **options)


def check(*factors: Tensor, result: Tensor | None = None, counted: Tensor | None = None) -> None:
    """Compare with float64, row by row."""
    result = kernels.project_sum_squared(*factors, counted=counted) if result is None else result
    truth, plain = (
        reference(*(tensor.to(dtype) for tensor in factors), counted=counted)
        for dtype in (torch.float64, torch.float32)
    )
    steps = matrix_steps(factors[0], max(tensor.shape[-1] for tensor in factors[:2]))
    for row in range(3):
        assert_as_accurate(result[row], plain[row], truth[row], steps=steps)


# [N, T, I, O, K]: several tiles each way, several chunks of an example and examples of a tile, tiles that end within an
# example, odd pitches, more tiles than are added up at a time.
SHAPES = [
    (3, 40, 72, 88, 72), (5, 33, 8, 40, 130), (7, 5, 24, 16, 16), (3, 16, 16, 24, 80), (2, 96, 16, 8, 16),
    (9, 1, 40, 8, 33), (3, 24, 8, 16, 64), (4, 40, 71, 88, 8), (4, 40, 72, 87, 15), (20, 11, 8, 8, 8),
    (2, 8, 1, 40, 16), (35, 32, 8, 8, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(shape, dtype):
    """Also bfloat16, which the launcher lets the interpreter multiply in float32."""
    check(*inputs(*shape, dtype), counted=make(*shape[:2]) > 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("of_factors, of_directions", [pair for pair in product(FLOATS, FLOATS) if pair[0] != pair[1]])
def test_directions_of_another_dtype(of_factors, of_directions, transposed):
    x, g, V, U = inputs(5, 20, 24, 40, 24, of_factors, of_directions)
    if transposed:
        V, U = V.mT.contiguous().mT, U.mT.contiguous().mT
    check(x, g, V, U, counted=make(5, 20) > 0)


def test_directions_that_require_gradients():
    """Nothing is recorded where they are prepared."""
    x, g, V, U = inputs(2, 3, 4, 5, 6, torch.bfloat16, torch.float32)
    check(x.requires_grad_(), g, V.requires_grad_(), U)
    assert not kernels.project_sum_squared(x, g, V, U).requires_grad


def test_prepared_a_part_at_a_time(monkeypatch):
    """Directions that are converted have bounded room."""
    x, g, V, U = inputs(3, 8, 8, 16, 300, torch.bfloat16, torch.float32)
    monkeypatch.setattr(kernels, "_PREPARED", 1)
    out = torch.empty(3, 300)
    sets = [[*kernels.prepared(x, g, V, U, None, out, allow_tf32=allow, on=H100)] for allow in (False, True)]
    for exact, rounded in zip(*sets, strict=True):
        assert (exact.v.dtype, exact.v.shape[0], rounded.v.shape[0]) == (torch.bfloat16, 3, 2)
    assert [part.v.shape[-1] for part in sets[0]] == [128, 128, 44]
    check(x, g, V, U)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("dtype, count", [(torch.float32, 3), (torch.float16, 2)])
def test_pieces_add_up(dtype, count, columns):
    """To the directions themselves, of any size: 8 bits of the mantissa in each."""
    directions = (make(40, 30) * 10.0 ** torch.randint(-6, 4, (40, 30), device=DEVICE)).to(dtype)
    before = directions.clone()
    pieces = kernels._pieces(directions, count, torch.bfloat16, columns=columns)
    assert (pieces.dtype, pieces.shape) == (torch.bfloat16, (count, 40, 30))
    assert pieces.stride()[1:] == ((1, 40) if columns else (32, 1))
    assert torch.equal(pieces.double().sum(0), before.double())
    assert torch.equal(directions, before)


def test_what_is_prepared():
    """Directions of the factors' dtype are taken as they are; tf32 gets columns without gaps."""
    same = on_meta(8, 64, 128, 256, 128, on=H100)
    assert same.v.shape == (1, 128, 128)
    assert same.v.dtype is torch.bfloat16
    exact, rounded = (
        on_meta(8, 64, 128, 256, 128, torch.float32, on=H100, allow_tf32=allow) for allow in (False, True)
    )
    assert exact.v.stride()[1:] == (128, 1)
    assert rounded.v.stride()[1:] == (1, 128)
    assert rounded.u.stride()[1:] == (1, 256)
    odd = on_meta(8, 64, 127, 255, 9, torch.float32, on=H100, allow_tf32=True)
    assert (odd.v.stride(2), odd.u.stride(2)) == (128, 256)  # rows of whole vectors


def arguments(call: kernels.Operands, on: Hardware) -> dict:
    return kernels.launches(call, on)[0].arguments


def test_tf32_is_for_float32_by_permission():
    for dtype, allowed, on, precision in [
        (torch.float32, False, H100, "ieee"), (torch.float32, True, H100, "tf32"), (torch.float32, True, A100, "tf32"),
        (torch.float32, True, MI300, "ieee"), (torch.bfloat16, True, H100, "ieee"),
    ]:  # fmt: skip
        call = on_meta(8, 16, 128, 64, 64, dtype, on=on, allow_tf32=allowed)
        assert arguments(call, on)["PRECISION"] == precision


def test_loads():
    """TMA loads what it can, where there is one; else vectors of 16 bytes are loaded, or single entries."""
    x, g, V, U = (
        torch.empty(shape, dtype=torch.bfloat16) for shape in ((4, 128, 64), (4, 128, 96), (64, 48), (96, 48))
    )
    odd = torch.empty(4, 128, 65, dtype=torch.bfloat16)
    expected = {
        "contiguous": ((x, g, V, U), "tma"),
        "columns of a wider tensor": ((torch.empty(4, 128, 128, dtype=x.dtype)[..., 64:], g, V, U), "tma"),
        "position first": ((x.transpose(0, 1).contiguous().transpose(0, 1), g, V, U), "tma"),
        "directions transposed": ((x, g, V.mT.contiguous().mT, U), "tma"),
        "position last": ((x.mT.contiguous().mT, g, V, U), "vectors"),
        "expanded": ((x[:1].expand(4, 128, 64), g, V, U), "vectors"),
        "directions expanded": ((x, g, V[:, :1].expand(64, 48), U), "vectors"),
        "odd pitch": ((odd[..., :-1], g, V, U), "elements"),
        "odd pitch of directions": ((x, g, V, torch.empty(96, 49, dtype=x.dtype)[:, :-1]), "elements"),
        "every other": ((x, g, torch.empty(64, 96, dtype=x.dtype)[:, ::2], U), "elements"),
    }
    for name, (factors, loads) in expected.items():
        problem = operands(*factors).problem
        assert configs.cut(problem, H100).loads == configs.cut(problem, INTERPRETER).loads == loads, name
        for on in (A100, MI300):
            assert configs.cut(problem, on).loads == loads.replace("tma", "vectors"), name
    # Without matrix units the loop would spill what TMA loads.
    assert configs.cut(on_meta(8, 128, 64, 64, 64, torch.float32, on=H100).problem, H100).loads == "vectors"


@pytest.mark.parametrize("T, loads, BLOCK_T", [
    (512, "tma", 128), (128, "tma", 128), (64, "tma", 64), (16, "tma", 16), (1, "tma", 1), (2, "tma", 2),
    (3, "vectors", 4), (5, "vectors", 8), (17, "vectors", 8), (300, "vectors", 64), (197, "tma", 128),
    (40, "tma", 8), (130, "vectors", 16), (96, "tma", 32), (2048, "tma", 128),
])  # fmt: skip
def test_chunks(T, loads, BLOCK_T):
    """Short examples side by side; long ones in chunks that leave little padding."""
    cut = configs.cut(on_meta(64, T, 4096, 4096, 4096, on=H100).problem, H100)
    assert (cut.loads, cut.BLOCK_T) == (loads, BLOCK_T)


def test_chunks_that_are_no_neighbours():
    """TMA loads several of them only where each position follows the last; else vectors are loaded."""
    for spaced, loads in ((False, "tma"), (True, "vectors")):
        x, g = (torch.empty(64, 24 if spaced else 16, 128, dtype=torch.bfloat16, device="meta")[:, :16] for _ in "xg")
        V = torch.empty(128, 128, dtype=torch.bfloat16, device="meta")
        assert configs.cut(operands(x, g, V, V).problem, H100).loads == loads


@pytest.mark.parametrize("on", [A100, H100, MI300, INTERPRETER], ids=lambda on: on.family)
def test_plan(on: Hardware):
    """Every shape has tiles; sums have a place for each tile, and for each chunk of a longer example."""
    for (I, O, K), (N, T), dtype in product(
        ((4096, 4096, 4096), (4096, 16, 16), (768, 3072, 768), (1, 1, 1), (4097, 128, 1000)),
        ((16, 512), (1, 2048), (256, 16), (4096, 1), (3, 2), (55, 298)),
        FLOATS,
    ):
        call = on_meta(N, T, I, O, K, dtype, on=on)
        planned = kernels.plan(call.problem, on)
        ours, config = planned.arguments, planned.config
        assert ours["CHUNKS"] * ours["BLOCK_T"] == config.ROWS
        assert (ours["chunks"] - 1) * ours["BLOCK_T"] < T <= ours["chunks"] * ours["BLOCK_T"]
        tiles = -(-N * ours["chunks"] // ours["CHUNKS"])
        assert planned.squares == (tiles, 2, K)
        assert planned.joints == ((tiles if ours["WHOLE"] else N * ours["chunks"]), K)
        assert planned.grid == (tiles * -(-K // config.BLOCK_K),)
        assert ours["WHOLE"] == (ours["chunks"] == 1)


def test_few_programs_take_fewer_directions():
    """So that there are more of them."""
    widths = [
        kernels.plan(on_meta(N, T, 4096, 4096, K, on=H100).problem, H100).config.BLOCK_K
        for N, T, K in ((16, 512, 4096), (1, 512, 4096), (1, 512, 768), (8, 512, 16), (16, 512, 100), (16, 512, 64))
    ]
    assert widths == [128, 128, 64, 16, 64, 64]


def test_addresses_past_int32(tmp_path):
    """Sparse files stand for tensors of which single rows are read."""
    if ON_GPU:
        pytest.skip("test_more_entries_than_int32_counts does it with memory")
    far = 2**30
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * far + 512, dtype=torch.float16)
    near = [make(3, 20, 11, dtype=torch.float16), make(3, 20, 5, dtype=torch.float16)]
    near += [make(11, 3, dtype=torch.float16), make(5, 3, dtype=torch.float16)]
    counted = make(3, 20) > 0
    places = {
        0: [(far, 11, 1), (11, far, 1)],  # examples, positions
        2: [(1, far), (far, 1)],  # directions, features
    }
    for number, strides in places.items():
        for stride in strides:
            tensor = near[number][:, :3] if stride == (11, far, 1) else near[number]
            tensor = tensor[:3] if stride == (far, 1) else tensor
            moved = file.as_strided(tensor.shape, stride).copy_(tensor)
            factors = list(near)
            factors[number] = moved
            if stride == (11, far, 1):
                factors[1] = factors[1][:, :3]
            if stride == (far, 1):
                factors[0] = factors[0][..., :3]
            mask = counted[:, : factors[0].shape[1]]
            actual = kernels.project_sum_squared(*factors, counted=mask)
            torch.testing.assert_close(actual, reference(*factors, counted=mask))


@pytest.mark.gpu
def test_more_entries_than_int32_counts():
    N, T, F = 3, 2**14, 2**16
    x, g = torch.zeros(N, T, F, dtype=torch.bfloat16, device=DEVICE), make(N, T, 16, dtype=torch.bfloat16)
    x[:, -8:] = make(N, 8, F, dtype=torch.bfloat16)
    V, U = make(F, 16, dtype=torch.bfloat16), make(16, 16, dtype=torch.bfloat16)
    check(x[:, -8:].contiguous(), g[:, -8:].contiguous(), V, U)  # of moderate size
    ends = kernels.project_sum_squared(x, g, V, U)
    torch.testing.assert_close(ends[[0, 2]], kernels.project_sum_squared(x[:, -8:], g[:, -8:], V, U)[[0, 2]])


def test_too_many_positions_are_refused():
    x = torch.ones(1, 1, 1, device=DEVICE).expand(2**15, 2**15, 1)
    with pytest.raises(ValueError, match="up to 2\\*\\*30 - 1 positions, got 1073741824"):
        kernels.project_sum_squared(x, x, torch.ones(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "chunks"])
@pytest.mark.parametrize("N, chunks, tiles, K", [(1, 1, 1, 1), (3, 5, 7, 40), (70, 3, 33, 33), (32, 4, 64, 32)])
def test_sums_are_added_up(N, chunks, tiles, K, whole):
    """For any number of them, into rows of a wider result; joint sums by example before the square."""
    squares, joints = make(tiles, 2, K), make(tiles if whole else N * chunks, K)
    out = torch.full((3, K + 5), 7.0, device=DEVICE)
    sum_tiles_kernel[(-(-K // 32), 3)](
        squares, joints, out, N, K, chunks, tiles, out.stride(0), WHOLE=whole, BLOCK_LINES=32, BLOCK_K=32
    )
    truth = joints.double() if whole else joints.double().view(N, chunks, K).sum(1).square()
    expected = torch.cat([squares.double().sum(0), truth.sum(0)[None]]).float()
    torch.testing.assert_close(out[:, :K], expected, rtol=1e-5, atol=1e-5)
    assert out[:, K:].eq(7).all()


def test_only_named_tiles_are_used_when_named():
    factors = inputs(3, 20, 24, 40, 20)
    chosen = Cut("vectors", 8, Config(16, 16, 32, 4, 1))
    call = operands(*factors)
    for launch in kernels.launches(call, HERE, chosen):
        launch.run()
    planned = kernels.plan(call.problem, HERE, chosen)
    assert (planned.config, planned.arguments["CHUNKS"], planned.arguments["chunks"]) == (chosen.config, 2, 3)
    check(*factors, result=call.out)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(TABLE) if ON_GPU else 1))
@pytest.mark.parametrize("T", [256, 16, 150])
def test_every_tile_of_the_table(number, T):
    """On the device, at sizes off the tile; the interpreter has tiles of its own."""
    kind, loads, config = TABLE[number]
    odd = loads == "elements"
    dtype = torch.bfloat16 if kind == "16 bits" else torch.float32
    factors = inputs(11, T, 200 - odd, 136 - odd, config.BLOCK_K + 8 - odd, dtype)
    counted = make(11, T) > 0
    length = 16 if T == 16 else 32 if T == 150 and loads != "tma" else config.ROWS
    call = operands(*factors, counted=counted, allow_tf32=kind == "tf32")
    assert configs.multiplies(call.problem, HERE) == kind
    for launch in kernels.launches(call, HERE, Cut(loads, length, config)):
        launch.run()
    if kind == "tf32":
        expected = reference(*factors, counted=counted)
        torch.testing.assert_close(call.out, expected, rtol=1e-2, atol=1e-2 * expected.max().item())
    else:
        check(*factors, result=call.out, counted=counted)


@pytest.mark.gpu
def test_bits_repeat_at_the_size_of_a_layer():
    """With programs that go round the device several times, and with prepared directions."""
    for of_directions in (torch.bfloat16, torch.float32):
        factors = inputs(8, 300, 4096, 1024, 1024, torch.bfloat16, of_directions)
        first = kernels.project_sum_squared(*factors)
        assert all(torch.equal(first, kernels.project_sum_squared(*factors)) for _ in range(10))
