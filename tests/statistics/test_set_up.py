"""What a pass does before its first batch, in counts that no busy machine changes; and what of that is its result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fishkern as fk
from fishkern.layers.kept import KeptGrads
from tests.support import zoo
from tests.support.closeness import alike
from tests.support.exactness import LIMIT
from tests.support.oracle import next_token, squares_one_by_one, worst_error

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

# Times those of one forward and one backward pass.
CALLS_OF_A_BATCH, CALLS_OF_THE_SET_UP = 4.2, 50
ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "one draw": fk.DiagonalFisher("mc", mc_samples=1, seed=3),
    "positions": fk.DiagonalFisher(unit="position"),
    "groups": fk.GroupFisher(by="layer"),
    "directions": fk.DirectionEnergy(),
    "factors": fk.DiagonalKronecker(),
    "of several draws": fk.DiagonalFisher("mc", mc_samples=2),
}
# The model runs on one example for the likelihood and once more for its own loss; on two for the survey; and alone on
# each that has not been alone yet. What it has seen of these two is not computed again.
ROWS = {
    (5, True): [1, 1, 2, 1, 1, 3],
    (5, False): [1, 1, 2, 1, 3],
    (3, False): [1, 1, 2, 1, 1],
    (2, True): [1, 1, 2, 1, 1],
    (1, True): [1, 1, 1, 1],
    (1, False): [1, 1, 1],
}


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of products of matrices and of attention."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (of := flop_registry.get(func._overloadpacket)) is not None:
            self.total += of(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Callable[[], object]) -> int:
    with Flops() as mode:
        run()
    return mode.total


def python_calls(run: Callable[[], object]) -> int:
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@contextmanager
def rows_of(model: nn.Module) -> Iterator[list[int]]:
    """On how many rows each call of the model runs, without a hook."""
    rows: list[int] = []

    def call(self, *args, **kwargs):
        rows.append(next(len(value) for value in kwargs.values() if isinstance(value, torch.Tensor)))
        return nn.Module.__call__(self, *args, **kwargs)

    try:
        type(model).__call__ = call
        yield rows
    finally:
        del type(model).__call__


def forward_backward(model: nn.Module, batch: dict) -> None:
    model.zero_grad()
    model(**batch).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize(("check", "limit"), [(True, 3.3), (False, 1.7)])
def test_the_arithmetic_before_the_first_batch_is_that_of_a_few_examples(check, limit):
    model, batch = zoo.llama().model, zoo.text_batch(4, 24)
    example = flops(lambda: forward_backward(model, {key: value[:1] for key, value in batch.items()}))
    one, two = (flops(lambda n=n: fk.estimate(model, [batch] * n, check=check)) for n in (1, 2))
    assert (2 * one - two) / example < limit  # one batch costs two - one


def test_a_batch_takes_few_more_calls_of_python_than_training_does():
    model, batch = zoo.llama().model, zoo.text_batch(4, 6)
    forward_backward(model, batch)  # what is imported and compiled at first
    usual = python_calls(lambda: forward_backward(model, batch))
    one, two = (python_calls(lambda n=n: fk.estimate(model, [batch] * n, check=False)) for n in (1, 2))
    assert (two - one) / usual < CALLS_OF_A_BATCH
    assert (2 * one - two) / usual < CALLS_OF_THE_SET_UP


@pytest.mark.parametrize(("N", "check"), ROWS)
def test_the_first_examples_run_once_for_all_purposes(N, check):
    model = zoo.llama().model
    with rows_of(model) as rows:
        statistics = fk.estimate(model, [zoo.text_batch(N)], check=check)
    assert rows == ROWS[N, check]
    assert statistics.count == N


@pytest.mark.parametrize("family", ["bert-classifier", "gpt2", "opt", "vit", "mixtral"])
def test_the_first_examples_count_in_models_of_every_kind(family):
    """With poolers, position embeddings that all examples share, flattened rows, hosts and experts."""
    specimen = zoo.FAMILIES[family]()
    with rows_of(specimen.model) as rows:
        fk.estimate(specimen.model, [specimen.batch(N=5)])
    assert rows[-1] == 3


@pytest.mark.parametrize("check", [True, False])
def test_what_the_survey_has_seen_is_exact(check):
    model = zoo.llama(tie_word_embeddings=True).model.double()
    batches = [zoo.text_batch(3, seed=1), zoo.text_batch(2, seed=2)]
    truth = squares_one_by_one(model, batches, next_token)
    error, name = worst_error(fk.estimate(model, batches, check=check), truth)
    assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_every_recipe_begins_with_the_surveyed_examples(kind, check):
    """A prepared pass reads its batches whole."""
    model, batches = zoo.llama().model, [zoo.text_batch(4, seed=1), zoo.text_batch(2, seed=2)]
    options = {"parameters": "*_proj.weight"} if kind == "factors" else {}
    prepared = fk.prepare(model, batches[0], ESTIMATORS[kind], check=check, **options)
    with rows_of(model) as rows:
        fresh = fk.estimate(model, batches, ESTIMATORS[kind], check=check, **options)
    assert rows[-2:] == ([4, 2] if kind == "of several draws" else [2, 2])
    assert alike(fresh, fk.estimate(model, batches, prepared=prepared))


def test_the_self_check_judges_what_has_been_kept(monkeypatch):
    """Planted: the kept gradients of one output are not those that arrived."""
    model, batch = zoo.llama().model.double(), zoo.text_batch(3)
    truth, joined = squares_one_by_one(model, [batch], next_token), KeptGrads.joined
    wide = model.config.intermediate_size

    def wrong(self, num_examples):
        return [
            grad * 1.1 if grad is not None and grad.shape[-1] == wide else grad for grad in joined(self, num_examples)
        ]

    monkeypatch.setattr(KeptGrads, "joined", wrong)
    with pytest.warns(UserWarning, match="ordinary autograd disagrees"):
        statistics = fk.estimate(model, [batch])
    slow = {name for name, covered in statistics.coverage.items() if covered.path == "loop"}
    assert slow == {name for name in truth if "gate_proj" in name or "up_proj" in name}
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}"
    error, _ = worst_error(fk.estimate(model, [batch], check=False), truth)
    assert error > 0.01  # which shows that what is kept is what counts


class Scaled(nn.Module):
    """Two uses of one matrix, one of them past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)) @ self.inner.weight)


