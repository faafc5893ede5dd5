"""The Fisher of training steps equals a loop over the shares of their losses, dropout included; they train as ever."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fishkern as fk
from tests.support import zoo
from tests.support.oracle import worst_error
from tests.support.slow import slowly

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

EXACT = 1e-6
SHIFTED = ("llama", "gemma", "gpt2", "opt", "mixtral")


def token_shares(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """The loss of a batch is the mean over its tokens: an example's share is the sum over its own, divided by all."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum()


def class_shares(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none") / len(labels)


def shares_of(model: nn.Module, batch: dict, shift: bool) -> Tensor:
    of_classes = batch["labels"].ndim == 1
    return (class_shares if of_classes else token_shares)(model(**batch).logits, batch["labels"], shift)


def squares_of_shares(parameters: dict[str, nn.Parameter], shares: Tensor) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of each one's share times N; one forward pass, so the same masks."""
    N = len(shares)
    total = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in parameters.items()}
    for n in range(N):
        grads = torch.autograd.grad(N * shares[n], list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] += grad.double().square() / N
    return total


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def drawn(seed: int, run: Callable[..., Tensor], *args) -> Tensor:
    """The same masks for the same seed."""
    torch.manual_seed(seed)
    return run(*args)


def own_loss(model: nn.Module, batch: dict) -> Tensor:
    return model(**batch).loss


def gpt2(**changes) -> nn.Module:
    """Tied weights, a fused qkv projection, biases, Conv1D, and dropout everywhere."""
    return zoo.gpt2(**changes).model.double().train()


def without_dropout(**changes) -> nn.Module:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes)


def batches(count: int, N: int = 4, T: int = 6) -> list[dict]:
    return [zoo.text_batch(N, T, seed=seed) for seed in range(count)]


def assert_no_trace(model: nn.Module) -> None:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not [name for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]
    assert not [name for name, one in model.named_parameters() if one._backward_hooks]
    assert torch.is_grad_enabled()


def checkpointed(reentrant: bool, **changes) -> nn.Module:
    model = gpt2(**changes)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


DROPOUT = {
    "llama": {"attention_dropout": 0.2},
    "gpt2": {},  # 0.1 everywhere by default, and so has BERT
    "bert-classifier": {},
}


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", "bert-classifier", "mixtral", *map(slowly, ("gemma", "bert", "vit"))]
)
def test_equals_a_loop_over_the_shares(family):
    specimen = zoo.FAMILIES[family](**DROPOUT.get(family, {}))
    model, batch = specimen.model.double().train(), specimen.batch(5, 7)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    shares = drawn(1, shares_of, model, batch, family in SHIFTED)
    truth = squares_of_shares(trained(model), shares)
    with fk.OnlineFisher(model) as online:
        loss = drawn(1, own_loss, model, batch)
        loss.backward()
    torch.testing.assert_close(loss, shares.sum(), rtol=1e-6, atol=0, check_dtype=False)
    error, name = worst_error(online.statistics, truth)
    assert error < EXACT, (name, error)
    assert_no_trace(model)


def test_in_float32_and_with_every_layout_of_a_convolution():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, groups=1), nn.GroupNorm(2, 4), nn.Dropout2d(0.3), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.Conv2d(4, 4, 2, stride=2), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(3))
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        model(images)
    truth = squares_of_shares(trained(model), class_shares(drawn(1, model, images), labels, False))
    with fk.OnlineFisher(model) as online:
        F.cross_entropy(drawn(1, model, images), labels).backward()
    error, name = worst_error(online.statistics, truth, torch.float32)
    assert error < 1e-5, (name, error)


