"""The whole Fisher pass on models of LLaMA's shapes with random weights, against the ways to it that people use.

``forward_backward`` is one ordinary forward and backward pass of the same batches. Times are for each batch. A pass of
``fishkern`` begins with a set-up (hooks, comparison of the loss with the model's own), spread over its batches;
``fishkern_one_batch`` shows it, and ``marginal_ms`` is what one batch more costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks import rivals
from benchmarks.gpu import Part, Record
from benchmarks.gpu._timing import compare
from benchmarks.rivals import Batches
from benchmarks.shapes import TINYLLAMA, Shape

# The comparison of both backends on a small model of every layer, which runs on the device where there is one.
TESTS = ["tests/models/test_backends.py"]
TESTED_IN = 45
# FISH-Tuning takes 128 examples.
BATCHES = 16
# The slow ones are timed on fewer batches.
FEWER = {"fishkern_one_batch": 1, "forward_backward": 4, "one_by_one": 1, "one_by_one_graphed": 2, "per_layer_bmm": 2}
FEWER |= {"fishkern_checked": 4, "fishkern_torch": 2}
# A capture that fails may disturb what is allocated after it, so that it is not timed in turns with the others.
ALONE = "one_by_one_graphed"


@dataclass(frozen=True)
class Case:
    """A model and batches of full rows.

    Args:
        N: Examples in each batch.
        T: Tokens of each example.
        layers: Decoder layers.
        hidden: Hidden size.
        intermediate: Size of the feed-forward layers.
        vocabulary: Number of tokens known.
        heads: Attention heads.
        key_heads: Heads of keys and values.
        tied: Whether embedding and head share their weight.
        lora: Rank of LoRA on all linears, whose factors alone are estimated; 0 for none.
        dtype: Of the weights.
    """

    N: int = 8
    T: int = 512
    layers: int = TINYLLAMA.layers
    hidden: int = TINYLLAMA.hidden
    intermediate: int = TINYLLAMA.intermediate
    vocabulary: int = TINYLLAMA.vocabulary
    heads: int = TINYLLAMA.heads
    key_heads: int = TINYLLAMA.key_heads
    tied: bool = False
    lora: int = 0
    dtype: str = "bfloat16"

    def model(self, device: torch.device) -> nn.Module:
        sizes = (self.layers, self.hidden, self.intermediate, self.vocabulary, self.heads, self.key_heads, self.tied)
        model = Shape(*sizes).model(device, getattr(torch, self.dtype))
        if self.lora:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=self.lora, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, adapters).eval()
        return model

    def data(self, device: torch.device) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.vocabulary, (BATCHES, self.N, self.T), generator=generator).to(device)
        return [{"input_ids": rows, "labels": rows} for rows in ids]


CASES = {
    "1B 8x512": Case(),
    "1B 8x128": Case(T=128),
    "1B 64x16": Case(N=64, T=16),
    "1B 8x512 tied": Case(tied=True),
    "1B 8x512 lora r=16": Case(lora=16),
}


def parts(device: torch.device) -> list[Part]:
    return [Part(name, partial(measure, case, device), seconds=65) for name, case in CASES.items()]


def measure(case: Case, device: torch.device) -> Iterator[Record]:
    """Time all providers on one case."""
    model, batches = case.model(device), case.data(device)
    counts = {name: min(FEWER.get(name, BATCHES), BATCHES) for name in providers(case, model)}
    runs = {name: partial(run, batches[: counts[name]]) for name, run in providers(case, model).items()}
    alone = {ALONE: runs.pop(ALONE)} if ALONE in runs else {}
    found = compare(runs, ours="fishkern", device=device, flush=False)
    accumulators = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    error = disagreement(model, batches[:1])
    if alone:
        found |= compare(alone, ours="fishkern", device=device, flush=False)
    for provider, figures in found.items():
        if "ms" in figures:
            figures["ms"] = {key: value / counts[provider] for key, value in figures["ms"].items()}
        record = {"provider": provider, "case": asdict(case), "attention": "sdpa", "dtype": case.dtype, **figures}
        if provider == "fishkern":
            first, all_of_them = found["fishkern_one_batch"]["ms"]["median"], figures["ms"]["median"] * BATCHES
            record |= {
                "error": f"{error:.1e}",
                "accumulators_mib": round(accumulators / 2**20, 1),
                "marginal_ms": (all_of_them - first) / max(BATCHES - 1, 1),
            }
        yield {**record, "batches": counts[provider]}


def providers(case: Case, model: nn.Module) -> dict[str, Callable[[Batches], object]]:
    """What is timed; with LoRA or a tied head only what is ours and the yardstick."""
    ours = partial(fk.estimate, model, check=False, backend="triton")
    found: dict[str, Callable[[Batches], object]] = {
        "fishkern_one_batch": ours,
        "fishkern": ours,
        "fishkern_checked": partial(fk.estimate, model, backend="triton"),
        "forward_backward": partial(rivals.forward_backward, model),
    }
    if case.tied or case.lora:
        return found
    graphed: list[Callable[[Batches], object]] = []

    def replay(batches: Batches) -> object:
        if not graphed:
            graphed.append(rivals.graphed_one_by_one(model, case.T))
        return graphed[0](batches)

    return found | {
        "fishkern_torch": partial(fk.estimate, model, check=False, backend="torch"),
        "one_by_one": partial(rivals.one_by_one, model),
        "one_by_one_graphed": replay,
        "per_layer_bmm": partial(rivals.per_layer_bmm, model),
    }


def disagreement(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The largest ``|triton - torch| / |torch|`` of a parameter."""
    ours, theirs = (fk.estimate(model, batches, check=False, backend=backend) for backend in ("triton", "torch"))
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)
