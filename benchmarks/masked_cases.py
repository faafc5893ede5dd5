"""Cases and providers of the masked optimizer's benchmarks.

A provider takes a model and a selection and returns ``step()``, called after each backward pass. ``python -m
benchmarks.masked_cases PROVIDER CASE`` prints peak memory.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.memory import MIB, _peak_of
from benchmarks.shapes import LLAMA_104M

Step = Callable[[], object]


@dataclass(frozen=True)
class MaskedStep:
    """What is trained.

    Args:
        model: ``"llama"``: all weights of a LLaMA of 104M parameters. ``"lora"``: the 24 matrices A and B of rank 16 in
            each of its layers, as tensors of their own.
        density: Selected fraction, at random.
    """

    model: str
    density: float

    def __str__(self) -> str:
        return f"{self.model},density={self.density}"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.model == "llama":
            return LLAMA_104M.model().train()
        hidden, inner, layers, R = LLAMA_104M.hidden, LLAMA_104M.intermediate, LLAMA_104M.layers, 16
        sizes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
        pairs = [[torch.randn(R, I), torch.randn(O, R)] for I, O in sizes for _ in range(layers)]
        return nn.ParameterList([nn.Parameter(tensor) for pair in pairs for tensor in pair])

    def selection(self, model: nn.Module) -> fk.Selection:
        scores = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return fk.select(scores, fk.Random(density=self.density, seed=0))


def fishkern(model: nn.Module, selection: fk.Selection) -> Step:
    return fk.MaskedAdamW(model, selection, max_grad_norm=math.inf).step


def six_lines(model: nn.Module, selection: fk.Selection) -> Step:
    """Gather into one flat vector, fused AdamW, scatter."""
    chosen = [(p, selection.indices(n).long().to(p.device)) for n, p in model.named_parameters() if selection.counts[n]]
    flat = torch.cat([p.detach().view(-1)[i] for p, i in chosen]).requires_grad_()
    optimizer = torch.optim.AdamW([flat], fused=True)

    @torch.no_grad()
    def step() -> None:
        flat.grad = torch.cat([p.grad.view(-1)[i] for p, i in chosen])
        optimizer.step()
        for (p, i), values in zip(chosen, flat.split([len(i) for _, i in chosen]), strict=True):
            p.view(-1)[i] = values

    return step


def _masked_gradients(model: nn.Module, selection: fk.Selection, **options: bool) -> Step:
    masks = [(p, selection.mask(n).to(p.device)) for n, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), **options)

    def step() -> None:
        for parameter, mask in masks:
            parameter.grad *= mask
        optimizer.step()

    return step


def masked_fused(model: nn.Module, selection: fk.Selection) -> Step:
    """Masked gradients and torch's fused AdamW, whose decay moves all weights."""
    return _masked_gradients(model, selection, fused=True)


def masked_foreach(model: nn.Module, selection: fk.Selection) -> Step:
    """Masked gradients and torch's multi-tensor AdamW."""
    return _masked_gradients(model, selection, foreach=True)


def dense_fused(model: nn.Module, selection: fk.Selection) -> Step:
    """Everything trained, by torch's fused AdamW."""
    return torch.optim.AdamW(model.parameters(), fused=True).step


PROVIDERS = {
    "fishkern": fishkern,
    "six_lines": six_lines,
    "masked_fused": masked_fused,
    "masked_foreach": masked_foreach,
    "dense_fused": dense_fused,
}
CASES = [MaskedStep(model, density) for model in ("lora", "llama") for density in (0.001, 0.005, 0.05, 0.5)]


def peak_memory(provider: str, case: MaskedStep) -> dict[str, float]:
    """Measure whole training steps in a fresh process, where freed memory goes back to the system at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.masked_cases", provider, repr(case)]
    root = Path(__file__).parents[1]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root)
    return json.loads(out.stdout.splitlines()[-1])


def main(provider: str, described: str) -> None:
    """Peak of two training steps of the LLaMA above what the loaded model takes, selection included, in MiB."""
    case = eval(described, {"MaskedStep": MaskedStep})
    model, trained = _to_train(case)
    ids: Tensor = torch.randint(0, LLAMA_104M.vocabulary, (2, 32))

    def train(step: Step | None) -> None:
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if step is not None:
                step()
            model.zero_grad()

    weights = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    activations = _peak_of(lambda: train(None))
    model.requires_grad_(False)
    trained.requires_grad_(True)
    peak = _peak_of(lambda: train(PROVIDERS[provider](trained, case.selection(trained))))
    figures = {"weights_mib": weights, "activations_mib": activations, "peak_mib": peak}
    print(json.dumps({key: round(value, 1) for key, value in figures.items()}))


def _to_train(case: MaskedStep) -> tuple[nn.Module, nn.Module]:
    """The LLaMA, and what of it is trained: itself, or adapters of rank 16 on all its linears."""
    if case.model == "llama":
        model = case.build()
        return model, model
    import peft

    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(LLAMA_104M.model().train(), lora)
    return model, nn.ParameterList([parameter for parameter in model.parameters() if parameter.requires_grad])


if __name__ == "__main__":
    main(*sys.argv[1:])