class Mixing(nn.Module):
    """No rule knows it, and it keeps the examples apart."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.dropout(torch.sin(x @ self.mix) * self.gain * x, self.drop, self.training)


class Attending(nn.Module):
    """Queries, keys and values come from one weight, past the calls of the modules inside."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=drop, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Reading(nn.Module):
    """Features ``[N, T, 6]`` in, logits ``[N, 3]`` out, with dropout around what the inner module does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), inner, nn.Linear(6, 3)

    def forward(self, x):
        hidden = F.dropout(self.first(x), 0.2, self.training)
        return self.last(F.dropout(self.inner(hidden), 0.2, self.training).mean(1))


def reading(inner: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Reading(Mixing() if inner is None else inner).double().train()


FEATURES = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
CLASSES = torch.tensor([0, 1, 2, 1, 0])


def reading_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(FEATURES), CLASSES)


@pytest.mark.parametrize(("inner", "name"), [(Mixing, "mix"), (Attending, "attention.in_proj_weight")])
def test_a_module_without_a_rule_takes_the_generic_path(inner, name):
    model = reading(inner())
    truth = squares_of_shares(trained(model), class_shares(drawn(1, model, FEATURES), CLASSES, False))
    with fk.OnlineFisher(model) as online:
        drawn(1, reading_loss, model).backward()
    error, worst = worst_error(online.statistics, truth)
    assert error < EXACT, (worst, error)
    assert online.statistics.coverage[f"inner.{name}"].path == "generic"


def test_equals_estimate_where_rows_are_equally_long_and_nothing_is_random():
    """The share of an example times N is then the loss of the example alone."""
    model, batch = without_dropout(), zoo.text_batch(4, 6, low=6)
    expected = fk.estimate(model, [batch])
    with fk.OnlineFisher(model, decay=0) as online:
        for each in (zoo.text_batch(4, 6, seed=1), batch):
            model(**each).loss.backward()
    error, name = worst_error(online.statistics, {key: value.double() for key, value in expected.items()})
    assert error < EXACT, (name, error)


def test_a_share_is_not_the_loss_alone_where_rows_differ_in_length():
    model, batch = without_dropout(), zoo.text_batch(4, 6)
    with fk.OnlineFisher(model, decay=0) as online:
        model(**batch).loss.backward()
    alone = fk.estimate(model, [batch])
    assert worst_error(online.statistics, {key: value.double() for key, value in alone.items()})[0] > 1e-2


def test_the_running_mean_over_a_training():
    """Batches of several sizes, the weights moving, the mean corrected for its start at zero."""
    model, decay = gpt2(), 0.8
    data = [zoo.text_batch(N, 6, seed=seed) for seed, N in enumerate((4, 3, 1, 5))]
    twin = copy.deepcopy(model)
    optimizer, twins = (torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, twin))
    mean = {name: torch.zeros_like(one) for name, one in trained(twin).items()}
    with fk.OnlineFisher(model, decay) as online:
        for step, batch in enumerate(data, 1):
            shares = drawn(step, shares_of, twin, batch, True)
            for name, squares in squares_of_shares(trained(twin), shares).items():
                mean[name] = decay * mean[name] + (1 - decay) * squares
            shares.sum().backward()
            drawn(step, own_loss, model, batch).backward()
            for one in (optimizer, twins):
                one.step()
                one.zero_grad()
            error, name = worst_error(online.statistics, {key: one / (1 - decay**step) for key, one in mean.items()})
            assert error < 1e-5, (step, name, error)  # transformers computes its loss in float32
    assert (online.steps, online.statistics.count) == (4, 13)


@pytest.mark.parametrize("family", ["gpt2", "bert-classifier", *map(slowly, ("opt", "vit"))])
def test_training_is_the_same_to_the_bit(family):
    """Gradients, weights and random numbers, with clipping, for several steps; also where position rows are shared."""
    specimen = zoo.FAMILIES[family]()
    model, batch = specimen.model.train(), specimen.batch(4, 6)
    twin = copy.deepcopy(model)

    def train(one: nn.Module, context) -> Iterator[Tensor]:
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        with context:
            for _ in range(3):
                one(**batch).loss.backward()
                nn.utils.clip_grad_norm_(one.parameters(), 0.5)
                yield from [grad.clone() for parameter in one.parameters() if (grad := parameter.grad) is not None]
                optimizer.step()
                optimizer.zero_grad()
        yield from one.parameters()
        yield torch.rand(1)

    ours, theirs = list(train(model, fk.OnlineFisher(model))), list(train(twin, nullcontext()))
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def with_lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.2, fan_in_fan_out=True)
    return peft.get_peft_model(zoo.gpt2().model, config)


@contextmanager
def distributed(model: nn.Module) -> Iterator[nn.Module]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


WAYS = {
    "checkpointing, reentrant": (lambda: checkpointed(True).float(), nullcontext),
    "checkpointing": (lambda: checkpointed(False).float(), nullcontext),
    "autocast": (lambda: gpt2().float(), lambda model: torch.autocast("cpu", torch.bfloat16)),
    "LoRA": (with_lora, nullcontext),
    "DistributedDataParallel": (lambda: gpt2().float(), distributed),
}


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_and_a_scaler_form_the_same_gradients_to_the_bit(way):
    make, around = WAYS[way]
    model = make().train()
    twin, data = copy.deepcopy(model), batches(4)

    def train(one: nn.Module, online: fk.OnlineFisher | None) -> Iterator[Tensor]:
        torch.manual_seed(7)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        with around(one) as wrapped, online(one, accumulation_steps=2, scaler=scaler) if online else nullcontext():
            run = wrapped if isinstance(wrapped, nn.Module) else one
            for number, batch in enumerate(data):
                scaler.scale(run(**batch).loss / 2).backward()
                if number % 2:
                    scaler.unscale_(optimizer)
                    yield from [grad.clone() for p in one.parameters() if (grad := p.grad) is not None]
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()

    ours, theirs = list(train(model, fk.OnlineFisher)), list(train(twin, None))
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("which", ["last.weight", "*"])
def test_a_hook_on_a_gradient_is_refused_by_name(which):
    """Such as one that masks it: only autograd on each example would say what it makes of that one's."""
    model = reading()
    for name, parameter in model.named_parameters():
        if which in (name, "*"):
            parameter.register_hook(lambda grad: grad * 0.5)
    name = "first.weight" if which == "*" else which
    message = rf"{name.replace('.', '[.]')}: a hook on it \(register_hook\) may change the gradient of each example"
    with pytest.raises(fk.UnsupportedModuleError, match=message), fk.OnlineFisher(model):
        reading_loss(model)


