"""Modules as people change them: hooks, patches, activations in place, sharing, checkpoints. The loop is right."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fishkern as fk
from tests.support.exactness import LIMIT, paths
from tests.support.oracle import squares_one_by_one, worst_error

pytestmark = pytest.mark.matrix


def losses(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(batch["x"]).flatten(1)
    return (output.sin() * torch.linspace(1, 2, output.shape[1]).to(output)).sum(1)


def assert_exact(model: nn.Module, *shape: int, **options) -> dict[str, set[str]]:
    """Compare with the loop in float64, with the self-check and without, and return the paths."""
    model = model.double()
    batches = [{"x": torch.randn(N, *shape, dtype=torch.float64)} for N in (3, 2, 1)]
    asked = options.get("parameters") or (lambda name, parameter: parameter.requires_grad)
    asked = {name for name, parameter in model.named_parameters() if asked(name, parameter)}
    truth = squares_one_by_one(model, batches, lambda model, row: losses(model, row)[0])
    truth = {name: value for name, value in truth.items() if name in asked}
    for check in (False, True):
        statistics = fk.estimate(model, batches, likelihood=losses, check=check, **options)
        error, name = worst_error(statistics, truth)
        assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}, by {statistics.coverage[name].path}"
    return paths(statistics)


class Custom(nn.Module):
    """No rule knows it."""

    def __init__(self, D: int = 6) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        return torch.sin(x @ self.matrix)


class Norm(nn.Module):
    """A scale, recognised by its function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


LAYERS = {
    "linear": lambda: nn.Linear(6, 6),
    "layer norm": lambda: nn.LayerNorm(6),
    "scale": Norm,
    "custom": Custom,
    "convolution": lambda: nn.Conv1d(5, 5, 3, padding=1),
    "grouped": lambda: nn.Conv1d(5, 5, 3, padding=1, groups=5),
    "transposed": lambda: nn.ConvTranspose1d(5, 5, 3, padding=1),
    "batch norm": lambda: nn.BatchNorm1d(5),
    "group norm": lambda: nn.GroupNorm(1, 5),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def around(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer, nn.Linear(6, 2))


HOOKS = {
    "output": lambda layer: layer.register_forward_hook(lambda module, args, output: output * 2.0 + 1.0),
    "output, ahead": lambda layer: layer.register_forward_hook(lambda m, a, output: output.sin(), prepend=True),
    "input": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,)),
    "input with keywords": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0].cos(),), kwargs), with_kwargs=True
    ),
    "gradients": lambda layer: layer.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 3.0,)),
    "input gradient": lambda layer: layer.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3.0,)),
}


@every_layer
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_a_module(kind, hook):
    """Also without the self-check, and by the path that the module takes without them."""
    plain = assert_exact(around(LAYERS[kind]()), 5, 6)
    model = around(LAYERS[kind]())
    HOOKS[hook](model[2])
    assert assert_exact(model, 5, 6) == plain
    assert "loop" not in plain


@every_layer
def test_a_forward_put_on_the_module_itself(kind):
    layer = LAYERS[kind]()
    plain = type(layer).forward
    layer.forward = types.MethodType(lambda self, x: plain(self, x) * 2.0, layer)
    by_path = assert_exact(around(layer), 5, 6)
    assert "loop" not in by_path


def test_a_hook_of_accelerates():
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2.0

    model = around(nn.Linear(6, 6))
    hooks.add_hook_to_module(model[2], Doubled())
    assert assert_exact(model, 5, 6)["generic"] == {"2.weight"}  # the bias is a shift, whatever else happens


def test_a_hook_on_a_parameters_gradient():
    """It belongs to the gradient of each example, and the reason says so."""
    model = around(nn.Linear(6, 6))
    model[2].weight.register_hook(lambda grad: grad.clamp(max=0.1))
    with pytest.warns(UserWarning, match=r"2\.weight: a hook on it \(register_hook\) may change the gradient"):
        by_path = assert_exact(model, 5, 6)
    assert by_path["loop"] == {"2.weight"}


