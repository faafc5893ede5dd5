"""Fused experts and routers: their rules are exact on every family, and what they do not compute is left to others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.layers import expert_call, experts, routed, rows
from tests.support import zoo
from tests.support.exactness import LIMIT, assert_exact, paths
from tests.support.oracle import squares_one_by_one, worst_error

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

expert_squares = import_module("fishkern.ops.expert_sum_grad_squared")  # the package's attribute is the function


def is_of_experts(name: str) -> bool:
    return ".experts." in name or ".gate." in name or ".router." in name


def of_experts(statistics: fk.Statistics) -> dict:
    """Paths of the experts and of the routers."""
    return {covered.path for name, covered in statistics.coverage.items() if is_of_experts(name)}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_experts_and_routers_equal_the_loop(family, implementation):
    """In two batches, one of which is a single example."""
    specimen = zoo.experts(family, implementation)
    statistics = assert_exact(specimen, [specimen.batch(4, 7), specimen.batch(1, 6, seed=5)])
    assert of_experts(statistics) == {"fused"}


@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_experts_by_grouped_products_equal_the_loop(family):
    """Those refuse float64, so the truth comes from the eager ones with the same weights."""
    specimen = zoo.experts(family, "grouped_mm")
    batch = specimen.batch(4, 7)
    statistics = fk.estimate(specimen.model, [batch])
    specimen.model.set_experts_implementation("eager")
    truth = squares_one_by_one(specimen.model.double(), [batch], specimen.loss)
    error, name = worst_error(statistics, truth, torch.float32)
    assert error < LIMIT[torch.float32], name
    assert of_experts(statistics) == {"fused"}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_under_checkpointing(family, reentrant):
    specimen = zoo.experts(family)
    specimen.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    specimen.model.train()
    assert of_experts(assert_exact(specimen, [specimen.batch(3, 7)])) == {"fused"}


def with_lora(specimen: zoo.Specimen, *weights: str) -> zoo.Specimen:
    """LoRA on some weights of the experts, moved from its start, at which ``B`` is zero."""
    peft = pytest.importorskip("peft")
    targets = [f"mlp.experts.{weight}" for weight in weights]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    model = peft.get_peft_model(specimen.model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return replace(specimen, model=model)


@pytest.mark.parametrize("frozen", [True, False], ids=["LoRA alone", "all"])
@pytest.mark.parametrize("weights", [("gate_up_proj", "down_proj"), ("gate_up_proj",)], ids=["both", "one"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_lora_on_experts(family, weights, frozen):
    specimen = with_lora(zoo.experts(family), *weights)
    if not frozen:
        specimen.model.requires_grad_(True)
    statistics = assert_exact(specimen, [specimen.batch(3, 7), specimen.batch(1, 6)])
    of_lora = {name: covered.path for name, covered in statistics.coverage.items() if "experts" in name}
    assert set(of_lora.values()) == {"fused", "left out"} if frozen else {"fused"}


def test_lora_on_experts_moves_after_its_pass_was_prepared():
    """At its start ``B`` is zero, and the experts compute the same without it; later they do not."""
    specimen = with_lora(zoo.experts("Mixtral"), "gate_up_proj")
    model, batch = specimen.model.double().requires_grad_(True), specimen.batch(3, 7)
    moved = {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_B" in name}
    for name in moved:
        nn.init.zeros_(model.get_parameter(name))
    prepared = fk.prepare(model, batch)
    with torch.no_grad():
        for name, value in moved.items():
            model.get_parameter(name).copy_(value)
    truth = squares_one_by_one(model, [batch], specimen.loss)
    assert worst_error(fk.estimate(model, [batch], prepared=prepared), truth)[0] < LIMIT[torch.float64]


@pytest.mark.parametrize("how", ["disabled", "of two", "on biases"])
def test_lora_on_experts_in_other_states(how):
    """Without an adapter in force its factors have no gradient; what the rule does not know takes another path."""
    family = "GptOss" if how == "on biases" else "Mixtral"
    specimen = with_lora(zoo.experts(family), "down_proj", *(["gate_up_proj_bias"] if how == "on biases" else []))
    model = specimen.model
    if how == "disabled":
        model.base_model.disable_adapter_layers()
    if how == "of two":
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        nn.init.normal_(model.base_model.model.model.layers[0].mlp.experts.lora_B["other"].weight)
    model.requires_grad_(True)
    found = dict(model.named_parameters())
    statistics = assert_exact(specimen, [specimen.batch(3, 7)])
    experts = {covered.path for name, covered in statistics.coverage.items() if name.endswith("base_layer.down_proj")}
    assert experts == ({"generic"} if how == "on biases" else {"fused"})
    assert all(parameter is found[name] for name, parameter in model.named_parameters())


def test_no_second_backward_pass_for_experts_that_get_their_blocks_input(monkeypatch):
    """Their rows are seen to be those of the examples; else losses are back-propagated once more, weighted."""
    specimen = zoo.experts("Mixtral")
    monkeypatch.setattr(rows, "_grads_at", None)
    assert of_experts(fk.estimate(specimen.model, [specimen.batch(3, 7)])) == {"fused"}


def test_frozen_experts_beside_requested_routers():
    specimen = zoo.experts("Mixtral")
    specimen.model.requires_grad_(False)
    for name, parameter in specimen.model.named_parameters():
        parameter.requires_grad_(".gate." in name or "down_proj" in name)
    assert len(assert_exact(specimen, [specimen.batch(3, 7)])) == 4


class Block(nn.Module):
    """Experts after a router that a test may replace; ``arrange`` chooses and orders the rows that they get."""

    def __init__(self, arrange=lambda rows, N: torch.arange(len(rows)), to=None) -> None:
        super().__init__()
        model = zoo.experts("Mixtral").model.model.layers[0].mlp
        self.gate, self.experts, self.arrange, self.to = model.gate, model.experts, arrange, to

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        order = self.arrange(rows, len(x))
        if not torch.equal(order, torch.arange(len(rows))):
            rows = rows[order]
        _, shares, index = self.gate(rows)
        index = index if self.to is None else torch.full_like(index, self.to)
        y = torch.zeros_like(x.view(-1, x.shape[-1]))
        return x + y.index_copy(0, order, self.experts(rows, index, shares)).view_as(x)


class Tower(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(zoo.V, 24), block, nn.Linear(24, 3)

    def forward(self, input_ids, **unused):
        return self.head(self.block(self.embed(input_ids)).tanh().mean(1))


def losses(model, batch):
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def assert_tower(block: nn.Module, sizes=(4, 1)) -> set[str]:
    specimen = zoo.Specimen(Tower(block), zoo.class_batch, lambda model, row: losses(model, row)[0])
    batches = [specimen.batch(N, 7, seed=N) for N in sizes]
    return of_experts(assert_exact(specimen, batches, likelihood=losses))


@pytest.mark.parametrize("to", [0, 4])
def test_all_positions_to_one_expert(to):
    """Twice each, and none to the others."""
    assert assert_tower(Block(to=to)) == {"fused"}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize(
    "arrange",
    [
        lambda rows, N: torch.arange(len(rows)).view(N, -1).mT.flatten(),  # the positions of all examples in turn
        lambda rows, N: rows.sum(1).argsort(),
        lambda rows, N: torch.arange(len(rows)).flip(0) if N > 2 else torch.arange(len(rows)),  # not in the survey
        lambda rows, N: torch.arange(len(rows)).view(N, -1)[:, ::2].flatten(),
    ],
    ids=["positions first", "sorted", "reversed later", "half of them"],
)
def test_rows_in_another_order_are_not_taken_for_those_of_the_examples(arrange):
    assert "generic" in assert_tower(Block(arrange), sizes=(2, 4, 3))


def test_experts_behind_a_change_of_their_blocks_input_are_checked_on_every_batch():
    """The input is not the block's own, so a weighted backward pass shows whose rows they are."""

    class Normed(Block):
        def forward(self, x):
            return super().forward(x.tanh())

    assert "fused" in assert_tower(Normed(), sizes=(3, 2))


