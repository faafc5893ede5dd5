"""torch.optim and a dense float64 simulation -> the reference -> the kernel, and the laws that all of them obey."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishkern import BackendUnavailableError
from fishkern.ops import _entries, masked_adamw_
from tests.support.closeness import assert_as_accurate

pytestmark = pytest.mark.matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
OPTIONS = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)

# Shapes of several parameters at once: ones, nothing, primes, a block of the kernel and one more.
SHAPES = [(7, 5), (), (1,), (0, 3), (1024,), (5, 41, 5), (13,)]


def draw(shapes, density: float, dtype=torch.float32, index=torch.int32) -> tuple[list[Tensor], list[Tensor]]:
    params = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    indices = [(torch.rand(p.numel(), device=DEVICE) < density).nonzero().squeeze(1).to(index) for p in params]
    return params, indices


def state_of(indices, dtype=torch.float32, count: int = 2) -> list[Tensor]:
    return [torch.zeros(sum(map(len, indices)), dtype=dtype, device=DEVICE) for _ in range(count)]


def grads_at(step: int, params, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [scale * torch.randn(p.shape, generator=generator).to(p) for p in params]


def run(params, indices, state, count: int, *, first: int = 1, backend=None, scale_of_grads=1.0, **options) -> None:
    for step in range(first, first + count):
        steps = torch.full((len(params),), float(step), device=DEVICE)
        grads = grads_at(step, params, scale_of_grads)
        masked_adamw_(params, grads, indices, *state, steps, backend=backend, **{**OPTIONS, **options})


def simulate(params, indices, count: int, dtype, *, maximize=False, clip=1.0, **options) -> list[Tensor]:
    """The oracle: the textbook's AdamW on whole tensors of ``dtype``, put back where nothing is selected."""
    o = {**OPTIONS, **options}
    results = []
    for i, (param, chosen) in enumerate(zip(params, indices, strict=True)):
        mask = torch.zeros(param.numel(), dtype=torch.bool, device=param.device)
        mask[chosen.long()] = True
        w, m, v = param.to(dtype).clone(), torch.zeros_like(param, dtype=dtype), torch.zeros_like(param, dtype=dtype)
        for t in range(1, count + 1):
            g = grads_at(t, params)[i].to(dtype) * clip * (-1 if maximize else 1)
            w = w - o["lr"] * o["weight_decay"] * w
            m = o["beta1"] * m + (1 - o["beta1"]) * g
            v = o["beta2"] * v + (1 - o["beta2"]) * g * g
            w = w - o["lr"] * (m / (1 - o["beta1"] ** t)) / ((v / (1 - o["beta2"] ** t)).sqrt() + o["eps"])
        results.append(torch.where(mask.view(param.shape), w, param.to(dtype)))
    return results


def in_two_threads(monkeypatch, chunk: int) -> None:
    """Step chunks of so many entries beside each other, as it is done with millions."""
    monkeypatch.setattr(_entries, "_CHUNK", chunk)
    monkeypatch.setattr(_entries, "_MANY", 0)
    monkeypatch.setattr(_entries, "threads", lambda: 2)


def check(actual, plain, truth) -> None:
    flat = [torch.cat([t.reshape(-1) for t in tensors]) for tensors in (actual, plain, truth)]
    assert_as_accurate(*flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, dict(weight_decay=0.0), dict(maximize=True), dict(betas=(0.0, 0.0)), dict(eps=1e-3, lr=3e-4)],
    ids=str,
)
def test_density_1_is_torch_bit_for_bit(options, dtype, monkeypatch):
    """100 steps, also where parameters are joined or cut into chunks, whose ends are computed without vectors."""
    options = dict(options)
    in_two_threads(monkeypatch, 64)
    shapes = [(7, 5), (), (33,), (1003,)]
    params, indices = draw(shapes, 2.0, dtype)
    theirs = [p.clone().requires_grad_() for p in params]
    betas = options.pop("betas", (0.9, 0.99))
    torch_options = dict(lr=1e-2, eps=1e-8, weight_decay=0.1) | options
    optimizer = torch.optim.AdamW(theirs, betas=betas, foreach=False, fused=False, **torch_options)
    state = state_of(indices, dtype)
    drawn = [grads_at(step, params, 10.0**-step) for step in range(5)]
    for step in range(1, 101):
        grads, chosen = drawn[step % 5], indices if step % 2 else [None] * len(params)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        steps = torch.full((len(params),), float(step), device=DEVICE)
        masked_adamw_(
            params, grads, chosen, *state, steps, beta1=betas[0], beta2=betas[1], backend="torch", **torch_options
        )
        assert step % 50 or all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))
    exp_avg = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in theirs])
    assert torch.equal(state[0], exp_avg)