def test_a_first_forward_pass_without_a_backward():
    """As that of a logged loss; nothing shows yet whose the rows are, so the next step is planned again."""

    class Zeroed(Reading):
        def forward(self, x):
            return self.last((self.first(x) + x).mean(1)) * self.inner(x[:, 0, :1])

    model = Zeroed(nn.Linear(1, 1)).double()
    nn.init.zeros_(model.inner.weight)
    nn.init.zeros_(model.inner.bias)
    with fk.OnlineFisher(model) as online:
        reading_loss(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # parameters with hooks would take the loop
            fk.estimate(model, [(FEATURES, CLASSES)], likelihood=fk.Classification())
        reading_loss(model).backward()
    assert online.steps == 1


@pytest.mark.slow
def test_steps_leave_no_tensors_behind():
    model, batch, counts = gpt2(), zoo.text_batch(4, 6), []
    with fk.OnlineFisher(model) as online:
        for _ in range(4):
            model(**batch).loss.backward()
            online.step()
            gc.collect()
            counts.append(sum(isinstance(one, Tensor) for one in gc.get_objects()))
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_nothing(reentrant):
    """A recomputed segment counts once, and draws the masks of its first run."""
    batch, found = zoo.text_batch(4, 6), []
    start = gpt2().state_dict()
    for model in (gpt2(), checkpointed(reentrant)):
        model.load_state_dict(start)
        with fk.OnlineFisher(model) as online:
            drawn(1, own_loss, model, batch).backward()
        found.append((online.statistics, [one.grad for one in model.parameters()]))
    (plain, grads), (recomputed, others) = found
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_segment_that_no_gradient_reaches_is_refused():
    """Frozen modules before a reentrant checkpoint cut the layers in it off, in training as well."""

    class CutOff(Reading):
        def forward(self, x):
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=True).mean(1))

    model = CutOff(Mixing()).double()
    model.first.requires_grad_(False)
    with (
        pytest.raises(
            fk.UnsupportedModuleError, match=r"'inner' \(Mixing\) runs under reentrant .*none, not even in tr"
        ),
        fk.OnlineFisher(model),
    ):
        reading_loss(model)
    assert_no_trace(model)
    with fk.OnlineFisher(model, parameters=["last.*"]) as online:
        reading_loss(model).backward()
    assert online.steps == 1
    assert model.inner.mix.grad is None


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_checkpoint_around_the_whole_model(reentrant):
    features, found = FEATURES.clone().requires_grad_(), []
    for around in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), Mixing(), nn.Linear(6, 3)).double()
        # inside a reentrant checkpoint no survey can run
        with fk.OnlineFisher(model, batch=(features, CLASSES) if reentrant else None) as online:
            torch.manual_seed(1)
            logits = checkpoint(model, features, use_reentrant=reentrant) if around else model(features)
            F.cross_entropy(logits.mean(1), CLASSES).backward()
        found.append(online.statistics)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    if reentrant:
        message = "called inside a reentrant checkpoint, .* batch="
        with pytest.raises(fk.UnsupportedModuleError, match=message), fk.OnlineFisher(model):
            checkpoint(model, features, use_reentrant=True)


def test_micro_batches_make_up_one_step():
    """However the loss is divided among them: an example has its share of the step's, times the step's examples."""
    whole = zoo.text_batch(6, 6)
    tokens = (whole["labels"][:, 1:] != -100).sum()
    model = without_dropout()
    with fk.OnlineFisher(model, decay=0) as together:
        model(**whole).loss.backward()
    model.zero_grad()
    with fk.OnlineFisher(model, decay=0, accumulation_steps=3) as apart:
        for rows in (slice(0, 3), slice(3, 4), slice(4, 6)):
            part = {key: value[rows] for key, value in whole.items()}
            (model(**part).loss * (part["labels"][:, 1:] != -100).sum() / tokens).backward()
        assert (apart.steps, apart.statistics.count) == (1, 6)
    error, name = worst_error(apart.statistics, {key: one.double() for key, one in together.statistics.items()})
    assert error < EXACT, (name, error)


