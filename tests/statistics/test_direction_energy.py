"""Energies of directions, against explicit covariances and explicit gradients of single examples in float64."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fishkern as fk
from fishkern.layers import linear_maps
from tests.models.test_quantized import Packed
from tests.support import oracle, zoo

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

PARTS = ("input", "output", "joint", "singular_values")
MODELS = {
    "llama": lambda: zoo.llama(num_key_value_heads=1),
    "tied": lambda: zoo.llama(tie_word_embeddings=True),
    "gpt2": zoo.gpt2,
    "bert": zoo.bert,
    "vit": zoo.vit,
}


def specimen(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[dict]]:
    one = MODELS[kind]()
    return one.model.to(dtype).eval(), [cast(one.batch(3), dtype), cast(one.batch(2), dtype)]


def cast(batch: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


class Oracle:
    """What enters each linear map, the gradient at its output, and the gradient of its matrix, for single examples."""

    def __init__(self, model: nn.Module, batches: list[dict], loss: oracle.Loss, counts: str = "attended") -> None:
        self.loss = loss
        self.maps = linear_maps(model)
        self.h, self.d, self.grads = ({name: [] for name in self.maps} for _ in range(3))
        self.positions = dict.fromkeys(self.maps, 0)
        self.examples = 0
        for batch in batches:
            for n in range(len(next(iter(batch.values())))):
                self._add(model, {key: value[n : n + 1] for key, value in batch.items()}, counts)

    def _add(self, model: nn.Module, row: dict, counts: str) -> None:
        self.examples += 1
        seen: dict[str, tuple] = {}
        handles = [
            linear.module.register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: (args[0], output)}) or output.retain_grad()
            )
            for name, linear in self.maps.items()
        ]
        model.zero_grad()
        self.loss(model, row).backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in seen.items():
            linear = self.maps[name]
            if isinstance(linear.module, nn.Conv2d):
                module = linear.module
                x = nn.functional.unfold(x, module.kernel_size, stride=module.stride).mT
                g = y.grad.flatten(2).mT
            else:
                x, g = x.reshape(1, -1, x.shape[-1]), y.grad.reshape(1, -1, y.shape[-1])
            counted = torch.ones(x.shape[1], dtype=torch.bool)
            if counts != "all" and "attention_mask" in row and x.shape[1] > 1:
                counted = row["attention_mask"][0].bool()
            if counts == "labelled":
                counted = torch.cat([row["labels"][0, 1:] >= 0, torch.tensor([False])])
            self.h[name].append(x[0][counted].detach())
            self.d[name].append(g[0][counted])
            grad = linear.weight.grad.flatten(1)
            self.grads[name].append((grad.T if linear.transposed else grad).clone())
            self.positions[name] += int(counted.sum())

    def directions(self, name: str, basis: str) -> tuple[torch.Tensor, torch.Tensor]:
        M = self.maps[name].matrix().double()
        if basis == "svd":
            U, _, Vh = torch.linalg.svd(M, full_matrices=False)
            return U, Vh.T
        V = M.T @ M
        V = V / V.norm(dim=0)
        U = M @ V
        return U / U.norm(dim=0), V

    def energies(self, name: str, basis: str) -> dict[str, torch.Tensor]:
        U, V = self.directions(name, basis)
        H, D = self.covariances(name)
        joint = torch.stack([(U * (G.double() @ V)).sum(0).square() for G in self.grads[name]])
        return {
            "input": (V * (H @ V)).sum(0),
            "output": (U * (D @ U)).sum(0),
            "joint": joint.sum(0) / self.examples,
        }

    def covariances(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        h, d = (torch.cat(factors[name]).double() for factors in (self.h, self.d))
        return h.T @ h / len(h), d.T @ d / len(d)

    def importance(self, name: str, kind: str) -> float:
        M = self.maps[name].matrix().double()
        if kind == "kronecker":
            H, D = self.covariances(name)
            return (torch.trace(D @ M @ H @ M.T) / M.numel()).item()
        return (sum((G.double() * M).sum().square() for G in self.grads[name]) / self.examples / M.numel()).item()


def assert_close(found: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    assert found.shape == truth.shape
    assert (found.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("basis", ["svd", "power"])
@pytest.mark.parametrize("importance", ["kronecker", "exact"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("kind", MODELS)
def test_they_equal_explicit_covariances_and_gradients(kind, dtype, tolerance, importance, basis):
    model, batches = specimen(kind, dtype)
    energies = fk.estimate(model, batches, fk.DirectionEnergy(basis=basis, importance=importance))
    # the truth is computed in float64, of a float32 model's own weights
    truths = Oracle(model.double(), [cast(batch, torch.float64) for batch in batches], MODELS[kind]().loss)
    assert list(energies) == list(truths.maps)
    for name, found in energies.items():
        truth = truths.energies(name, basis)
        for part, value in truth.items():
            assert_close(getattr(found, part), value, tolerance)
        assert found.importance == pytest.approx(truths.importance(name, importance), rel=10 * tolerance)
        assert found.positions == pytest.approx(truths.positions[name] / truths.examples, rel=1e-6)
        assert found.shape == truths.maps[name].shape
        if basis == "svd":
            assert_close(found.singular_values, torch.linalg.svdvals(truths.maps[name].matrix()), tolerance)
        else:
            assert found.singular_values is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["labelled", "all"])
def test_other_positions_count_where_they_are_asked_for(kind, positions):
    model, batches = specimen(kind)
    for batch in batches:
        batch["labels"][:, :3] = -100  # a prompt, whose own tokens carry no label
    energies = fk.estimate(model, batches, fk.DirectionEnergy(positions=positions, importance="kronecker"))
    truths = Oracle(model, batches, MODELS[kind]().loss, positions)
    attended = fk.estimate(model, batches, fk.DirectionEnergy())
    for name, found in energies.items():
        for part, value in truths.energies(name, "svd").items():
            assert_close(getattr(found, part), value, 1e-10)
        assert found.importance == pytest.approx(truths.importance(name, "kronecker"), rel=1e-9)
        assert found.positions != attended[name].positions
        torch.testing.assert_close(found.joint, attended[name].joint)


def test_masked_tokens_are_the_labelled_positions_of_a_masked_language_model():
    batch = zoo.masked_batch(4)
    model = zoo.bert_for("MaskedLM").double()
    energies = fk.estimate(model, [batch], fk.DirectionEnergy(positions="labelled"))
    counted = (batch["labels"] >= 0).sum().item() / 4
    assert {round(one.positions, 6) for one in energies.values()} == {round(counted, 6)}


def test_a_loss_without_labels_of_positions_cannot_say_which_are_labelled():
    model, batches = specimen("vit")
    with pytest.raises(ValueError, match="Classification has no labels of positions"):
        fk.estimate(model, batches, fk.DirectionEnergy(positions="labelled"))
    model, batches = specimen("llama")
    with pytest.raises(ValueError, match="and not a function"):
        fk.estimate(
            model,
            batches,
            fk.DirectionEnergy(positions="labelled"),
            likelihood=lambda model, batch: fk.CausalLM().predictive(model, batch).losses(),
        )


def test_a_loss_scaled_by_c_scales_gradients_and_leaves_inputs():
    model, batches = specimen("llama")

    def losses(model, batch):
        return fk.CausalLM().predictive(model, batch).losses()

    plain = fk.estimate(model, batches, fk.DirectionEnergy(importance="exact"), likelihood=losses)
    scaled = fk.estimate(
        model, batches, fk.DirectionEnergy(importance="exact"), likelihood=lambda *args: 4 * losses(*args)
    )
    for name in plain:
        assert_close(scaled[name].input, plain[name].input, 1e-12)
        for part in ("output", "joint"):
            assert_close(getattr(scaled[name], part), 16 * getattr(plain[name], part), 1e-12)
        assert scaled[name].importance == pytest.approx(16 * plain[name].importance)


@pytest.mark.parametrize("of", ["*.layers.0.*", ["*q_proj.weight", "*up_proj.weight"]])
def test_importance_is_of_the_matrices_that_it_was_asked_for(of):
    model, batches = specimen("llama")
    every = fk.estimate(model, batches, fk.DirectionEnergy(importance="kronecker"))
    some = fk.estimate(model, batches, fk.DirectionEnergy(importance="kronecker", importance_of=of))
    asked = {name for name in every if ".layers.0." in name} if isinstance(of, str) else {
        name for name in every if "q_proj" in name or "up_proj" in name
    }  # fmt: skip
    assert {name for name, one in some.items() if one.importance is not None} == asked
    assert all(some[name].importance == every[name].importance for name in asked)
    assert not any(f"{name}/grams" in some.blocks for name in every if name not in asked)


def test_no_gradient_no_covariance_and_one_call_for_each_matrix_and_batch(monkeypatch):
    """What is projected is projected by the operation, whose calls are counted; then no weight asks for a gradient."""
    module = import_module("fishkern.statistics.direction_energy")
    calls = []

    def counting(activations, output_grads, V, U, **options):
        calls.append((activations.shape[-1], output_grads.shape[-1]))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        return real(activations, output_grads, V, U, **options)

    real = module.project_sum_squared
    monkeypatch.setattr(module, "project_sum_squared", counting)
    model, batches = specimen("llama")
    energies = fk.estimate(model, batches, fk.DirectionEnergy(), check=False)
    assert len(calls) == (1 + len(batches)) * len(energies)  # the first two examples come by themselves
    assert sorted(set(calls)) == sorted({(I, O) for O, I in (one.shape for one in energies.values())})


def test_a_pattern_of_importance_that_matches_nothing_is_refused():
    model, batches = specimen("llama")
    with pytest.raises(ValueError, match=r"importance_of='\*.layer.0.\*' matches none of 15 weights"):
        fk.estimate(model, batches, fk.DirectionEnergy(importance="exact", importance_of=["*", "*.layer.0.*"]))


def test_a_mask_that_does_not_say_which_positions_count_is_refused():
    model, (batch, _) = specimen("llama")
    causal = torch.ones(7, 7).tril().bool() & batch["attention_mask"].bool()[:, None, None]
    with pytest.raises(ValueError, match=r"attention_mask \[N, T\] marks, and this one is \[\d, 1, 7, 7\]"):
        fk.estimate(model, [{**batch, "attention_mask": causal}], fk.DirectionEnergy())
    whole = {**batch, "attention_mask": causal}
    assert fk.estimate(model, [whole], fk.DirectionEnergy(positions="all"))["lm_head.weight"].positions == 7


def test_the_mask_beside_the_inputs_of_a_pair_counts_as_that_of_a_mapping():
    model, (batch, _) = specimen("llama")

    def losses(model, batch):
        inputs, labels = batch if isinstance(batch, tuple) else (batch, batch["labels"])
        return fk.CausalLM().predictive(model, {**inputs, "labels": labels}).losses()

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    paired = fk.estimate(model, [(inputs, batch["labels"])], fk.DirectionEnergy(), likelihood=losses)
    mapped = fk.estimate(model, [batch], fk.DirectionEnergy(), likelihood=losses)
    assert all(torch.equal(paired.blocks[entry], value) for entry, value in mapped.blocks.items())


def test_padding_of_a_decoder_is_refused_as_that_of_an_encoder():
    one = zoo.t5()
    model, batch = one.model.eval(), one.batch(3)
    names, labels = "*SelfAttention.q.weight", batch["labels"]
    assert (labels == -100).any()
    with pytest.raises(fk.UnsupportedModuleError, match="attention_mask says which positions count in the encoder"):
        fk.estimate(model, [{**batch, "labels": labels.clamp_min(3)}], fk.DirectionEnergy(), parameters=names)
    del batch["attention_mask"]
    with pytest.raises(fk.UnsupportedModuleError, match="labels of -100 are padding in the decoder alone"):
        fk.estimate(model, [batch], fk.DirectionEnergy(), parameters=names)
    marked = {**batch, "decoder_attention_mask": (labels != -100).long()}
    with pytest.raises(fk.UnsupportedModuleError, match="decoder_attention_mask says which positions count"):
        fk.estimate(model, [marked], fk.DirectionEnergy(), parameters=names)
    batch["labels"] = labels.clamp_min(3)
    energies = fk.estimate(model, [batch], fk.DirectionEnergy(), parameters=names)
    assert {"encoder" in name: one.positions for name, one in energies.items()} == {True: 7, False: 5}


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation returns while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("basis", ["svd", "power"])
@pytest.mark.parametrize("shape", [(8, 200), (200, 8)], ids=str)
def test_no_tensor_is_larger_than_the_matrix(basis, shape):
    """There is no matrix of the larger side squared: neither a covariance nor FILet's candidates."""
    O, I = shape
    model = nn.Sequential(nn.Linear(I, O, bias=False), nn.Linear(O, 3, bias=False))
    data = [(torch.randn(2, I), torch.tensor([0, 1]))]
    with Largest() as largest:
        fk.estimate(
            model,
            data,
            fk.DirectionEnergy(basis=basis, importance="kronecker"),
            likelihood=fk.Classification(),
            parameters="0.weight",
        )
    assert 0 < largest.numel <= O * I


