"""What grows in the scaling benchmark, and the providers of each operation. Loaded by :mod:`benchmarks.worker`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks import masked_cases, topk_cases
from benchmarks.cases import WholePass
from benchmarks.providers import PROVIDERS as PASSES
from fishkern.ops import sum_grad_squared

Run = Callable[[], object]


@dataclass(frozen=True)
class Sweep:
    """One quantity that grows while the others stay.

    Args:
        op: ``sum_grad_squared``, ``streaming_topk``, ``masked_adamw`` or ``whole_pass``.
        grows: Which one of the sizes.
        sizes: Its values.
        others: The other sizes.
    """

    op: str
    grows: str
    sizes: tuple[int, ...]
    others: dict[str, int]

    def __str__(self) -> str:
        return f"{self.op},{self.grows}"


SWEEPS = [
    Sweep("sum_grad_squared", "N", (8, 16, 32, 64, 128, 256, 512), {"T": 32, "width": 1024}),
    Sweep("sum_grad_squared", "T", (8, 16, 32, 64, 128, 256, 512), {"N": 16, "width": 1024}),
    Sweep("sum_grad_squared", "width", (256, 512, 1024, 2048, 4096), {"N": 16, "T": 32}),
    Sweep("streaming_topk", "n", (2**18, 2**20, 2**22, 2**24, 2**26, 2**28), {"k": 2**10, "tensors": 64}),
    Sweep("streaming_topk", "k", (2**6, 2**10, 2**14, 2**18, 2**22), {"n": 2**24, "tensors": 64}),
    Sweep("streaming_topk", "tensors", (1, 8, 64, 512, 4096), {"n": 2**24, "k": 2**14}),
    Sweep("masked_adamw", "P", (2**19, 2**21, 2**23, 2**25, 2**27), {"k": 2**18, "tensors": 64}),
    Sweep("masked_adamw", "k", (2**8, 2**11, 2**14, 2**17, 2**20), {"P": 2**24, "tensors": 64}),
    Sweep("masked_adamw", "tensors", (1, 8, 64, 512, 4096), {"P": 2**24, "k": 2**16}),
    Sweep("whole_pass", "N", (4, 8, 16, 32, 64, 128), {"T": 16, "layers": 2}),
    Sweep("whole_pass", "T", (8, 16, 32, 64, 128, 256), {"N": 8, "layers": 2}),
    Sweep("whole_pass", "layers", (1, 2, 4, 8, 16), {"N": 8, "T": 16}),
]


def loop(activations: Tensor, output_grads: Tensor) -> Tensor:
    """The gradient of one example after the other, squared and added."""
    total = torch.zeros(output_grads.shape[-1], activations.shape[-1], device=activations.device)
    for x, g in zip(activations, output_grads, strict=True):
        total += (g.mT @ x).square_()
    return total


def vmap(activations: Tensor, output_grads: Tensor) -> Tensor:
    """All of them at once, ``[N, O, I]``."""
    return torch.func.vmap(lambda x, g: g.mT @ x)(activations, output_grads).square_().sum(0)


PROVIDERS: dict[str, dict[str, Callable]] = {
    "sum_grad_squared": {"fishkern": sum_grad_squared, "loop": loop, "vmap": vmap},
    "streaming_topk": {name: topk_cases.PROVIDERS[name] for name in ("fishkern", "sampled_threshold", "cat_topk")},
    "masked_adamw": {name: masked_cases.PROVIDERS[name] for name in ("fishkern", "six_lines", "masked_fused")},
    "whole_pass": {name: PASSES[name] for name in ("fishkern", "one_by_one", "vmap_grad")},
}


def prepare(op: str, provider: str, sizes: dict[str, int]) -> Run:
    """Make the inputs of one measurement, and what runs on them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = PROVIDERS[op][provider]
    torch.manual_seed(0)
    return {"sum_grad_squared": _layer, "streaming_topk": _scores, "masked_adamw": _step, "whole_pass": _pass}[op](
        run, device, **sizes
    )


def _layer(run: Callable, device: torch.device, N: int, T: int, width: int) -> Run:
    activations, output_grads = torch.randn(2, N, T, width, device=device)
    return partial(run, activations, output_grads)


def _scores(run: Callable, device: torch.device, n: int, k: int, tensors: int) -> Run:
    return partial(run, topk_cases.TopK(n, blocks=tensors).scores(device), k)


def _step(run: Callable, device: torch.device, P: int, k: int, tensors: int) -> Run:
    model = nn.ParameterList([nn.Parameter(torch.randn(P // tensors, device=device)) for _ in range(tensors)])
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    selection = fk.select({name: p.detach() for name, p in model.named_parameters()}, fk.Random(k=k, seed=0))
    made: list[Run] = []

    def step() -> None:
        """The first one makes the state, which counts as memory."""
        if not made:
            made.append(run(model, selection))
        made[0]()

    return step


def _pass(run: Callable, device: torch.device, N: int, T: int, layers: int) -> Run:
    case = WholePass(T=T, N=N, batches=2, layers=layers, hidden=256)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in case.data()]
    return partial(run, case.model().to(device), batches)