@every_layer
@pytest.mark.parametrize("inside", ["the model", "a block"])
@pytest.mark.parametrize(
    "change", [F.relu_, lambda x: F.silu(x, inplace=True), lambda x: x.mul_(2.0), lambda x: x.add_(1.0)]
)
def test_in_place_behind_a_module(kind, inside, change):
    """As in every network of torchvision; nothing takes the loop for it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = LAYERS[kind](), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(change(self.layer(x)))

    torch.manual_seed(0)
    block = Block()
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), block) if inside == "a block" else block
    assert "loop" not in assert_exact(model, 5, 6)


class Shift(nn.Module):
    """Needs its input for no gradient, so that a model may write into it afterwards, or the module itself."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.shift, self.inside = nn.Parameter(torch.randn(5, 6)), inside

    def forward(self, x):
        return x.mul_(2.0).add_(self.shift) if self.inside else x + self.shift


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "afterwards"])
def test_an_input_that_is_written_into(inside):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shift, self.last = nn.Linear(6, 6), Shift(inside), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            y = self.shift(x)
            return self.last(y if inside else y.sin() + x.mul_(3.0))

    if inside:
        with pytest.warns(UserWarning, match="shift writes into its input, which others may hold"):
            by_path = assert_exact(Block(), 5, 6)
        assert by_path["loop"] == {"shift.shift"}
        assert "loop" not in assert_exact(nn.Sequential(nn.Linear(6, 6), Block()), 5, 6)
    else:
        assert assert_exact(Block(), 5, 6)["generic"] == {"shift.shift"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift, self.last = nn.Linear(6, 6), Shift(True), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.shift(x) + x)


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_an_input_that_is_written_into_and_used_past_the_output():
    assert assert_exact(Residual(), 5, 6)["loop"] == {"shift.shift"}