def test_a_step_of_fewer_micro_batches_is_ended_by_hand():
    model, (one, other) = without_dropout(), batches(2)
    with fk.OnlineFisher(model, decay=0) as expected:
        model(**other).loss.backward()
    with fk.OnlineFisher(model, decay=0, accumulation_steps=2) as online:
        for batch in (one, one, other):
            model(**batch).loss.backward()
        assert online.steps == 1
        online.step()
        online.step()  # nothing has come since
        assert online.steps == 2
    assert all(torch.equal(online.statistics[name], expected.statistics[name]) for name in expected.statistics)


def test_the_scale_of_a_grad_scaler_is_taken_out_and_what_it_skips_is_left_out():
    model, data = zoo.llama().model.train(), batches(3)
    results = []
    for scaled in (False, True):
        twin = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        with fk.OnlineFisher(twin, 0.5, scaler=scaler) as online:
            for number, batch in enumerate(data):
                loss = twin(**batch).loss
                if scaled and number == 1:
                    scaler.scale(loss * float("inf")).backward()
                    scaler.step(optimizer)  # skipped, and the scale is halved
                    scaler.update()
                    optimizer.zero_grad()
                    loss = twin(**batch).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        results.append(online)
    plain, scaled = results
    assert scaled.steps == plain.steps == 3
    assert scaled.statistics.provenance["runs"][0]["skipped_steps"] == 1
    truth = {name: one.double() for name, one in plain.statistics.items()}
    assert worst_error(scaled.statistics, truth, torch.float32)[0] < 1e-4


def test_infinite_gradients_without_a_scaler_are_refused_and_the_mean_stays():
    model, batch = without_dropout(), zoo.text_batch(4, 6)
    online = fk.OnlineFisher(model)
    with online:
        model(**batch).loss.backward()
        before = online.statistics
        (model(**batch).loss * float("inf")).backward()
        with pytest.raises(ValueError, match=r"squared gradients of step 2 are infinite or NaN in .*scaler="):
            online.step()
        assert online.statistics == before


def interrupted_backward(model: nn.Module) -> None:
    """An exception in the middle, as where memory runs out, which the training catches."""

    def fail(grad: Tensor) -> None:
        raise MemoryError

    handle = model.first.register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with pytest.raises(MemoryError):
        reading_loss(model).backward()
    handle.remove()
    model.zero_grad()


def test_a_backward_pass_that_was_interrupted_is_left_out():
    model, found = reading(), []
    for fails in (False, True):
        with fk.OnlineFisher(model) as online:
            for seed in (1, 2):
                drawn(seed, reading_loss, model).backward()
                if fails:
                    interrupted_backward(model)
        found.append(online)
    plain, interrupted = found
    assert interrupted.steps == 2
    assert all(torch.equal(plain.statistics[name], interrupted.statistics[name]) for name in plain.statistics)
    assert interrupted.statistics.provenance["runs"][0]["skipped_steps"] == 2
    with fk.OnlineFisher(model, accumulation_steps=2) as online:
        reading_loss(model).backward()
        interrupted_backward(model)
        with pytest.raises(RuntimeError, match="interrupted a backward pass after 1 other"):
            online.step()
        assert online.steps == 0


def test_a_forward_pass_that_raises_is_no_step():
    model = reading()
    with fk.OnlineFisher(model) as online:
        drawn(1, reading_loss, model).backward()
        before = online.statistics
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(FEATURES[..., :5])
    assert online.statistics == before


