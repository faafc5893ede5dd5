"""The Fisher of fused experts and their routers: their rules against the generic path and the batch-size-1 loop.

A Mixtral with random weights, of which experts and routers alone are requested, so that nothing else hides them. Passes
are prepared, since the set-up is paid once for a model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks import rivals
from benchmarks.engine.records import Record
from benchmarks.engine.turns import in_turns, seconds_of, spread
from benchmarks.rivals import Batches
from fishkern import layers

TESTS = {"run": ["tests/models/test_experts.py", "tests/models/test_random_experts.py"]}
ROUNDS = 3  # of up to 15 seconds
VOCABULARY = 256

pytestmark = pytest.mark.skipif(not hasattr(layers, "Experts"), reason="this fishkern has no rule of experts")


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Args:
        hidden: Hidden size.
        intermediate: Of an expert.
        layers: Decoder layers.
        N: Examples of a batch.
        T: Positions of an example.
        batches: Number of batches.
        experts: Of a layer; two are chosen for a position.
        faster: The least that the rules are to be faster than the generic path.
        of_loop: The most that they are to take of the loop's time; ``None``: no goal.
    """

    hidden: int
    intermediate: int
    layers: int
    N: int = 16
    T: int = 32
    batches: int = 1
    experts: int = 8
    faster: float = 1 / 1.05
    of_loop: float | None = None

    def __str__(self) -> str:
        return f"hidden={self.hidden},N={self.N},T={self.T}"

    def model(self) -> nn.Module:
        """Make it, with gradients for experts and routers alone."""
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=8, num_key_value_heads=8, num_local_experts=self.experts,
            num_experts_per_tok=2, max_position_embeddings=self.T, use_cache=False,
        )  # fmt: skip
        model = MixtralForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".experts." in name or ".gate." in name)
        return model

    def data(self) -> Batches:
        """Random rows without padding."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(VOCABULARY, (self.batches, self.N, self.T), generator=generator)
        return [{"input_ids": one, "labels": one} for one in rows]


CASES = [
    Case(256, 512, layers=4, T=64, batches=2, faster=1.2),
    Case(2048, 1024, layers=1, T=32, of_loop=1.25),
    Case(2048, 1024, layers=1, T=128, of_loop=1.25),
]
PROVIDERS = ("fishkern", "generic", "one_by_one")


@contextmanager
def without_rules() -> Iterator[None]:
    """Take the rules of experts and routers away, as if no one had written them."""
    others = tuple(layer for layer in layers.LAYERS if not isinstance(layer, layers.Experts | layers.Router))
    rooms = [module for name, module in sys.modules.items() if name.startswith("fishkern.layers.")]
    with ExitStack() as patched:
        for room in rooms:
            if hasattr(room, "LAYERS"):
                patched.enter_context(patch.object(room, "LAYERS", others))
        yield


def provider(name: str, model: nn.Module, data: Batches) -> Callable[[], dict[str, Tensor]]:
    """Prepare a pass, or the loop.

    Args:
        name: One of :data:`PROVIDERS`.
        model: From :meth:`Case.model`.
        data: From :meth:`Case.data`.

    Returns:
        A function that runs it, and gives means of squares by name.
    """
    if name == "one_by_one":
        count = sum(len(batch["input_ids"]) for batch in data)
        return lambda: {key: total / count for key, total in rivals.one_by_one(model, data).items()}
    if name == "fishkern":
        prepared = fk.prepare(model, data[0])
        return partial(fk.estimate, model, data, prepared=prepared)
    with without_rules():
        prepared = fk.prepare(model, data[0])

    def generic() -> fk.Statistics:
        with without_rules():
            return fk.estimate(model, data, prepared=prepared)

    return generic


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time(case, benchmark, record):
    model, data = case.model(), case.data()
    timed = {name: partial(seconds_of, provider(name, model, data)) for name in PROVIDERS}
    seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        record("experts", {**description(case, name), "seconds": spread(values), "rounds": ROUNDS})
    middle = {name: median(values) for name, values in seconds.items()}
    assert middle["generic"] >= case.faster * middle["fishkern"]
    assert case.of_loop is None or middle["fishkern"] <= case.of_loop * middle["one_by_one"]


def description(case: Case, name: str) -> Record:
    """The fields of a record other than its figures."""
    fields = {key: value for key, value in asdict(case).items() if key not in ("faster", "of_loop")}
    shared = {"op": "experts", "quantity": "time", "case": fields, "attention": "sdpa", "dtype": "float32"}
    return {**shared, "implementation": "grouped_mm", "provider": name}
