"""K3: one masked AdamW step against what people do today, on tensors of LoRA and on all weights of a 7B LLaMA.

Gradients stay as they are, so that a step is all that is timed; ``host_ms`` is what the calling thread takes to launch
it. Only parameters are made, no model: speed does not depend on what lies between them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
from torch import nn

import fishkern as fk
from benchmarks.gpu import Part, Record, too_large
from benchmarks.gpu._timing import compare
from benchmarks.masked_cases import PROVIDERS

TESTS = ["tests/ops/test_masked_adamw.py", "tests/ops/test_masked_sgd.py", "tests/laws/test_optimizers.py"]
TESTED_IN = 45
HOST_STEPS = 20


@dataclass(frozen=True)
class Step:
    """What is trained.

    Args:
        shapes: ``"lora"``: 448 matrices A and B of rank 16, 40M entries. ``"7B"``: the weights of LLaMA-2-7B.
        density: Selected fraction, at random.
        dtype: Of the weights.
    """

    shapes: str
    density: float
    dtype: str

    def parameters(self, device: torch.device) -> nn.ParameterList:
        D, inner, layers, R = 4096, 11008, 32, 16
        linears = [(D, D)] * 4 + [(inner, D)] * 2 + [(D, inner)]
        if self.shapes == "lora":
            sizes = [size for O, I in linears for size in ((R, I), (O, R))] * layers
        else:
            sizes = linears * layers + [(32_000, D)] * 2
        dtype = getattr(torch, self.dtype)
        made = nn.ParameterList([torch.full(size, 0.5, dtype=dtype, device=device) for size in sizes])
        for parameter in made:
            parameter.grad = torch.full_like(parameter, 1e-3)
        return made


CASES = {
    **{f"lora {density:.0%}": Step("lora", density, "float32") for density in (0.05, 0.2, 1.0)},
    **{f"7B {density:.1%}": Step("7B", density, "bfloat16") for density in (0.001, 0.005, 0.01, 0.05)},
}


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(_measure, case, device), seconds=30) for name, case in CASES.items()]


def _measure(case: Step, device: torch.device) -> Iterator[Record]:
    parameters = case.parameters(device)
    needed = sum(2 * parameter.nbytes for parameter in parameters)
    if (most := 1.5 * needed) > torch.cuda.get_device_properties(device).total_memory:
        yield too_large(case, most)
        return
    selection = drawn(parameters, case.density)
    # A rival makes its state when it is first called, and gives it back before the next one comes.
    steps: dict[str, object] = {}

    def step(name: str) -> None:
        if name not in steps:
            steps[name] = PROVIDERS[name](parameters, selection)
        steps[name]()

    for rival in [name for name in PROVIDERS if name != "fishkern"]:
        steps.clear()
        found = compare(
            {name: partial(step, name) for name in ("fishkern", rival)}, ours="fishkern", device=device, flush=False
        )
        for provider, figures in found.items():
            if "failed" not in figures:
                figures["host_ms"] = _host_ms(partial(step, provider))
            yield {
                "provider": provider,
                "against": rival,
                "case": asdict(case),
                "entries": selection.count,
                **figures,
            }


def drawn(parameters: nn.ParameterList, density: float) -> fk.Selection:
    """Select about so many entries at random, on the device: ``fk.Random``, which counts them, takes half a minute."""
    generator = torch.Generator(parameters[0].device).manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in parameters.named_parameters()}
    indices = {}
    for name, parameter in parameters.named_parameters():
        draws = torch.rand(parameter.numel(), device=parameter.device, generator=generator)
        indices[name] = (draws < density).nonzero().view(-1).to("cpu", torch.int32)
    return fk.Selection(shapes, indices, whole=shapes if density == 1 else ())


def _host_ms(step: partial) -> float:
    """Time that the calling thread takes for one step, which the device may still be at."""
    times = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return median(times)
