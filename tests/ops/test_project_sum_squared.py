"""Autograd of single examples and single positions -> the reference -> the kernel, and the laws that both obey."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fishkern import BackendUnavailableError
from fishkern.ops import project_sum_squared, sum_grad_squared
from fishkern.ops.project_sum_squared import project_sum_squared_torch
from tests.support.closeness import assert_as_accurate, matrix_steps
from tests.support.forked import PEAK, forked

pytestmark = pytest.mark.matrix

MODULE = import_module("fishkern.ops.project_sum_squared")  # the package's attribute of this name is the function
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# [N, T, I, O, K]: ones, nothing, primes, fewer and more directions than features, one off a tile of the kernel, chunks.
SHAPES = [
    (1, 1, 1, 1, 1), (3, 1, 7, 5, 5), (2, 5, 1, 3, 2), (5, 7, 13, 11, 3), (2, 33, 65, 63, 17), (1, 67, 32, 16, 64),
    (17, 3, 4, 6, 4), (40, 1, 8, 8, 8), (0, 3, 4, 5, 4), (3, 0, 4, 5, 4), (3, 2, 0, 5, 4), (3, 2, 4, 0, 4),
    (3, 2, 4, 5, 0),
]  # fmt: skip


def make(N: int, T: int, I: int, O: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = (N, T, I), (N, T, O), (I, K), (O, K)
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)


def some(N: int, T: int) -> Tensor:
    """Which positions count: about two of three."""
    return torch.rand(N, T, device=DEVICE) < 0.7


def one_by_one(
    x: Tensor, g: Tensor, V: Tensor, U: Tensor, counted: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The oracle: single positions, and autograd's weight gradient of every example alone, times each direction."""
    x, g, V, U = (tensor.to(dtype) for tensor in (x, g, V, U))
    total = torch.zeros(3, V.shape[1], dtype=dtype, device=x.device)
    weight = torch.zeros(g.shape[-1], x.shape[-1], dtype=dtype, device=x.device, requires_grad=True)
    for n, (activations, output_grads) in enumerate(zip(x, g, strict=True)):
        (grad,) = torch.autograd.grad(F.linear(activations, weight), weight, output_grads)
        for k, (v, u) in enumerate(zip(V.mT, U.mT, strict=True)):
            total[2, k] += (grad * torch.outer(u, v)).sum() ** 2
        for t in range(x.shape[1]):
            if counted is None or counted[n, t]:
                total[0] += (activations[t] @ V) ** 2
                total[1] += (output_grads[t] @ U) ** 2
    return total


def check(actual: Tensor, *factors: Tensor, counted: Tensor | None = None) -> None:
    """Demand the accuracy of a float32 loop over the same numbers, which of 16 bits are exact in float32."""
    x = factors[0]
    plain, truth = (one_by_one(*factors, counted, dtype) for dtype in (torch.float32, torch.float64))
    steps = matrix_steps(x, max(tensor.shape[-1] for tensor in factors))
    for row in range(3):  # each has a scale of its own
        assert_as_accurate(actual[row], plain[row], truth[row], steps=steps)


