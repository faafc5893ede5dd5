"""A prepared pass reads its data and nothing else, equals a fresh one to rounding, and refuses what has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from tests.support import zoo
from tests.support.closeness import alike
from tests.support.exactness import LIMIT
from tests.support.oracle import next_token, squares_one_by_one, worst_error

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc", mc_samples=2, seed=3),
    "groups": fk.GroupFisher(by="layer"),
    "directions": fk.DirectionEnergy(layers_per_pass=1),
    "sketched": fk.SketchedFisher(2),
    "batch": fk.DiagonalFisher(unit="batch"),
}
every_estimator = pytest.mark.parametrize("kind", ESTIMATORS)


def text(*sizes: int, T: int = 5) -> list[dict]:
    return [zoo.text_batch(N, T, seed=seed) for seed, N in enumerate(sizes)]


def train(model: nn.Module) -> None:
    """Move every weight, as steps of training do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@contextmanager
def counted(model: nn.Module):
    """The calls of the model, without a hook and without another forward method."""
    calls: list[int] = []

    def call(self, *args, **kwargs):
        calls.append(1)
        return nn.Module.__call__(self, *args, **kwargs)

    try:
        type(model).__call__ = call
        yield calls
    finally:
        del type(model).__call__


def with_lora(base: nn.Module | None = None) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base or zoo.llama().model, config)


def test_a_reading_equals_the_loop_at_the_weights_that_it_finds():
    model, batches = zoo.llama(tie_word_embeddings=True).model.double(), text(3, 2)
    prepared = fk.prepare(model, batches[0])
    for _ in range(2):
        train(model)
        statistics = fk.estimate(model, batches, prepared=prepared)
        error, name = worst_error(statistics, squares_one_by_one(model, batches, next_token))
        assert error < LIMIT[torch.float64], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("check", [True, False])
@every_estimator
def test_a_reading_runs_the_model_once_for_each_batch_and_pass(kind, check):
    model, batches = zoo.llama().model, text(3, 2, 1)
    with counted(model) as calls:
        prepared = fk.prepare(model, batches[0], ESTIMATORS[kind], check=check)
        passes = len(prepared.known)
        calls.clear()
        for _ in range(2):
            train(model)
            fk.estimate(model, batches, prepared=prepared)
            assert len(calls) == passes * len(batches)
            calls.clear()


@every_estimator
def test_on_other_data_only_the_rows_are_checked_and_only_once(kind):
    """Two examples together and each alone: what does not look at single examples has no rows to check."""
    model, batches = zoo.llama().model, text(3, 2)
    others = batches[::-1]
    with counted(model) as calls:
        prepared = fk.prepare(model, batches[0], ESTIMATORS[kind])
        for data, new in ((others, True), (others, False), (batches, False)):
            calls.clear()
            reading = fk.estimate(model, data, prepared=prepared)
            rows = 3 if new and kind != "batch" else 0
            assert len(calls) == len(prepared.known) * (len(data) + rows)
            assert alike(reading, fk.estimate(model, data, ESTIMATORS[kind]))


def test_data_are_seen_if_the_first_examples_are_the_same_values():
    model, batches = zoo.llama().model, text(3, 2)
    prepared = fk.prepare(model, batches[0])
    padded = {key: F.pad(value, (0, 1), value=-100 if key == "labels" else 0) for key, value in batches[0].items()}
    cases = [
        (copy.deepcopy(batches), True),
        ([{key: value[:2] for key, value in batches[0].items()}], True),
        ([batches[0], padded], True),
        ([{key: value.flip(0) for key, value in batches[0].items()}], False),
        ([padded], False),
        ([{**batches[0], "labels": batches[0]["labels"].clone().index_fill_(1, torch.tensor(1), 7)}], False),
    ]
    with counted(model) as calls:
        for number, (data, seen) in enumerate(cases):
            calls.clear()
            fk.estimate(model, data, prepared=prepared)
            assert len(calls) == len(data) + (0 if seen else 3), number


