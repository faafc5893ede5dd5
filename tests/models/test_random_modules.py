"""Any model that trains is estimated exactly, or refused in fishkern's own words: random small models, with everything
that people do to modules, against the loop in float64."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fishkern as fk
from tests.support.exactness import LIMIT
from tests.support.oracle import squares_one_by_one, worst_error

T, D = 4, 6  # every module takes and returns [N, T, D]


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        return torch.sin(x @ self.matrix)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return x.cos() * self.weight + self.bias


class InPlace(nn.Module):
    """Writes into its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(T, D))

    def forward(self, x):
        return x.mul_(0.5).add_(self.shift)


class Pair(nn.Module):
    """Gives a tuple and a dict, and takes a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(D, D), Custom()

    def forward(self, x, more=None):
        more = x if more is None else more["right"]
        return self.left(more), {"right": self.right(x)}


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "layer norm": lambda: nn.LayerNorm(D),
    "scale": Scale,
    "custom": Custom,
    "in place": InPlace,
    "pair": Pair,
    "grouped convolution": lambda: nn.Conv1d(T, T, 3, padding=1, groups=2),
    "convolution": lambda: nn.Conv1d(T, T, 1),
    "batch norm": lambda: nn.BatchNorm1d(T),
    "group norm": lambda: nn.GroupNorm(2, T),
    "recurrent": lambda: nn.GRU(D, D, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(D, 2, 8, batch_first=True),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(D, D), "weight", 0.5),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
}


def patched(module: nn.Module) -> None:
    plain = type(module).forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: changed(plain(self, *args, **kwargs)), module)


def changed(output):
    return output * 1.5 if isinstance(output, torch.Tensor) else output


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "none": lambda module: None,
    "output": lambda module: module.register_forward_hook(lambda m, args, output: changed(output)),
    "input": lambda module: module.register_forward_pre_hook(lambda m, args: (args[0].cos(), *args[1:])),
    "gradients": lambda module: module.register_full_backward_pre_hook(
        lambda m, grads: tuple(None if grad is None else 2 * grad for grad in grads)
    ),
    "parameter": lambda module: next(module.parameters()).register_hook(lambda grad: grad.clamp(max=0.05)),
    "patched": patched,
}


def first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


WAYS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "plain": lambda module, x: first(module(x)),
    "residual": lambda module, x: x + first(module(x)),
    "residual in place": lambda module, x: x.add_(first(module(x))),
    "twice": lambda module, x: first(module(first(module(x)).tanh())),
    "pair to pair": lambda module, x: module(*module(x))[0] if isinstance(module, Pair) else first(module(x)),
    "without gradient": lambda module, x: x + first(module(x.detach())).detach() + first(module(x)),
    "length first": lambda module, x: first(module(x.transpose(0, 1))).transpose(0, 1),
    "flattened": lambda module, x: first(module(x.flatten(0, 1))).unflatten(0, x.shape[:2]),
    "one token": lambda module, x: x + first(module(x[:, 0]))[:, None],
    "checkpointed": lambda module, x: first(checkpointed(module, x, False)),
    "reentrant": lambda module, x: first(checkpointed(module, x, True)),
}
CHECKPOINTS = [True]  # off for the oracle: with them torch neither sees all writes in place nor allows autograd.grad


def checkpointed(module: nn.Module, x: torch.Tensor, reentrant: bool):
    return checkpoint(module, x, use_reentrant=reentrant) if CHECKPOINTS[0] else module(x)


AFTER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda x: x,
    "tanh": torch.tanh,
    "relu_": F.relu_,
    "mul_": lambda x: x.mul_(0.7),
    "add": lambda x: x.add(0.3),
}


@dataclass(frozen=True)
class Step:
    leaf: int | tuple[Step, ...]
    way: str
    after: str


steps = st.recursive(
    st.tuples(st.builds(Step, st.integers(0, 2), st.sampled_from(sorted(WAYS)), st.sampled_from(sorted(AFTER)))),
    lambda inner: st.lists(
        st.builds(
            Step,
            st.integers(0, 2) | inner,
            st.sampled_from(sorted(WAYS)),
            st.sampled_from(sorted(AFTER)),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    max_leaves=4,
)
leaves = st.lists(st.tuples(st.sampled_from(sorted(LEAVES)), st.sampled_from(sorted(HOOKS))), min_size=3, max_size=3)


class Block(nn.Module):
    """Runs its steps; each calls a leaf that others may share, or a block of its own."""

    def __init__(self, steps: tuple[Step, ...], pool: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            pool[step.leaf] if isinstance(step.leaf, int) else Block(step.leaf, pool) for step in steps
        )
        self.steps = steps

    def forward(self, x):
        for part, step in zip(self.parts, self.steps, strict=True):
            x = AFTER[step.after](WAYS[step.way](part, x))
        return x


class Whole(nn.Module):
    def __init__(self, steps: tuple[Step, ...], pool: list[nn.Module]) -> None:
        super().__init__()
        self.front, self.block, self.head = nn.Linear(D, D), Block(steps, pool), nn.Linear(D, 2)

    def forward(self, x):
        return self.head(self.block(self.front(x)))


def losses(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(batch["x"]).flatten(1)
    return (output.sin() * torch.linspace(1, 2, output.shape[1]).to(output)).sum(1)


def trains(model: nn.Module, batches: list[dict], truth: dict[str, torch.Tensor]) -> bool:
    """Whether ordinary training runs, reentrant checkpoints included, each example's loss being its own."""
    total = {name: torch.zeros_like(value) for name, value in truth.items()}
    for batch in batches:
        together = losses(model, batch)
        for n in range(len(batch["x"])):
            model.zero_grad()
            (loss,) = losses(model, {"x": batch["x"][n : n + 1]})
            loss.backward()
            if not torch.isclose(loss, together[n], rtol=1e-9):
                return False
            for name, parameter in model.named_parameters():
                total[name] += 0 if parameter.grad is None else parameter.grad.square() / 6
    model.zero_grad()
    return error(total, truth)[0] < LIMIT[torch.float64]


