"""Autograd of single examples -> both ways of the reference -> the kernel, and the laws that all of them obey."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fishkern import BackendUnavailableError
from fishkern.ops import group_sum_grad_squared, sum_grad_squared
from tests.support.closeness import assert_as_accurate, matrix_steps
from tests.support.forked import PEAK, forked

pytestmark = pytest.mark.matrix

MODULE = import_module("fishkern.ops.group_sum_grad_squared")  # the package's attribute of this name is the function
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
AXES = {"row": 1, "column": 0, "tensor": (0, 1)}  # of [O, I], summed over
Run = Callable[..., Tensor]

# [N, T, I, O]: ones, nothing, primes, one off a tile of the kernel, two blocks of positions and of the Gram matrix.
SHAPES = [
    (1, 1, 1, 1), (3, 1, 7, 5), (2, 5, 1, 3), (2, 5, 3, 1), (5, 7, 13, 11), (2, 33, 65, 63), (1, 67, 64, 64),
    (2, 130, 9, 8), (17, 3, 4, 6), (0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0),
]  # fmt: skip


def forced(grams: bool, *args: object, **options: object) -> Tensor:
    """One way of the reference, whatever it costs."""
    with patch.object(MODULE, "_grams_cost_less", lambda T, I, O: grams):
        return group_sum_grad_squared(*args, backend="torch", **options)


WAYS: dict[str, Run] = {
    "torch by grams": partial(forced, True),
    "torch by tiles": partial(forced, False),
    "triton": partial(group_sum_grad_squared, backend="triton"),
}


# Of session scope, since hypothesis refuses function-scoped fixtures.
@pytest.fixture(scope="session", params=WAYS)
def run(request: pytest.FixtureRequest) -> Run:
    """The operation by each way of the reference, and by the kernel."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return WAYS[request.param]


def make(N: int, T: int, I: int, O: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, I, device=DEVICE).to(dtype), torch.randn(N, T, O, device=DEVICE).to(dtype)