@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.0), dict(maximize=True), dict(beta1=0.0)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 2.0])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_as_accurate_as_dense(density, index, options, backend):
    params, indices = draw(SHAPES, density, index=index)
    start = [p.clone() for p in params]
    run(params, indices, state_of(indices), 5, backend=backend, **options)
    check(
        params,
        simulate(start, indices, 5, torch.float32, **options),
        simulate(start, indices, 5, torch.float64, **options),
    )
    for param, before, chosen in zip(params, start, indices, strict=True):
        untouched = torch.ones(param.numel(), dtype=torch.bool, device=DEVICE).index_fill_(0, chosen.long(), False)
        assert torch.equal(param.view(-1)[untouched], before.view(-1)[untouched])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_master_is_float32_rounded(dtype, backend):
    """Steps far below the distance of 16-bit neighbours add up in the master."""
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    params, indices = draw(SHAPES, 0.3, dtype)
    wide = [p.float() for p in params]
    start = torch.cat([p.view(-1)[i.long()].float() for p, i in zip(params, indices, strict=True)])
    master = start.clone()
    state, wide_state = state_of(indices), state_of(indices)
    for step in range(1, 8):
        grads = grads_at(step, params)
        steps = torch.full((len(params),), float(step), device=DEVICE)
        options = {**OPTIONS, "lr": 1e-5, "backend": backend}
        masked_adamw_(params, grads, indices, *state, steps, master=master, **options)
        masked_adamw_(wide, [g.float() for g in grads], indices, *wide_state, steps, **options)
    assert all(torch.equal(p, w.to(dtype)) for p, w in zip(params, wide, strict=True))
    assert torch.equal(master, torch.cat([w.view(-1)[i.long()] for w, i in zip(wide, indices, strict=True)]))
    assert (master != start).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_master_follows_weights_that_were_restored(dtype, backend):
    """Those entries stay as they are at lr 0, also -0 where +0 was; the masters of the others stay unrounded."""
    if backend == "triton" and dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    params, indices = draw(SHAPES, 0.5, dtype)
    chosen = [i.long() for i in indices]
    master = torch.cat([p.view(-1)[i].float() for p, i in zip(params, chosen, strict=True)]) * (1 + 2.0**-14)
    master[::5] = 1e-45  # which rounds to 0, and not to -0
    for p, i, values in zip(params, chosen, master.split(list(map(len, chosen))), strict=True):
        p.view(-1)[i] = values.to(dtype)
    before, trained = master.clone(), [p.clone() for p in params]
    for p in params:
        p.view(-1)[::3] = torch.randn_like(p.view(-1)[::3])
        p.view(-1)[::4] = -0.0
    restored = [p.clone() for p in params]
    run(params, indices, state_of(indices), 1, lr=0.0, master=master, backend=backend)
    assert all(torch.equal(p, r) for p, r in zip(params, restored, strict=True))
    stored, was = (torch.cat([p.view(-1)[i] for p, i in zip(t, chosen, strict=True)]) for t in (restored, trained))
    changed = stored.view(torch.int16) != was.view(torch.int16)
    assert torch.equal(master[~changed], before[~changed])
    assert torch.equal(master[changed], stored[changed].float())
    assert (changed & (before == 1e-45) & (stored == 0)).any()
    assert (before != was.float())[~changed].any()


def test_16_bit_state_without_master(backend):
    params, indices = draw(SHAPES, 0.5, torch.float16)
    start = [p.clone() for p in params]
    run(params, indices, state_of(indices, torch.float16), 1, backend=backend, weight_decay=0.0, eps=1e-3)
    options = dict(weight_decay=0.0, eps=1e-3)
    check(
        params,
        simulate(start, indices, 1, torch.float16, **options),
        simulate(start, indices, 1, torch.float64, **options),
    )


@pytest.mark.parametrize("chunk", [1, 3, 2**14])
def test_chunks_change_nothing(chunk, monkeypatch):
    """Joined, cut, or one parameter after the other; some without gradient, and at different steps."""
    params, indices = draw(SHAPES, 0.4)
    start = [p.clone() for p in params]
    steps = torch.tensor([1.0, 1, 2, 2, 2, 1, 1], device=DEVICE)
    grads = [g if i not in (1, 5) else None for i, g in enumerate(grads_at(1, params))]
    sizes = [len(i) for i in indices]
    in_two_threads(monkeypatch, chunk)
    state = state_of(indices)
    masked_adamw_(params, grads, indices, *state, steps, backend="torch", **OPTIONS)
    for i, (m, v) in enumerate(zip(state[0].split(sizes), state[1].split(sizes), strict=True)):
        alone, own = start[i].clone(), [torch.zeros_like(m), torch.zeros_like(v)]
        if grads[i] is not None:
            masked_adamw_([alone], [grads[i]], [indices[i]], *own, steps[i : i + 1], backend="torch", **OPTIONS)
        assert torch.equal(params[i], alone)
        assert torch.equal(m, own[0])
        assert torch.equal(v, own[1])


