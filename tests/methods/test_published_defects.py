"""Defects of published codes that no other test shows to be absent, see docs/starts.md and docs/freezing.md."""

from __future__ import annotations

import ast
import re
import weakref
from pathlib import Path

import pytest
import torch

import fishkern as fk
from tests.support import zoo

ROOT = Path(__file__).resolve().parents[2]
STARTS = {
    "farss": lambda model, batches, **options: fk.farss(
        model, batches, shallow=0, rank=2, ranks=fk.UniformRank(2), **options
    ),
    "filet": lambda model, batches, **options: fk.filet(
        model, batches, rank=2, targets="*", magnitude="uniform", **options
    ),
}
every_method = pytest.mark.parametrize("method", STARTS)
pytestmark = pytest.mark.filterwarnings("ignore:.*(directions are dead|fewer positions than):UserWarning")


@pytest.mark.parametrize("page, defects", [("starts.md", 15), ("freezing.md", 10)])
def test_the_tests_named_on_the_page_exist(page, defects):
    """Each of the table is a test of the file that it is said to be in."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = text.partition("## Against the published code")[2].partition("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > defects
    assert all("`tests/" in row for row in rows)
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
        assert test.startswith("test_")


@every_method
def test_dropout_and_the_random_state_have_no_part_in_it(method):
    """The published statistic is taken in training mode, and on positions that are drawn without a seed."""
    pytest.importorskip("transformers")
    model = zoo.bert_classifier(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).model.train()
    batches = [zoo.class_batch(6, 9, seed=seed) for seed in range(4)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    init = STARTS[method](model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert STARTS[method](model, batches) == init
    assert STARTS[method](model.eval(), batches) == init


class Token:
    """Lives as long as the graph that it is put into."""


class Marked(torch.autograd.Function):
    """Hands on its input, and puts a token into the graph."""

    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@every_method
def test_no_graph_outlives_its_batch(method):
    """The published backward keeps the graph, and with it the activations, until the next batch overwrites it."""
    pytest.importorskip("transformers")
    model = zoo.llama().model
    tokens: list[weakref.ref] = []
    alive: list[int] = []
    kept: list[torch.Tensor] = []

    def losses(model: torch.nn.Module, batch: dict, *, keep: bool = False) -> torch.Tensor:
        alive.append(sum(token() is not None for token in tokens))
        token = Token()
        tokens.append(weakref.ref(token))
        logits = Marked.apply(model(input_ids=batch["input_ids"]).logits, token)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        ).mean(1)
        kept.extend([losses] * keep)
        return losses

    batches = [zoo.llama().batch(4, 9, seed=n) for n in range(4)]
    STARTS[method](model, batches, likelihood=losses)
    assert len(alive) >= len(batches)
    assert max(alive) == 0
    tokens.clear()
    STARTS[method](model, batches, likelihood=lambda model, batch: losses(model, batch, keep=True))
    assert max(alive) >= len(batches) - 1  # what a graph that is kept looks like


@every_method
def test_no_weight_changes_its_dtype(method):
    """The published code makes whatever has 'norm' or 'gate' in its name float32, and so every gate_proj."""
    pytest.importorskip("peft")
    from fishkern.integrations.lora import attach_init

    specimen = zoo.llama()
    model = specimen.model.to(torch.bfloat16).eval()
    names = {name for name, _ in model.named_parameters()}
    batch = specimen.batch(6, 9)
    adapted = attach_init(model, STARTS[method](model, [batch]))
    adapted(**batch).loss.backward()
    frozen = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): parameter
        for name, parameter in adapted.named_parameters()
        if "lora_" not in name
    }
    assert frozen.keys() == names
    assert any("gate_proj" in name for name in frozen)
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