by_expert, factors = expert_squares._by_expert, expert_call.ExpertCall.factors
grads_of_experts = experts.Experts.per_example_grads


def one_example_fewer(expert, offsets):
    """Of each expert."""
    for e, of_expert, lengths in by_expert(expert, offsets):
        yield e, slice(of_expert.start, of_expert.stop - lengths[-1]), lengths[:-1]


def share_twice(self, grads):
    return factors(replace(self, share=self.share.square()), grads)


def without_share(self, grads):
    return factors(replace(self, share=torch.ones_like(self.share)), grads)


def swapped(self, *args):
    """Of the square matrices."""
    for name, grads in grads_of_experts(self, *args):
        yield name, replace(grads, axes=(0, 1, 2)) if name == "gate_up_proj" else grads


PLANTED = {
    "one example fewer": (expert_squares, "_by_expert", one_example_fewer),
    "positions for examples": (routed.Routed, "unflattened", lambda self, N: self),
    "a share twice": (expert_call.ExpertCall, "factors", share_twice),
    "no share": (expert_call.ExpertCall, "factors", without_share),
    "a transposed weight": (experts.Experts, "per_example_grads", swapped),
}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    """By the comparison with the loop, and by the self-check, which leaves the parameters to the loop."""
    specimen = zoo.experts("GptOss")
    specimen.model.double()
    batch = specimen.batch(4, 7)
    truth = squares_one_by_one(specimen.model, [batch], specimen.loss)
    monkeypatch.setattr(*PLANTED[error])
    wrong, _ = worst_error(fk.estimate(specimen.model, [batch], check=False), truth)
    assert wrong > 0.05
    checked = fk.estimate(specimen.model, [batch])
    assert worst_error(checked, truth)[0] < LIMIT[torch.float64]
    assert "loop" in of_experts(checked)


