"""What an operation says that a call takes equals what a call of the reference takes of torch's allocator."""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.memory import peak_allocated
from fishkern.digests import digest
from fishkern.ops.expert_sum_grad_squared import expert_sum_grad_squared_torch
from fishkern.ops.group_sum_grad_squared import group_sum_grad_squared_torch
from fishkern.ops.project_sum_squared import project_sum_squared_torch
from fishkern.ops.sum_grad_squared import sum_grad_squared_torch
from fishkern.statistics.valueless import Valueless

BFLOAT16 = torch.bfloat16


def factors(N: int, T: int, I: int, O: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.ones(N, T, I, dtype=dtype), torch.ones(N, T, O, dtype=dtype)


def packed(lengths: list[int], I: int, O: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x, g = factors(1, sum(lengths), I, O, dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {"activations": x[0], "output_grads": g[0], "offsets": offsets}


def directions(I: int, O: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.ones(I, K, dtype=dtype), torch.ones(O, K, dtype=dtype)


def projected(N, T, I, O, K, dtype=torch.float32, of_directions=None, counted=False):
    mask = torch.ones(N, T, dtype=torch.bool) if counted else None
    tensors = *factors(N, T, I, O, dtype), *directions(I, O, K, of_directions or dtype)
    return partial(project_sum_squared_torch, *tensors, counted=mask)


def squared(N, T, I, O, dtype=torch.float32, **options):
    return partial(sum_grad_squared_torch, *factors(N, T, I, O, dtype), **options)


def grouped(N, T, I, O, by, dtype=torch.float32):
    return partial(group_sum_grad_squared_torch, *factors(N, T, I, O, dtype), by=by)


def sent(groups: dict[int, list[int]], I, O, dtype=torch.float32, **options):
    """Rows that were sent to four experts, so many for each example."""
    call = packed([length for lengths in groups.values() for length in lengths], I, O, dtype)
    expert = torch.tensor([e for e, lengths in groups.items() for _ in lengths])
    return partial(expert_sum_grad_squared_torch, **call, num_experts=4, expert=expert, **options)


def as_strided(N, T, I, O, K):
    """Factors that are parts of wider ones, as those of heads are."""
    x, g = factors(N, T, 2 * I, 2 * O)
    return partial(project_sum_squared_torch, x[..., :I], g[..., O:], *directions(I, O, K))


def products(total, a, b, *args, out_shape, **options) -> int:
    return 2 * prod(a) * b[-1]


IN_PLACE = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), products)  # torch leaves these out

CALLS = {
    "projections": projected(8, 256, 512, 384, 384),
    "projections of many directions": projected(4, 128, 256, 300, 1024),
    "projections of long examples": projected(1, 3000, 256, 192, 192, counted=True),
    "projections of few features": projected(16, 256, 16, 16, 700, counted=True),
    "projections of many examples": projected(100, 64, 200, 300, 200),
    "projections of many features": projected(4, 64, 20_000, 64, 64),
    "projections in bfloat16": projected(8, 128, 2048, 700, 700, BFLOAT16),
    "projections on float32 of bfloat16": projected(8, 128, 2048, 700, 700, BFLOAT16, torch.float32),
    "projections in float64": projected(4, 128, 512, 512, 512, torch.float64),
    "projections of strided factors": as_strided(8, 256, 384, 256, 256),
    "projections of nothing": projected(0, 3, 8, 8, 8),
    "squares": squared(4, 64, 1024, 768),
    "squares in tiles": squared(2, 8, 2048, 3000),
    "squares in bfloat16": squared(4, 300, 1024, 768, BFLOAT16),
    "squares of small matrices": squared(40, 16, 128, 96),
    "squares of small matrices and gradients": squared(40, 16, 128, 96, grad_out=torch.zeros(96, 128)),
    "squares of small matrices in bfloat16": squared(40, 200, 128, 96, BFLOAT16),
    "squares of single positions": squared(1100, 1, 256, 500),
    "squares of single positions and gradients": squared(300, 1, 256, 500, BFLOAT16, grad_out=torch.zeros(500, 256)),
    "squares added to a tensor": squared(4, 64, 512, 512, out=torch.zeros(512, 512)),
    "squares of packed examples": partial(sum_grad_squared_torch, **packed([3, 400, 0, 70], 512, 300, BFLOAT16)),
    "squares of no example": squared(0, 3, 64, 64),
    "squares of experts": sent({0: [3, 40, 1, 1], 1: [60, 80], 3: [1] * 200}, 512, 300),
    "squares of experts, by one row and by several": sent({2: [1] * 300 + [100, 150, 2]}, 300, 200, BFLOAT16),
    "squares of experts added to a tensor": sent({0: [30, 1], 2: [500]}, 700, 400, out=torch.zeros(4, 400, 700)),
    "squares of experts in bfloat16": sent({1: [300, 200]}, 700, 400, BFLOAT16),
    "squares of experts without rows": sent({}, 64, 64),
    "groups by row": grouped(8, 128, 1024, 768, "row"),
    "groups by column": grouped(8, 128, 1024, 768, "column"),
    "groups by tensor": grouped(8, 128, 1024, 768, "tensor"),
    "groups by row of long examples": grouped(2, 500, 2048, 512, "row", BFLOAT16),
    "groups by tensor of long examples": grouped(2, 500, 2048, 512, "tensor", BFLOAT16),
    "groups by column of many examples": grouped(300, 16, 512, 384, "column"),
    "groups by row in tiles": grouped(16, 600, 256, 128, "row"),
    "groups by tensor in tiles": grouped(3, 800, 400, 300, "tensor", BFLOAT16),
    "groups of packed examples": partial(
        group_sum_grad_squared_torch, **packed([3, 400, 0, 70, 400], 300, 256), by="row"
    ),
    "a digest": partial(digest, torch.ones(2**21 + 5)),
    "a digest in bfloat16": partial(digest, torch.ones(700, 900, dtype=BFLOAT16)),
}


def described(call: partial):
    return call.func.describe(*call.args, **call.keywords)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_a_call_takes(call):
    """The oracles are torch's profiler, which sees every allocation, and its counter of FLOPs; and the result."""
    step = call.func.describe(*call.args, **call.keywords)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        result = call()
    assert step.flops == counter.get_total_flops()
    made = 0
    if isinstance(result, Tensor):
        assert (step.result.shape, step.result.dtype) == (result.shape, result.dtype)
        made = result.nbytes if call.keywords.get("out") is None else 0
    assert made + step.scratch == pytest.approx(peak_allocated(call), rel=0.04, abs=4096)


def test_a_plan_counts_a_step():
    mode = Valueless()
    x, g = (mode.input_like(one, one.device) for one in factors(2, 3, 4, 5))
    with mode:
        total = sum_grad_squared_torch(x, g)
    assert (total.shape, mode.flops) == ((5, 4), 2 * 2 * 3 * 4 * 5)
    assert mode.peak == total.nbytes + sum_grad_squared_torch.describe(x, g).scratch
