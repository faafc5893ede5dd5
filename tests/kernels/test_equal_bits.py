"""Equal calls give equal bits: nothing that a kernel gives depends on the order in which its programs run."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fishkern.kernels._hardware import H100

from fishkern import ops
from fishkern.kernels import sum_grad_squared as kernels

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# What is added to in memory that others may add to: the one sum of a tile, a counter of places, and counts.
ATOMICS = {
    ("_sum_grad_squared_device.py", "_store_tile"),
    ("_streaming_topk_device.py", "select_kernel"),
    ("log_histogram.py", "log_histogram_kernel"),
}


def test_atomics_are_where_their_order_does_not_matter():
    """One that is new belongs on the list, with a reason, and with a call below."""
    found = set()
    for path in KERNELS.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                names = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
                found |= {(path.name, function.name) for name in names if name.startswith("atomic_")}
    assert found == ATOMICS


@pytest.mark.parametrize("O, I, N", [(300, 200, 3), (1024, 1024, 8), (128, 16, 40)])
def test_one_program_adds_to_a_tile(O, I, N, monkeypatch):
    """Where tiles are added in memory, no two programs of a launch have the same, and parts have their own results."""
    x, g = (torch.empty(N, 64, width, dtype=torch.bfloat16, device="meta") for width in (I, O))
    (launch, *sums) = kernels.launches(kernels.Operands(x, g, None, torch.empty(O, I, device="meta")), H100)
    tiles, parts = launch.grid
    assert tiles == -(-O // launch.arguments["BLOCK_O"]) * -(-I // launch.arguments["BLOCK_I"])
    adds = launch.arguments["ADD"] and launch.arguments["REDUCE"]
    assert adds == (parts == 1) == (not sums)
    # The kernel's own arithmetic, on numbers.
    monkeypatch.setattr(kernels.device.tl, "cdiv", lambda a, b: -(-a // b))
    places = Counter(kernels.device._tile.fn(program, O, I, 32, 64, 2) for program in range(-(-O // 32) * -(-I // 64)))
    assert places == Counter((row, column) for row in range(0, O, 32) for column in range(0, I, 64))


def _calls() -> dict[str, object]:
    """One call of each operation with a kernel, large on a GPU."""
    size = 512 if ON_GPU else 24
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    x, g = (torch.randn(3, 10, width, device=DEVICE).to(dtype) for width in (size, size + 8))
    offsets = torch.tensor([0, 3, 20, 30])
    scores = [torch.randn(4500, device=DEVICE).round(decimals=1), torch.randn(500, device=DEVICE)]

    def adamw():
        params, state = [torch.ones(1100, device=DEVICE)], torch.zeros(2, 1100, device=DEVICE)
        rest = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "backend": "triton"}
        ops.masked_adamw_(params, [scores[0][:1100]], [None], *state, torch.ones(1, device=DEVICE), **rest)
        return torch.cat([params[0], *state])

    def sgd():
        params, buffer = [torch.ones(1100, device=DEVICE)], torch.zeros(1100, device=DEVICE)
        one = torch.ones(1, device=DEVICE)
        ops.masked_sgd_(params, [scores[0][:1100]], [None], buffer, one, lr=0.1, momentum=0.9, backend="triton")
        return torch.cat([params[0], buffer])

    packed = {"offsets": offsets, "backend": "triton"}
    flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)
    counted = torch.ones(3, 10, dtype=torch.bool, device=DEVICE)
    v, u = (torch.randn(width, 16, device=DEVICE).to(dtype) for width in (size, size + 8))
    return {
        "sum_grad_squared": lambda: ops.sum_grad_squared(x, g, backend="triton"),
        "sum_grad_squared packed": lambda: ops.sum_grad_squared(flat_x, flat_g, **packed),
        "expert_sum_grad_squared": lambda: ops.expert_sum_grad_squared(
            flat_x,
            flat_g,
            2,
            expert=torch.tensor([0, 0, 1], device=DEVICE),
            offsets=offsets.to(DEVICE),
            backend="triton",
        ),
        "group_sum_grad_squared": lambda: ops.group_sum_grad_squared(x, g, by="row", backend="triton"),
        "project_sum_squared": lambda: ops.project_sum_squared(x, g, v, u, counted=counted, backend="triton"),
        "scale_sum_grad_squared": lambda: ops.scale_sum_grad_squared(x, x, norm="rms", eps=1e-6, backend="triton"),
        "streaming_topk": lambda: torch.cat(ops.streaming_topk(scores, 1500, backend="triton")),
        "log_histogram": lambda: ops.log_histogram(scores[0], torch.linspace(-3, 1, 9), backend="triton"),
        "masked_adamw": adamw,
        "masked_sgd": sgd,
    }


def test_every_kernel_gives_equal_bits_twice():
    calls = _calls()
    assert {name.split()[0] for name in calls} == {path.stem for path in KERNELS.glob("[!_]*.py")}
    for name, call in calls.items():
        assert torch.equal(call(), call()), name