def test_nothing_of_the_first_examples_is_left_where_a_parameter_takes_the_loop():
    torch.manual_seed(0)
    model = Scaled().double()
    batch = {"x": torch.randn(5, 4, dtype=torch.float64), "y": torch.tensor([0, 1, 2, 1, 0])}

    def losses(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    with pytest.warns(UserWarning, match="inner.weight"):
        statistics = fk.estimate(model, [batch], likelihood=losses)
    truth = squares_one_by_one(model, [batch], lambda model, row: losses(model, row)[0])
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}"
    assert statistics.coverage["inner.weight"].path == "loop"


class Workspace(nn.Module):
    """Hands one memory to a linear in every run, as models with a fixed cache do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.memory = nn.Linear(4, 3), nn.Linear(4, 3), torch.zeros(8, 4, dtype=torch.float64)

    def forward(self, x):
        mine = self.memory[: len(x)].copy_(2 * x.detach())
        return torch.tanh(self.first(x)) + self.second(mine)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("estimator", [fk.DiagonalFisher(), fk.GroupFisher(by="row")], ids=["diagonal", "groups"])
def test_what_a_later_run_writes_into_is_not_taken_for_what_the_survey_has_kept(estimator, check):
    torch.manual_seed(0)
    model = Workspace().double()
    batch = {"x": torch.randn(5, 4, dtype=torch.float64), "y": torch.tensor([0, 1, 2, 1, 0])}

    def losses(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    statistics = fk.estimate(model, [batch], estimator, likelihood=losses, check=check)
    truth = squares_one_by_one(model, [batch], lambda model, row: losses(model, row)[0])
    if isinstance(estimator, fk.GroupFisher):
        truth = {name: value.flatten(1).sum(1) if value.ndim > 1 else value for name, value in truth.items()}
    error, name = worst_error({name: value.reshape(truth[name].shape) for name, value in statistics.items()}, truth)
    assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}"
    assert {covered.path for covered in statistics.coverage.values()} == {"fused"}