def test_experts_that_compute_something_else_take_the_generic_path():
    specimen = zoo.experts("Mixtral")
    module = specimen.model.model.layers[0].mlp.experts
    plain = type(module)
    module.__class__ = type("Others", (plain,), {"forward": lambda self, *args: plain.forward(self, *args).tanh()})
    statistics = assert_exact(specimen, [specimen.batch(3, 7)])
    assert paths(statistics)["generic"] == {
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }


def test_experts_with_a_parameter_in_their_gate_take_the_generic_path():
    """The rule would have no gradient for it."""
    specimen = zoo.experts("Mixtral", "batched_mm")
    module = specimen.model.model.layers[0].mlp.experts
    plain = type(module)
    gate = {"_apply_gate": lambda self, rows: self.gain * plain._apply_gate(self, rows)}
    module.__class__ = type("Gained", (plain,), gate)
    module.gain = nn.Parameter(torch.rand(module.down_proj.shape[-1]))
    statistics = assert_exact(specimen, [specimen.batch(3, 7)])
    assert {name.rpartition(".")[2] for name in paths(statistics)["generic"]} == {"gain", "gate_up_proj", "down_proj"}


def squares_by_position(model: nn.Module, batch: dict, loss) -> dict:
    """The squares of each position's term in the experts' gradients: a position alone has its own part of the output.

    Its term is found by the gradient through the rows that it sends: those of all others are detached.
    """
    totals: dict = {}

    def of_one_position(kept, module, args, output):
        mask = torch.zeros(len(output), 1, dtype=output.dtype)
        mask[kept] = 1
        return output * mask + output.detach() * (1 - mask)

    modules = [layer.mlp.experts for layer in model.model.layers]
    for n in range(len(batch["input_ids"])):
        row = {key: value[n : n + 1] for key, value in batch.items()}
        for number, module in enumerate(modules):
            parameters = dict(module.named_parameters())
            for kept in range(row["input_ids"].shape[1]):
                handle = module.register_forward_hook(partial(of_one_position, kept))
                grads = torch.autograd.grad(loss(model, row), list(parameters.values()))
                handle.remove()
                for name, grad in zip(parameters, grads, strict=True):
                    key = f"model.layers.{number}.mlp.experts.{name}"
                    totals[key] = totals.get(key, 0) + grad.square()
    return totals


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_other_recipes_on_experts(family):
    """Squares of positions, with padding that does not count; sums over groups."""
    specimen = zoo.experts(family)
    model, batch = specimen.model.double(), specimen.batch(3, 5)
    truth = squares_by_position(model, batch, specimen.loss)
    names = {"parameters": sorted(truth)}
    by_position = fk.estimate(model, [batch], fk.DiagonalFisher(unit="position"), **names)
    assert worst_error({name: 3 * value for name, value in by_position.items()}, truth)[0] < LIMIT[torch.float64]
    factored = fk.estimate(model, [batch], fk.DiagonalKronecker(), **names)
    positions = int(batch["attention_mask"].sum())
    means = {name: factored[name].double() * positions for name in truth}
    assert worst_error(means, truth)[0] < LIMIT[torch.float64]
    squares = {name: value.double() for name, value in fk.estimate(model, [batch], **names).items()}
    by_hand = {
        "row": {name: value.flatten(1).sum(1) for name, value in squares.items() if value.ndim == 3},
        "tensor": {name: value.sum() for name, value in squares.items()},
    }
    for by, sums in by_hand.items():
        groups = fk.estimate(model, [batch], fk.GroupFisher(by=by), parameters=sorted(sums))
        assert worst_error(groups, sums)[0] < LIMIT[torch.float64]


def test_a_recipe_of_factors_refuses_experts_by_name():
    specimen = zoo.experts("Mixtral")
    with pytest.raises(fk.UnsupportedModuleError, match="experts"):
        fk.estimate(specimen.model, [specimen.batch(3, 7)], fk.DirectionEnergy(), parameters="*experts*")
