"""How time and peak memory grow with examples, positions, layers, tensors, scores and selected entries.

Each operation and the whole pass are measured along with the simple ways to the same result, on a geometric row of
sizes. Every provider has a process of its own, which may take :data:`LIMIT_GIB` of memory above its imports; they take
turns within each round. Memory is measured in further processes, above the inputs. A provider that runs out of memory
or fails really does: that size is recorded with the reason, and larger ones as not tried.

The sizes suit two cores, and do not keep a GPU busy. Exponents are the picture's, not the records'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

import fishkern as fk
from benchmarks.engine.process import Process, ProcessError
from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, spread
from benchmarks.rivals.providers import LAYERS, MASKED, PASSES, TOPK, runs
from benchmarks.subjects.scores import TopK
from benchmarks.subjects.transformers import Workload, small_llama

TESTS = {
    "run": [
        "tests/benchmarks/test_scaling.py",
        "tests/ops/test_sum_grad_squared.py",
        "tests/ops/test_streaming_topk.py",
        "tests/ops/test_masked_adamw.py",
        "tests/laws/test_layers.py",
    ]
}
LIMIT_GIB = 2
ROUNDS = 3
MORE_ROUNDS, SHORT = 9, 0.1  # of runs that take less than so many seconds
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Sizes = dict[str, int]
Figures = dict[str, Record]  # by provider


@dataclass(frozen=True)
class Sweep:
    """One quantity that grows while the others stay.

    Args:
        op: A key of :data:`PROVIDERS`.
        grows: Which one of the sizes.
        sizes: Its values.
        others: The other sizes.
    """

    op: str
    grows: str
    sizes: tuple[int, ...]
    others: Sizes

    def __str__(self) -> str:
        return f"{self.op},{self.grows}"

    def at(self, size: int) -> Sizes:
        return {**self.others, self.grows: size}


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
PROVIDERS: dict[str, dict[str, Callable]] = {
    "sum_grad_squared": runs(LAYERS),
    "streaming_topk": runs(TOPK, "fishkern", "sampled_threshold", "cat_topk"),
    "masked_adamw": runs(MASKED, "fishkern", "six_lines", "masked_fused"),
    "whole_pass": runs(PASSES, "fishkern", "one_by_one", "vmap_grad"),
}


def make(op: str, provider: str, sizes: Sizes) -> Run:
    """Make the inputs of one measurement, and what runs on them."""
    torch.manual_seed(0)
    return _MAKERS[op](PROVIDERS[op][provider], **sizes)


def _layer(run: Callable, N: int, T: int, width: int) -> Run:
    activations, output_grads = torch.randn(2, N, T, width, device=DEVICE)
    return partial(run, activations, output_grads)


def _scores(run: Callable, n: int, k: int, tensors: int) -> Run:
    return partial(run, TopK(n, blocks=tensors).scores(DEVICE), k)


def _step(run: Callable, P: int, k: int, tensors: int) -> Run:
    model = nn.ParameterList([nn.Parameter(torch.randn(P // tensors, device=DEVICE)) for _ in range(tensors)])
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    selection = fk.select({name: p.detach() for name, p in model.named_parameters()}, fk.Random(k=k, seed=0))
    steps: list[Run] = []

    def step() -> None:
        """The first one makes the state, which counts as memory."""
        if not steps:
            steps.append(run(model, selection))
        steps[0]()

    return step


def _pass(run: Callable, N: int, T: int, layers: int) -> Run:
    case = Workload(small_llama(layers, 256), T, N, batches=2, device=DEVICE)
    return partial(run, case.model(), case.data(mask=True))


_MAKERS = {"sum_grad_squared": _layer, "streaming_topk": _scores, "masked_adamw": _step, "whole_pass": _pass}


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``: the middle of each row of sizes, by ``fishkern`` and one rival."""

    def at_the_middle(sweep: Sweep, provider: str) -> Run:
        return make(sweep.op, provider, sweep.at(sweep.sizes[len(sweep.sizes) // 2]))

    return {
        str(sweep): {name: partial(at_the_middle, sweep, name) for name in list(PROVIDERS[sweep.op])[:2]}
        for sweep in SWEEPS
    }


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_scaling(sweep, record):
    figures = {quantity: list(measure(sweep, quantity)) for quantity in ("time", "memory")}
    for quantity, measured in figures.items():
        for provider, size, figure in measured:
            described = {"op": sweep.op, "quantity": quantity, "grows": sweep.grows, "case": sweep.at(size)}
            described |= {"dtype": "float32", "provider": provider, "limit_gib": LIMIT_GIB}
            record("scaling", {**described, **figure})
    ours = [figure for measured in figures.values() for provider, _, figure in measured if provider == "fishkern"]
    assert not [figure["left out"] for figure in ours if "left out" in figure]


def measure(sweep: Sweep, quantity: str) -> Iterator[tuple[str, int, Record]]:
    """Measure all providers at all sizes.

    Yields:
        Provider, size, and its figures or the reason that there are none.
    """
    stopped: dict[str, str] = {}
    measured_by = {"time": times, "memory": peaks}[quantity]
    with processes(sweep.op, memory=quantity == "memory") as running:
        if quantity == "memory":
            peaks(running, sweep.op, sweep.at(sweep.sizes[0]))  # libraries allocate on first use
        for size in sweep.sizes:
            ready = {provider: process for provider, process in running.items() if provider not in stopped}
            figures = measured_by(ready, sweep.op, sweep.at(size))
            for provider in running:
                if provider in stopped:
                    yield provider, size, {"left out": f"not tried: {stopped[provider]}"}
                    continue
                yield provider, size, figures[provider]
                if reason := figures[provider].get("left out"):
                    stopped[provider] = f"{reason} at {sweep.grows} = {size}"


@contextmanager
def processes(op: str, *, memory: bool) -> Iterator[dict[str, Process]]:
    """One process for each provider, for as long as the block runs."""
    with ExitStack() as stack:
        yield {
            provider: stack.enter_context(Process(limit_gib=LIMIT_GIB, memory=memory, quiet=True))
            for provider in PROVIDERS[op]
        }


def times(running: dict[str, Process], op: str, sizes: Sizes) -> Figures:
    """Let providers take turns, after a warm-up, which decides how many rounds there are."""
    failed: Figures = {}
    seconds: dict[str, list[float]] = {}

    def turn(provider: str) -> None:
        try:
            seconds.setdefault(provider, []).append(running[provider].seconds())
        except ProcessError as error:
            failed[provider] = {"left out": str(error)}

    for provider, process in running.items():
        try:
            process.prepare("benchmarks.cases.scaling:make", op, provider, sizes)
        except ProcessError as error:
            failed[provider] = {"left out": str(error)}
        else:
            turn(provider)
    slowest = max((values[0] for name, values in seconds.items() if name not in failed), default=0.0)
    seconds.clear()
    for _ in range(MORE_ROUNDS if slowest < SHORT else ROUNDS):
        for provider in [name for name in running if name not in failed]:
            turn(provider)
    timed = {name: values for name, values in seconds.items() if name not in failed}
    return failed | {name: {"seconds": spread(values), "rounds": len(values)} for name, values in timed.items()}


def peaks(running: dict[str, Process], op: str, sizes: Sizes) -> Figures:
    """One run each, which makes the state that it keeps."""
    figures: Figures = {}
    for provider, process in running.items():
        try:
            process.prepare("benchmarks.cases.scaling:make", op, provider, sizes)
            figures[provider] = {"peak_mib": round(process.peak_mib(), 2)}
        except ProcessError as error:
            figures[provider] = {"left out": str(error)}
    return figures