def test_nothing_stays_of_forward_passes_that_raise():
    """As where memory runs out in the middle, which the training catches: the arguments would fill it."""
    model, fails, held = reading(DrawingNorm()), [], []

    def enter(module: nn.Module, args: tuple) -> None:
        held.append(weakref.ref(args[0]))
        if fails:
            raise MemoryError

    model.inner.register_forward_pre_hook(enter)
    with fk.OnlineFisher(model):
        reading_loss(model).backward()
        fails.append(True)
        held.clear()
        for _ in range(2):
            with pytest.raises(MemoryError):
                reading_loss(model)
        gc.collect()
        assert not [one for one in held if one() is not None]


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path):
    """Interrupted in the middle of a step of two backward passes."""
    data = [*batches(3), *batches(2)]

    def opened(model: nn.Module) -> fk.OnlineFisher:
        return fk.OnlineFisher(model, decay=0.7, accumulation_steps=2)

    def run(model: nn.Module, some: list[dict], first: int) -> None:
        for number, batch in enumerate(some, first):
            drawn(number, own_loss, model, batch).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            model.zero_grad()

    start = gpt2()
    model = copy.deepcopy(start)
    with opened(model) as whole:
        run(model, [*data, data[0]], 0)
    model = copy.deepcopy(start)
    with opened(model) as first:
        run(model, data[:3], 0)
        torch.save({"online": first.state_dict(), "model": model.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    model = copy.deepcopy(start)
    model.load_state_dict(saved["model"])
    second = opened(model)
    second.load_state_dict(saved["online"])
    assert second.statistics == first.statistics
    with second:
        run(model, [*data[3:], data[0]], 3)
    assert second.steps == whole.steps == 3
    assert all(torch.equal(second.statistics[name], whole.statistics[name]) for name in whole.statistics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.5}, r"decay=0\.7, and this OnlineFisher has 0\.5"),
        ({"accumulation_steps": 2}, r"accumulation_steps=1, and this OnlineFisher has 2"),
        ({"parameters": ["*.bias"]}, r"other parameters: .*differ in presence or shape"),
    ],
    ids=str,
)
def test_a_state_of_other_settings_is_refused(options, message):
    model = without_dropout()
    state = fk.OnlineFisher(model, decay=0.7).state_dict()
    with pytest.raises(ValueError, match=message):
        fk.OnlineFisher(model, **{"decay": 0.7, **options}).load_state_dict(state)


