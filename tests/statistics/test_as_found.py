"""A pass leaves the model, its hooks, the random state and torch's modes as found, however it ends."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo

pytest.importorskip("transformers")
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore:.*slow exact path")]

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
)  # fmt: skip
ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc", mc_samples=2),
    "batch": fk.DiagonalFisher(unit="batch"),
    "sketched": fk.SketchedFisher(2),
}
every_estimator = pytest.mark.parametrize("kind", ESTIMATORS)


def checkpointed(reentrant: bool = False) -> nn.Module:
    model = zoo.llama(tie_word_embeddings=True).model
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def in_use() -> nn.Module:
    """A model in the middle of its training: partly frozen, in mixed modes, with gradients and hooks of the user's."""
    model = checkpointed().train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    for place, parameter in enumerate(model.parameters()):
        if place % 2:
            parameter.grad = torch.randn_like(parameter)
    model.model.norm.register_forward_hook(lambda module, args, output: None)
    model.lm_head.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    model.model.norm.weight.register_hook(lambda grad: grad)
    return model


def state_of(model: nn.Module) -> dict:
    """All that a pass could change."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, kind)) for kind in HOOKS] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "checkpointing": {name: vars(module).get("_gradient_checkpointing_func") for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "parameters": {name: id(parameter) for name, parameter in parameters.items()},
        "grads": {name: id(parameter.grad) for name, parameter in parameters.items()},
        "grad values": [None if p.grad is None else p.grad.tolist() for p in parameters.values()],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "parameter hooks": {
            name: (list(p._backward_hooks or ()), list(p._post_accumulate_grad_hooks or ()))
            for name, p in parameters.items()
        },
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    }


def six_batches() -> list[dict]:
    return [zoo.text_batch(3, 5, seed=seed) for seed in range(6)]


@contextmanager
def as_found(model: nn.Module):
    before = state_of(model)
    yield
    after = state_of(model)
    for what in before:
        assert after[what] == before[what], what


@every_estimator
def test_after_success(kind):
    model = in_use()
    with as_found(model):
        fk.estimate(model, [zoo.text_batch(3, 5), zoo.text_batch(2, 5)], ESTIMATORS[kind])


@pytest.mark.parametrize("options", [{"parameters": "all"}, {"check": False}, {"max_examples": 2}], ids=str)
def test_after_success_with_options(options):
    model = in_use()
    with as_found(model):
        fk.estimate(model, [zoo.text_batch(3, 5)], **options)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_with_both_kinds_of_checkpointing(reentrant):
    model = checkpointed(reentrant).train()
    with as_found(model):
        fk.estimate(model, [zoo.text_batch(3, 5)])


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_after_the_slower_paths():
    """The generic path (the positions of a ViT) and the loop over the whole model (prompts)."""
    peft = pytest.importorskip("peft")
    specimen = zoo.vit()
    with as_found(specimen.model):
        fk.estimate(specimen.model, [specimen.batch(3)])
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(zoo.llama().model, config).train()
    with as_found(model):
        fk.estimate(model, [zoo.text_batch(3, 5)])


@every_estimator
@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_after_an_exception_in_the_loss(kind, at):
    """Whatever stage the pass is in: survey, self-check, or the data."""
    model, calls = in_use(), []

    class Failing(fk.CausalLM):
        def predictive(self, model, batch):
            calls.append(model)
            if len(calls) == at:
                raise ArithmeticError("in the loss")
            return super().predictive(model, batch)

    with as_found(model), pytest.raises(ArithmeticError, match="in the loss"):
        fk.estimate(model, six_batches(), ESTIMATORS[kind], likelihood=Failing())


@every_estimator
@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_after_an_exception_inside_a_forward(kind, at):
    """Also inside a checkpointed layer, whose flag is down while its body runs."""
    model, calls = in_use(), []
    mlp = model.model.layers[0].mlp
    plain = mlp.forward

    def failing(x):
        calls.append(x)
        if len(calls) == at:
            raise ArithmeticError("inside a forward")
        return plain(x)

    mlp.forward = failing
    with as_found(model), pytest.raises(ArithmeticError, match="inside a forward"):
        fk.estimate(model, six_batches(), ESTIMATORS[kind])


@every_estimator
def test_after_an_exception_inside_a_backward(kind):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("inside a backward")

    model = in_use()
    model.model.layers[1].register_forward_hook(lambda module, args, output: Failing.apply(output))
    with as_found(model), pytest.raises(ArithmeticError, match="inside a backward"):
        fk.estimate(model, [zoo.text_batch(3, 5)], ESTIMATORS[kind])


@every_estimator
@pytest.mark.parametrize("exception", [KeyboardInterrupt, ValueError])
def test_after_an_exception_in_the_data(kind, exception):
    def batches():
        yield zoo.text_batch(3, 5)
        raise exception("in the data")

    model = in_use()
    with as_found(model), pytest.raises(exception, match="in the data"):
        fk.estimate(model, batches(), ESTIMATORS[kind])


def test_after_an_exception_in_the_progress_function():
    def progress(done, total):
        raise KeyboardInterrupt

    model = in_use()
    with as_found(model), pytest.raises(KeyboardInterrupt):
        fk.estimate(model, [zoo.text_batch(3, 5)], progress=progress)


def test_compilation_is_switched_on_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def batches():
        yield zoo.text_batch(3, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fk.estimate(zoo.llama().model, batches())
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert compiled


@pytest.mark.parametrize("kind", ["empirical", "mc", "sketched"])
def test_grad_mode_and_autocast_stay_on_or_off(kind):
    model = in_use()
    batches = [zoo.text_batch(3, 5)]
    expected = fk.estimate(model, batches, ESTIMATORS[kind])
    with torch.no_grad(), as_found(model):
        assert fk.estimate(model, batches, ESTIMATORS[kind]) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16), as_found(model):
        fk.estimate(model, batches, ESTIMATORS[kind])
    assert fk.estimate(model, batches, ESTIMATORS[kind]) == expected


class Drawing(nn.Module):
    """Draws random numbers in every mode, and forgets them."""

    def forward(self, x):
        torch.rand(3)
        return x


class Noisy(torch.utils.data.Dataset):
    """Draws its inputs when they are asked for."""

    def __len__(self):
        return 7

    def __getitem__(self, place):
        return torch.randn(4), place % 3


@pytest.mark.parametrize("kind", ["empirical", "mc", "sketched"])
def test_the_data_draws_from_the_users_own_random_numbers(kind):
    """Shuffling and augmentation see the numbers that they would see in a loop without a model, and move them on."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), Drawing(), nn.Linear(8, 3))
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=2, shuffle=True)
    torch.manual_seed(5)
    expected = list(loader)
    after = torch.get_rng_state()
    seen = []

    def watched():
        for batch in loader:
            seen.append(batch)
            yield batch

    torch.manual_seed(5)
    fk.estimate(model, watched(), ESTIMATORS[kind], likelihood=fk.Classification())
    for one, other in zip(seen, expected, strict=True):
        assert all(map(torch.equal, one, other))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("kind", ["empirical", "mc", "sketched"])
