"""Factors of the Fisher, against explicit activations and output gradients of single examples in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from tests.support import oracle, zoo

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

MODELS = {
    "llama": lambda: zoo.llama(num_key_value_heads=1),
    "tied": lambda: zoo.llama(tie_word_embeddings=True),
    "gpt2": zoo.gpt2,
    "qwen3": zoo.qwen3,  # norms of queries and keys run at every head
    "bert": zoo.bert,
    "bert-classifier": zoo.bert_classifier,
    "vit": zoo.vit,
}
EACH = pytest.mark.parametrize("kind", MODELS)


def specimen(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[dict], oracle.Loss]:
    one = MODELS[kind]()
    return (
        one.model.to(dtype).eval(),
        [cast(one.batch(3, low=5), dtype), cast(one.batch(2, low=5, seed=4), dtype)],
        one.loss,
    )


def cast(batch: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def with_rules(name: str, parameter: nn.Parameter) -> bool:
    """Not what ViT adds to its patches, in no module of its own."""
    return "cls_token" not in name and "embeddings.position" not in name


class Oracle:
    """Sums over positions, one example at a time: of what enters and leaves each module that has parameters."""

    def __init__(self, model: nn.Module, batches: list[dict], loss: oracle.Loss, counts: str = "attended") -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.squares: dict[str, Tensor | float] = {}  # of what has no factors, or of each side of a matrix
        self.positions: dict[str, int] = {}
        self.matrices: dict[str, torch.Size] = {}
        modules = [one for one in model.modules() if [*one.parameters()] and not [*one.children()]]
        for batch in batches:
            for n in range(oracle.size(batch)):
                row = oracle.row(batch, n)
                seen = self._run(model, modules, row, loss)
                for module, x, g in seen:
                    self._add(module, x, g, self._counted(row, counts, g))

    def _run(self, model: nn.Module, modules: list, row: dict, loss: oracle.Loss) -> list:
        seen = []

        def note(module, args, output):
            output.retain_grad()
            seen.append((module, args[0].detach(), output))

        handles = [module.register_forward_hook(note) for module in modules]
        loss(model, row).backward()
        for handle in handles:
            handle.remove()
        return [(module, x, (output.detach(), output.grad)) for module, x, output in seen if output.grad is not None]

    def _counted(self, row: dict, counts: str, pair: tuple[Tensor, Tensor]) -> Tensor | None:
        mask = row["attention_mask"][0].bool() if "attention_mask" in row else None
        if counts == "labelled":
            mask = torch.cat([row["labels"][0, 1:] >= 0, torch.tensor([False])])
        along = pair[1].ndim > 2 and mask is not None and pair[1].shape[1] == len(mask)
        return mask if along and counts != "all" else None

    def _add(self, module: nn.Module, x: Tensor, pair: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        output, g = pair
        if isinstance(module, nn.Conv2d):
            x = nn.functional.unfold(x, module.kernel_size, stride=module.stride).mT
            output, g = (one.flatten(2).mT for one in (output, g))
        flat = [one.reshape(-1, one.shape[-1]) if one.is_floating_point() else one.flatten() for one in (x, output, g)]
        if mask is not None:  # of every head at a position
            mask = mask.repeat_interleave(len(flat[-1]) // len(mask))
        x, output, g = (one if mask is None else one[mask] for one in flat)
        if isinstance(module, nn.Embedding):
            self._sum(module.weight, torch.zeros_like(module.weight).index_add_(0, x, g.square()), len(x))
            return
        if isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D":
            sides = (x, g) if type(module).__name__ == "Conv1D" else (g, x)
            self.matrices[self.names[module.weight]] = module.weight.shape
            for side, factor in zip(("rows", "columns"), sides, strict=True):
                self._sum(module.weight, factor.square().sum(0), len(x) if side == "rows" else 0, f"/{side}")
            if isinstance(module, nn.Linear):  # for one that shares its weight with an embedding
                self._sum(module.weight, (g.square().T @ x.square()), 0, "/terms")
        else:
            bias = getattr(module, "bias", None)
            normalized = (output if bias is None else output - bias) / module.weight
            self._sum(module.weight, (g * normalized).square().sum(0), len(x))
        if getattr(module, "bias", None) is not None:
            self._sum(module.bias, g.square().sum(0), len(x))

    def _sum(self, parameter: nn.Parameter, squares: Tensor, positions: int, part: str = "") -> None:
        name = self.names[parameter]
        self.squares[name + part] = self.squares.get(name + part, 0) + squares.detach()
        self.positions[name] = self.positions.get(name, 0) + positions

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return tuple(self.squares[f"{name}/{side}"] / self.positions[name] for side in ("rows", "columns"))

    def __getitem__(self, name: str) -> Tensor:
        if name in self.squares:  # a weight that an embedding shares is squared at each position of each use
            return (self.squares[name] + self.squares.get(f"{name}/terms", 0)) / self.positions[name]
        rows, columns = self.factors(name)
        return (rows[:, None] * columns).view(self.matrices[name])


def assert_close(found: Tensor, truth: Tensor, name: str, tolerance: float = 2e-6, floor: float = 0.0) -> None:
    assert found.shape == truth.shape, name
    assert (found.double() - truth).abs().max() <= tolerance * truth.abs().max() + floor, name


def assert_equal(held: fk.FactoredStatistics, truths: Oracle, tolerance: float = 2e-6) -> None:
    # the gradient of a key's bias is zero but for rounding
    floor = 1e-14 * max(truths[name].abs().max().item() for name in held)
    for name, value in held.items():
        assert_close(value, truths[name], name, tolerance, floor)
        factors = held.factors(name)
        assert (factors is None) == (name in truths.squares), name
        if factors is not None:
            for factor, truth in zip(factors, truths.factors(name), strict=True):
                assert_close(factor, truth, name, tolerance, floor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@EACH
def test_it_equals_explicit_activations_and_output_gradients(kind, dtype):
    model, batches, loss = specimen(kind, dtype)
    held = fk.estimate(model, batches, fk.DiagonalKronecker(), parameters=with_rules)
    assert isinstance(held, fk.FactoredStatistics)
    truths = Oracle(copy.deepcopy(model).double(), [cast(batch, torch.float64) for batch in batches], loss)
    assert set(held) == {name for name, one in model.named_parameters() if with_rules(name, one)}
    assert_equal(held, truths, 2e-6 if dtype == torch.float64 else 5e-4)
    assert all(held.shape(name) == model.get_parameter(name).shape == value.shape for name, value in held.items())


def test_it_equals_them_on_trained_weights_and_sentences(shared_data):
    folder = shared_data / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time there was a cat.", "The sun was warm.", "Tom and Lily went to the park to play."]
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    assert (mask == 0).any()
    held = fk.estimate(model, [batch], fk.DiagonalKronecker())
    assert_equal(held, Oracle(model, [batch], oracle.next_token))


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("positions", ["labelled", "all"])
def test_other_positions_count_where_they_are_asked_for(kind, positions):
    model, batches, loss = specimen(kind)
    for batch in batches:
        batch["labels"][:, :3] = -100  # a prompt, whose own tokens carry no label
    held = fk.estimate(model, batches, fk.DiagonalKronecker(positions=positions))
    assert_equal(held, Oracle(copy.deepcopy(model), batches, loss, positions))
    attended = fk.estimate(model, batches, fk.DiagonalKronecker())
    assert not any(torch.equal(held[name], attended[name]) for name in held if "bias" not in name)


def test_a_bias_is_the_factor_of_output_gradients():
    model, batches, _ = specimen("gpt2")
    held = fk.estimate(model, batches, fk.DiagonalKronecker())
    weights = [name for name in held if held.factors(name) is not None]
    assert len(weights) == 8
    for name in weights:
        factors, bias = held.factors(name), held[name.replace("weight", "bias")]
        assert factors.columns.shape == bias.shape  # Conv1D stores input features as rows
        torch.testing.assert_close(factors.columns, bias, rtol=1e-5, atol=0)


@EACH
def test_nothing_is_left_at_zero(kind):
    model, batches, _ = specimen(kind)
    held = fk.estimate(model, batches, fk.DiagonalKronecker(), parameters=with_rules)
    assert not [name for name, value in held.items() if not value.any()]


def test_a_module_that_runs_twice_has_the_positions_of_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.inner(self.inner(x).tanh()))

    model, x, y = Twice().double(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    held = fk.estimate(model, [(x, y)], fk.DiagonalKronecker(), likelihood=fk.Classification())
    truths = Oracle(
        model, [{"x": x, "y": y}], lambda model, row: nn.functional.cross_entropy(model(row["x"]), row["y"])
    )
    assert truths.positions["inner.weight"] == 10
    assert_equal(held, truths)


def test_what_positions_cannot_be_told_apart_of_is_refused_by_name():
    model, batches, _ = specimen("vit")
    with pytest.raises(fk.UnsupportedModuleError, match=r"there is none for .'vit\.embeddings\.position_embeddings'"):
        fk.estimate(model, batches, fk.DiagonalKronecker())


def test_norms_of_heads_are_refused_where_what_does_not_count_has_a_gradient():
    one = zoo.qwen3()
    batch = one.batch(3, low=5)
    batch["labels"][:, :3] = -100
    with pytest.raises(fk.UnsupportedModuleError, match=r"_norm.weight runs at \d+ positions"):
        fk.estimate(one.model, [batch], fk.DiagonalKronecker(positions="labelled"))


def test_norms_of_heads_count_where_there_are_as_many_heads_as_positions():
    one = zoo.qwen3()  # of four heads for the queries, and two for the keys
    model, batch = one.model.double().eval(), one.batch(3, T=4, low=2)
    assert_equal(fk.estimate(model, [batch], fk.DiagonalKronecker()), Oracle(model, [batch], one.loss))


def test_other_units_and_positions_are_refused():
    with pytest.raises(ValueError, match="unit must be .*position.*got 'example'"):
        fk.DiagonalKronecker(unit="example")
    with pytest.raises(ValueError, match="positions must be one of"):
        fk.DiagonalKronecker(positions="some")


def test_the_state_of_a_matrix_is_its_two_sides():
    model = zoo.llama().model
    sides = sum(sum(parameter.shape) for name, parameter in model.named_parameters() if name.endswith("_proj.weight"))
    plan = fk.plan(model, estimator=fk.DiagonalKronecker(), parameters="*_proj.weight")
    assert plan.accumulator_bytes == 8 * sides + 8 * 14  # and the number of positions of each


class TestUse:
    @pytest.fixture
    def held(self) -> fk.FactoredStatistics:
        model, batches, _ = specimen("gpt2", torch.float32)
        return fk.estimate(model, batches, fk.DiagonalKronecker())

    @pytest.mark.parametrize("rule", [fk.GlobalTopK(k=300), fk.PerTensorTopK(density=0.1)], ids=["global", "tensor"])
    def test_a_rule_selects_by_it_as_by_its_values(self, held, rule, tmp_path):
        values = {name: value.clone() for name, value in held.items()}
        expected = fk.select(values, rule)
        on_disk = fk.FactoredStatistics.load(held.save(tmp_path / "factored"), lazy=True)
        for one in (held, on_disk):
            selected = fk.select(one, rule)
            assert all(torch.equal(selected.indices(name), expected.indices(name)) for name in values)
            assert selected.provenance["statistics"]["definition"]["estimator"] == "DiagonalKronecker"
            assert selected.provenance["statistics"]["count"] == 5

    def test_halves_with_other_padding_merge_to_the_whole(self):
        model, batches, loss = specimen("llama")
        model, parts = model.double(), [*batches, zoo.text_batch(4, 9, seed=9)]
        merged = fk.merge(*(fk.estimate(model, [part], fk.DiagonalKronecker()) for part in parts))
        assert_equal(merged, Oracle(model, parts, loss))
        assert merged.count == 9

    def test_names_change_and_the_rest_does_not(self, held):
        other = held.rename(lambda name: f"base.{name}")
        assert list(other) == [f"base.{name}" for name in held]
        assert torch.equal(other["base.transformer.ln_f.bias"], held["transformer.ln_f.bias"])
        assert other.rename(lambda name: name.removeprefix("base.")) == held

    def test_it_says_what_it_is(self, held):
        assert repr(held) == (
            "FactoredStatistics(DiagonalKronecker, 8 matrices by their factors, 20 other parameters, 16,248 "
            "coordinates, mean over 5 examples)"
        )
        assert held.total == 16248
        assert held.provenance["definition"]["positions"] == "attended"

    def test_a_name_that_it_does_not_have(self, held):
        for look_up in (held.__getitem__, held.factors, held.shape):
            with pytest.raises(KeyError, match="transformer.ln_f"):
                look_up("transformer.ln_f")

    def test_a_file_in_16_bits_keeps_the_shapes(self, tmp_path):
        net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.Flatten(), nn.Linear(20, 3))
        data = [(torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 1]))]
        held = fk.estimate(net, data, fk.DiagonalKronecker(), likelihood=fk.Classification())
        loaded = fk.FactoredStatistics.load(held.save(tmp_path / "half", dtype=torch.bfloat16))
        for name, value in held.items():
            assert loaded[name].shape == net.get_parameter(name).shape
            torch.testing.assert_close(loaded[name], value, rtol=0.03, atol=0)

    @pytest.mark.parametrize(
        "parts, says",
        [
            ({"rows": (3,), "positions": ()}, "w has rows, positions"),
            ({"rows": (3,), "columns": (2,), "values": (3, 2), "positions": ()}, "w has rows, columns, values, pos"),
            ({"sums": (3,), "positions": ()}, "w has sums, positions"),
            ({"rows": (3, 1), "columns": (2,), "positions": ()}, r"do not fit: rows \(3, 1\)"),
            ({"rows": (3,), "columns": (), "positions": ()}, r"do not fit: .*columns \(\)"),
            ({"values": (3,), "positions": (1,)}, r"do not fit: .*positions \(1,\)"),
        ],
    )
    def test_parts_that_do_not_belong_together_are_refused(self, parts, says):
        with pytest.raises(ValueError, match=says):
            fk.FactoredStatistics({f"w/{part}": torch.ones(shape) for part, shape in parts.items()}, count=1)