def test_type_2_is_planned_by_a_position_at_which_attention_has_a_choice():
    """At the first position queries and keys get no gradient, which would say nothing of whose their rows are."""
    model = zoo.llama(vocab_size=9).model
    model.set_attn_implementation("eager")
    ids = torch.arange(8).view(2, 4)
    batches = [{"input_ids": ids, "labels": ids.where(ids != 7, -100)}]  # the last label is one example's alone
    fresh = fk.estimate(model, batches, fk.DiagonalFisher("type-2"))
    assert {covered.path for covered in fresh.coverage.values()} == {"fused"}
    prepared = fk.prepare(model, batches[0], fk.DiagonalFisher("type-2"))
    with counted(model) as calls:
        assert alike(fk.estimate(model, batches, prepared=prepared), fresh)
    assert len(calls) == 1


def test_values_that_cannot_be_compared_count_as_other_data():
    class Tag:
        pass

    model = nn.Linear(4, 3)
    batch = {"x": torch.randn(3, 4), "y": torch.tensor([0, 1, 2]), "tags": [Tag(), Tag(), Tag()], "words": ["a"] * 3}
    del batch["tags"]

    def losses(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    for tags, runs in ((None, 1), ([Tag(), Tag(), Tag()], 4)):
        data = batch if tags is None else {**batch, "tags": tags}
        prepared = fk.prepare(model, data, likelihood=losses)
        with counted(model) as calls:
            fk.estimate(model, [data], prepared=prepared)
        assert len(calls) == runs


def test_only_the_first_batch_decides_whether_data_are_seen():
    model, batches = zoo.llama().model, text(3, 2)
    prepared = fk.prepare(model, batches[0])
    fk.estimate(model, [batches[0], *text(4, 4, 4)[1:]], prepared=prepared)
    with counted(model) as calls:
        fk.estimate(model, [batches[0], *text(2, 3, 1)[1:]], prepared=prepared)
    assert len(calls) == 3


def test_batches_of_one_have_a_plan_of_their_own():
    model, (alone, several) = zoo.llama().model, text(1, 3)
    prepared = fk.prepare(model, alone)
    data = [alone, several, alone]
    assert alike(fk.estimate(model, data, prepared=prepared), fk.estimate(model, data))
    with counted(model) as calls:
        train(model)
        reading = fk.estimate(model, data, prepared=prepared)
        assert len(calls) == 3
    assert alike(reading, fk.estimate(model, data))


def switched(model: nn.Module) -> None:
    model.set_adapter("other")


def disabled(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def merged(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.merge()


def frozen(model: nn.Module) -> None:
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)


def replaced(model: nn.Module) -> None:
    layer = model.base_model.model.model.layers[0]
    layer.mlp.gate_proj = copy.deepcopy(layer.mlp.gate_proj)


def half(model: nn.Module) -> None:
    model.base_model.model.model.norm.bfloat16()


def untied(model: nn.Module) -> None:
    model.base_model.model.lm_head.weight = nn.Parameter(model.base_model.model.lm_head.weight.detach().clone())


def grown(model: nn.Module) -> None:
    head = model.base_model.model.lm_head
    head.weight.data = torch.cat([head.weight.data, head.weight.data[:1]])


def configured(model: nn.Module) -> None:
    model.config.rms_norm_eps = 0.5


def hooked(model: nn.Module) -> None:
    model.base_model.model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)


def gradient_hooked(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.register_hook(lambda grad: grad)


def patched(model: nn.Module) -> None:
    norm = model.base_model.model.model.norm
    norm.forward = lambda x: x


def checkpointed(model: nn.Module) -> None:
    for layer in model.base_model.model.model.layers:
        layer.gradient_checkpointing = True


def added(model: nn.Module) -> None:
    model.base_model.model.model.norm.register_parameter("shift", nn.Parameter(torch.zeros(24)))


Q = r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj"
CHANGES = {
    "the adapter": (switched, r"active_adapter of the model was default and is other"),
    "adapters off": (disabled, rf"disable_adapters of {Q} was False and is True"),
    "adapter merged": (merged, rf"merged_adapters of {Q} was \(\) and is \('default',\)"),
    "trainability": (frozen, r"requires_grad of \S+layers\.1\.self_attn\.q_proj\.lora_A\.default\.weight was True and"),
    "a module": (replaced, r"the module \S+layers\.0\.mlp\.gate_proj was Linear and is another Linear"),
    "a dtype": (half, r"the dtype of \S+\.norm\.weight was float32 and is bfloat16"),
    "a tie": (untied, r"the tensor of \S+lm_head\.weight was that of \S+embed_tokens\.weight and is its own"),
    "a shape": (grown, r"the shape of \S+embed_tokens\.weight was \[41, 24\] and is \[42, 24\]"),
    "the config": (configured, r"the config's rms_norm_eps was 1e-06 and is 0\.5"),
    "a hook": (hooked, r"the hooks on \S+model\.norm was absent and is hooked"),
    "a hook on a gradient": (gradient_hooked, r"the hooks on the gradient of \S+lora_B\S+ was absent and is gradient_"),
    "a forward": (patched, r"the forward method of \S+\.norm was LlamaRMSNorm\.forward and is patched"),
    "checkpointing": (checkpointed, r"the activation checkpointing of \S+layers\.0 was absent and is on"),
    "a parameter": (added, r"the parameter \S+norm\.shift was absent and is Parameter"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_is_refused_by_name(change):
    changed, message = CHANGES[change]
    model, batches = with_lora(zoo.llama(tie_word_embeddings=True).model), text(3, 2)
    model.add_adapter("other", model.peft_config["default"])
    prepared = fk.prepare(model, batches[0])
    fk.estimate(model, batches, prepared=prepared)
    changed(model)
    with pytest.raises(ValueError, match=rf"(?s)prepared for something else: .*{message}.*fishkern\.prepare\("):
        fk.estimate(model, batches, prepared=prepared)


def test_another_model_is_refused_and_the_old_one_still_read():
    model, batches = zoo.llama().model, text(3)
    prepared = fk.prepare(model, batches[0])
    with pytest.raises(ValueError, match=r"the module the model was LlamaForCausalLM and is another LlamaForCausalLM"):
        fk.estimate(copy.deepcopy(model), batches, prepared=prepared)
    model.model.norm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad of model\.norm\.weight was True and is False"):
        fk.estimate(model, batches, prepared=prepared)
    model.model.norm.requires_grad_(True)
    assert alike(fk.estimate(model, batches, prepared=prepared), fk.estimate(model, batches))


def test_an_attention_implementation_inside_the_config_is_noticed():
    transformers = pytest.importorskip("transformers")

    class Holding(nn.Linear):
        """Its config holds another, as those of models of images and text do."""

        config = transformers.LlavaConfig(text_config=zoo.llama().model.config)

    def losses(model, batch):
        return model(batch["x"]).square().sum(1)

    model, batch = Holding(3, 2), {"x": torch.randn(3, 3)}
    model.config.text_config._attn_implementation = "sdpa"
    prepared = fk.prepare(model, batch, likelihood=losses)
    fk.estimate(model, [batch], prepared=prepared)
    model.config.text_config._attn_implementation = "eager"
    with pytest.raises(ValueError, match=r"the config's text_config\._attn_implementation was 'sdpa' and is 'eager'"):
        fk.estimate(model, [batch], prepared=prepared)


def without(batch: dict, key: str) -> dict:
    return {name: value for name, value in batch.items() if name != key}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda batch: without(batch, "attention_mask"),
            "'attention_mask' was a tensor of int64 with 2 axes and is abs",
        ),
        (lambda batch: {**batch, "extra": None}, "the entry 'extra' was absent and is None"),
        (lambda batch: {**batch, "labels": batch["labels"].int()}, "'labels' was a tensor of int64 .* and is .*int32"),
        (lambda batch: {**batch, "attention_mask": batch["attention_mask"][:, None]}, "'attention_mask' was .*3 axes"),
    ],
    ids=["a key less", "a key more", "a dtype", "an axis"],
)
def test_a_batch_of_another_structure_is_refused_by_name(change, message):
    model, batches = zoo.llama().model, text(3, 2)
    prepared = fk.prepare(model, batches[0])
    with pytest.raises(ValueError, match=f"prepared for something else: .*{message}"):
        fk.estimate(model, [change(batches[0])], prepared=prepared)


def test_the_structure_of_nested_batches_has_no_sizes():
    model = nn.Linear(4, 3)

    def data(N: int, **more) -> dict:
        boxes = [{"box": torch.zeros(n + 1, 4)} for n in range(N)]
        return {"x": torch.randn(N, 4), "more": ({"y": torch.arange(N) % 3},), "boxes": boxes, "scale": 1.0, **more}

    def losses(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["more"][0]["y"], reduction="none")

    prepared = fk.prepare(model, data(3), likelihood=losses)
    assert fk.estimate(model, [data(5), data(2)], prepared=prepared).count == 7
    with pytest.raises(ValueError, match=r"'boxes' was a list of a tensor of float32 with 2 axes box and is a list of"):
        fk.estimate(model, [data(2, boxes=[{"mask": torch.zeros(3)}] * 2)], prepared=prepared)
    with pytest.raises(ValueError, match=r"'more\.0\.y' was a tensor of int64 .* and is absent; .*'more\.0\.z'"):
        fk.estimate(model, [data(2, more=({"z": torch.zeros(2)},))], prepared=prepared)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"estimator": fk.GroupFisher()}, "the argument estimator was DiagonalFisher .* and is GroupFisher"),
        ({"estimator": fk.DiagonalFisher("mc")}, "'fisher_type': 'empirical'.* and is .*'mc'"),
        ({"likelihood": fk.CausalLM("sum")}, r"the argument likelihood was None and is CausalLM\(reduction='sum'\)"),
        ({"parameters": "*norm*"}, r"the estimate of model\.embed_tokens\.weight was asked for and is left out"),
        ({"shared": "labels"}, "the argument shared was None and is labels"),
    ],
    ids=["estimator", "definition", "likelihood", "parameters", "shared"],
)
def test_another_request_is_refused_by_name(options, message):
    model, batches = zoo.llama().model, text(3)
    prepared = fk.prepare(model, batches[0])
    with pytest.raises(ValueError, match=message):
        fk.estimate(model, batches, prepared=prepared, **options)


