"""Random mixtures of experts against the loop in float64, and calls that the rules of experts and routers must not take
for what they have confirmed."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fishkern as fk
from tests.support.exactness import LIMIT
from tests.support.oracle import squares_one_by_one, worst_error

pytestmark = pytest.mark.matrix

V, D, E = 17, 8, 5


class Experts(nn.Module):
    """One expert after the other, with the attributes by which transformers describes such modules."""

    def __init__(self, pick: random.Random) -> None:
        super().__init__()
        self.num_experts, F_ = E, 6
        self.has_gate, self.has_bias, self.is_transposed = (pick.random() < 0.5 for _ in range(3))
        self.interleaved, self.act_fn = pick.random() < 0.5, pick.choice([F.silu, F.gelu, torch.tanh])
        sizes = {"gate_up_proj" if self.has_gate else "up_proj": (D, (1 + self.has_gate) * F_), "down_proj": (F_, D)}
        for name, (fan_in, fan_out) in sizes.items():
            shape = (fan_in, fan_out) if self.is_transposed else (fan_out, fan_in)
            self.register_parameter(name, nn.Parameter(torch.randn(E, *shape) / 3))
            if self.has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, fan_out)))

    def _apply_gate(self, rows):
        gate, up = (rows[..., ::2], rows[..., 1::2]) if self.interleaved else rows.chunk(2, dim=-1)
        return self.act_fn(gate) * (up + 1)

    def mapped(self, x, name, e):
        y = x @ getattr(self, name)[e] if self.is_transposed else x @ getattr(self, name)[e].T
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    def forward(self, x, index, shares):
        y = torch.zeros_like(x)
        for e in range(E):
            rows, slot = torch.where(index == e)
            middle = self.mapped(x[rows], "gate_up_proj" if self.has_gate else "up_proj", e)
            middle = self._apply_gate(middle) if self.has_gate else self.act_fn(middle)
            y = y.index_add(0, rows, self.mapped(middle, "down_proj", e) * shares[rows, slot, None])
        return y


class Router(nn.Module):
    """Chooses two experts, in one of several ways; ``maps`` changes how often it uses its weight in a batch."""

    def __init__(self, pick: random.Random, maps=lambda x: 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.bias = nn.Parameter(torch.randn(E)) if pick.random() < 0.5 else None
        self.correction = nn.Parameter(torch.randn(E)) if pick.random() < 0.5 else None  # of the choice alone
        self.after = nn.Linear(E, E) if pick.random() < 0.3 else nn.Identity()
        self.score, self.maps = pick.choice([torch.sigmoid, lambda logits: logits.softmax(-1), torch.exp]), maps
        self.normalised, self.twice, self.dropping = (pick.random() < odds for odds in (0.5, 0.3, 0.3))

    def forward(self, x):
        logits = self.after(sum(F.linear(x + n, self.weight, self.bias) for n in range(self.maps(x))))
        scores = self.score(logits)
        choice = scores if self.correction is None else scores + self.correction
        index = choice.topk(2, dim=-1).indices
        if self.twice:  # some positions choose one expert twice
            index = torch.where(index[:, :1] < 2, index[:, :1], index)
        shares = scores.gather(-1, index)
        shares = shares / shares.sum(-1, keepdim=True) if self.normalised else shares
        if self.dropping:  # the number behind the last expert means none
            index = torch.where((index == 0) & (shares < 0.5), E, index)
        return logits, shares, index


class Mixture(nn.Module):
    def __init__(self, pick: random.Random, **options) -> None:
        super().__init__()
        self.router, self.experts = Router(pick, **options), Experts(pick)
        self.shared = nn.Linear(D, D) if pick.random() < 0.5 else None
        self.shared_gate = nn.Linear(D, 1) if self.shared is not None and pick.random() < 0.5 else None
        self.moved = pick.random() < 0.3  # then the rows are not the block's own input

    def forward(self, x):
        rows = (x.cos() if self.moved else x).view(-1, D)
        _, shares, index = self.router(rows)
        y = self.experts(rows, index, shares)
        if self.shared is not None:
            y = y + self.shared(rows) * (1 if self.shared_gate is None else self.shared_gate(rows).sigmoid())
        return x + y.view_as(x)


class Tower(nn.Module):
    def __init__(self, *blocks: nn.Module, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(V, D), nn.ModuleList(blocks), nn.Linear(D, 3)
        self.reentrant = reentrant

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.tanh().mean(1))


def losses(model, batch):
    return F.cross_entropy(model(batch["ids"]), batch["label"], reduction="none")


def batches(*shapes: tuple[int, int]) -> list[dict]:
    return [{"ids": torch.randint(V, shape), "label": torch.randint(3, shape[:1])} for shape in shapes]


def assert_equals_loop(model: nn.Module, data: list[dict], **options) -> dict[str, str]:
    """Estimate and compare; give the path of each parameter."""
    statistics = fk.estimate(model, data, likelihood=losses, **options)
    model.reentrant = None  # under which autograd gives no single gradients
    truth = squares_one_by_one(model, data, lambda model, row: losses(model, row)[0])
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], name
    return {name: covered.path for name, covered in statistics.coverage.items() if name in statistics}


@pytest.mark.parametrize("seed", range(20))
def test_random_mixtures_equal_the_loop(seed):
    pick = random.Random(seed)
    torch.manual_seed(seed)
    blocks = [Mixture(pick) for _ in range(pick.choice([1, 2]))]
    model = Tower(*blocks, reentrant=pick.choice([None, None, True, False])).double()
    if pick.random() < 0.4:
        for parameter in model.parameters():
            parameter.requires_grad_(pick.random() < 0.5)
    model.embed.weight.requires_grad_(True)  # reentrant segments need an input with a gradient
    data = batches(*((pick.randint(1, 5), pick.randint(2, 6)) for _ in range(3)))
    served = assert_equals_loop(model, data)
    for number, block in enumerate(blocks):
        # where all rows of the first examples are dropped, an output of zeros shows nothing
        names = [] if block.router.dropping else [f"experts.{name}" for name, _ in block.experts.named_parameters()]
        # of several tensors it is not checked on every batch whose rows they are
        names += [] if block.moved else ["router.weight"]
        assert {served.get(f"blocks.{number}.{name}", "fused") for name in names} <= {"fused"}


def mixture(seed: int = 0, **options) -> Mixture:
    torch.manual_seed(seed)
    return Mixture(random.Random(seed), **options)


def test_a_router_that_uses_its_weight_twice_in_a_later_batch_is_refused():
    """Its gradient would be missing."""
    model = Tower(mixture(maps=lambda x: 1 + (len(x) % 5 == 0))).double()
    model.blocks[0].moved = False
    assert_equals_loop(model, batches((3, 4), (2, 4)))
    with pytest.raises(fk.UnsupportedModuleError, match="Router maps its input once .* not so here"):
        fk.estimate(model, batches((3, 4), (2, 5)), likelihood=losses)


def test_modules_inside_a_router_are_not_counted_twice():
    """Planted: the router runs once more while they report."""
    model = Tower(mixture()).double()
    model.blocks[0].moved = False
    model.blocks[0].router.after = nn.Linear(E, E).double()
    data = batches((3, 4))
    served = assert_equals_loop(model, data, check=False)
    assert served["blocks.0.router.weight"] == served["blocks.0.router.after.weight"] == "fused"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fishkern.layers.hooks.Hooks.paused", lambda self: torch.enable_grad())
        with pytest.raises(AssertionError, match="router"):
            assert_equals_loop(model, data, check=False)


def test_an_index_below_zero_is_refused():
    """Kernels read it in different ways: as the last expert, as an error, or as memory that nothing was written to."""
    block = mixture()

    def below(module, args):
        rows, index, shares = args
        return rows, torch.where(index == 0, -1, index) if len(rows) % 5 == 0 else index, shares

    block.experts.register_forward_pre_hook(below)
    with pytest.raises(fk.UnsupportedModuleError, match="no negative index. Call it alike in every batch"):
        fk.estimate(Tower(block).double(), batches((3, 4), (4, 5)), likelihood=losses)


def test_experts_whose_first_output_is_zero_take_the_generic_path():
    """It says nothing of what they compute: here something else, once their last weight has moved."""
    block = mixture(1)
    plain = type(block.experts)
    block.experts.__class__ = type("Bent", (plain,), {"forward": lambda self, *args: plain.forward(self, *args).tanh()})
    nn.init.zeros_(block.experts.down_proj)
    if block.experts.has_bias:
        nn.init.zeros_(block.experts.down_proj_bias)
    model, data = Tower(block).double(), batches((3, 4))
    prepared = fk.prepare(model, data[0], likelihood=losses)
    with torch.no_grad():
        block.experts.down_proj.normal_()
    served = assert_equals_loop(model, data, prepared=prepared)
    assert served["blocks.0.experts.down_proj"] == "generic"


class Later(nn.Module):
    """Calls its experts twice where an example has five positions."""

    def __init__(self, inside: Mixture) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x):
        y = self.inside(x.sin())
        return self.inside(y) if x.shape[1] == 5 else y


def test_experts_that_a_later_batch_calls_twice():
    """In the first batch a weighted backward pass shows whose rows they are, which two calls do not allow."""
    inside = mixture(3)
    inside.moved = True
    assert_equals_loop(Tower(Later(inside)).double(), batches((2, 4), (4, 5), (3, 4)))


def test_routers_in_bfloat16_are_served():
    """They cast their weight to float32, while autograd's gradient of it has 8 bits."""
    model = Tower(mixture(4)).to(torch.bfloat16)
    router, model.blocks[0].moved = model.blocks[0].router, False
    router.bias, router.after = None, nn.Identity()
    plain = type(router)

    def forward(self, x):
        logits = F.linear(x.float(), self.weight.float())
        shares, index = logits.sigmoid().topk(2, dim=-1)
        return logits, shares.to(x.dtype), index

    router.__class__ = type("Cast", (plain,), {"forward": forward})
    statistics = fk.estimate(model, batches((3, 4)), likelihood=lambda model, batch: losses(model, batch).float())
    assert statistics.coverage["blocks.0.router.weight"].path == "fused"