def test_layers_in_passes_give_what_one_pass_gives():
    model, batches = specimen("llama")
    whole = fk.estimate(model, batches, fk.DirectionEnergy(importance="exact"))
    seen = []
    report = fk.estimate(
        model,
        batches,
        fk.DirectionEnergy(importance="exact", layers_per_pass=1),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert list(report) == list(whole)
    assert all(torch.equal(report.blocks[key], value) for key, value in whole.blocks.items())
    assert report.provenance["runs"][0]["passes"] == 3  # two layers and the head
    assert report.coverage == whole.coverage
    assert fk.merge(report, whole).count == 10
    assert [done for done, _ in seen] == [3, 5] * 3  # a list of batches has no known number of examples


def test_bases_of_a_pass_are_freed_before_the_next(monkeypatch):
    import weakref

    module = import_module("fishkern.statistics.direction_energy")
    bases, alive = [], []

    def noted(matrix):
        directions = real(matrix)
        alive.append(sum(ref() is not None for ref in bases))
        bases.append(weakref.ref(directions.U))
        return directions

    real = module.svd_directions
    monkeypatch.setattr(module, "svd_directions", noted)
    model, batches = specimen("llama")
    fk.estimate(model, batches, fk.DirectionEnergy(layers_per_pass=1))
    assert len(bases) == 15
    assert max(alive) <= 6  # seven matrices of a layer, of which one is being made


def test_data_that_differ_from_pass_to_pass_are_refused():
    model, _ = specimen("llama")
    batches = [zoo.text_batch(3), zoo.text_batch(2, seed=1)]
    estimator = fk.DirectionEnergy(layers_per_pass=1)
    with pytest.raises(ValueError, match="takes 3 passes over the data, and batches is an iterator"):
        fk.estimate(model, iter(batches), estimator)

    class Shuffled:
        turn = -1

        def __iter__(self):
            self.turn += 1
            return iter(batches[: 2 - self.turn % 2])

    with pytest.raises(ValueError, match="pass 2 of 3 saw other data than the first: 3 examples"):
        fk.estimate(model, Shuffled(), estimator)

    class Limited(Shuffled):
        def __iter__(self):
            self.turn += 1
            return iter(batches if self.turn % 2 == 0 else batches[::-1])

    with pytest.raises(ValueError, match="pass 2 of 3 saw other data than the first: 2 examples with a mean loss"):
        fk.estimate(model, Limited(), estimator, max_examples=2)
    fk.estimate(model, Limited(), estimator)  # the same examples in another order

    class Nudged(Shuffled):
        """One token of one example differs in the second pass, so that the mean loss moves by less than 1e-3."""

        def __iter__(self):
            self.turn += 1
            ids = batches[0]["input_ids"].clone()
            ids[0, 3] = (ids[0, 3] + self.turn % 2) % 40
            labels = batches[0]["labels"]
            return iter([{**batches[0], "input_ids": ids, "labels": labels}])

    with pytest.raises(ValueError, match="pass 2 of 3 saw other data than the first: 3 examples with a mean loss"):
        fk.estimate(model, Nudged(), estimator)


def test_parameters_without_factors_are_refused_by_name_and_left_out_by_default():
    model, batches = specimen("tied")
    for names in ("*norm.weight", "model.embed_tokens.weight", "all"):
        with pytest.raises(
            fk.UnsupportedModuleError, match="reads activations and output gradients.*(norm|embed_tokens)"
        ):
            fk.estimate(model, batches, fk.DirectionEnergy(), parameters=names)
    energies = fk.estimate(model, batches, fk.DirectionEnergy())
    assert "not the weight of a linear map" in energies.coverage["model.embed_tokens.weight"].reason
    with pytest.raises(KeyError, match="was left out: not the weight of a linear map"):
        energies["model.norm.weight"]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    with pytest.raises(ValueError, match="no weight of a linear map among them requires a gradient"):
        fk.estimate(model, batches, fk.DirectionEnergy())


def test_a_quantised_weight_has_the_energies_of_its_matrix():
    torch.manual_seed(0)
    quantised = nn.Sequential(Packed(8, 6), nn.Tanh(), nn.Linear(8, 3)).double()
    plain = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)).double()
    plain[0].weight.data = quantised[0].dequantize()
    plain[2].load_state_dict(quantised[2].state_dict())
    data = [(torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))]
    options = dict(likelihood=fk.Classification(), parameters=["0.weight"])
    for estimator in (
        fk.DirectionEnergy(importance="kronecker"),
        fk.DirectionEnergy(basis="power", importance="exact"),
    ):
        found, truth = (fk.estimate(model, data, estimator, **options)["0.weight"] for model in (quantised, plain))
        for part in ("input", "output", "joint"):
            assert_close(getattr(found, part), getattr(truth, part).double(), 1e-5)
        assert found.importance == pytest.approx(truth.importance, rel=1e-5)


