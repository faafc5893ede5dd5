"""What the operation's own tests do not reach: each way the kernel cuts, loads, splits and writes."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fishkern.ops.sum_grad_squared import sum_grad_squared_torch as reference
from tests.support.closeness import assert_as_accurate, matrix_steps

pytest.importorskip("triton")

from fishkern.kernels._chunks import chunk_table
from fishkern.kernels._hardware import A100, H100, INTERPRETER, MI300, Hardware, hardware
from fishkern.kernels._launch import Launch
from fishkern.kernels._problem import Problem

from fishkern.kernels import _sum_grad_squared_configs as configs
from fishkern.kernels import sum_grad_squared as kernels

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HERE = hardware(torch.device(DEVICE, 0) if ON_GPU else torch.device(DEVICE))
TABLE = list(configs.configs(HERE))


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(x: Tensor, g: Tensor, **options) -> Launch:
    """Compare squares and sums of the gradients with float64, and give the launch that made them."""
    shape = g.shape[-1], x.shape[-1]
    out, mean = (torch.full(shape, 0.5, device=DEVICE) for _ in range(2))
    assert kernels.sum_grad_squared(x, g, out=out, grad_out=mean, **options) is out
    alone = kernels.sum_grad_squared(x, g, **options)
    truth, plain = ([torch.full(shape, 0.5, dtype=dtype, device=DEVICE) for _ in range(2)] for dtype in DTYPES)
    for dtype, (squares, sums) in zip(DTYPES, (truth, plain), strict=True):
        reference(x.to(dtype), g.to(dtype), out=squares, grad_out=sums, **options)
    offsets = options.get("offsets")
    steps = matrix_steps(x, x.shape[1] if offsets is None else int(offsets.diff().max()))
    assert_as_accurate(out, plain[0], truth[0], steps=steps)
    assert_as_accurate(alone, plain[0] - 0.5, truth[0] - 0.5, steps=steps)
    # Summands of both signs: the error is one of their size, not of the sum's.
    magnitude = torch.full_like(truth[1], (x.double().norm() * g.double().norm()).item())
    assert_as_accurate(magnitude + mean.double() - truth[1], magnitude, magnitude, steps=steps)
    return kernels.launches(kernels.Operands(x, g, offsets, out), HERE)[0]


DTYPES = torch.float64, torch.float32
FLOATS = torch.bfloat16, torch.float32


def problem(x: Tensor, g: Tensor, *, mean: bool = False, offsets: Tensor | None = None) -> Problem:
    """The call with these inputs and contiguous results."""
    out = torch.empty(g.shape[-1], x.shape[-1], device="meta")
    return kernels.Operands(x, g, offsets, out, torch.empty_like(out) if mean else None).problem


def problem_of(
    N: int, T: int, I: int, O: int, *, dtype: torch.dtype = torch.bfloat16, mean: bool = False, packed: bool = False
) -> Problem:
    """The call with contiguous inputs of these shapes."""
    x, g = (torch.empty(N, T, width, dtype=dtype, device="meta") for width in (I, O))
    if packed:
        return problem(x.flatten(0, 1), g.flatten(0, 1), mean=mean, offsets=torch.arange(N + 1) * T)
    return problem(x, g, mean=mean)


# [N, T, I, O]: several tiles each way, several chunks, parts of one example and of several, the long side either way.
SHAPES = [
    (5, 40, 72, 88), (7, 33, 8, 40), (3, 17, 136, 8), (3, 17, 8, 136), (1, 16, 64, 32), (9, 20, 24, 16), (6, 3, 72, 40),
    (4, 40, 71, 88), (4, 40, 72, 87), (4, 20, 1, 40), (4, 20, 40, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(shape, dtype):
    """Also bfloat16, which the launcher lets the interpreter multiply in float32."""
    N, T, I, O = shape
    check(make(N, T, I, dtype=dtype), make(N, T, O, dtype=dtype))


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("lengths", [[0, 1, 3, 130, 0], [33, 32, 31, 64, 1, 1, 1], [5] * 9, [96]], ids=str)
def test_packed(lengths, where):
    x, g = make(sum(lengths), 72), make(sum(lengths), 40)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE if where == "device" else "cpu")
    check(x, g, offsets=offsets)
    check(x[:, :3], g, offsets=offsets)


def test_examples_of_one_chunk():
    """Their gradients are products of their own, also with sums of the gradients, with parts and off the tile."""
    for shape in [(5, 16, 72, 88), (9, 16, 24, 16), (3, 16, 40, 72), (2, 13, 72, 40)]:
        N, T, I, O = shape
        launch = check(make(N, T, I, dtype=torch.float16), make(N, T, O, dtype=torch.float16))
        assert launch.arguments["SINGLE"] is True
    for N, T, dtype in [(2, 300, torch.float16), (2, 16, torch.float32)]:
        x, g = (make(N, T, width, dtype=dtype) for width in (24, 40))
        (launch,) = kernels.launches(kernels.Operands(x, g, None, torch.empty(40, 24, device=DEVICE)), HERE)
        assert launch.arguments["SINGLE"] is False


def test_how_long_chunks_are():
    """An example that fits one chunk is one, unless half of it would be padding; others have little padding."""
    lengths = {5: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 16, 128: 64, 300: 64, 36: 64}
    for T, block in lengths.items():
        tiles, _ = configs.tiles(problem_of(256, T, 4096, 11008), H100)
        assert block == tiles.BLOCK_T, T


def test_the_width_of_tiles_is_that_of_the_least_work():
    """Waves of programs, times what a program reads; of equal work the widest, and never one that does not fit."""
    widths = {
        (11008, 4096): 256, (4096, 4096): 256, (2048, 2048): 256, (1024, 4096): 256, (5632, 2048): 256,
        (128, 512): 128, (4096, 200): 256, (640, 256): 128,
    }  # fmt: skip
    for (O, I), width in widths.items():
        call = problem_of(8, 512, I, O)
        tiles, parts = configs.tiles(call, H100)
        assert width == tiles.BLOCK_I, (O, I)
        work = {}
        for other in (128, 256):
            programs = -(-O // 128) * -(-I // other)
            work[other] = min(
                -(-programs * split // 132) * (128 + other) * (-(-8 // split) + (split > 1)) for split in range(1, 9)
            )
        assert work[width] == min(work.values())
        assert parts == 1 or O * I < 2**22


@pytest.mark.parametrize("packed", [False, True])
def test_odd_widths_are_copied_where_several_tiles_read_them(packed, monkeypatch):
    """Into rows of whole 16 bytes, each input that needs it; what is read once is not copied."""
    monkeypatch.setattr(configs, "_READ_ONCE", 16)  # the tiles of the interpreter are small, and so are these tensors
    offsets = torch.tensor([0, 7, 20, 40]) if packed else None
    copies = {}
    copy = kernels._in_vectors
    monkeypatch.setattr(kernels, "_in_vectors", lambda tensor: copies.setdefault(tensor.shape[-1], copy(tensor)))
    # Widths of both inputs, and those of the copied ones.
    for widths, expected in [((35, 49), {35, 49}), ((36, 37), {37}), ((35, 16), set()), ((36, 44), set())]:
        x, g = (make(40, width) if packed else make(2, 20, width) for width in widths)
        copies.clear()
        torch.testing.assert_close(kernels.sum_grad_squared(x, g, offsets=offsets), reference(x, g, offsets=offsets))
        copied = {width for tensor in (x, g) if (width := tensor.shape[-1]) in copies and copies[width] is not tensor}
        assert copied == expected
        for width in copied:
            assert copies[width].stride(-2) * copies[width].element_size() % 16 == 0
            assert torch.equal(copies[width], x if x.shape[-1] == width else g)
    assert configs.worth_a_copy(problem_of(8, 5, 4097, 4097), H100)
    assert not configs.worth_a_copy(problem_of(8, 3, 4097, 4097), H100)  # few positions take no matrix units


def test_strides_that_nothing_reads_compile_nothing():
    """Blocks that TMA brings have one set of arguments, whatever tensor they are columns of."""
    g = torch.empty(4, 64, 2048, dtype=torch.bfloat16, device="meta")
    wider = torch.empty(4, 64, 8192, dtype=torch.bfloat16, device="meta")[..., :4096]
    first = torch.empty(64, 4, 4096, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    out = torch.empty(2048, 4096, device="meta")
    strides = [
        {name: value for name, value in launch.arguments.items() if name.startswith("stride")}
        for x in (torch.empty(4, 64, 4096, dtype=torch.bfloat16, device="meta"), wider, first)
        for launch in kernels.launches(kernels.Operands(x, g, None, out), H100)
    ]
    assert strides == [dict.fromkeys(strides[0], 0)] * 3


@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_few_positions_take_no_matrix_units(T):
    launch = check(make(5, T, 72), make(5, T, 40))
    assert launch.kernel is kernels.device.few_positions_kernel


def test_addresses_past_int32(tmp_path):
    """Sparse files stand for tensors of which single rows are read and written."""
    if ON_GPU:
        pytest.skip("test_more_entries_than_int32_counts does it with memory")
    far = 2**30
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * far + 512, dtype=torch.float16)
    out = torch.from_file(str(tmp_path / "out"), shared=True, size=2 * far + 64, dtype=torch.float32)
    for T in (3, 20):
        x_far = x.as_strided((3, T, 11), (far, 11, 1)).copy_(make(3, T, 11))
        x_wide = x.as_strided((2, T, 3), (11 * T, 11, far)).copy_(make(2, T, 3))
        g = make(3, T, 5, dtype=torch.float16)
        torch.testing.assert_close(kernels.sum_grad_squared(x_far, g), reference(x_far, g))
        torch.testing.assert_close(kernels.sum_grad_squared(g[:2], x_wide), reference(g[:2], x_wide))
        far_rows = out.as_strided((3, 11), (far, 1)).zero_()
        kernels.sum_grad_squared(x_far, g[..., :3], out=far_rows)
        torch.testing.assert_close(far_rows, reference(x_far, g[..., :3]))


def test_loads():
    """TMA loads what it can, where there is one; else vectors of 16 bytes are loaded, or single entries."""
    x, g = torch.empty(4, 64, 4096, dtype=torch.bfloat16), torch.empty(4, 64, 2048, dtype=torch.bfloat16)
    odd = torch.empty(4, 64, 4097, dtype=torch.bfloat16)
    expected = {
        "contiguous": (x, "tma"),
        "columns of a wider tensor": (torch.empty(4, 64, 8192, dtype=torch.bfloat16)[..., 4096:], "tma"),
        "one example of many": (x[:1], "tma"),
        "position first": (x.transpose(0, 1).contiguous().transpose(0, 1), "tma"),
        "position last": (x.mT.contiguous().mT, "vectors"),
        "expanded": (x[:1].expand(4, 64, 4096), "vectors"),
        "odd pitch": (odd[..., :-1], "elements"),
        "odd address": (odd.flatten()[1 : 1 + x.numel()].view(x.shape), "elements"),
        "every other": (odd[..., ::2], "elements"),
    }
    for name, (tensor, loads) in expected.items():
        call = problem(tensor, g[: len(tensor)])
        assert configs.loads(call, H100) == configs.loads(call, INTERPRETER) == loads, name
        for on in (A100, MI300):
            assert configs.loads(call, on) == loads.replace("tma", "vectors"), name


@pytest.mark.parametrize("on", [A100, H100, MI300, INTERPRETER], ids=lambda on: on.family)
def test_choice(on: Hardware):
    """Every shape has tiles; partial results fit the workspace; no part is without an example."""
    shapes = (1, 1), (4096, 16), (1024, 1024), (1024, 4096), (11008, 4096), (128256, 4096)
    examples = (1, 1), (8, 512), (256, 16), (4096, 1), (3, 2), (55, 298)
    for dtype, (O, I), (N, T), packed in product(FLOATS, shapes, examples, (True, False)):
        call = problem_of(N, T, I, O, dtype=dtype, packed=packed)
        tiles, parts = configs.tiles(call, on)
        assert 1 <= parts <= N
        assert parts == 1 or parts * O * I * 4 <= configs.WORKSPACE
        assert tiles.BLOCK_T >= 16 or (not packed and T <= configs.FEW_POSITIONS)
    assert configs.tiles(problem_of(8, 512, 4096, 11008), H100)[1] == 1
    assert configs.tiles(problem_of(8, 512, 1024, 1024), H100)[1] > 1


@pytest.mark.parametrize(
    "on, itemsize, loads, width",
    [
        (A100, 2, "vectors", 128), (A100, 4, "vectors", 64), (A100, 4, "elements", 64),
        (H100, 2, "tma", 128), (H100, 4, "tma", 128), (MI300, 4, "vectors", 128),
    ],
)  # fmt: skip
def test_tiles_with_the_mean_gradient(on: Hardware, itemsize: int, loads: str, width: int):
    """A third tile needs its registers: not wider than what ``resources.json`` shows to fit."""
    odd = int(loads == "elements")
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    with_mean, alone = (problem_of(8, 512, 4096 + odd, 11008, dtype=dtype, mean=mean) for mean in (True, False))
    assert configs.loads(alone, on) == loads
    assert width == configs.tiles(with_mean, on)[0].BLOCK_I
    assert width <= configs.tiles(alone, on)[0].BLOCK_I


@pytest.mark.parametrize(
    "family, properties",
    [
        ("sm_80", dict(major=8, minor=9, shared_memory_per_block_optin=101_376)),
        ("sm_80", dict(major=12, minor=0, shared_memory_per_block_optin=101_376)),
        ("sm_90", dict(major=9, minor=0, shared_memory_per_block_optin=232_448)),
        ("sm_90", dict(major=10, minor=0, shared_memory_per_block_optin=232_448)),
        ("gfx942", dict(gcnArchName="gfx950:sramecc+:xnack-")),
    ],
)
def test_whose_tables_a_device_takes(family, properties, monkeypatch):
    """The nearest below its own, as far as its shared memory goes."""
    described = SimpleNamespace(multi_processor_count=100, **properties)
    monkeypatch.setattr(torch.version, "hip", "7.0" if "gcnArchName" in properties else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    shared = properties.get("shared_memory_per_block_optin", 163_840)
    assert hardware.__wrapped__(torch.device("cuda", 0)) == Hardware(family, 100, shared)


def test_no_chunks_are_copied_under_capture(monkeypatch):
    """A replay would copy them again, from memory that is gone by then."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    offsets = torch.tensor([0, 3, 5])
    with pytest.raises(RuntimeError, match="pad the examples to one length"):
        chunk_table(offsets, 5, 1, 16, torch.device("cuda", 0))
    chunks, _ = chunk_table(offsets, 5, 1, 16, torch.device("cpu"))  # where they are needed: no copy
    assert chunks[:4].tolist() == [0, 3, 3, 2]


