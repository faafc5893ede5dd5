"""One masked AdamW step on a GPU against common practice, on LoRA's factors and on all weights of a 7B LLaMA.

Gradients stay as they are, so the step alone is timed; ``host_ms`` is the time in which the calling thread launches it.
On a CPU: :mod:`benchmarks.cases.masked_step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import nn

import fishkern as fk
from benchmarks.engine.turns import Run, seconds_of
from benchmarks.gpu import Part, Record, too_large
from benchmarks.gpu.timing import time_providers
from benchmarks.rivals.providers import MASKED, runs
from benchmarks.subjects.masks import MODELS, MaskedStep

TESTS = {"gpu": ["tests/ops/test_masked_adamw.py", "tests/ops/test_masked_sgd.py", "tests/laws/test_optimizers.py"]}
TESTED_IN = 45
HOST_STEPS = 20
PROVIDERS = runs(MASKED)
CASES = {
    **{f"lora {density:.0%}": MaskedStep("7B lora", density, device="cuda") for density in (0.05, 0.2, 1.0)},
    **{f"7B {density:.1%}": MaskedStep("7B", density, "bfloat16", "cuda") for density in (0.001, 0.005, 0.01, 0.05)},
}


def parts(device: torch.device) -> list[Part]:
    return [
        Part(name, partial(_measure, replace(case, device=str(device)), device), seconds=30)
        for name, case in CASES.items()
    ]


def _measure(case: MaskedStep, device: torch.device) -> Iterator[Record]:
    shape, lora = MODELS[case.model]
    needed = 0 if lora else 1.5 * 2 * sum(shape.sizes()) * getattr(torch, case.dtype).itemsize
    if needed > torch.cuda.get_device_properties(device).total_memory:
        yield too_large(case, needed)
        return
    trained = case.trained()
    selection = drawn(trained, case.density)
    # A rival makes its state when it is first called, and frees it before the next one runs.
    steps: dict[str, Run] = {}

    def step(name: str) -> None:
        if name not in steps:
            steps[name] = PROVIDERS[name](trained, selection)
        steps[name]()

    for rival in [name for name in PROVIDERS if name != "fishkern"]:
        steps.clear()
        timed = {name: partial(step, name) for name in ("fishkern", rival)}
        for provider, figures in time_providers(timed, ours="fishkern", device=device, flush=False).items():
            if "failed" not in figures:
                figures["host_ms"] = _host_ms(timed[provider])
            described = {"provider": provider, "against": rival, "case": case.fields, "dtype": case.dtype}
            yield {**described, "entries": selection.count, **figures}


def drawn(trained: nn.Module, density: float) -> fk.Selection:
    """About so many entries at random, drawn on the device: ``fk.Random``, which counts them, takes half a minute."""
    parameters = dict(trained.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    indices = {}
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(0)
    for name, parameter in parameters.items():
        draws = torch.rand(parameter.numel(), device=parameter.device, generator=generator)
        indices[name] = (draws < density).nonzero().view(-1).to("cpu", torch.int32)
    return fk.Selection(shapes, indices, whole=shapes if density == 1 else ())


def _host_ms(step: Run) -> float:
    """Time that the calling thread takes for one step, while the device may still be busy with it."""
    times = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        times.append(1000 * seconds_of(step))
    torch.cuda.synchronize()
    return median(times)
