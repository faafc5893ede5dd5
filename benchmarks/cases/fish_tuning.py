"""FISH-Tuning's selection over 128 examples, in batches, against the loop that its published code runs.

Random weights and tokens; shapes of MiniLM with LoRA (r = 1, PiSSA) on query, key and value of five layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine.turns import Run, in_turns, seconds_of
from benchmarks.rivals import one_by_one
from benchmarks.subjects.transformers import MINILM

TESTS = {"run": ["tests/methods/test_fish_tuning.py", "tests/models/test_adapters.py"]}
ROUNDS = 3
EXAMPLES, BATCH = 128, 16
LENGTHS = (6, 24)  # of a CoLA sentence with its special tokens
DENSITY = 0.2


def adapted() -> nn.Module:
    import peft

    lora = peft.LoraConfig(
        r=1,
        lora_alpha=2,
        target_modules=["query", "key", "value"],
        layers_to_transform=list(range(5)),
        init_lora_weights="pissa",
        task_type="SEQ_CLS",
    )
    return peft.get_peft_model(MINILM.model(), lora).eval()


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(EXAMPLES // BATCH):
        lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (BATCH,), generator=generator)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(1000, 30_000, mask.shape, generator=generator) * mask
        labels = torch.randint(2, (BATCH,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def selected_by_loop(model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Selection:
    return fk.select(one_by_one(model, batches), fk.GlobalTopK(k=selected(model, batches).k, always="*classifier*"))


def selected(model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Selection:
    return fk.fish_tuning(model, batches, density=DENSITY)


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""

    def make(run: Callable) -> Run:
        return partial(run, adapted(), data())

    return {"selection": {"fishkern": partial(make, selected), "one_by_one": partial(make, one_by_one)}}


def test_selection(benchmark, record):
    model, batches = adapted(), data()
    runs = {"fishkern": partial(selected, model, batches), "one_by_one": partial(one_by_one, model, batches)}
    seconds = in_turns(benchmark, {name: partial(seconds_of, run) for name, run in runs.items()}, ROUNDS)
    ours, loop = (median(seconds[name]) for name in runs)
    overlap = selected(model, batches).overlap(selected_by_loop(model, batches))
    record(
        "fish_tuning",
        {
            "op": "fish_tuning",
            "case": {"examples": EXAMPLES, "batch": BATCH, "lengths": LENGTHS, "density": DENSITY},
            "model": {"layers": 6, "hidden": 384},
            "dtype": "float32",
            "attention": "sdpa",
            "seconds": {"fishkern, selection included": ours, "one_by_one, scores alone": loop},
            "ratio": loop / ours,
            "overlap": overlap,
            "rounds": ROUNDS,
        },
    )
    benchmark.extra_info["overlap"] = overlap
    assert overlap > 0.99