def test_only_named_tiles_are_used_when_named():
    x, g, out = make(3, 20, 24), make(3, 20, 40), torch.zeros(40, 24, device=DEVICE)
    config = configs.Config(16, 16, 16, 4, 1)
    (launch,) = kernels.launches(kernels.Operands(x, g, None, out), HERE, config)
    assert config.constants.items() <= launch.arguments.items()
    launch.run()
    torch.testing.assert_close(out, reference(x, g))


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(TABLE) if ON_GPU else 1))
def test_every_tile_of_the_table(number):
    """On the device, at sizes off the tile; the interpreter has tiles of its own."""
    itemsize, loads, config = TABLE[number]
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    O, I = 2 * config.BLOCK_O + 8 - (loads == "elements"), config.BLOCK_I + 8
    x, g = make(5, 150, I, dtype=dtype), make(5, 150, O, dtype=dtype)
    if loads == "vectors":
        g = make(5, O, 152, dtype=dtype).mT[:, :150]
    out = torch.ones(O, I, device=DEVICE)
    (launch,) = kernels.launches(kernels.Operands(x, g, None, out), HERE, config)
    assert (configs.loads(problem(x, g), HERE), launch.options["num_warps"]) == (loads, config.num_warps)
    launch.run()
    truth, plain = (1 + reference(x.to(dtype), g.to(dtype)) for dtype in DTYPES)
    assert_as_accurate(out, plain, truth, steps=matrix_steps(x, 150))