def test_a_tampered_capture_is_noticed_by_the_exact_energies(monkeypatch):
    """The self-check compares the joint energies with those of autograd's gradients."""
    from fishkern.layers import linear

    real = linear.Linear.per_example_grads

    def doubled(self, call, output_grads, names):
        return real(self, call, 2 * output_grads, names)

    monkeypatch.setattr(linear.Linear, "per_example_grads", doubled)
    model, batches = specimen("llama")
    with pytest.raises(fk.UnsupportedModuleError, match="reads activations and output gradients"):
        fk.estimate(model, batches, fk.DirectionEnergy())


def test_in_bfloat16_sums_are_float32():
    model, batches = specimen("llama", torch.float32)
    truth = fk.estimate(model.bfloat16().float(), batches, fk.DirectionEnergy(importance="kronecker"))
    found = fk.estimate(model.bfloat16(), batches, fk.DirectionEnergy(importance="kronecker"))
    for name, one in found.items():
        assert one.joint.dtype == torch.float32
        assert_close(one.input, truth[name].input.double(), 0.05)
        assert_close(one.output, truth[name].output.double(), 0.1)
    ready = fk.prepare(model, batches[0], fk.DirectionEnergy(), check=False)  # so that every batch runs whole
    once = fk.estimate(model, batches, prepared=ready)
    often = fk.estimate(model, batches * 12, prepared=ready)  # 16 bits would lose the last ones
    for name, one in often.items():
        for part in ("input", "output", "joint"):
            torch.testing.assert_close(getattr(one, part), getattr(once[name], part), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"basis": "qr"}, "basis must be one of"),
        ({"positions": "padding"}, "positions must be one of"),
        ({"importance": "diagonal"}, "importance must be one of"),
        ({"layers_per_pass": 0}, "layers_per_pass must be at least 1"),
        ({"layers_per_pass": 1.5}, "layers_per_pass must be an integer"),
        ({"importance_of": 3}, "importance_of must be patterns"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fk.DirectionEnergy(**options)


class Gated(nn.Module):
    """A branch that is switched off, and gets a gradient of zeros, where the first token is a small number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.branch, self.head = nn.Embedding(30, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.embed(x)
        on = (x[:, :1, None] >= 15).to(h)
        return self.head(h + on * torch.tanh(self.branch(h)))


def test_positions_count_where_the_gradient_is_zero_whatever_batch_comes_first():
    torch.manual_seed(0)
    model = Gated().double()
    off = (torch.randint(0, 15, (2, 8)), torch.randint(0, 4, (2, 8)))
    on = (torch.randint(15, 30, (3, 8)), torch.randint(0, 4, (3, 8)))
    name = "branch.weight"
    for batches in ([off, on], [on, off], [off]):
        found = fk.estimate(model, batches, fk.DirectionEnergy(), likelihood=routed_losses)[name]
        U, _, Vh = torch.linalg.svd(model.branch.weight.detach(), full_matrices=False)
        tokens, count = torch.cat([x for x, _ in batches]), sum(len(x) for x, _ in batches)
        assert found.positions == 8
        assert_close(found.input, (model.embed(tokens).detach() @ Vh.T).square().mean((0, 1)), 1e-12)
        squares = torch.zeros(6, dtype=torch.float64)
        for batch in batches:
            h = model.embed(batch[0]).detach()
            y = model.branch(h).detach().requires_grad_()
            logits = model.head(h + (batch[0][:, :1, None] >= 15) * torch.tanh(y))
            losses = nn.functional.cross_entropy(logits.mT, batch[1], reduction="none").mean(1)
            (d,) = torch.autograd.grad(losses.sum(), y)
            squares += (d @ U).square().sum((0, 1)) / (8 * count)
        assert (found.output - squares).abs().max() <= 1e-12 * squares.max()
        assert bool(squares.any()) == (len(batches) > 1)


class Experts(nn.Module):
    """A router that sends each position to one of several experts, each a module of two linears."""

    checkpointed = False

    def __init__(self, D: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(D, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D, bias=False)) for _ in range(count)
        )

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).max(-1)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            places = (chosen == number).nonzero().flatten()
            if len(places):
                picked = rows[places]
                added = checkpoint(expert, picked, use_reentrant=False) if self.checkpointed else expert(picked)
                y.index_add_(0, places, weights[places, None] * added)
        return y.view_as(x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(30, 6), Experts(6, 3), nn.Linear(6, 4)

    def forward(self, x, attention_mask=None):
        return self.head(self.block(self.embed(x)))


def routed_losses(model: nn.Module, batch: tuple) -> torch.Tensor:
    logits, labels = model(batch[0]), batch[1]
    return nn.functional.cross_entropy(logits.mT, labels, reduction="none").mean(1)


def test_experts_that_are_modules_have_the_energies_of_their_own_rows():
    torch.manual_seed(3)
    model = Routed().double()
    with torch.no_grad():
        model.embed.weight.mul_(3)
    x, labels = torch.randint(0, 30, (5, 8)), torch.randint(0, 4, (5, 8))
    batches = [(x[:3], labels[:3]), (x[3:], labels[3:])]
    energies = fk.estimate(model, batches, fk.DirectionEnergy(importance="kronecker"), likelihood=routed_losses)
    experts = [name for name in energies if "experts" in name]
    assert len(experts) == 6
    assert {energies.coverage[name].path for name in experts} == {"generic"}
    rows: dict[str, list] = {}
    for name, linear in linear_maps(model).items():
        linear.module.register_forward_hook(
            lambda module, args, output, name=name: (
                rows.setdefault(name, []).append((args[0], output)) or output.retain_grad()
            )
        )
    joint = {name: torch.zeros(min(linear.shape), dtype=torch.float64) for name, linear in linear_maps(model).items()}
    for n in range(5):
        model.zero_grad()
        routed_losses(model, (x[n : n + 1], labels[n : n + 1])).sum().backward()
        for name, linear in linear_maps(model).items():
            if linear.weight.grad is not None:
                U, _, Vh = torch.linalg.svd(linear.matrix(), full_matrices=False)
                joint[name] += (U * (linear.weight.grad @ Vh.T)).sum(0).square() / 5
    for name, found in energies.items():
        h = torch.cat([one.detach().reshape(-1, one.shape[-1]) for one, _ in rows[name]])
        d = torch.cat([one.grad.reshape(-1, one.shape[-1]) for _, one in rows[name]])
        U, _, Vh = torch.linalg.svd(linear_maps(model)[name].matrix(), full_matrices=False)
        assert found.positions * 5 == pytest.approx(len(h))
        assert_close(found.input, (h @ Vh.T).square().mean(0), 1e-10)
        assert_close(found.output, (d @ U).square().mean(0), 1e-10)
        assert_close(found.joint, joint[name], 1e-10)


def test_experts_that_recompute_their_activations_have_the_same_energies():
    torch.manual_seed(3)
    model = Routed().double()
    batch = (torch.randint(0, 30, (3, 8)), torch.randint(0, 4, (3, 8)))
    plain = fk.estimate(model, [batch], fk.DirectionEnergy(), likelihood=routed_losses)
    model.block.checkpointed = True
    found = fk.estimate(model, [batch], fk.DirectionEnergy(), likelihood=routed_losses)
    assert found.blocks.keys() == plain.blocks.keys()
    assert all(torch.equal(found.blocks[entry], value) for entry, value in plain.blocks.items())


def test_padding_among_the_rows_of_an_expert_is_refused_by_name():
    torch.manual_seed(3)
    model = Routed()
    batch = {"x": torch.randint(0, 30, (4, 8)), "labels": torch.randint(0, 4, (4, 8))}
    batch["attention_mask"] = torch.ones(4, 8, dtype=torch.long)
    batch["attention_mask"][1:, 5:] = 0

    def losses(model, batch):
        nll = nn.functional.cross_entropy(model(batch["x"]).mT, batch["labels"], reduction="none")
        return (nll * batch["attention_mask"]).sum(1)

    with pytest.raises(fk.UnsupportedModuleError, match=r"block.experts.* gets rows that block picks"):
        fk.estimate(model, [batch], fk.DirectionEnergy(), likelihood=losses)
    assert fk.estimate(model, [batch], fk.DirectionEnergy(positions="all"), likelihood=losses).count == 4