class Calls(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.linear = inner, nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(self.inner(x))


class Reads(Calls):
    """Uses a parameter of a module that it never calls."""

    def forward(self, x):
        return self.linear(torch.sin(x @ self.inner.matrix))


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("kind", [Calls, Reads])
@pytest.mark.parametrize("deep", [True, False])
def test_a_module_that_two_blocks_share(kind, deep):
    """The module that runs for each example must enclose all uses: the one around both blocks, or the whole model."""
    torch.manual_seed(0)
    shared = Custom()
    model = nn.Sequential(kind(shared), nn.Tanh(), kind(shared))
    by_path = assert_exact(nn.Sequential(model, nn.Linear(6, 2)) if deep else model, 5, 6)
    name = "0.0.inner.matrix" if deep else "0.inner.matrix"
    assert name in by_path["generic" if deep else "loop"]
    assert isinstance(shared.matrix, nn.Parameter)


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_a_module_called_past_the_block_around_it():
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Calls(Custom())

        def forward(self, x):
            return self.block(x) + self.block.inner(x.cos())

    assert assert_exact(Past(), 5, 6)["loop"] == {"block.inner.matrix"}


def test_a_parameter_registered_by_an_outer_module_too():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.weight = self.linear.weight

        def forward(self, x):
            return self.linear(x.transpose(0, 1)).transpose(0, 1)

    model = nn.Sequential(Outer(), nn.Linear(6, 2))
    assert assert_exact(model, 5, 6) == {"generic": {"0.weight", "0.linear.bias"}, "fused": {"1.weight", "1.bias"}}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@pytest.mark.parametrize("lengths", [[5, 5, 3, 2], [5, 2, 3, 4], [5, 5, 5, 5], [1, 1, 6, 6]], ids=str)
@pytest.mark.parametrize("check", [True, False])
def test_rows_that_end_one_after_the_other(lengths, check):
    """A recurrent network written out: the first two examples may be of one length, and later ones not."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.new, self.old, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x, lengths):
            order = lengths.argsort(descending=True, stable=True)
            x, lengths = x[order], lengths[order]
            state = x.new_zeros(len(x), 5)
            for t in range(int(lengths.max())):
                going = int((lengths > t).sum())
                state = torch.cat([torch.tanh(self.new(x[:going, t]) + self.old(state[:going])), state[going:]])
            return self.head(state[order.argsort()])

    def losses(model, batch):
        return model(batch["x"], batch["lengths"]).sin().sum(1)

    model = Cell().double()
    batches = [
        {"x": torch.randn(len(some), 6, 4, dtype=torch.float64), "lengths": torch.tensor(some)}
        for some in (lengths, [2, 6, 2], [4])
    ]
    truth = squares_one_by_one(model, batches, lambda model, row: losses(model, row)[0])
    statistics = fk.estimate(model, batches, likelihood=losses, check=check)
    error, name = worst_error(statistics, truth)
    assert error < LIMIT[torch.float64], name
    assert {"head.weight", "head.bias"} == paths(statistics)["fused"]


class Checkpointed(nn.Module):
    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front, self.head = front, nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Custom()) for _ in range(2))
        self.reentrant = True

    def forward(self, x):
        x = self.front(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
@pytest.mark.parametrize("estimator", [fk.DiagonalFisher(), fk.DiagonalFisher(unit="batch")], ids=["example", "batch"])
def test_reentrant_checkpoints_behind_an_embedding_that_is_left_out(estimator):
    """The numbers of training, where the embedding requires a gradient: not zeros."""
    model = Checkpointed(nn.Embedding(9, 6)).double()
    batches = [{"x": torch.randint(9, (1, 5))} for _ in range(3)]
    model.reentrant = False  # the oracle's torch.autograd.grad refuses it
    truth = squares_one_by_one(model, batches, lambda model, row: losses(model, row)[0])
    model.reentrant = True
    for by_whose_word in ("the argument", "requires_grad"):
        model.front.requires_grad_(by_whose_word == "the argument")
        statistics = fk.estimate(model, batches, estimator, likelihood=losses, parameters=lambda n, p: "front" not in n)
        error, name = worst_error(statistics, {name: truth[name] for name in statistics})
        assert error < LIMIT[torch.float64], name
        if estimator.reads == "squares":
            assert paths(statistics)["generic"] == {"blocks.0.2.matrix", "blocks.1.2.matrix"}
            assert fk.verify(model, batches, statistics, likelihood=losses).ok


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("estimator", [fk.DiagonalFisher(), fk.SketchedFisher(1)], ids=["example", "sketched"])
def test_reentrant_checkpoints_with_nothing_in_front_are_refused(estimator):
    says = r"'blocks.0.0' \(Linear\) runs under reentrant .* not even in training. Checkpoint with use_reentrant=False"
    with pytest.raises(fk.UnsupportedModuleError, match=says):
        fk.estimate(Checkpointed(nn.Identity()), [{"x": torch.randn(3, 5, 6)}], estimator, likelihood=losses)
    head = fk.estimate(
        Checkpointed(nn.Identity()), [{"x": torch.randn(3, 5, 6)}], estimator,
        likelihood=losses, parameters=lambda name, parameter: "head" in name,
    )  # fmt: skip
    assert list(head) == ["head.weight", "head.bias"]


class Segments(nn.Module):
    """A block that checkpoints its content, among it a module without a rule."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.after, self.reentrant = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 6), reentrant

    def forward(self, x):
        return self.after(checkpoint(self.inner, x, use_reentrant=self.reentrant)[0])


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_a_checkpoint_inside_what_runs_once_more_for_each_example():
    """Its recomputation, too, must see the substitutes of its parameters."""
    by_path = assert_exact(nn.Sequential(nn.Linear(6, 6), Segments(False)), 5, 6)
    assert len(by_path["generic"]) == 4
    model = nn.Sequential(nn.Linear(6, 6), Segments(True)).double()
    batches = [{"x": torch.randn(N, 5, 6, dtype=torch.float64)} for N in (3, 1)]
    statistics = fk.estimate(model, batches, likelihood=losses)
    model[1].reentrant = False
    error, name = worst_error(statistics, squares_one_by_one(model, batches, lambda model, row: losses(model, row)[0]))
    assert error < LIMIT[torch.float64], name


class LengthFirst(nn.Module):
    """``[N, T, D]`` outside, ``[T, N, D]`` inside."""

    def __init__(self, inner: nn.Module, wrapped: bool = False) -> None:
        super().__init__()
        self.inner, self.head, self.wrapped = inner, nn.Linear(6, 2), wrapped

    def forward(self, x):
        return self.head(self.inner(x) if self.wrapped else self.inner(x.transpose(0, 1)).transpose(0, 1))


class Turned(nn.Module):
    """Following the advice of the message."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Decoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(6, 2, 8, batch_first=batch_first)

    def forward(self, x):
        return self.layer(x, x)


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


@pytest.mark.parametrize(("make", "name"), [(encoder, "TransformerEncoderLayer"), (Decoder, "TransformerDecoderLayer")])
def test_transformers_with_the_length_first(make, name):
    advice = rf"{name} has its examples along the second axis: make it with batch_first=True\)"
    with pytest.warns(UserWarning, match=advice):
        assert len(assert_exact(LengthFirst(make(False)), 5, 6)["loop"]) > 10
    assert "loop" not in assert_exact(LengthFirst(make(True), wrapped=True), 5, 6)


def test_any_other_model_with_the_length_first():
    advice = (
        r"Sequential has its examples along the second axis: put it into a module that takes and returns them along "
        r"the first\)"
    )
    inner = nn.Sequential(nn.Linear(6, 6), Custom())
    with pytest.warns(UserWarning, match=advice):
        assert len(assert_exact(LengthFirst(inner), 5, 6)["loop"]) == 3
    assert "loop" not in assert_exact(LengthFirst(Turned(inner), wrapped=True), 5, 6)


class Mapped(nn.Module):
    """A network for one example, or one position, that ``torch.vmap`` runs on all."""

    def __init__(self, axis: int = 0, beside: bool = False) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        self.axis, self.beside = axis, beside

    def one(self, x):
        return self.outer(self.inner(x).tanh())

    def forward(self, x):
        output = torch.vmap(self.one, in_dims=self.axis, out_dims=self.axis)(x)
        return output + self.outer(x) if self.beside else output


@pytest.mark.parametrize(("axis", "beside"), [(0, False), (1, False), (0, True)])
def test_a_network_that_vmap_runs_on_each_example_or_position(axis, beside):
    model = nn.Sequential(nn.Linear(6, 6), Mapped(axis, beside), nn.Linear(6, 2))
    found = assert_exact(model, 5, 6)
    assert found["generic"] == {f"1.{name}" for name, _ in model[1].named_parameters()}


class WithoutEntries(nn.Module):
    """Returns a tensor ``[N, 0]`` as well, as of features that are switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return torch.tanh(x @ self.matrix), x.new_zeros(len(x), 0)


class TakesFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = WithoutEntries(), nn.Linear(6, 2)

    def forward(self, x):
        return self.outer(self.inner(x)[0])


def test_an_output_without_entries():
    assert assert_exact(TakesFirst(), 6)["generic"] == {"inner.matrix"}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_a_whole_model_written_for_one_example():
    assert len(assert_exact(Mapped(), 6)["loop"]) == 4


class Forces(nn.Module):
    """The slope of an energy, as molecular models give it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.energy = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), Custom())

    def forward(self, x):
        return torch.vmap(torch.func.grad(lambda one: self.energy(one).sum()))(self.embed(x))


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_forces_by_a_gradient_inside_the_model():
    assert assert_exact(Forces(), 6)["fused"] == {"embed.weight", "embed.bias"}


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_a_weight_shared_with_a_module_that_vmap_runs():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return torch.vmap(self.second)(self.first(x).tanh())

    assert "first.weight" in assert_exact(Tied(), 6)["loop"]


@pytest.mark.filterwarnings("ignore:.*slow exact path", "ignore:.*torch.jit", "ignore::DeprecationWarning")
def test_a_traced_module_is_served_and_a_scripted_one_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6), Custom(), nn.Linear(6, 2)).double()
    batches = [{"x": torch.randn(N, 6, dtype=torch.float64)} for N in (3, 2)]
    truth = squares_one_by_one(model, batches, lambda model, row: losses(model, row)[0])
    traced = nn.Sequential(model[0], torch.jit.trace(model[1], batches[0]["x"]), model[2])
    assert worst_error(fk.estimate(traced, batches, likelihood=losses), truth)[0] < LIMIT[torch.float64]
    scripted = nn.Sequential(model[0], torch.jit.script(model[1]), model[2])
    for run in (fk.estimate, fk.verify):
        with pytest.raises(fk.UnsupportedModuleError, match=r"'1' \(Custom\) was made by torch.jit.script.*made from"):
            run(scripted, batches, likelihood=losses)
    assert not any(module._forward_hooks for module in (scripted[0], scripted[2]))
    assert worst_error(fk.estimate(model, batches, likelihood=losses), truth)[0] < LIMIT[torch.float64]


def test_a_lazy_module_that_has_not_run_is_refused_in_one_sentence():
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="'0.weight' of Sequential has no shape yet.*run the model once on a batch"):
        fk.estimate(model, [{"x": x}], likelihood=losses)
    model(x)
    assert_exact(model, 4)


class Sparse(nn.Module):
    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        dense = torch.randn(6, 6, dtype=torch.float64) * torch.eye(6)
        self.weight = nn.Parameter(dense.to_sparse(layout=layout))

    def forward(self, x):
        return torch.sparse.mm(self.weight, x.t()).t()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_parameter_in_a_sparse_layout_is_refused_and_what_is_around_it_exact(layout):
    model = nn.Sequential(nn.Linear(6, 6), Sparse(layout), nn.Linear(6, 2)).double()
    for estimator in (fk.DiagonalFisher(), fk.SketchedFisher(draws=1)):
        with pytest.raises(fk.UnsupportedModuleError, match=r"\['1.weight'\] are kept in a sparse layout.*leave"):
            fk.estimate(model, [{"x": torch.randn(3, 6).double()}], estimator, likelihood=losses)
    model[1].weight.requires_grad_(False)
    assert_exact(model, 6)


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_nested_tensors_run_through_the_model_in_batches_of_one():
    def losses(model, batch):
        return torch.stack([sequence.sin().sum() for sequence in model(batch["x"]).unbind()])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    sequences = [torch.randn(T, 6, dtype=torch.float64) for T in (2, 3, 4)]
    batches = [{"x": torch.nested.nested_tensor([one], layout=torch.jagged)} for one in sequences]
    rows = [{"x": one[None]} for one in sequences]
    truth = squares_one_by_one(model, rows, lambda model, row: model(row["x"]).sin().sum())
    for check in (True, False):
        statistics = fk.estimate(model, batches, likelihood=losses, check=check)
        assert worst_error(statistics, truth)[0] < LIMIT[torch.float64]


def test_a_target_without_gradient_costs_no_path():
    """A model that learns from its own answer, as self-distillation does."""

    def distilled(model, batch):
        with torch.no_grad():
            target = model(0.9 * batch["x"])
        return (model(batch["x"]) - target).square().mean(1) + losses(model, batch)

    def from_itself(model, batch):
        with torch.no_grad():
            target = model(0.9 * batch["x"])
        return (model(batch["x"]) - target).square().mean(1)

    model = around(Custom()).double()
    batches = [{"x": torch.randn(N, 6, dtype=torch.float64)} for N in (3, 2)]
    for function, path in ((from_itself, "generic"), (distilled, "loop")):
        truth = squares_one_by_one(model, batches, lambda model, row, function=function: function(model, row)[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("error" if path == "generic" else "ignore", ".*slow exact path")
            statistics = fk.estimate(model, batches, likelihood=function)
        assert worst_error(statistics, truth)[0] < LIMIT[torch.float64]
        assert statistics.coverage["2.matrix"].path == path


def test_a_head_that_is_not_called_is_said_to_be_so():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match="unused.weight: unused was not called by the first examples"):
        assert assert_exact(Heads(), 6)["loop"] == {"unused.weight", "unused.bias"}