@pytest.mark.gpu
def test_forms_of_tma():
    """Rows of which the device has never loaded blocks in other tests, and sums over many positions."""
    N, T, I, O = 7, 40, 72, 88
    g = make(N, T, O, dtype=torch.bfloat16)
    first = make(T, N, I, dtype=torch.bfloat16).transpose(0, 1)  # the stride of examples below that of positions
    wider = make(N, T, I + 64, dtype=torch.bfloat16)[..., 64:]
    for x, grads in ((first, g), (wider, g), (first[:1], g[:1]), (wider.flatten(0, 1), g.flatten(0, 1))):
        offsets = torch.tensor([0, 3, 3, 150, N * T]) if x.ndim == 2 else None
        call = problem(x, grads, offsets=offsets)
        assert configs.loads(call, HERE) == ("tma" if configs.takes_tma(HERE) else "vectors")
        check(x, grads, offsets=offsets)
    check(make(2, 8192, 72, dtype=torch.bfloat16), make(2, 8192, 88, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_bits_repeat_at_the_size_of_a_layer():
    """With tiles that go round the device several times, and with parts."""
    for O, I in ((4096, 4096), (1024, 256), (4096, 16)):
        x, g = make(8, 300, I, dtype=torch.bfloat16), make(8, 300, O, dtype=torch.bfloat16)
        first = kernels.sum_grad_squared(x, g)
        assert all(torch.equal(first, kernels.sum_grad_squared(x, g)) for _ in range(10))


def test_tf32_is_for_float32_by_permission():
    out = torch.empty(64, 128)
    for dtype, allowed, precision in [
        (torch.float32, False, "ieee"), (torch.float32, True, "tf32"), (torch.bfloat16, True, "ieee"),
    ]:  # fmt: skip
        x, g = torch.empty(8, 16, 128, dtype=dtype), torch.empty(8, 16, 64, dtype=dtype)
        launch = kernels.launches(kernels.Operands(x, g, None, out, allow_tf32=allowed), H100)[0]
        assert launch.arguments["PRECISION"] == precision


@pytest.mark.parametrize("lengths", [[3], [0, 0], [16, 17, 15], [1] * 20, [100, 0, 0, 1, 30]], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_chunk_table(lengths, parts):
    """Every position is in one chunk, no chunk holds two examples, no part ends within one."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    chunks, cuts = chunk_table(offsets, sum(lengths), parts, 16, torch.device("cpu"))
    cuts = cuts.tolist()
    rows = chunks.view(-1, 2)[: cuts[-1]].tolist()
    assert len(chunks) > 2 * cuts[-1]  # the kernel reads one row ahead
    assert len(chunks) * chunks.element_size() % 16 == 0  # where the cuts begin
    seen = [
        [(position, remaining) for position, remaining in rows if first <= position < last]
        for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    for (position, length), own in zip(zip(offsets.tolist(), lengths, strict=False), seen, strict=True):
        assert own == [(position + t, length - t) for t in range(0, length, 16)]
    assert cuts[0] == 0
    assert cuts == sorted(cuts)
    begins = {sum(map(len, seen[:n])) for n in range(len(lengths) + 1)}
    assert set(cuts) <= begins
    assert cuts[-1] == sum(map(len, seen))