@pytest.mark.parametrize("masked", [True, False], ids=["counted", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_autograd_one_example_at_a_time(shape, masked):
    factors = make(*shape, torch.float64)
    counted = some(*shape[:2]) if masked else None
    expected = one_by_one(*factors, counted)
    torch.testing.assert_close(project_sum_squared_torch(*factors, counted=counted), expected)


@pytest.mark.parametrize(
    "shape", [(7, 9, 20, 30, 50), (2, 70, 20, 30, 8), (3, 5, 400, 9, 9), (100, 1, 3, 3, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reference_in_several_pieces(shape, dtype, monkeypatch):
    """Of directions, of examples, of the positions of one example, and of features."""
    factors, counted = make(*shape, dtype), some(*shape[:2])
    whole = project_sum_squared_torch(*factors, counted=counted)
    for entries in (200, 2000):
        monkeypatch.setattr(MODULE, "TILE_ENTRIES", entries)
        monkeypatch.setattr(MODULE, "TILE_ENTRIES_ON_GPU", entries)
        monkeypatch.setattr(MODULE, "_DIRECTIONS", 16)
        torch.testing.assert_close(project_sum_squared_torch(*factors, counted=counted), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False], ids=["counted", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_float32(shape, dtype, masked, backend):
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    factors = make(*shape, dtype)
    counted = some(*shape[:2]) if masked else None
    result = project_sum_squared(*factors, counted=counted, backend=backend)
    assert result.dtype is torch.float32
    check(result, *factors, counted=counted)


@pytest.mark.parametrize("of_factors", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_directions", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 20, 40, 24, 33), (20, 3, 9, 40, 8)], ids=str)
def test_directions_of_another_dtype(shape, of_factors, of_directions, backend):
    """Neither is rounded to the other's."""
    if backend == "triton" and torch.bfloat16 in (of_factors, of_directions) and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    x, g, V, U = make(*shape)
    factors = x.to(of_factors), g.to(of_factors), V.to(of_directions), U.to(of_directions)
    result = project_sum_squared(*factors, backend=backend)
    assert result.dtype is torch.float32
    check(result, *factors)


def test_float64_on_either_side():
    x, g, V, U = make(2, 3, 5, 4, 6, torch.float64)
    for factors in ((x.float(), g.float(), V, U), (x, g, V.float(), U.float())):
        result = project_sum_squared(*factors)
        assert result.dtype is torch.float64
        torch.testing.assert_close(result, one_by_one(*factors))


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "columns of a wider tensor": lambda x: F.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "expanded rows": lambda x: x[..., :1, :].expand_as(x),
    "first axis last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded first axis": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("shape", [(3, 5, 19, 23, 21), (3, 32, 16, 32, 16)], ids=str)
def test_any_strides(shape, view, backend):
    factors = tuple(view(tensor) for tensor in make(*shape))
    counted = some(*shape[1::-1]).mT
    check(project_sum_squared(*factors, counted=counted, backend=backend), *factors, counted=counted)
    counted = some(*shape[:2])[:, :1].expand(shape[:2])
    check(project_sum_squared(*factors, counted=counted, backend=backend), *factors, counted=counted)


small = st.integers(0, 9)


@settings(max_examples=15)
@given(shape=st.tuples(small, small, small, small, small), data=st.data())
def test_batch_size_invariance(shape, data, backend):
    """Splitting the examples over calls changes nothing."""
    x, g, V, U = make(*shape)
    counted = some(*shape[:2])
    cut = data.draw(st.integers(0, shape[0]))
    parts = [
        project_sum_squared(x[part], g[part], V, U, counted=counted[part], backend=backend)
        for part in (slice(cut), slice(cut, None))
    ]
    whole = project_sum_squared(x, g, V, U, counted=counted, backend=backend)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(shape=st.tuples(small, small, small, small, small), data=st.data())
def test_each_direction_for_itself(shape, data, backend):
    """What else is asked for changes nothing, and neither does the order."""
    x, g, V, U = make(*shape)
    order = data.draw(st.permutations(range(shape[-1])))[: data.draw(small)]
    expected = project_sum_squared(x, g, V, U, backend=backend)[:, order]
    result = project_sum_squared(x, g, V[:, order], U[:, order], backend=backend)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(shape=st.tuples(small, small, small, small, small))
def test_sides_are_exchangeable(shape, backend):
    """The transposed layer has the same sums, the first two exchanged."""
    x, g, V, U = make(*shape)
    counted = some(*shape[:2])
    expected = project_sum_squared(x, g, V, U, counted=counted, backend=backend)[[1, 0, 2]]
    result = project_sum_squared(g, x, U, V, counted=counted, backend=backend)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_directions_of_single_entries(backend):
    """Along ``e_o e_i^T`` the joint sum is an entry of :func:`sum_grad_squared`."""
    x, g, _, _ = make(4, 6, 7, 5, 1)
    V, U = torch.eye(7, device=DEVICE).repeat(1, 5), torch.eye(5, device=DEVICE).repeat_interleave(7, 1)
    result = project_sum_squared(x, g, V, U, backend=backend)
    torch.testing.assert_close(result[2].view(5, 7), sum_grad_squared(x, g, backend="torch"))
    torch.testing.assert_close(result[0].view(5, 7), x.square().sum((0, 1)).expand(5, 7))
    torch.testing.assert_close(result[1].view(5, 7), g.square().sum((0, 1))[:, None].expand(5, 7))


def test_orthonormal_directions_share_the_whole(backend):
    """In any basis of the inputs the squares of the activations add up to the same."""
    x, g, _, U = make(3, 5, 12, 6, 12)
    V = torch.linalg.qr(torch.randn(12, 12, device=DEVICE))[0]
    total = project_sum_squared(x, g, V, U, backend=backend)[0].sum()
    torch.testing.assert_close(total, x.square().sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 6, 40])
def test_padding_invariance(T, backend):
    """Garbage in padded activations does not matter where they are not counted and the output gradients are zero."""
    x, g, V, U = make(2, T, 9, 8, 7)
    counted = some(2, T)
    padded = F.pad(x, (0, 0, 0, 90), value=1e30), F.pad(g, (0, 0, 0, 90))
    result = project_sum_squared(*padded, V, U, counted=F.pad(counted, (0, 90)), backend=backend)
    torch.testing.assert_close(result, project_sum_squared(x, g, V, U, counted=counted, backend=backend))


def test_who_counts_is_no_matter_of_the_joint_sum(backend):
    factors = make(4, 9, 8, 7, 6)
    counted = some(4, 9)
    joint, masked = (project_sum_squared(*factors, counted=c, backend=backend)[2] for c in (None, counted))
    assert torch.equal(joint, masked)
    nothing = project_sum_squared(*factors, counted=torch.zeros_like(counted), backend=backend)
    assert nothing[:2].eq(0).all()
    everything = project_sum_squared(*factors, counted=torch.ones_like(counted), backend=backend)
    assert torch.equal(everything, project_sum_squared(*factors, backend=backend))


def test_loss_scale(backend):
    """A loss c times as large has c^2 times the Fisher, and activations as they were."""
    x, g, V, U = make(3, 6, 9, 8, 7)
    factor = torch.tensor([1.0, 9.0, 9.0], device=DEVICE)[:, None]
    expected = factor * project_sum_squared(x, g, V, U, backend=backend)
    torch.testing.assert_close(project_sum_squared(x, 3 * g, V, U, backend=backend), expected)


@pytest.mark.parametrize("T", [4, 40])
def test_order_of_examples_and_positions(T, backend):
    x, g, V, U = make(5, T, 9, 8, 7)
    expected = project_sum_squared(x, g, V, U, backend=backend)
    torch.testing.assert_close(project_sum_squared(x.flip(0), g.flip(0), V, U, backend=backend), expected)
    torch.testing.assert_close(project_sum_squared(x.flip(1), g.flip(1), V, U, backend=backend), expected)


@pytest.mark.parametrize("T", [6, 40])
def test_positions_that_cancel(T, backend):
    """A gradient that is zero but for rounding has no joint sum, whatever its positions have."""
    x, g, V, U = make(4, T, 9, 8, 7)
    x, g = torch.cat([x, -x], dim=1), torch.cat([g, g], dim=1)
    result = project_sum_squared(x, g, V, U, backend=backend)
    assert (result[2] <= 1e-9 * result[0] * result[1]).all()
    assert (result[:2] > 1).all()


def test_tf32_is_a_permission(backend):
    """The reference ignores it; a kernel stays within the rounding to 10 bits of both sides."""
    factors = make(3, 20, 40, 24, 30)
    exact, allowed = (project_sum_squared(*factors, allow_tf32=allow, backend=backend) for allow in (False, True))
    if backend == "torch":
        assert torch.equal(exact, allowed)
    for row in range(3):
        torch.testing.assert_close(allowed[row], exact[row], rtol=1e-2, atol=1e-2 * exact[row].max().item())


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bit_gradients_do_not_vanish(T, dtype, backend):
    """2e-5 squared is zero in float16, and so would the gradients of small losses be."""
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    x, V = torch.ones(1, T, 3, dtype=dtype, device=DEVICE), torch.ones(3, 2, dtype=dtype, device=DEVICE)
    g, U = torch.full((1, T, 2), 2e-5, dtype=dtype, device=DEVICE), torch.ones(2, 2, dtype=dtype, device=DEVICE)
    d = 2 * g[0, 0, 0].double()
    expected = torch.stack([9.0 * T * torch.ones_like(d), T * d**2, (3 * T * d) ** 2])
    result = project_sum_squared(x, g, V, U, backend=backend)
    torch.testing.assert_close(result, expected[:, None].expand(3, 2).float())


def test_bits_repeat(backend):
    factors, counted = make(4, 37, 21, 22, 20), some(4, 37)
    first, second = (project_sum_squared(*factors, counted=counted, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_recorded_and_autocast_is_ignored(backend):
    factors = [tensor.requires_grad_() for tensor in make(2, 3, 4, 5, 3)]
    expected = project_sum_squared(*factors, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = project_sum_squared(*factors, backend=backend)
    assert not result.requires_grad
    assert torch.equal(result, expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded():
    """Projections, and features in float32, of 64 and 73 MiB. In a process of its own, since a peak never falls."""
    code = f"""
{PEAK}
from fishkern.ops import project_sum_squared

torch.set_num_threads(1)  # each has buffers of its own for matrix products
dtype = getattr(torch, dtype)
small = [torch.ones(shape, dtype=dtype) for shape in ((2, 3, 300), (2, 3, 300), (300, 40), (300, 40))]
project_sum_squared(*small, counted=torch.ones(2, 3, dtype=torch.bool))
x, g = (torch.ones(1, T, F, dtype=dtype) for _ in range(2))
V, U = (torch.ones(F, K, dtype=dtype) for _ in range(2))
counted = torch.ones(1, T, dtype=torch.bool)
before = peak()
project_sum_squared(x, g, V, U, counted=counted)
print(peak() - before)
"""
    positions = {"dtype": "float32", "T": 8192, "F": 64, "K": 1024}
    features = {"dtype": "bfloat16", "T": 64, "F": 150_000, "K": 64}
    freed_is_not_counted = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    of_positions, of_features = forked(code, [positions, features], **freed_is_not_counted)
    assert float(of_positions.stdout) < 16, of_positions.stderr
    assert float(of_features.stdout) < 30, of_features.stderr


def test_float64_is_not_for_triton():
    factors = make(1, 2, 3, 4, 2, torch.float64)
    with pytest.raises(BackendUnavailableError, match="project_sum_squared cannot run on Triton"):
        project_sum_squared(*factors, backend="triton")


x, g, V, U = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(4, 6), torch.ones(5, 6)
all_count = torch.ones(2, 3, dtype=torch.bool)
REFUSED = {
    "two dimensions": ((x[0], g[0], V, U), {}, r"\[N, T, I\].* got \(3, 4\)"),
    "other positions": ((x, g[:, :2], V, U), {}, "agree in all sizes but the last"),
    "other dtypes": ((x, g.double(), V, U), {}, "same floating dtype"),
    "other devices": ((x, g.to("meta"), V, U), {}, "one device"),
    "directions of one side only": ((x, g, V, U[:, :5]), {}, r"\[I, K\].*I = 4.*O = 5, got \(4, 6\) and \(5, 5\)"),
    "directions transposed": ((x, g, V.mT, U.mT), {}, r"got \(6, 4\) and \(6, 5\): pass one column"),
    "sides exchanged": ((x, g, U, V), {}, r"got \(5, 6\) and \(4, 6\)"),
    "a single direction": ((x, g, V[:, 0], U[:, 0]), {}, r"got \(4,\) and \(5,\)"),
    "directions of two dtypes": ((x, g, V, U.double()), {}, "V and U must have the same floating dtype"),
    "whole numbers": ((x, g, V.long(), U.long()), {}, "same floating dtype, got torch.int64"),
    "directions elsewhere": ((x, g, V.to("meta"), U.to("meta")), {}, "on the device of the activations, cpu, got meta"),
    "a mask of numbers": ((x, g, V, U), dict(counted=all_count.float()), r"counted must be \(2, 3\), torch.bool"),
    "a mask of other examples": ((x, g, V, U), dict(counted=all_count[:1]), r"counted must be .* got \(1, 3\)"),
    "a mask elsewhere": ((x, g, V, U), dict(counted=all_count.to("meta")), "counted must be .* on meta"),
    "an unknown backend": ((x, g, V, U), dict(backend="cuda"), "backend must be one of"),
}


@pytest.mark.parametrize("factors, options, message", REFUSED.values(), ids=REFUSED)
def test_refused(factors, options, message):
    with pytest.raises(ValueError, match=message):
        project_sum_squared(*factors, **options)