def test_lora_whose_second_factor_begins_at_zero():
    """The first factor then has no gradient in the first step, and nothing shows yet whose rows it gets."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], lora_dropout=0.2, fan_in_fan_out=True)
    model = peft.get_peft_model(zoo.gpt2().model, config).double().train()
    twin, batch = copy.deepcopy(model), zoo.text_batch(4, 6)
    optimizers = [torch.optim.SGD(one.parameters(), lr=1.0) for one in (model, twin)]
    mean = {name: torch.zeros_like(one) for name, one in trained(twin).items()}
    with fk.OnlineFisher(model, 0.5) as online:
        for step in range(1, 4):
            shares = drawn(step, shares_of, twin, batch, True)
            for name, squares in squares_of_shares(trained(twin), shares).items():
                mean[name] = 0.5 * mean[name] + 0.5 * squares
            shares.sum().backward()
            drawn(step, own_loss, model, batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    error, name = worst_error(online.statistics, {key: one / (1 - 0.5**3) for key, one in mean.items()})
    assert error < 1e-5, (name, error)
    assert all("lora" in name for name in online.statistics)


def test_only_the_requested_parameters():
    model, batch = without_dropout(), zoo.text_batch(4, 6)
    model.transformer.wte.requires_grad_(False)
    kept = []
    for parameters in (["*.bias"], "all"):
        with fk.OnlineFisher(model, parameters=parameters) as online:
            model(**batch).loss.backward()
        kept.append(online.statistics)
        model.zero_grad()
    assert all(name.endswith(".bias") for name in kept[0])
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert set(kept[1]) == set(dict(model.named_parameters()))
    assert kept[0].coverage["transformer.wpe.weight"].reason == "the parameters argument"
    with fk.OnlineFisher(model) as online:
        model(**batch).loss.backward()
    assert online.statistics.coverage["transformer.wte.weight"].reason == "requires_grad is False"


def test_a_parameter_that_is_frozen_meanwhile_is_still_read():
    found = []
    for frozen in (False, True):
        model = reading()
        with fk.OnlineFisher(model) as online:
            drawn(1, reading_loss, model).backward()
            model.first.requires_grad_(not frozen)
            drawn(2, reading_loss, model).backward()
        found.append(online.statistics)
        with online:  # planned and checked again
            drawn(3, reading_loss, model).backward()
    assert found[0] == found[1]


def test_all_that_is_requested_may_be_frozen_while_the_rest_trains():
    found = []
    for frozen in (False, True):
        model = reading()
        model.last.requires_grad_(not frozen)
        with fk.OnlineFisher(model, parameters=["last.*"]) as online:
            drawn(1, reading_loss, model).backward()
        assert online.steps == 1
        found.append(online.statistics)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_planned_by_a_batch_when_entered():
    model, batch = gpt2(), zoo.text_batch(4, 6)
    by_first = fk.OnlineFisher(model)
    with by_first:
        drawn(1, own_loss, model, batch).backward()
    with fk.OnlineFisher(model, batch=batch) as online:
        drawn(1, own_loss, model, batch).backward()
    assert online.statistics == by_first.statistics
    bad = reading(nn.BatchNorm1d(4))
    with pytest.raises(fk.UnsupportedModuleError, match="'inner'"), fk.OnlineFisher(bad, batch=(FEATURES, CLASSES)):
        raise AssertionError("not reached")
    assert_no_trace(bad)


def test_a_first_batch_of_one():
    model, data = without_dropout(), [zoo.text_batch(1, 6), zoo.text_batch(4, 6)]
    with fk.OnlineFisher(model, decay=0) as online:
        for batch in data:
            model(**batch).loss.backward()
    with fk.OnlineFisher(model, decay=0) as expected:
        model(**data[1]).loss.backward()
    assert all(torch.equal(online.statistics[name], expected.statistics[name]) for name in online.statistics)


def test_calls_that_are_no_steps_are_not_read():
    """Evaluation, generation without gradients, another pass of this library, a forward pass without a backward."""
    model, batch = gpt2(), zoo.text_batch(4, 6)
    with fk.OnlineFisher(model) as expected:
        drawn(1, own_loss, model, batch).backward()
    other = zoo.text_batch(3, 5, seed=9)
    with fk.OnlineFisher(model) as online:
        model(**other)
        drawn(1, own_loss, model, batch).backward()
        with torch.no_grad():
            model(**other)
        fk.estimate(model, [other])
        model.eval()
        model(**other).loss.backward()
        model.train()
        model(**other)
    assert online.steps == 1
    assert online.statistics == expected.statistics


def test_a_compiled_model_runs_eagerly_meanwhile():
    model, found, compiled_calls = reading(), [], []

    def backend(graph, inputs):
        return lambda *args: compiled_calls.append(1) or graph(*args)

    compiled = torch.compile(model, backend=backend)
    drawn(1, reading_loss, compiled)
    assert compiled_calls
    compiled_calls.clear()
    for one in (model, compiled):
        with fk.OnlineFisher(one) as online:
            drawn(1, reading_loss, one).backward()
        found.append(online.statistics)
    assert found[0] == found[1]
    assert not compiled_calls
    drawn(1, reading_loss, compiled)
    assert compiled_calls


def test_autocast_to_16_bits():
    model, batch = zoo.llama().model.train(), zoo.text_batch(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        shares = shares_of(model, batch, True)
    truth = squares_of_shares(trained(model), shares)
    with fk.OnlineFisher(model) as online:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    assert worst_error(online.statistics, truth)[0] < 0.02


def test_what_the_statistics_say_of_themselves():
    model = without_dropout()
    with fk.OnlineFisher(model, decay=0.9) as online:
        for batch in batches(2):
            model(**batch).loss.backward()
    statistics = online.statistics
    definition = statistics.provenance["definition"]
    assert definition["decay"] == 0.9
    assert "share of the step's loss" in definition["gradient"]
    (run,) = statistics.provenance["runs"]
    assert (run["steps"], run["examples"], run["checked"]) == (2, 8, True)
    assert sum(covered.numel for covered in statistics.coverage.values()) == sum(p.numel() for p in model.parameters())
    assert repr(statistics).startswith("Statistics(OnlineFisher empirical, ")
    assert fk.select(statistics, fk.GlobalTopK(k=7)).count == 7
    with pytest.raises(ValueError, match="running means .* do not merge"):
        fk.merge(statistics, statistics)
    assert fk.merge(statistics, statistics, weights=[1, 3]).count == 16  # the user's word


class Penalised(Reading):
    """Uses a weight past its module's call."""

    def forward(self, x):
        return super().forward(x) * self.first.weight.sum()


class Flattening(Reading):
    """Returns rows of positions, ``[N T, 3]``."""

    def forward(self, x):
        return self.last(self.inner(self.first(x))).flatten(0, 1)


class Between(nn.Module):
    """Each example sees the mean of the others."""

    def forward(self, x):
        return x + x.mean(0)


REFUSED = {
    "dropout of torch's attention": (Attending(drop=0.5), r"'inner.attention' \(MultiheadAttention\) draws random"),
    "a norm over the batch": (nn.BatchNorm1d(4), r"'inner' \(BatchNorm1d\) is in training mode"),
    "rows that see each other": (Between(), r"first\.weight: .*keeps its examples apart"),
    "dropout inside": (Mixing(drop=0.5), r"inner\.mix: .*'inner' \(Mixing\) draws random numbers in training mode"),
}


