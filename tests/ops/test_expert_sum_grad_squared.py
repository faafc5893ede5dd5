from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fishkern import BackendUnavailableError
from fishkern.ops import expert_sum_grad_squared, sum_grad_squared
from tests.support.closeness import assert_as_accurate, matrix_steps

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# Number of experts, I, O, and the rows of each group by expert: all kinds of groups together and alone, experts
# without groups and with empty ones, all rows on one expert, several chunks, sides of one entry.
CALLS = {
    "of every kind": (5, 13, 11, {0: [3, 1, 1], 1: [1, 40, 2], 3: [1], 4: [2, 0, 17]}),
    "single rows": (3, 7, 70, {0: [1] * 5, 2: [1] * 3}),
    "none single": (3, 65, 63, {0: [2, 5], 1: [33, 2]}),
    "all on one": (4, 9, 8, {2: [30, 1, 20]}),
    "all on the last": (3, 8, 9, {2: [4]}),
    "one expert": (1, 5, 4, {0: [3, 2]}),
    "one input": (2, 1, 6, {0: [3], 1: [1, 2]}),
    "one output": (2, 70, 1, {0: [3], 1: [1, 2]}),
    "empty groups": (2, 5, 4, {0: [0, 0], 1: [0]}),
    "no group": (2, 5, 4, {}),
    "no input": (2, 0, 4, {0: [2]}),
    "no output": (2, 5, 0, {1: [2]}),
    "no expert": (0, 5, 4, {}),
}


def make(E: int, I: int, O: int, groups: dict[int, list[int]], dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of the operation, with random factors."""
    lengths = [length for of_expert in groups.values() for length in of_expert]
    x, g = (torch.randn(sum(lengths), width, device=DEVICE).to(dtype) for width in (I, O))
    expert = torch.tensor([e for e, of_expert in groups.items() for _ in of_expert], dtype=torch.int64)
    return arguments(x, g, E, expert, torch.tensor([0, *lengths]).cumsum(0))


def arguments(x: Tensor, g: Tensor, E: int, expert: Tensor, offsets: Tensor) -> dict:
    return {"activations": x, "output_grads": g, "num_experts": E, "expert": expert, "offsets": offsets}


def one_by_one(call: dict, dtype: torch.dtype = torch.float64) -> Tensor:
    """The oracle: autograd's weight gradient of every group alone, squared."""
    x, g = (call[name].to(dtype) for name in ("activations", "output_grads"))
    weights = torch.zeros(call["num_experts"], g.shape[1], x.shape[1], dtype=dtype, device=x.device)
    total = torch.zeros_like(weights)
    for e, (first, last) in zip(call["expert"].tolist(), pairwise(call["offsets"].tolist()), strict=True):
        weight = weights[e].clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.linear(x[first:last], weight), weight, g[first:last])
        total[e] += grad**2
    return total


def check(actual: Tensor, call: dict, added: float = 0.0) -> None:
    """Demand the accuracy of a float32 loop over the same numbers, which for 16-bit inputs are exact in float32."""
    x = call["activations"]
    wide = torch.promote_types(x.dtype, torch.float32)
    plain, truth = (added + one_by_one(call, dtype) for dtype in (wide, torch.float64))
    assert_as_accurate(actual, plain, truth, steps=matrix_steps(x, len(x)))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_reference_is_autograd_one_group_at_a_time(call):
    call = make(*call, torch.float64)
    torch.testing.assert_close(expert_sum_grad_squared(**call), one_by_one(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_as_accurate_as_float32(call, dtype, backend):
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    call = make(*call, dtype)
    result = expert_sum_grad_squared(**call, backend=backend)
    assert result.dtype is torch.float32
    check(result, call)


RESULTS = {
    "contiguous": lambda E, O, I: torch.empty(E, O, I),
    "transposed": lambda E, O, I: torch.empty(E, I, O).mT,
    "experts last": lambda E, O, I: torch.empty(O, I, E).permute(2, 0, 1),
    "every other one": lambda E, O, I: torch.empty(2 * E, O, 2 * I)[::2, :, ::2],
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_adds_to_results_of_any_strides(result, wide, backend):
    E, _, O, groups = CALLS["of every kind"]
    call = make(E, 72 if wide else 13, O, groups)
    out = result(E, O, call["activations"].shape[1]).to(DEVICE)
    base = out if out._base is None else out._base
    base.fill_(0.5)
    assert expert_sum_grad_squared(**call, out=out, backend=backend) is out
    check(out, call, added=0.5)
    assert out[2].eq(0.5).all()  # no row went there
    assert base.numel() - out.numel() == 0 or base.view(2 * E, O, -1)[1::2].eq(0.5).all()


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "columns of a wider tensor": lambda x: F.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_factors_of_any_strides(view, backend):
    call = make(*CALLS["of every kind"])
    call |= {name: view(call[name]) for name in ("activations", "output_grads")}
    check(expert_sum_grad_squared(**call, backend=backend), call)


small = st.integers(0, 9)
lengths_by_expert = st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 5), max_size=4), max_size=4)