def test_in_inference_mode(monkeypatch):
    """What is made there can be changed in no other mode, which threads have to know."""
    in_two_threads(monkeypatch, 64)
    with torch.inference_mode():
        params, indices = draw(SHAPES, 0.5)
        start = [p.clone() for p in params]
        run(params, indices, state_of(indices), 2, backend="torch")
    check(params, *(simulate(start, indices, 2, dtype) for dtype in (torch.float32, torch.float64)))


def test_without_gradient_nothing_moves(backend):
    params, indices = draw([(5, 6), (7,)], 0.5)
    start = [p.clone() for p in params]
    state = state_of(indices)
    steps = torch.ones(2, device=DEVICE)
    masked_adamw_(params, [None, grads_at(1, params)[1]], indices, *state, steps, backend=backend, **OPTIONS)
    assert torch.equal(params[0], start[0])
    assert not state[0][: len(indices[0])].any()
    assert not torch.equal(params[1], start[1])


@settings(max_examples=25)
@given(data=st.data())
def test_gradient_of_the_selected_entries_alone(data, backend):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 6), max_size=2).map(tuple), min_size=1, max_size=4))
    params, indices = draw(shapes, data.draw(st.sampled_from([0.2, 0.8, 2.0])))
    compact = [g.view(-1)[i.long()] for g, i in zip(grads_at(1, params), indices, strict=True)]
    copies = [p.clone() for p in params]
    steps = torch.ones(len(params), device=DEVICE)
    masked_adamw_(params, grads_at(1, params), indices, *state_of(indices), steps, backend=backend, **OPTIONS)
    masked_adamw_(copies, compact, indices, *state_of(indices), steps, backend=backend, **OPTIONS)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_entries_count_their_own_updates(backend):
    """Entries that come in at step 3 go on like entries at step 0; those from before go on as they were."""
    params, indices = draw([(9, 7)], 0.5)
    late = torch.arange(len(indices[0]), device=DEVICE) % 2 == 0
    begun_late, begun_early = indices[0].long()[late], indices[0].long()[~late]
    start, fresh, throughout = (params[0].clone() for _ in range(3))
    state, fresh_state = state_of(indices), state_of(indices)
    run([throughout], indices, state_of(indices), 5, backend=backend)
    run(params, indices, state, 3, backend=backend)
    params[0].view(-1)[begun_late] = start.view(-1)[begun_late]
    for values in state:
        values[late] = 0.0
    run(params, indices, state, 2, first=4, starts=torch.where(late, 3.0, 0.0), backend=backend)
    for t in (1, 2):
        steps = torch.tensor([float(t)], device=DEVICE)
        masked_adamw_([fresh], grads_at(3 + t, params), indices, *fresh_state, steps, backend=backend, **OPTIONS)
    torch.testing.assert_close(params[0].view(-1)[begun_late], fresh.view(-1)[begun_late])
    torch.testing.assert_close(params[0].view(-1)[begun_early], throughout.view(-1)[begun_early])


@pytest.mark.parametrize("starts", [False, True])
def test_betas_close_to_1_at_any_age(starts, backend):
    """In float32 the difference in ``1 - beta^t`` would keep four digits of the first updates."""
    ages = torch.tensor([1.0, 2, 7, 4999, 5001, 20_000, 2**20], device=DEVICE)
    betas = {"beta1": 0.0, "beta2": 0.9999, "weight_decay": 0.0, "eps": 0.0}
    params = [torch.zeros(1, device=DEVICE) for _ in ages]
    grads = [torch.ones(1, device=DEVICE) for _ in ages]
    first, second = torch.zeros(len(ages), device=DEVICE), torch.full((len(ages),), 0.5, device=DEVICE)
    steps, extra = (ages, {})
    if starts:
        params, grads = [torch.zeros(len(ages), device=DEVICE)], [torch.ones(len(ages), device=DEVICE)]
        steps, extra = torch.full((1,), 2.0**20, device=DEVICE), {"starts": 2.0**20 - ages}
    masked_adamw_(params, grads, [None] * len(params), first, second, steps, lr=1.0, backend=backend, **betas, **extra)
    moved = torch.cat(params).double()
    second_moment = 0.5 * 0.9999 + (1 - 0.9999)
    exact = -((1 - 0.9999 ** ages.double()) / second_moment).sqrt()
    torch.testing.assert_close(moved, exact, rtol=1e-6, atol=0)