def one_by_one(x: Tensor, g: Tensor, by: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The oracle: autograd's weight gradient of every example alone, squared and summed over the group."""
    weight = torch.zeros(g.shape[-1], x.shape[-1], dtype=dtype, device=x.device, requires_grad=True)
    total = torch.zeros_like(weight, requires_grad=False)
    for activations, output_grads in zip(x.to(dtype), g.to(dtype), strict=True):
        (grad,) = torch.autograd.grad(F.linear(activations, weight), weight, output_grads)
        total += grad**2
    return total.sum(AXES[by])


def check(actual: Tensor, x: Tensor, g: Tensor, by: str) -> None:
    """Demand the accuracy of a float32 loop over the same numbers, which for 16-bit inputs are exact in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    plain, truth = (one_by_one(x, g, by, dtype) for dtype in (wide, torch.float64))
    assert_as_accurate(actual, plain, truth, steps=matrix_steps(x, x.shape[1]))


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grams", [True, False])
def test_reference_is_autograd_one_example_at_a_time(shape, by, grams):
    x, g = make(*shape, torch.float64)
    torch.testing.assert_close(forced(grams, x, g, by=by), one_by_one(x, g, by))


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("shape", [(3, 5, 2100, 1030), (2, 3, 3, 800_001), (300, 70, 3, 5), (2, 700, 9, 3200)], ids=str)
@pytest.mark.parametrize("grams", [True, False])
def test_reference_in_several_pieces(shape, by, grams):
    """Tiles, calls for several examples, features that are converted a part at a time."""
    x, g = make(*shape, torch.float64)
    expected = sum_grad_squared(x, g, backend="torch").sum(AXES[by])
    torch.testing.assert_close(forced(grams, x, g, by=by), expected)


@pytest.mark.parametrize("T, I, O, grams", [
    (1, 1, 1, True), (16, 512, 512, True), (1024, 512, 512, False), (1024, 2048, 2048, True),
    (512, 4096, 16, False), (512, 16, 4096, False), (4, 4096, 16, True),
])  # fmt: skip
def test_cheaper_way(T, I, O, grams):
    """Grams for short examples of large layers, tiles for long ones and for the thin factors of LoRA."""
    assert MODULE._grams_cost_less(T, I, O) is grams


def test_each_packed_example_goes_its_way():
    x, g = make(1, 103, 5, 6, torch.float64)
    assert {MODULE._grams_cost_less(T, 5, 6) for T in (1, 100)} == {True, False}
    offsets = torch.tensor([0, 1, 101, 101, 103])
    parts = (one_by_one(x[:, a:b], g[:, a:b], "row") for a, b in offsets.unfold(0, 2, 1))
    torch.testing.assert_close(group_sum_grad_squared(x[0], g[0], by="row", offsets=offsets), sum(parts))


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_float32(shape, dtype, by, run):
    if run is WAYS["triton"] and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    x, g = make(*shape, dtype)
    result = run(x, g, by=by)
    assert result.dtype is torch.float32
    check(result, x, g, by)


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "position first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other feature": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "columns of a wider tensor": lambda x: F.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "expanded positions": lambda x: x[:, :1].expand_as(x),
    "expanded examples": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_any_strides(view, packed, by, run):
    x, g = (view(tensor) for tensor in make(3, 5, 19, 23))
    out = torch.zeros({"row": 46, "column": 38, "tensor": 2}[by], device=DEVICE)[::2]
    out = out[0] if by == "tensor" else out
    if packed:
        flat = [view(tensor.flatten(0, 1)[None])[0] for tensor in (x, g)]
        x, g = (tensor.unflatten(0, (3, 5)) for tensor in flat)
        run(*flat, by=by, offsets=torch.tensor([0, 5, 10, 15]), out=out)
    else:
        run(x, g, by=by, out=out)
    check(out, x, g, by)


small = st.integers(0, 9)
groups = st.sampled_from(list(AXES))


@settings(max_examples=15)
@given(shape=st.tuples(small, small, small, small), by=groups, data=st.data())
def test_batch_size_invariance(shape, by, data, run):
    """Splitting the examples over calls changes nothing."""
    x, g = make(*shape)
    cut = data.draw(st.integers(0, shape[0]))
    parts = run(x[:cut], g[:cut], by=by)
    assert run(x[cut:], g[cut:], by=by, out=parts) is parts
    torch.testing.assert_close(run(x, g, by=by), parts, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(shape=st.tuples(small, small, small, small))
def test_groups_agree(shape, run):
    """Rows and columns add up to the tensor, and to the sums of :func:`sum_grad_squared`."""
    x, g = make(*shape)
    squares = sum_grad_squared(x, g, backend="torch")
    for by, axes in AXES.items():
        torch.testing.assert_close(run(x, g, by=by), squares.sum(axes), rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(shape=st.tuples(small, small, small, small), by=st.sampled_from(["row", "column"]))
def test_rows_are_columns_of_the_transpose(shape, by, run):
    x, g = make(*shape)
    other = {"row": "column", "column": "row"}[by]
    torch.testing.assert_close(run(x, g, by=by), run(g, x, by=other), rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(
    lengths=st.lists(small, max_size=6),
    I=small,
    O=small,
    by=groups,
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_packed_equals_dense(lengths, I, O, by, dtype, run):
    """Packed examples, some of them empty, equal the same ones one by one."""
    x, g = (tensor[0] for tensor in make(1, sum(lengths), I, O))
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    expected = torch.zeros(O, I, device=DEVICE)
    for part_x, part_g in zip(x.split(lengths), g.split(lengths), strict=True):
        sum_grad_squared(part_x[None], part_g[None], out=expected, backend="torch")
    result = run(x, g, by=by, offsets=offsets)
    torch.testing.assert_close(result, expected.sum(AXES[by]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("T", [1, 6])
def test_padding_invariance(T, by, run):
    """Garbage in padded activations does not matter where the output gradients are zero."""
    x, g = make(2, T, 9, 8)
    padded = F.pad(x, (0, 0, 0, 90), value=1e30), F.pad(g, (0, 0, 0, 90))
    torch.testing.assert_close(run(*padded, by=by), run(x, g, by=by))


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("T", [1, 6])
def test_loss_scale(T, by, run):
    """A loss c times as large has c^2 times the Fisher."""
    x, g = make(3, T, 9, 8)
    torch.testing.assert_close(run(x, 3 * g, by=by), 9 * run(x, g, by=by))


@pytest.mark.parametrize("by", AXES)
def test_order_of_examples(by, run):
    x, g = make(5, 4, 9, 8)
    torch.testing.assert_close(run(x.flip(0), g.flip(0), by=by), run(x, g, by=by))


@pytest.mark.parametrize("by", AXES)
def test_positions_that_cancel(by, run):
    """Gradients that are zero but for rounding have no negative squares, and none larger than rounding."""
    x, g = make(4, 6, 300, 200)
    x, g = torch.cat([x, -x], dim=1), torch.cat([g, g], dim=1)
    result = run(x, g, by=by)
    assert (result >= 0).all()
    assert (result <= 1e-5 * run(x.abs(), g.abs(), by=by)).all()


@pytest.mark.parametrize("by", AXES)
def test_accumulates_into_out(by, run):
    x, g = make(3, 4, 9, 8)
    expected = 5 + run(x, g, by=by)
    out = torch.full_like(expected, 5.0)
    assert run(x, g, by=by, out=out) is out
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("T", [1, 20])
def test_tf32_is_a_permission(T, by, run):
    """The reference ignores it; a kernel stays within the rounding to 10 bits of both factors."""
    x, g = make(3, T, 40, 24)
    exact, allowed = (run(x, g, by=by, allow_tf32=allow) for allow in (False, True))
    if run is not WAYS["triton"]:
        assert torch.equal(exact, allowed)
    torch.testing.assert_close(allowed, exact, rtol=1e-2, atol=1e-2 * exact.max().item())


@pytest.mark.parametrize("by", AXES)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bit_gradients_do_not_vanish(T, dtype, by, run):
    """2e-5 squared is zero in float16, and so would the gradients of small losses be."""
    if run is WAYS["triton"] and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    x = torch.ones(1, T, 3, dtype=dtype, device=DEVICE)
    g = torch.full((1, T, 2), 2e-5, dtype=dtype, device=DEVICE)
    square = (T * g[0, 0, 0].double()).square()
    expected = square.expand(2, 3).sum(AXES[by]).float()
    torch.testing.assert_close(run(x, g, by=by), expected)


@pytest.mark.parametrize("by", AXES)
def test_bits_repeat(by, run):
    x, g = make(4, 37, 21, 22)
    assert torch.equal(run(x, g, by=by), run(x, g, by=by))


@pytest.mark.parametrize("by", AXES)
def test_nothing_is_recorded_and_autocast_is_ignored(by, run):
    x, g = (tensor.requires_grad_() for tensor in make(2, 3, 4, 5))
    expected = run(x, g, by=by)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = run(x, g, by=by)
    assert not result.requires_grad
    assert torch.equal(result, expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded():
    """Gradients of 512 MiB; features of 46 MiB in float32. Each in a process of its own, since a peak never falls."""
    code = f"""
{PEAK}
from importlib import import_module
from unittest.mock import patch

torch.set_num_threads(1)  # each has buffers of its own for matrix products
module = import_module("fishkern.ops.group_sum_grad_squared")
with patch.object(module, "_grams_cost_less", lambda T, I, O: grams):
    module.group_sum_grad_squared(torch.ones(2, 9, 99), torch.ones(2, 9, 99), by="row", backend="torch")
    x, g = (torch.ones(*shape, dtype=getattr(torch, dtype)) for shape in shapes)
    before = peak()
    module.group_sum_grad_squared(x, g, by="row", backend="torch")
    print(peak() - before)
"""
    examples = {"dtype": "float32", "shapes": [(512, 2, 512), (512, 2, 512)]}
    outputs = {"dtype": "bfloat16", "shapes": [(1, 300, 256), (1, 300, 40_000)]}
    cases = [{**sizes, "grams": grams} for sizes in (examples, outputs) for grams in (True, False)]
    freed_is_not_counted = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for case, done in zip(cases, forked(code, cases, **freed_is_not_counted), strict=True):
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 24, case


def test_float64_is_not_for_triton():
    x, g = make(1, 2, 3, 4, torch.float64)
    with pytest.raises(BackendUnavailableError, match="group_sum_grad_squared cannot run on Triton"):
        group_sum_grad_squared(x, g, by="row", backend="triton")


x, g, x1, g1 = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(6, 4), torch.ones(6, 5)
REFUSED = {
    "an unknown group": (x, g, dict(by="layer"), r"by must be one of \('row', 'column', 'tensor'\), got 'layer'"),
    "without offsets two dimensions": (x1, g1, {}, r"\[N, T, I\].* got \(6, 4\)"),
    "with offsets three": (x, g, dict(offsets=torch.tensor([0, 6])), r"\[S, I\].* got \(2, 3, 4\)"),
    "other positions": (x, g[:, :2], {}, "agree in all sizes but the last"),
    "other dtypes": (x, g.double(), {}, "same floating dtype"),
    "other devices": (x, g.to("meta"), {}, "one device"),
    "out for columns": (x, g, dict(out=torch.zeros(4)), r"out must be \(5,\)"),
    "out for rows": (x, g, dict(by="column", out=torch.zeros(5)), r"out must be \(4,\)"),
    "out of one dimension": (x, g, dict(by="tensor", out=torch.zeros(1)), r"out must be \(\)"),
    "out in 16 bits": (x.half(), g.half(), dict(out=torch.zeros(5).half()), "out must be .*float32"),
    "out short of float64": (x.double(), g.double(), dict(out=torch.zeros(5)), "out must be .*float64"),
    "out whose entries share a place": (x, g, dict(out=torch.zeros(1).expand(5)), "place for each entry"),
    "offsets short of the end": (x1, g1, dict(offsets=torch.tensor([0, 5])), "got 2 numbers from 0 to 5"),
    "an unknown backend": (x, g, dict(backend="cuda"), "backend must be one of"),
}


@pytest.mark.parametrize("activations, output_grads, options, message", REFUSED.values(), ids=REFUSED)
def test_refused(activations, output_grads, options, message):
    with pytest.raises(ValueError, match=message):
        group_sum_grad_squared(activations, output_grads, **{"by": "row", **options})