def test_the_same_request_in_other_words_is_read():
    model, batches = zoo.llama().model, text(3)
    prepared = fk.prepare(model, batches[0])
    expected = fk.estimate(model, batches)
    words = dict(estimator=fk.DiagonalFisher(), likelihood=fk.CausalLM(), parameters="all")
    reading = fk.estimate(model, batches, prepared=prepared, **words)
    torch.testing.assert_close(reading["lm_head.weight"], expected["lm_head.weight"], rtol=1e-4, atol=1e-9)
    assert fk.estimate(model, batches, prepared=prepared, max_examples=2).count == 2


def test_the_seed_may_change_from_reading_to_reading():
    model, batches = zoo.llama().model, text(3)
    recipes = [fk.DiagonalFisher("mc", seed=seed) for seed in range(2)]
    prepared = fk.prepare(model, batches[0], recipes[0])
    readings = [fk.estimate(model, batches, recipe, prepared=prepared) for recipe in recipes]
    assert all(alike(one, fk.estimate(model, batches, recipe)) for one, recipe in zip(readings, recipes, strict=True))
    assert readings[0] != readings[1]


def test_layers_per_pass_belongs_to_the_request():
    model, batches = zoo.llama().model, text(3)
    prepared = fk.prepare(model, batches[0], fk.DirectionEnergy(layers_per_pass=1))
    with pytest.raises(ValueError, match=r"the estimate of \S+ was asked for, in pass 1 of \d and is asked for"):
        fk.estimate(model, batches, fk.DirectionEnergy(), prepared=prepared)