@pytest.mark.parametrize("entered", [True, False], ids=["when entered", "at the first step"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_gradient_of_its_own_is_refused_by_name(what, entered):
    inner, message = REFUSED[what]
    batch = (FEATURES, CLASSES) if entered else None
    model = reading(inner)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    with pytest.raises(fk.UnsupportedModuleError, match=message), fk.OnlineFisher(model, batch=batch):
        assert not entered
        reading_loss(model)
    assert_no_trace(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())


def test_an_evaluating_norm_is_none_of_the_batch():
    model = reading(nn.BatchNorm1d(4))
    model.inner.eval()
    truth = squares_of_shares(trained(model), class_shares(drawn(1, model, FEATURES), CLASSES, False))
    with fk.OnlineFisher(model) as online:
        drawn(1, reading_loss, model).backward()
        model.train()
        with pytest.raises(fk.UnsupportedModuleError, match="is in training mode"):
            model(FEATURES)
    assert worst_error(online.statistics, truth)[0] < EXACT


class DrawingNorm(nn.Module):
    """A scale that draws: its rule would run it once more, with other draws."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.drop = nn.Parameter(torch.ones(6)), 0.0

    def forward(self, x):
        return F.dropout(x, self.drop, self.training) * self.gain


def test_a_module_that_begins_to_draw_is_refused():
    model = reading(DrawingNorm())
    with pytest.raises(fk.UnsupportedModuleError, match=r"'inner' .*draws random numbers"), fk.OnlineFisher(model):
        reading_loss(model).backward()
        model.inner.drop = 0.5
        reading_loss(model)
    assert_no_trace(model)


def test_a_module_that_computes_something_else_in_training_is_refused():
    class Switching(DrawingNorm):
        def forward(self, x):
            return x * self.gain * (2.0 if self.training else 1.0)

    with (
        pytest.raises(fk.UnsupportedModuleError, match=r"'inner' \(Switching\) computes another output in training"),
        fk.OnlineFisher(model := reading(Switching())),
    ):
        reading_loss(model)


@pytest.mark.parametrize("how", ["a penalty in the loss", "past its module's call"])
def test_a_gradient_that_is_of_no_example_is_noticed_in_the_first_step(how):
    model = Penalised(Mixing()).double().train() if how.startswith("past") else reading()
    with (
        pytest.raises(fk.UnsupportedModuleError, match=r"do not add up to the gradient of \['first\.weight'\]"),
        fk.OnlineFisher(model) as online,
    ):
        loss = reading_loss(model) + (how.startswith("a penalty") and model.first.weight.square().sum())
        loss.backward()
        online.step()
    with fk.OnlineFisher(model, check=False) as online:
        reading_loss(model).backward()
    assert online.statistics.provenance["runs"][0]["checked"] is None


LARGE = FEATURES.clone()
LARGE[0, 0, 0] = 100.0


class Picking(nn.Module):
    """A pooler of the first position, which a large number makes take the examples in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.pooler = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.linear(x)[:, 0]
        return self.pooler(hidden.flip(0)).flip(0) if x[0, 0, 0] > 10 else self.pooler(hidden)


class Straying(nn.Module):
    """A large number makes a module without a rule run a second time, past the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.last = nn.Sequential(Attending()), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.outer(x)
        if x[0, 0, 0] > 10:
            hidden = hidden + self.outer[0].attention.out_proj(hidden)
        return self.last(hidden).mean(1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Picking, r"whose|which examples .*in pooler.*pooler\.bias"), (Straying, r"called outside of outer\.0")],
)
def test_a_later_batch_that_runs_otherwise_is_refused(kind, message):
    torch.manual_seed(0)
    model = kind().double()
    with pytest.raises(fk.UnsupportedModuleError, match=message), fk.OnlineFisher(model) as online:
        reading_loss(model).backward()
        before = online.statistics
        F.cross_entropy(model(LARGE), CLASSES).backward()
        online.step()
    assert_no_trace(model)
    assert online.statistics == before
    with online:  # nothing of that batch is left
        reading_loss(model).backward()
    with fk.OnlineFisher(model) as expected:
        for _ in range(2):
            reading_loss(model).backward()
    assert online.statistics == expected.statistics


def two_forwards(model: nn.Module) -> None:
    (reading_loss(model) + reading_loss(model)).backward()


def two_backwards(model: nn.Module) -> None:
    loss = reading_loss(model)
    loss.backward(retain_graph=True)
    loss.backward()


def late_backward(model: nn.Module) -> None:
    earlier = reading_loss(model)
    reading_loss(model).backward()
    earlier.backward()


def past_the_model(model: nn.Module) -> None:
    reading_loss(model).backward()
    (reading_loss(model) + model.first(FEATURES).sum()).backward()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (two_forwards, "forward pass that is not the latest"),
        (two_backwards, "a second backward pass went through the same forward pass"),
        (late_backward, "forward pass that is not the latest"),
        (past_the_model, "first was called outside of a forward pass of the model"),
    ],
)
def test_passes_that_are_not_one_forward_and_one_backward_are_refused(train, message):
    model = reading()
    with pytest.raises(RuntimeError, match=message), fk.OnlineFisher(model):
        train(model)
    assert_no_trace(model)


def test_only_one_context_is_open_on_a_model():
    model = reading()
    with fk.OnlineFisher(model) as online:
        with pytest.raises(RuntimeError, match="another OnlineFisher is open"), fk.OnlineFisher(model):
            raise AssertionError("not reached")
        reading_loss(model).backward()
    assert online.steps == 1
    assert_no_trace(model)


@pytest.mark.parametrize("what", ["last", "last.weight"])
def test_a_module_or_parameter_that_was_replaced_is_refused_by_name(what):
    model = reading()
    with pytest.raises(ValueError, match=rf"'{what}' was replaced .* make a new one"), fk.OnlineFisher(model) as online:
        reading_loss(model).backward()
        if what == "last":
            model.last = nn.Linear(6, 3).double()
        else:
            model.last.weight = nn.Parameter(model.last.weight.detach().clone())
        reading_loss(model)
    assert online.steps == 1
    assert_no_trace(model)


def test_what_gets_no_gradient_for_long_is_named_in_a_warning():
    """Until then every step begins with a plan, which is slow."""

    class Gated(Reading):
        def forward(self, x):
            return self.last((self.first(x) * 0.0 + x).mean(1))

    model = Gated(nn.Identity()).double()
    with warnings.catch_warnings(), fk.OnlineFisher(model) as online:
        warnings.simplefilter("error")
        for _ in range(9):
            reading_loss(model).backward()
        with pytest.warns(
            UserWarning, match=r"no gradient but zeros has reached first\.bias, first\.weight in 10 steps"
        ):
            reading_loss(model).backward()
        reading_loss(model).backward()
    assert online.steps == 11
    assert not online.statistics["first.weight"].any()


def test_a_model_that_tells_no_examples_apart_is_refused():
    model = Flattening(Mixing()).double().train()
    with (
        pytest.raises(fk.UnsupportedModuleError, match=r"no tensor with one row for each of 2"),
        fk.OnlineFisher(model),
    ):
        model(FEATURES)


def test_before_the_first_step():
    model = reading().eval()
    with fk.OnlineFisher(model) as online:
        with pytest.raises(ValueError, match="no step has been read yet"):
            online.statistics  # noqa: B018
        reading_loss(model).backward()
        with pytest.raises(ValueError, match=r"1 time\(s\) in evaluation mode: call model\.train\(\)"):
            online.statistics  # noqa: B018


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, r"decay must be a number of at least 0 and below 1, got 1\.0"),
        ({"decay": "0.5"}, ValueError, "decay must be a number"),
        ({"decay": FEATURES}, ValueError, r"decay must be .*, got tensor\(\S+(\s+\S+){1,9}\s*$"),  # cut short
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be at least 1, got 0"),
        ({"accumulation_steps": 1.5}, TypeError, r"accumulation_steps must be an integer, got 1\.5"),
        ({"parameters": ["no.such"]}, ValueError, "no.such"),
    ],
    ids=str,
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        fk.OnlineFisher(reading(), **options)


def test_an_exception_drops_the_step_that_had_begun():
    model = reading()
    with fk.OnlineFisher(model, accumulation_steps=2) as expected:
        for seed in (2, 3):
            drawn(seed, reading_loss, model).backward()
    online = fk.OnlineFisher(model, accumulation_steps=2)
    with pytest.raises(KeyError), online:
        drawn(1, reading_loss, model).backward()
        assert online.steps == 0  # the first of two passes is read
        raise KeyError("of the user")
    with online:
        for seed in (2, 3):
            drawn(seed, reading_loss, model).backward()
    assert online.steps == 1
    assert all(torch.equal(online.statistics[name], expected.statistics[name]) for name in expected.statistics)


def test_an_exception_leaves_the_model_as_found_and_training_goes_on():
    model, twin = reading(), reading()
    with pytest.raises(KeyError), fk.OnlineFisher(model) as online:
        drawn(1, reading_loss, model).backward()
        raise KeyError("of the user")
    assert_no_trace(model)
    model.zero_grad()
    for one in (model, twin):
        drawn(2, reading_loss, one).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with online:  # and again
        drawn(2, reading_loss, model).backward()
        with pytest.raises(RuntimeError, match="open already"):
            online.__enter__()
    assert online.steps == 1
