"""What fewer tokens save of a forward pass and of a training step, in counted FLOPs and in time.

A vision transformer of the shape of ViT-S/14 with random weights keeps 0.7 of its image tokens in three of its twelve
layers, and all of them. Both take turns within each round. What is saved is a fraction of what the model without
reduction takes; ranking and merging tokens costs time that no FLOP shows, so the saved time is less than the saved
FLOPs. A training step moves 0.33 % of the weights, as TR-PTS does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine.flops import flops
from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, seconds_of, spread, there_and_back

TESTS = {"run": ["tests/tokens"]}
KEEP, REDUCING = 0.7, (3, 6, 9)  # the layers in which EViT reduces
TRAINED = 0.0033
ROUNDS = 9
AT_LEAST = 0.7  # of the counted saving, in time

HAS_TOKENS = find_spec("fishkern.tokens") is not None
pytestmark = pytest.mark.skipif(not HAS_TOKENS, reason="this fishkern reduces no tokens")


@dataclass(frozen=True)
class Images:
    """A vision transformer and images.

    Args:
        N: Images in a batch.
        size: Pixels along a side.
        layers: Of the model.
        hidden: Hidden size; heads have 64 of it.
        patch: Pixels along the side of a patch.
    """

    N: int
    size: int
    layers: int = 12
    hidden: int = 384
    patch: int = 14

    def model(self) -> nn.Module:
        from transformers import Dinov2Config, Dinov2ForImageClassification

        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=max(1, self.hidden // 64),
            image_size=self.size, patch_size=self.patch, num_labels=10, attn_implementation="sdpa",
        )  # fmt: skip
        model = Dinov2ForImageClassification(config).eval()
        model.get_parameter("dinov2.embeddings.mask_token").requires_grad_(False)  # never reached
        return model

    def batch(self) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        pixels = torch.randn(self.N, 3, self.size, self.size, generator=draws)
        return {"pixel_values": pixels, "labels": torch.arange(self.N) % 10}


CASES = (Images(1, 518), Images(8, 224))


def model_of(case: Images, *, reduced: bool) -> nn.Module:
    model = case.model()
    if reduced:
        from fishkern import tokens

        tokens.attach(model, tokens.TokenReduction(REDUCING, keep=KEEP))
    return model


def forward(case: Images, *, reduced: bool) -> Run:
    """A forward pass in evaluation."""
    model, batch = model_of(case, reduced=reduced), case.batch()

    def run() -> None:
        with torch.no_grad():
            model(**batch)

    return run


def training_step(case: Images, *, reduced: bool) -> Run:
    """Forward, backward and a step of the optimizer."""
    model, batch = model_of(case, reduced=reduced), case.batch()
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    selection = fk.select({name: value.detach() for name, value in weights.items()}, fk.Random(density=TRAINED, seed=0))
    optimizer = fk.MaskedAdamW(weights.items(), selection, lr=1e-4)

    def run() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


WHAT: dict[str, Callable[..., Run]] = {"forward": forward, "training step": training_step}
PROVIDERS = {"fishkern": True, "all_tokens": False}


def saved(both: Mapping[str, float]) -> float:
    """The fraction that reduction saves."""
    return 1 - both["fishkern"] / both["all_tokens"]


def description(case: Images, what: str, provider: str) -> Record:
    """The fields of a record other than its figures."""
    reduction = {"layers": list(REDUCING), "keep": KEEP} if PROVIDERS[provider] else None
    named = {**asdict(case), "reducing": reduction}
    return {
        "op": "token_reduction", "quantity": what, "case": named, "attention": "sdpa", "dtype": "float32",
        "provider": provider,
    }  # fmt: skip


def measured(case: Images, what: str, rounds: int) -> tuple[dict[str, int], dict[str, list[float]]]:
    """FLOPs, and the seconds of each round, by provider."""
    runs = {provider: WHAT[what](case, reduced=reduced) for provider, reduced in PROVIDERS.items()}
    counted = {provider: flops(run) for provider, run in runs.items()}  # which also warms up
    return counted, there_and_back(runs, rounds, seconds_of)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.N}x{case.size}px")
def test_token_reduction(benchmark, record, case, what):
    counted, seconds = benchmark.pedantic(measured, args=(case, what, ROUNDS), rounds=1)
    fewer, faster = saved(counted), saved({provider: median(times) for provider, times in seconds.items()})
    for provider, times in seconds.items():
        figures = {"seconds": spread(times), "rounds": ROUNDS, "flops": counted[provider]}
        if provider == "fishkern":
            figures |= {"saved_flops": fewer, "saved_seconds": faster}
        record("token_reduction", {**description(case, what, provider), **figures})
    benchmark.extra_info["saved"] = f"{faster:.3f} of the time, {fewer:.3f} of the FLOPs"
    assert faster >= AT_LEAST * fewer


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""
    if not HAS_TOKENS:
        return {}
    return {
        f"{what} {case.N}x{case.size}px": {
            provider: partial(make, case, reduced=reduced) for provider, reduced in PROVIDERS.items()
        }
        for case in CASES
        for what, make in WHAT.items()
    }