def hooks_of(model: nn.Module) -> list[int]:
    modules = [len(getattr(module, kind)) for module in model.modules() for kind in HOOKS]
    parameters = [
        len(hooks or ())
        for one in model.parameters()
        for hooks in (one._backward_hooks, one._post_accumulate_grad_hooks)
    ]
    return modules + parameters


def alive() -> dict[int, weakref.ref]:
    """All tensors that Python can reach, without keeping them."""
    gc.collect()
    return {id(one): weakref.ref(one) for one in gc.get_objects() if issubclass(type(one), torch.Tensor)}


def shapes_of_new(before: dict[int, weakref.ref]) -> list[torch.Size]:
    """Of the tensors that are alive now and were not before; other tests' may be gone meanwhile."""
    now = alive()
    return [one().shape for place, one in now.items() if place not in before or before[place]() is not one()]


@pytest.mark.parametrize("kind", ["empirical", "directions", "sketched"])
def test_nothing_is_held_between_calls_but_the_model(kind):
    """No hook, no gradient, and no tensor: neither of a batch, nor of activations, nor an accumulator."""
    model, batches = zoo.llama().model, text(3, 2)
    fk.estimate(model, batches, ESTIMATORS[kind])  # what torch itself keeps from a first run
    batches = text(3, 2)
    references = [weakref.ref(value) for batch in batches for value in batch.values()]
    tensors = alive()
    before = hooks_of(model)
    prepared = fk.prepare(model, batches[0], ESTIMATORS[kind])
    assert hooks_of(model) == before
    fk.estimate(model, batches, prepared=prepared)
    assert hooks_of(model) == before
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert shapes_of_new(tensors) == []
    del batches
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_after_an_exception_it_reads_as_before():
    model, batches = zoo.llama().model, text(3, 2)
    prepared = fk.prepare(model, batches[0])

    def failing():
        yield batches[0]
        raise KeyboardInterrupt

    before = hooks_of(model)
    with pytest.raises(KeyboardInterrupt):
        fk.estimate(model, failing(), prepared=prepared)
    assert hooks_of(model) == before
    assert alike(fk.estimate(model, batches, prepared=prepared), fk.estimate(model, batches))