class Called(Mixture):
    """Calls its experts in another way, which ``change`` says."""

    def __init__(self, change) -> None:
        super().__init__(random.Random(0))
        self.router.dropping, self.moved, self.change = False, False, change

    def forward(self, x):
        rows = x.view(-1, D)
        _, shares, index = self.router(rows)
        return x + self.experts(rows, *self.change(index, shares)).view_as(x)


class OfOne(Experts):
    """Of one expert for each position, whose index and share have one axis."""

    def forward(self, x, index, shares):
        return super().forward(x, index[:, None], shares[:, None])


@pytest.mark.parametrize("kind", ["int32", "one axis"])
def test_an_index_of_another_kind(kind):
    torch.manual_seed(0)
    if kind == "int32":
        model = Tower(Called(lambda index, shares: (index.int(), shares)))
    else:
        model = Tower(Called(lambda index, shares: (index[:, 0], shares[:, 0])))
        model.blocks[0].experts = OfOne(random.Random(0))
    served = assert_equals_loop(model.double(), batches((3, 4), (2, 5)))
    assert served["blocks.0.experts.down_proj"] == ("fused" if kind == "int32" else "generic")
    report = fk.verify(model, batches((3, 4)), likelihood=losses)
    assert (report.ok, report.choices, report.unmatched_choices) == (True, 12, ())