def test_the_smallest_numbers_are_no_zeros(backend):
    """Squares below 1e-38 have a root, by which a step without eps is of the size of others."""
    params, grads = [torch.zeros(3, device=DEVICE)], [torch.tensor([1e-20, -3e-21, 1.0], device=DEVICE)]
    first, second = torch.zeros(2, 3, device=DEVICE)
    plain = {"beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    masked_adamw_(params, grads, [None], first, second, torch.ones(1, device=DEVICE), lr=0.1, backend=backend, **plain)
    torch.testing.assert_close(params[0].cpu(), torch.tensor([-0.1, 0.1, -0.1]), rtol=2e-3, atol=0)


def test_scale_and_lr_as_tensors(backend):
    params, indices = draw(SHAPES, 0.5)
    copies = [p.clone() for p in params]
    half, lr = torch.tensor(0.5, device=DEVICE), torch.tensor(1e-2, device=DEVICE)
    state, expected = state_of(indices), state_of(indices)
    run(params, indices, state, 2, backend=backend, scale=half, lr=lr)
    run(copies, indices, expected, 2, backend=backend, scale_of_grads=0.5)
    # The weights alone would not tell: Adam's steps hardly depend on the scale of all gradients.
    for p, q in zip([*params, *state], [*copies, *expected], strict=True):
        torch.testing.assert_close(p, q)


LAYOUTS = {
    "transposed": lambda p: p.mT.contiguous().mT,
    "every other column": lambda p: p.repeat_interleave(2, dim=-1)[..., ::2],
    "part of a wider tensor": lambda p: torch.nn.functional.pad(p, (2, 3), value=torch.nan)[..., 2:-3],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, backend):
    params, indices = draw([(9, 7), (4, 3)], 0.5)
    strided = [layout(p.clone()) for p in params]
    steps = torch.ones(2, device=DEVICE)
    grads = grads_at(1, params)
    masked_adamw_(strided, [layout(g) for g in grads], indices, *state_of(indices), steps, backend=backend, **OPTIONS)
    masked_adamw_(params, grads, indices, *state_of(indices), steps, backend=backend, **OPTIONS)
    assert all(torch.equal(p, q) for p, q in zip(params, strided, strict=True))


def test_autograd_notices_the_step(backend):
    """A backward pass through weights of before the step is an error, not a wrong gradient."""
    weight = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    loss = (weight**2).sum()
    indices = [torch.tensor([1, 5], device=DEVICE)]
    steps = torch.ones(1, device=DEVICE)
    masked_adamw_(
        [weight], [torch.ones(3, 4, device=DEVICE)], indices, *state_of(indices), steps, backend=backend, **OPTIONS
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_infinite_gradient_stays_where_it_is(backend):
    params, indices = draw([(4, 4)], 0.5)
    start = params[0].clone()
    grads = [torch.full((4, 4), math.inf, device=DEVICE)]
    masked_adamw_(params, grads, indices, *state_of(indices), torch.ones(1, device=DEVICE), backend=backend, **OPTIONS)
    untouched = torch.ones(16, dtype=torch.bool, device=DEVICE).index_fill_(0, indices[0].long(), False)
    assert torch.equal(params[0].view(-1)[untouched], start.view(-1)[untouched])


def test_float64_is_not_for_triton():
    params, indices = draw([(4, 4)], 0.5, torch.float64)
    with pytest.raises(BackendUnavailableError, match="masked_adamw_ cannot run on Triton"):
        run(params, indices, state_of(indices, torch.float64), 1, backend="triton")


w, i, s = torch.ones(2, 3), torch.tensor([0, 4]), torch.zeros(2)
one = torch.ones(1)
REFUSED = {
    "fewer gradients": (([w], [], [i], s, s, one), "one entry for each parameter"),
    "gradient of another shape": (([w], [w[:1]], [i], s, s, one), r"\(2, 3\).* or \(2,\).* got \(1, 3\)"),
    "sparse gradient": (([w], [w.to_sparse()], [i], s, s, one), "gradient 0 is sparse"),
    "state of another size": (([w], [w], [i], s[:1], s, one), r"exp_avg must be contiguous, torch.float32, \(2,\)"),
    "two dtypes": (([w, w.half()], [w, w.half()], [i, i], torch.zeros(4), torch.zeros(4), torch.ones(2)), "one dtype"),
    "state of another dtype": (([w], [w], [i], s.half(), s, one), "exp_avg must be contiguous, torch.float32"),
    "indices that float": (([w], [w], [i.float()], s, s, one), "int32 or int64"),
    "indices elsewhere": (([w], [w], [i.to("meta")], s, s, one), "one device, got cpu and meta"),
    "state with gaps": (([w], [w], [i], torch.zeros(4)[::2], s, one), "exp_avg must be contiguous"),
    "indices of two dtypes": (
        ([w, w], [w, w], [i, i.int()], torch.zeros(4), torch.zeros(4), torch.ones(2)),
        "one dtype",
    ),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        masked_adamw_(*arguments, **OPTIONS)


def test_no_parameters():
    masked_adamw_([], [], [], torch.zeros(0), torch.zeros(0), torch.zeros(0), **OPTIONS)