@pytest.mark.parametrize("kind, reentrant", [("empirical", True), ("empirical", False), ("sketched", True)])
def test_training_and_evaluation_mode_alternate(kind, reentrant):
    """transformers checkpoints in training mode alone, where no gradient enters a segment by itself."""
    model, batches = zoo.llama().model, text(3, 2)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args, **kwargs: torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=reentrant, **kwargs
        )
    prepared = fk.prepare(model.eval(), batches[0], ESTIMATORS[kind])
    for training in (True, False, True):
        train(model.train(training))
        assert alike(fk.estimate(model, batches, prepared=prepared), fk.estimate(model, batches, ESTIMATORS[kind]))
        assert model.training == training


class Checkpointed(nn.Module):
    """A module of one's own that checkpoints, whose segments no embedding connects."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        if bool((x > 1000).any()):
            return self.last(self._body(x))
        return self.last(torch.utils.checkpoint.checkpoint(self._body, x, use_reentrant=True))

    def _body(self, x):
        return self.second(x).tanh()


@pytest.mark.parametrize("kind", ["empirical", "sketched", "batch"])
def test_reentrant_segments_are_connected_from_the_first_batch_on(kind):
    model = Checkpointed()
    batches = [(torch.randn(3, 4), torch.tensor([0, 1, 2])), (torch.randn(2, 4), torch.tensor([2, 1]))]
    options = dict(likelihood=fk.Classification(), parameters="second.*")
    prepared = fk.prepare(model, batches[0], ESTIMATORS[kind], **options)
    with counted(model) as calls:
        reading = fk.estimate(model, batches, prepared=prepared)
        assert len(calls) == 2
    assert reading["second.weight"].any()
    assert alike(reading, fk.estimate(model, batches, ESTIMATORS[kind], **options))


def test_segments_of_a_pass_that_failed_are_connected_in_the_next_one():
    model, labels = Checkpointed(), torch.tensor([0, 1, 2])
    without, within = (1e5 * torch.ones(3, 4), labels), (torch.randn(3, 4), labels)
    model.first.weight.data.abs_()
    options = dict(likelihood=fk.Classification(), parameters="second.*")
    prepared = fk.prepare(model, without, **options)

    def interrupted():
        yield within
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fk.estimate(model, interrupted(), prepared=prepared)
    reading = fk.estimate(model, [within], prepared=prepared)
    assert reading["second.weight"].any()
    assert alike(reading, fk.estimate(model, [within], **options))


def test_slow_paths_are_announced_once():
    """The prompts of prompt tuning take the loop, the positions of a ViT the generic path."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model, batches = peft.get_peft_model(zoo.llama().model, config), text(3, 2)
    with pytest.warns(UserWarning, match="slow exact path"):
        prepared = fk.prepare(model, batches[0])
    assert set(prepared.paths.values()) == {"loop"}
    train(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = fk.estimate(model, batches, prepared=prepared)
    with pytest.warns(UserWarning, match="slow exact path"):
        assert alike(reading, fk.estimate(model, batches))
    specimen = zoo.vit()
    images = [specimen.batch(3), specimen.batch(2)]
    prepared = fk.prepare(specimen.model, images[0])
    assert "generic" in prepared.paths.values()
    train(specimen.model)
    assert alike(fk.estimate(specimen.model, images, prepared=prepared), fk.estimate(specimen.model, images))


def test_A_of_a_lora_is_looked_at_when_B_leaves_zero():
    """At ``B = 0`` no gradient shows whose rows those of ``A`` are; the first reading away from it shows it for all."""
    model, batches = with_lora(), text(3, 2)
    prepared = fk.prepare(model, batches[0])
    with counted(model) as calls:
        assert alike(fk.estimate(model, batches, prepared=prepared), fk.estimate(model, batches))
        for runs in ("more", 2, 2):
            train(model)
            calls.clear()
            reading = fk.estimate(model, batches, prepared=prepared)
            assert len(calls) == runs or (runs == "more" and len(calls) > 2)
            assert alike(reading, fk.estimate(model, batches))
            assert any(reading[name].any() for name in reading if "lora_A" in name)


class Bypassed(nn.Module):
    """``down`` is used past its call, behind an ``up`` that is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down, self.up = nn.Linear(4, 3), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.head(x) + self.up(self.down(x) + x.square() @ self.down.weight.T)


def test_what_the_comparison_with_autograd_could_not_see_is_compared_later():
    model, batch = Bypassed(), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    prepared = fk.prepare(model, batch, likelihood=fk.Classification())
    train(model)
    with pytest.warns(UserWarning, match=r"slow exact path.*down\.weight: ordinary autograd disagrees"):
        reading = fk.estimate(model, [batch], prepared=prepared)
    truth = torch.zeros_like(model.down.weight)
    for x, y in zip(*batch, strict=True):
        truth += torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), model.down.weight)[0].square() / 3
    torch.testing.assert_close(reading["down.weight"], truth)
    other = (torch.randn(2, 4), torch.tensor([0, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was found out holds on other data as well
        assert fk.estimate(model, [other], prepared=prepared).coverage["down.weight"].path == "loop"


class Branching(nn.Module):
    """The second half runs only on inputs that ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = self.first(x)
        return y + self.second(x) if bool((x > 100).any()) else y


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_data_that_need_another_plan_get_it():
    """And those seen before get theirs back."""
    model, labels = Branching(), torch.tensor([0, 1, 2])
    one, both = (torch.randn(3, 4), labels), (torch.randn(3, 4).index_fill_(1, torch.tensor(2), 200.0), labels)
    options = dict(likelihood=fk.Classification())
    prepared = fk.prepare(model, one, **options)
    for batch in (both, one, both, one):
        train(model)
        reading = fk.estimate(model, [batch], prepared=prepared)
        assert alike(reading, fk.estimate(model, [batch], **options))
        assert reading["second.weight"].any() == (batch is both)


class BranchingPast(Branching):
    def forward(self, x):
        y = super().forward(x)
        return y + x.square() @ self.second.weight.T if bool((x > 100).any()) else y


@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_what_other_data_reach_first_is_compared_with_autograd():
    model, labels = BranchingPast(), torch.tensor([0, 1, 2])
    x = torch.randn(3, 4)
    prepared = fk.prepare(model, (x, labels), likelihood=fk.Classification())
    train(model)
    for reach in range(3):
        with torch.no_grad():
            model.second.weight.mul_(1e-4)  # large inputs, and yet a loss with a gradient
            model.first.weight.mul_(1e-2)
        batch = (x.index_fill(1, torch.tensor(reach), 200.0), labels)
        reading = fk.estimate(model, [batch], prepared=prepared)
        truth = torch.zeros_like(model.second.weight)
        for row, label in zip(*batch, strict=True):
            loss = F.cross_entropy(model(row[None]), label[None])
            truth += torch.autograd.grad(loss, model.second.weight)[0].square() / 3
        torch.testing.assert_close(reading["second.weight"], truth)


class Meeting(nn.Module):
    """Examples see each other where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0) if bool((x > 100).any()) else x)


@pytest.mark.parametrize("kind", ["empirical", "sketched"])
def test_examples_that_meet_in_other_data_are_refused(kind):
    model, labels = Meeting(), torch.tensor([0, 1, 2])
    apart, meeting = (torch.randn(3, 4), labels), (torch.randn(3, 4).index_fill_(1, torch.tensor(2), 200.0), labels)
    prepared = fk.prepare(model, apart, ESTIMATORS[kind], likelihood=fk.Classification())
    for _ in range(2):
        with pytest.raises(ValueError, match="see each other"):
            fk.estimate(model, [meeting], prepared=prepared)
    assert fk.estimate(model, [apart], prepared=prepared).count == 3


def test_losses_of_a_function():
    model, batch = nn.Linear(4, 3), (torch.randn(3, 4), torch.tensor([0, 1, 2]))

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def noisy(model, batch, draws):
        return F.cross_entropy(model(batch[0] + draws.randn(4)), batch[1], reduction="none")

    for likelihood in (losses, fk.Drawn(noisy, seed=1)):
        prepared = fk.prepare(model, batch, likelihood=likelihood)
        train(model)
        fresh = fk.estimate(model, [batch], likelihood=likelihood)
        assert alike(fk.estimate(model, [batch], prepared=prepared), fresh)
        assert alike(fk.estimate(model, [batch], likelihood=likelihood, prepared=prepared), fresh)
        with pytest.raises(ValueError, match=r"the argument likelihood was function \S+.* and is function \S+<lam"):
            fk.estimate(model, [batch], likelihood=lambda model, batch: 0, prepared=prepared)


def test_a_mean_over_a_batch_of_one_is_read_by_the_batches_of_the_reading():
    model, batch = nn.Linear(4, 3), (torch.randn(3, 4), torch.tensor([0, 1, 2]))

    def mean(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def squeezed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none").squeeze()

    one = (batch[0][:1], batch[1][:1])
    for likelihood in (mean, squeezed):
        prepared = fk.prepare(model, one, likelihood=likelihood)
        assert fk.estimate(model, [one, one], prepared=prepared).count == 2
        with pytest.raises(ValueError, match="one loss for each example"):
            fk.estimate(model, [batch], prepared=prepared)


def test_random_losses_of_a_batch_draw_as_in_a_fresh_pass():
    """What runs before the first batch moves no stream on."""
    model = nn.Sequential(nn.Linear(4, 3))
    batches = [(torch.randn(3, 4), torch.tensor([0, 1, 2])), (torch.randn(2, 4), torch.tensor([0, 1]))]

    def noisy(model, batch):
        return F.cross_entropy(model(batch[0] + torch.randn_like(batch[0])), batch[1], reduction="none")

    recipe = fk.DiagonalFisher(unit="batch")
    prepared = fk.prepare(model, batches[0], recipe, likelihood=noisy)
    assert alike(fk.estimate(model, batches, prepared=prepared), fk.estimate(model, batches, recipe, likelihood=noisy))


def test_what_training_and_saving_leave_behind_is_no_change(tmp_path):
    model, batch = zoo.bert_classifier().model, zoo.class_batch(3, 5)
    prepared = fk.prepare(model, batch)
    model.train()
    model(**batch).loss.backward()  # the model settles its problem_type
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model.save_pretrained(tmp_path)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model.config.use_cache = False
    assert model.config.problem_type is not None
    assert alike(fk.estimate(model, [batch], prepared=prepared), fk.estimate(model, [batch]))


def test_it_says_what_it_is_and_is_not_copied():
    model, batch = zoo.llama().model, zoo.text_batch(3, 5)
    prepared = fk.prepare(model, batch, fk.GroupFisher(), check=False)
    assert repr(prepared) == "Prepared(GroupFisher, 21 parameters: 21 fused)"
    assert (prepared.estimator, prepared.checked) == (fk.GroupFisher(), False)
    assert prepared.parameters == [name for name, _ in model.named_parameters()]
    reading = fk.estimate(model, [batch], prepared=prepared)
    assert alike(reading, fk.estimate(model, [batch], fk.GroupFisher(), check=False))
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"neither pickled nor copied: call fishkern\.prepare"):
            copied(prepared)


def test_what_is_no_batch_or_no_prepared_pass_is_refused():
    model, batch = zoo.llama().model, zoo.text_batch(3, 5)
    loader = torch.utils.data.DataLoader([{key: value[0] for key, value in batch.items()}])
    with pytest.raises(TypeError, match=r"takes one batch, got a DataLoader: pass its first one, next\(iter"):
        fk.prepare(model, loader)
    with pytest.raises(TypeError, match=r"takes one batch, got a list: pass its first one, next\(iter"):
        fk.prepare(model, [batch, batch])
    with pytest.raises(TypeError, match=r"prepared must come from fishkern\.prepare"):
        fk.estimate(model, [batch], prepared=True)
