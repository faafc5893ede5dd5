"""Under ``torch.compile`` an operation is one node of the graph, and gives the same bits as without."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fishkern.ops import masked_adamw_, masked_sgd_, streaming_topk, sum_grad_squared


@pytest.fixture
def compiled():
    """Compile without code generation, but with the tracing of mutations that comes before it; and count graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield counter, lambda run: torch.compile(run, backend=counter, fullgraph=True)
    torch._dynamo.reset()


def test_squares_are_one_node(compiled):
    """Alone, added to a result with the sum of the gradients, and packed."""
    counter, of = compiled
    x, g = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    out, mean = torch.ones(6, 8), torch.ones(6, 8)
    expected_out, expected_mean = out.clone(), mean.clone()
    offsets = torch.tensor([0, 4, 15])

    def run(x, g, out, mean, offsets):
        alone = sum_grad_squared(x, g) * 2
        added = sum_grad_squared(x, g, out=out, grad_out=mean)
        return alone + added + sum_grad_squared(x.flatten(0, 1), g.flatten(0, 1), offsets=offsets)

    expected = run(x, g, expected_out, expected_mean, offsets)
    assert torch.equal(of(run)(x, g, out, mean, offsets), expected)
    assert torch.equal(out, expected_out)
    assert torch.equal(mean, expected_mean)
    assert counter.frame_count == 1


@pytest.mark.parametrize("step, lr", [("adamw", 0.1), ("sgd", torch.tensor(0.1))])
def test_masked_steps_are_one_node(step, lr, compiled):
    counter, of = compiled
    indices, grads = [torch.tensor([1, 3]), None], [torch.randn(5), torch.randn(2)]

    def tensors():
        torch.manual_seed(0)
        return [torch.randn(5), torch.randn(2)], torch.zeros(4), torch.zeros(4), torch.ones(2)

    def run(params, first, second, steps):
        if step == "adamw":
            rest = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
            masked_adamw_(params, grads, indices, first, second, steps, lr=lr, **rest)
        else:
            masked_sgd_(params, grads, indices, first, steps, lr=lr, momentum=0.9, weight_decay=0.1)
        return [param * 2 for param in params]

    eager, traced = tensors(), tensors()
    expected, got = run(*eager), of(run)(*traced)
    for one, other in zip([*expected, *eager[0], *eager[1:]], [*got, *traced[0], *traced[1:]], strict=True):
        assert torch.equal(one, other)
    assert counter.frame_count == 1


def test_topk_breaks_the_graph_and_says_so(compiled):
    counter, of = compiled
    scores = [torch.tensor([3.0, 1.0, 2.0])]

    def run(scores):
        return streaming_topk([scores[0] * 2], 2)[0] + 1

    with pytest.raises(torch._dynamo.exc.Unsupported, match="topk_with_threshold"):
        of(run)(scores)
    torch._dynamo.reset()
    assert torch.compile(run, backend=counter)(scores).tolist() == [1, 3]
    assert "torch.compile`` breaks the graph here" in streaming_topk.__doc__