@settings(max_examples=10)
@given(groups=lengths_by_expert, I=small, O=small, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_equals_each_expert_alone(groups, I, O, dtype, backend):
    """That is the operation of one layer on packed examples."""
    call = make(4, I, O, dict(sorted(groups.items())))
    call |= {name: call[name].to(dtype) for name in ("expert", "offsets")}
    expected, first = torch.zeros(4, O, I, device=DEVICE), 0
    for e, lengths in sorted(groups.items()):
        rows = slice(first, first := first + sum(lengths))
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        x, g = call["activations"][rows], call["output_grads"][rows]
        sum_grad_squared(x, g, offsets=offsets, out=expected[e], backend="torch")
    torch.testing.assert_close(expert_sum_grad_squared(**call, backend=backend), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=6)
@given(groups=lengths_by_expert, cut=st.integers(0, 16))
def test_groups_split_over_calls(groups, cut, backend):
    """Groups are examples: those of one expert may come in several calls."""
    call = make(4, 5, 6, dict(sorted(groups.items())))
    cut = min(cut, len(call["expert"]))
    row = int(call["offsets"][cut])
    x, g, E, expert, offsets = call.values()
    out = expert_sum_grad_squared(**arguments(x[:row], g[:row], E, expert[:cut], offsets[: cut + 1]), backend=backend)
    rest = arguments(x[row:], g[row:], E, expert[cut:], offsets[cut:] - row)
    expert_sum_grad_squared(**rest, out=out, backend=backend)
    torch.testing.assert_close(out, expert_sum_grad_squared(**call, backend=backend), rtol=1e-5, atol=1e-5)


def test_loss_scale_and_order_of_groups(backend):
    """A loss c times as large has c^2 times the Fisher; the groups of one expert come in any order."""
    call = make(*CALLS["none single"])
    result = expert_sum_grad_squared(**call, backend=backend)
    larger = {**call, "output_grads": 3 * call["output_grads"]}
    close = {"rtol": 2e-5, "atol": 1e-5}
    torch.testing.assert_close(expert_sum_grad_squared(**larger, backend=backend), 9 * result, **close)
    order = torch.tensor([*range(2, 7), 0, 1, *range(40, 42), *range(7, 40)], device=DEVICE)
    x, g = call["activations"][order], call["output_grads"][order]
    other = arguments(x, g, 3, call["expert"], torch.tensor([0, 5, 7, 9, 42]))
    torch.testing.assert_close(expert_sum_grad_squared(**other, backend=backend), result, **close)


def test_tf32_is_a_permission(backend):
    """The reference ignores it; a kernel stays within the rounding to 10 bits of both factors."""
    call = make(*CALLS["of every kind"])
    exact, allowed = (expert_sum_grad_squared(**call, allow_tf32=allow, backend=backend) for allow in (False, True))
    if backend == "torch":
        assert torch.equal(exact, allowed)
    torch.testing.assert_close(allowed, exact, rtol=1e-2, atol=1e-2 * exact.max().item())


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bit_gradients_do_not_vanish(length, dtype, backend):
    """2e-5 squared is zero in float16, and so would the gradients of small losses be."""
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    call = make(2, 3, 2, {1: [length]}, dtype)
    call["activations"].fill_(1)
    g = call["output_grads"].fill_(2e-5)
    expected = torch.zeros(2, 2, 3, device=DEVICE)
    expected[1] = (length * g[0, 0].double()).square().float()
    torch.testing.assert_close(expert_sum_grad_squared(**call, backend=backend), expected, rtol=1e-5, atol=0)


def test_bits_repeat(backend):
    call = make(*CALLS["of every kind"])
    first, second = (expert_sum_grad_squared(**call, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_recorded_and_autocast_is_ignored(backend):
    call = make(*CALLS["of every kind"])
    call["activations"].requires_grad_()
    expected = expert_sum_grad_squared(**call, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = expert_sum_grad_squared(**call, backend=backend)
    assert not result.requires_grad
    assert torch.equal(result, expected)


def test_float64_is_not_for_triton():
    with pytest.raises(BackendUnavailableError, match="expert_sum_grad_squared cannot run on Triton"):
        expert_sum_grad_squared(**make(*CALLS["all on one"], torch.float64), backend="triton")


REFUSED = {
    "three dimensions": ({"activations": torch.ones(1, 3, 4)}, r"\[S, I\] and \[S, O\] with offsets, got \(1, 3, 4\)"),
    "other rows": ({"output_grads": torch.ones(2, 5)}, "agree in all sizes but the last"),
    "other dtypes": ({"activations": torch.ones(3, 4).half()}, "same floating dtype"),
    "offsets short of the end": ({"offsets": torch.tensor([0, 1, 2])}, "got 3 numbers from 0 to 2"),
    "a number for each row": ({"expert": torch.tensor([0, 0, 1])}, r"expert must be \[2\].* got \(3,\), torch.int64"),
    "numbers that are none": ({"expert": torch.tensor([0.0, 1.0])}, "int64 or int32; got .* torch.float32"),
    "rows that are not sorted": ({"expert": torch.tensor([1, 0])}, "expert must ascend: sort the rows"),
    "an expert too many": ({"expert": torch.tensor([0, 2])}, "from 0 to num_experts - 1 = 1, got 0 to 2: leave rows"),
    "an expert below zero": ({"expert": torch.tensor([-1, 0])}, "got -1 to 0"),
    "out of one expert": ({"out": torch.zeros(5, 4)}, r"out must be \(2, 5, 4\)"),
    "out in 16 bits": ({"out": torch.zeros(2, 5, 4).half()}, "out must be .*float32"),
    "out whose entries share a place": ({"out": torch.zeros(1, 5, 4).expand(2, 5, 4)}, "place for each entry"),
    "an unknown backend": ({"backend": "cuda"}, "backend must be one of"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_refused(change, message):
    call = arguments(torch.ones(3, 4), torch.ones(3, 5), 2, torch.tensor([0, 1]), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=message):
        expert_sum_grad_squared(**(call | change))


@pytest.mark.parametrize("number, error", [(2.0, TypeError), (-1, ValueError)])
def test_the_number_of_experts_is_checked(number, error):
    with pytest.raises(error, match="num_experts must be"):
        expert_sum_grad_squared(**(make(*CALLS["no group"]) | {"num_experts": number}))