def error(squares: Mapping[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error, except for gradients that are zero up to rounding, such as that of a shift before a norm."""
    largest = max(value.max() for value in truth.values())
    kept = [name for name, value in truth.items() if max(value.max(), squares[name].max()) > 1e-22 * largest]
    return worst_error({name: squares[name] for name in kept}, {name: truth[name] for name in kept})


def made(steps: tuple[Step, ...], leaves: list[tuple[str, str]]) -> nn.Module:
    torch.manual_seed(0)
    pool = [LEAVES[kind]() for kind, _ in leaves]
    for module, (_, hook) in zip(pool, leaves, strict=True):
        HOOKS[hook](module)
    return Whole(steps, pool).double().eval()


ALONE = [("custom", "none")] * 3


def of(*kinds: str, hook: str = "none") -> list[tuple[str, str]]:
    return [(kind, hook) for kind in kinds]


# shrinking a failure would take minutes and help little: the programs are short
@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=50,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@example((Step(0, "residual", "tanh"),), of("in place", "custom", "scale", hook="patched"), False)
@example((Step(0, "checkpointed", "relu_"),), of("in place", "custom", "scale", hook="patched"), False)
@example((Step(0, "checkpointed", "add"),), of("recurrent", "custom", "scale"), False)
@example((Step(0, "reentrant", "tanh"),), of("weight norm", "recurrent", "pair"), False)
@example((Step(0, "reentrant", "tanh"),), of("recurrent", "custom", "scale"), True)
@example((Step(0, "flattened", "relu_"), Step(1, "reentrant", "add")), of("scale", "custom", "custom"), True)
@example(
    (Step((Step(0, "one token", "mul_"), Step(1, "checkpointed", "tanh")), "plain", "tanh"),),
    of("in place", "layer norm", "scale"),
    False,
)
@example((Step((Step(0, "plain", "tanh"),), "plain", "tanh"), Step(0, "plain", "add")), ALONE, False)
@given(steps=steps, leaves=leaves, check=st.booleans())
def test_exact_or_refused(steps, leaves, check):
    batches = [{"x": torch.randn(N, T, D, dtype=torch.float64)} for N in (3, 2, 1)]
    CHECKPOINTS[0] = False
    model = made(steps, leaves)
    try:
        truth = squares_one_by_one(model, batches, lambda model, row: losses(model, row)[0])
        CHECKPOINTS[0] = True
        assume(trains(model, batches, truth))
    except Exception:  # torch itself refuses it
        assume(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = list(model.parameters())
    try:
        statistics = fk.estimate(model, batches, likelihood=losses, check=check)
    except fk.UnsupportedModuleError:
        statistics = None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(one is other for one, other in zip(model.parameters(), found, strict=True))
    if statistics is not None:
        worst, name = error(statistics, truth)
        assert worst < LIMIT[torch.float64], f"{name}: relative error {worst:.1e}, by {statistics.coverage[name]}"
