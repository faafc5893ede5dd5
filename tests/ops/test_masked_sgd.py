"""torch.optim and a dense float64 simulation -> the reference -> the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishkern.ops import masked_sgd_
from tests.ops.test_masked_adamw import in_two_threads
from tests.support.closeness import assert_as_accurate

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPES = [(7, 5), (), (1,), (0, 3), (1024,), (5, 41, 5), (13,)]
VARIANTS = [
    dict(lr=0.1),
    dict(lr=0.1, weight_decay=0.1),
    dict(lr=0.1, momentum=0.9),
    dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    dict(lr=0.1, momentum=0.5, maximize=True),
]


def draw(shapes, density: float, dtype=torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    params = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    indices = [(torch.rand(p.numel(), device=DEVICE) < density).nonzero().squeeze(1).int() for p in params]
    return params, indices


def buffer_of(indices, options: dict, dtype=torch.float32) -> Tensor | None:
    K = sum(map(len, indices))
    return torch.zeros(K, dtype=dtype, device=DEVICE) if options.get("momentum") else None


def grads_at(step: int, params) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p) for p in params]


def run(params, indices, buffer, count: int, *, first: int = 1, **options) -> None:
    for step in range(first, first + count):
        steps = torch.full((len(params),), float(step), device=DEVICE)
        masked_sgd_(params, grads_at(step, params), indices, buffer, steps, **options)


def simulate(params, indices, count: int, dtype, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
             maximize=False) -> Tensor:  # fmt: skip
    """The oracle: SGD on whole tensors of ``dtype``, put back where nothing is selected."""
    results = []
    for i, (param, chosen) in enumerate(zip(params, indices, strict=True)):
        mask = torch.zeros(param.numel(), dtype=torch.bool, device=param.device)
        mask[chosen.long()] = True
        w = param.to(dtype).clone()
        b = None
        for t in range(1, count + 1):
            g = grads_at(t, params)[i].to(dtype) * (-1 if maximize else 1) + weight_decay * w
            b = g if b is None else momentum * b + (1 - dampening) * g
            w = w - lr * (g + momentum * b if nesterov else b if momentum else g)
        results.append(torch.where(mask.view(param.shape), w, param.to(dtype)).reshape(-1))
    return torch.cat(results)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_density_1_is_torch_bit_for_bit(options, dtype, monkeypatch):
    """100 steps, also at the ends of tensors, where PyTorch rounds 16-bit sums otherwise."""
    in_two_threads(monkeypatch, 64)
    shapes = [(7, 5), (), (33,), (1003,)]
    params, indices = draw(shapes, 2.0, dtype)
    theirs = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.SGD(theirs, foreach=False, fused=False, **options)
    buffer = buffer_of(indices, options, dtype)
    drawn = [grads_at(step, params) for step in range(5)]
    for step in range(1, 101):
        for p, g in zip(theirs, drawn[step % 5], strict=True):
            p.grad = g.clone()
        optimizer.step()
        steps = torch.full((len(params),), float(step), device=DEVICE)
        masked_sgd_(params, drawn[step % 5], indices, buffer, steps, backend="torch", **options)
    assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 2.0])
def test_as_accurate_as_dense(density, options, backend):
    params, indices = draw(SHAPES, density)
    start = [p.clone() for p in params]
    run(params, indices, buffer_of(indices, options), 4, backend=backend, **options)
    flat = torch.cat([p.reshape(-1) for p in params])
    assert_as_accurate(
        flat, *(simulate(start, indices, 4, dtype, **options) for dtype in (torch.float32, torch.float64))
    )
    for param, before, chosen in zip(params, start, indices, strict=True):
        untouched = torch.ones(param.numel(), dtype=torch.bool, device=DEVICE).index_fill_(0, chosen.long(), False)
        assert torch.equal(param.view(-1)[untouched], before.view(-1)[untouched])


def test_master_is_float32_rounded(backend):
    params, indices = draw(SHAPES, 0.3, torch.float16)
    wide = [p.float() for p in params]
    master = torch.cat([p.view(-1)[i.long()].float() for p, i in zip(params, indices, strict=True)])
    options = dict(lr=1e-6, momentum=0.9, backend=backend)
    run(params, indices, buffer_of(indices, options), 5, master=master, **options)
    generator_grads = [[g.half().float() for g in grads_at(step, params)] for step in range(1, 6)]
    buffer = buffer_of(indices, options)
    for step, grads in enumerate(generator_grads, start=1):
        masked_sgd_(wide, grads, indices, buffer, torch.full((len(wide),), float(step), device=DEVICE), **options)
    assert all(torch.equal(p, w.half()) for p, w in zip(params, wide, strict=True))


def test_master_follows_weights_that_were_restored(backend):
    """A step after a restore is the step of a master that equals the restored weights."""
    params, indices = draw(SHAPES, 0.3, torch.float16)
    base = [p.clone() for p in params]
    master, fresh = (
        torch.cat([p.view(-1)[i.long()].float() for p, i in zip(base, indices, strict=True)]) for _ in range(2)
    )
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend)
    buffer = buffer_of(indices, options)
    run(params, indices, buffer, 3, master=master, **options)
    for p, values in zip(params, base, strict=True):
        p.copy_(values)
    other = buffer.clone()
    run(params, indices, buffer, 1, first=4, master=master, **options)
    run(base, indices, other, 1, first=4, master=fresh, **options)
    assert torch.equal(master, fresh)
    assert all(torch.equal(p, q) for p, q in zip(params, base, strict=True))


@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_entries_count_their_own_updates(dampening, backend):
    """Momentum begins with an entry's first gradient whole, also where it came in later."""
    options = dict(lr=0.1, momentum=0.9, dampening=dampening, backend=backend)
    params, indices = draw([(9, 7)], 0.5)
    K = len(indices[0])
    late = torch.arange(K, device=DEVICE) % 2 == 0
    alone, early = params[0].clone(), params[0].clone()
    buffer, alone_buffer = torch.zeros(K, device=DEVICE), torch.zeros(K, device=DEVICE)
    run([early], indices, torch.zeros(K, device=DEVICE), 5, **options)
    start = params[0].clone()
    run(params, indices, buffer, 3, **options)
    places = indices[0].long()[late]
    params[0].view(-1)[places] = start.view(-1)[places]
    buffer[late] = 0.0
    run(params, indices, buffer, 2, first=4, starts=torch.where(late, 3.0, 0.0), **options)
    for t in (1, 2):
        steps = torch.tensor([float(t)], device=DEVICE)
        masked_sgd_([alone], grads_at(3 + t, params), indices, alone_buffer, steps, **options)
    torch.testing.assert_close(params[0].view(-1)[places], alone.view(-1)[places])
    places = indices[0].long()[~late]
    torch.testing.assert_close(params[0].view(-1)[places], early.view(-1)[places])


def test_scale_and_lr_as_tensors(backend):
    params, indices = draw(SHAPES, 0.5)
    copies = [p.clone() for p in params]
    run(params, indices, None, 2, lr=torch.tensor(0.25), scale=torch.tensor(0.5, device=DEVICE), backend=backend)
    run(copies, indices, None, 2, lr=0.125, backend=backend)
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("momentum, buffer", [(0.0, torch.zeros(1)), (0.9, None)])
def test_buffer_belongs_to_momentum(momentum, buffer):
    arguments = ([torch.ones(2)], [torch.ones(2)], [torch.tensor([0])], buffer, torch.ones(1))
    with pytest.raises(ValueError, match="momentum_buffer belongs to a momentum other than 0"):
        masked_sgd_(*arguments, lr=0.1, momentum=momentum)
