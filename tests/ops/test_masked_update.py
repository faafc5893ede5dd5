"""An arithmetic of one's own on selected entries: equal to the optimizer that has it, and to dense float64."""

from __future__ import annotations

import threading

import pytest
import torch

from fishkern.ops import masked_sgd_, masked_update_
from tests.ops.test_masked_adamw import in_two_threads
from tests.ops.test_masked_sgd import SHAPES, draw, grads_at


def momentum_by(buffer, *, lr: float, momentum: float):
    def update(span, step, weight, grad):
        held = buffer[span]
        held.copy_(grad if step == 1 else held * momentum + grad)
        weight.add_(held, alpha=-lr)

    return update


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_master", [False, True], ids=["float32", "bfloat16 with master"])
def test_it_steps_as_an_optimizer_of_the_same_arithmetic(density, with_master):
    torch.manual_seed(0)
    params, indices = draw(SHAPES, density, torch.bfloat16 if with_master else torch.float32)
    params[4] = torch.randn(32, 32).to(params[4].dtype).t()  # not contiguous: written back
    indices[4] = (torch.rand(1024) < density).nonzero().squeeze(1).int()
    K = sum(map(len, indices))
    runs = []
    for own in (True, False):
        values = [p.clone(memory_format=torch.preserve_format) for p in params]
        buffer, options = torch.zeros(K), dict(maximize=True, scale=torch.tensor(0.5))
        if with_master:
            options["master"] = torch.cat(
                [p.reshape(-1)[i.long()] for p, i in zip(values, indices, strict=True)]
            ).float()
        for step in range(1, 4):
            steps = torch.full((len(params),), float(step))
            grads = [None if i == 6 else grad for i, grad in enumerate(grads_at(step, params))]
            if own:
                update = momentum_by(buffer, lr=0.1, momentum=0.9)
                masked_update_(update, values, grads, indices, steps, state={"buffer": buffer}, **options)
            else:
                masked_sgd_(values, grads, indices, buffer, steps, lr=0.1, momentum=0.9, backend="torch", **options)
        runs.append([*values, buffer, *([options["master"]] if with_master else [])])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*runs, strict=True))
    moved = [not torch.equal(mine, before) for mine, before in zip(runs[0], params, strict=False)]
    assert any(moved) is (density > 0)


def test_it_is_the_arithmetic_on_whole_tensors():
    """Float64, signs of an average: every selected entry moves by it, every other keeps its bits."""
    torch.manual_seed(1)
    params, indices = draw(SHAPES, 0.3, torch.float64)
    start, average = [p.clone() for p in params], torch.zeros(sum(map(len, indices)), dtype=torch.float64)

    def update(span, step, weight, grad):
        average[span].lerp_(grad, 0.25)
        weight.sub_(average[span].sign(), alpha=0.01 * step)

    for step in (1, 2):
        masked_update_(update, params, grads_at(step, params), indices, torch.full((len(params),), float(step)))
    for i, (param, before, chosen) in enumerate(zip(params, start, indices, strict=True)):
        mask = torch.zeros(param.numel(), dtype=torch.bool)
        mask[chosen.long()] = True
        first, second = (grads_at(step, params)[i] for step in (1, 2))
        moved = before - 0.01 * first.sign() - 0.02 * (0.25 * second + 0.75 * 0.25 * first).sign()
        expected = torch.where(mask.view(param.shape), moved, before)
        torch.testing.assert_close(param, expected, rtol=1e-14, atol=1e-14)
        assert torch.equal(param[~mask.view(param.shape)], before[~mask.view(param.shape)])


def test_the_function_is_called_by_the_caller_alone(monkeypatch):
    """It may keep what it likes between its calls."""
    in_two_threads(monkeypatch, 64)
    params, indices = draw(SHAPES, 0.5)
    callers = []
    masked_update_(
        lambda *_: callers.append(threading.get_ident()), params, grads_at(1, params), indices, torch.ones(len(params))
    )
    assert len(callers) > 10
    assert set(callers) == {threading.get_ident()}


def test_what_does_not_fit_is_refused():
    params, indices = draw([(4, 3)], 0.5)
    with pytest.raises(ValueError, match="average"):
        masked_update_(
            lambda *_: None, params, grads_at(1, params), indices, torch.ones(1), state={"average": torch.zeros(100)}
        )
    masked_update_(lambda *_: None, [], [], [], torch.ones(0))
