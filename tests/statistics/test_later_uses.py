"""Uses of a parameter that only later examples reach: the first two, which the checks look at, show nothing of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from tests.support.oracle import squares_one_by_one, worst_error

pytestmark = pytest.mark.filterwarnings("ignore:.*slow exact path")


class Sine(nn.Module):
    """No rule knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return torch.sin(x @ self.frequency)


class Bank(nn.Module):
    """A container of a weight, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        raise AssertionError


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.linear = inner, nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.inner(x) if isinstance(self.inner, Sine) else torch.sin(x @ self.inner.weight)
        return self.linear(hidden)


class Twice(nn.Module):
    """The second block, which shares the inner module, is for rows that begin with a large number."""

    def __init__(self, inner: nn.Module, always: bool) -> None:
        super().__init__()
        self.always, self.a, self.b = always, Block(inner), Block(inner)

    def forward(self, x):
        hidden, large = self.a(x), x[:, 0, 0] > 10
        if self.always or large.any():
            hidden = torch.where((large | self.always)[:, None, None], self.b(hidden), hidden)
        return hidden


class Reaching(nn.Module):
    """Rows that begin with a large number go through a module inside the block once more, from outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mixing()

    def forward(self, x):
        hidden, large = self.block(x), x[:, 0, 0] > 10
        if large.any():
            hidden = torch.where(large[:, None, None], self.block.inner(hidden[None])[0], hidden)
        return hidden


class Transposed(nn.Module):
    """Its own rows are not the examples, so that the block around it is the host."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return torch.sin(x @ self.frequency)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.linear = Transposed(), nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(self.inner(x.transpose(0, 1)).transpose(0, 1))


class Tied(nn.Module):
    """Rows that begin with a large number go through a second module, which shares the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        hidden, large = self.first(x), x[:, 0, 0] > 10
        if large.any():
            hidden = torch.where(large[:, None, None], self.second(hidden.tanh()), hidden)
        return hidden


class TiedBranch(Tied):
    """Rows that begin with a large number go through two modules that share their weight; no others do."""

    def forward(self, x):
        large = x[:, 0, 0] > 10
        return torch.where(large[:, None, None], self.second(self.first(x).tanh()), x) if large.any() else x


def losses(model: nn.Module, batch: dict) -> Tensor:
    return F.cross_entropy(model(batch["x"]).mean(1)[:, :3], batch["y"], reduction="none")


def batch(large: tuple[int, ...]) -> dict:
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[list(large), 0, 0] = 11
    return {"x": x, "y": torch.tensor([0, 1, 2, 1, 0])}


MODELS = {
    "a module in two blocks": lambda: Twice(Sine(), always=True),
    "a container in two blocks": lambda: Twice(Bank(), always=True),
    "a module in a second block, later": lambda: Twice(Sine(), always=False),
    "a container in a second block, later": lambda: Twice(Bank(), always=False),
    "from outside of its host, later": Reaching,
    "a module that shares the weight, later": Tied,
    "all modules that share the weight, later": lambda: nn.Sequential(TiedBranch(), nn.Linear(6, 6)),
}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_uses_that_later_examples_reach(kind, check, size):
    torch.manual_seed(0)
    model, whole = MODELS[kind]().double(), batch(large=(2, 3))
    batches = [{key: value[n : n + size] for key, value in whole.items()} for n in range(0, 5, size)]
    found = fk.estimate(model, batches, likelihood=losses, check=check)
    error, name = worst_error(found, squares_one_by_one(model, batches, lambda model, row: losses(model, row)[0]))
    assert error < 1e-5, name


@pytest.mark.filterwarnings("default")
def test_a_use_from_outside_of_the_host_is_announced():
    model = Reaching().double()
    with pytest.warns(UserWarning, match="block.inner.frequency: its module is also called outside of block"):
        found = fk.estimate(model, [batch(large=()), batch(large=(4,)), batch(large=())], likelihood=losses)
    assert found.coverage["block.inner.frequency"].path == "loop"


@pytest.mark.filterwarnings("default")
def test_a_module_that_shares_a_weight_and_is_called_later_is_announced():
    model = Tied().double()
    with pytest.warns(UserWarning, match="first.weight: second shares it, and the first examples did not call"):
        statistics = fk.estimate(model, [batch(large=()), batch(large=(4,)), batch(large=())], likelihood=losses)
    assert statistics.coverage["first.weight"].path == "loop"


class UsingTheWeight(nn.Module):
    """Rows that begin with a large number meet the weight once more, without its module's call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        hidden, large = self.linear(x), x[:, 0, 0] > 10
        if large.any():
            hidden = torch.where(large[:, None, None], F.linear(hidden.tanh(), self.linear.weight), hidden)
        return hidden


@pytest.mark.parametrize("large", [(0,), (2, 3)])
def test_a_weight_used_past_its_call_is_seen_by_verify_whichever_examples_do_it(large):
    """``estimate`` sees it where the first two examples show it."""
    torch.manual_seed(0)
    model, whole = UsingTheWeight().double(), batch(large)
    statistics = fk.estimate(model, [whole], likelihood=losses)
    error, _ = worst_error(statistics, squares_one_by_one(model, [whole], lambda model, row: losses(model, row)[0]))
    report = fk.verify(model, [whole], statistics, likelihood=losses)
    assert report.ok == (error < 1e-5) == (large == (0,))
    assert all("linear.weight" in failure for failure in report.failures)