def test_inputs_that_require_a_gradient_get_none(kind):
    model, labels = nn.Sequential(nn.Linear(4, 3)), torch.tensor([0, 1, 2])
    leaf = torch.randn(3, 4, requires_grad=True)
    for input in (leaf, 2 * leaf):
        given, plain = (
            fk.estimate(model, [(x, labels)], ESTIMATORS[kind], likelihood=fk.Classification())
            for x in (input, input.detach())
        )
        assert given == plain
    assert leaf.grad is None


def test_dropout_is_off_and_comes_back():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    one, other = (fk.estimate(model, [batch], likelihood=fk.Classification()) for _ in range(2))
    assert one == other
    assert model[1].training


class Counting(nn.Module):
    """Counts its calls and keeps a running mean, in every mode, and stores the longest input in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.longest = nn.Linear(4, 4), 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        self.calls += 1
        if self.longest < 4:
            self.register_buffer("cache", torch.full((4,), 0.5), persistent=False)
            self.longest = 4
        shift = self.mean + self.cache
        self.mean.mul_(0.9)
        return self.linear(x - shift)


class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, max_norm=0.1)

    def forward(self, x):
        return self.embed((10 * x).long() % 9).mean(1)


def normed() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["empirical", "sketched"])
@pytest.mark.parametrize("make", [Counting, Bounded, normed], ids=["counter", "max_norm", "spectral norm"])
def test_buffers_and_tables_that_move_in_every_forward_pass(make, kind):
    """And each example meets the state that was found, whatever came before it."""
    model = nn.Sequential(make(), nn.Linear(4, 3)).train()
    batches = [(torch.rand(2, 4), torch.tensor([0, 2])), (torch.rand(3, 4), torch.tensor([1, 0, 1]))]
    with as_found(model):
        statistics = fk.estimate(model, batches, ESTIMATORS[kind], likelihood=fk.Classification())
    if make is Counting:
        assert model[0].cache is None
        assert model[0].longest == 0
    assert all(covered.path != "loop" for covered in statistics.coverage.values())
    turned = fk.estimate(model, batches[::-1], likelihood=fk.Classification())
    if kind == "empirical":
        for name in statistics:
            torch.testing.assert_close(turned[name], statistics[name])
        with as_found(model):
            assert fk.verify(model, batches, statistics, likelihood=fk.Classification()).ok


@pytest.mark.parametrize("kind", ["empirical", "batch", "sketched"])
def test_an_optimizer_that_steps_in_backward_rests(kind):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.rand(2, 4), torch.tensor([0, 2]))]
    expected = fk.estimate(model, batches, ESTIMATORS[kind], likelihood=fk.Classification())
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in model.parameters()]
    with as_found(model):
        assert fk.estimate(model, batches, ESTIMATORS[kind], likelihood=fk.Classification()) == expected
        fk.verify(model, batches, likelihood=fk.Classification())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(batches[0][0]).sum().backward()
    assert not any(map(torch.equal, model.parameters(), before))
    for handle in handles:
        handle.remove()
    model(batches[0][0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_that_a_masked_optimizer_releases_are_seen_all_the_same():
    model, batches = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), [(torch.rand(2, 4), torch.tensor([0, 2]))]
    expected = fk.estimate(model, batches, likelihood=fk.Classification())
    selection = fk.select(expected, fk.GlobalTopK(density=0.1))
    optimizer = fk.MaskedSGD(model, selection, lr=0.1, release_grads=True, max_grad_norm=1.0)
    assert fk.estimate(model, batches, likelihood=fk.Classification()) == expected
    assert optimizer.param_groups
