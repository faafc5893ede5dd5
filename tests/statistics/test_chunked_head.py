"""Logits in chunks: the same statistics as from logits as a whole, and never more of them in memory than the limit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fishkern as fk
from fishkern.hosts import heads
from fishkern.layers import capture, parts
from fishkern.layers.uses import Uses
from fishkern.statistics import head_logits
from fishkern.statistics.checkpoint import Checkpoint
from tests.models import test_packed as rows
from tests.models.test_quantized import Packed
from tests.support import zoo
from tests.support.oracle import next_token, per_token, squares_one_by_one, worst_error

transformers = pytest.importorskip("transformers")

# the self-check would mend a chunk that is wrong by the loop, and the result would be right all the same
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("error:.*take the slow exact path")]

N, T, V = 5, 7, zoo.V
POSITION = V * 8  # bytes of the logits of one position in float64
LIMITS = {"three positions": 3 * POSITION, "two examples": 2 * T * POSITION}
EXACT = 1e-10
ROUNDED = {"gemma": 1e-6, "gemma2": 1e-6, "cohere": 1e-6}  # they compute their norms in float32


class Wide(fk.DiagonalFisher):
    """The same sums, as they are: statistics are float32. Says how the logits were formed."""

    def result(self, state, count):
        return state / count

    def collect(self, model, results, **described):
        object.__setattr__(self, "logits", described["provenance"]["runs"][0].get("logits", ""))
        return results


def whole() -> fk.CausalLM:
    return fk.CausalLM(logits_bytes=None)


def small(**changes) -> dict:
    sizes = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    return {**sizes, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**small(head_dim=8), final_logit_softcapping=0.2)
    return transformers.Gemma2ForCausalLM(config)


def granite() -> nn.Module:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**small(), logits_scaling=4.0))


def cohere() -> nn.Module:
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.CohereForCausalLM(transformers.CohereConfig(**small(), **special, logit_scale=0.25))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: zoo.llama().model,
    "llama, tied": lambda: zoo.llama(tie_word_embeddings=True).model,
    "gpt2, tied": lambda: zoo.gpt2().model,
    "gemma, tied": lambda: zoo.gemma().model,
    "gemma2, a bound": gemma2,
    "granite, a divisor": granite,
    "cohere, a factor": cohere,
}


def made(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().to(dtype).eval()


def worst(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return worst_error(actual, {name: value.double() for name, value in truth.items()})[0]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_loop_and_whole_logits(family, limit):
    model, batch = made(family), zoo.text_batch(N, T)
    chunked, plain = Wide(), Wide()
    found = fk.estimate(model, [batch], chunked, likelihood=fk.CausalLM(logits_bytes=LIMITS[limit]))
    assert chunked.logits == f"in chunks of {LIMITS[limit]} bytes"
    allowed = ROUNDED.get(family.partition(",")[0], EXACT)
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < allowed
    assert worst(found, fk.estimate(model, [batch], plain, likelihood=whole())) < allowed
    assert plain.logits == ""


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
@pytest.mark.parametrize(
    "estimator",
    [Wide("mc", mc_samples=2), Wide("type-2", max_label_passes=V * T), Wide(unit="position"), Wide(unit="batch")],
    ids=lambda one: f"{one.fisher_type}, {one.unit}",
)
def test_other_fishers(family, estimator):
    model, batch = made(family), zoo.text_batch(2, 3)
    truth = fk.estimate(model, [batch], copy.copy(estimator), likelihood=whole())
    found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=5 * POSITION))
    as_one = estimator.unit == "position" and family == "llama, tied"
    assert estimator.logits.startswith("whole: model.embed_tokens.weight is used elsewhere" if as_one else "in chunks")
    assert worst(found, truth) < EXACT


def test_float32_and_the_default_limit():
    """The default leaves small logits whole; with a limit the results differ by rounding."""
    model, batch = made("llama", torch.float32), zoo.text_batch(N, T)
    plain = fk.estimate(model, [batch])
    chunked = fk.estimate(model, [batch], likelihood=fk.CausalLM(logits_bytes=400))
    assert "logits" not in plain.provenance["runs"][0]
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-4, atol=1e-6 * value.max().item())
    assert fk.merge(plain, chunked).count == 2 * N  # the same quantity


def test_bfloat16_stays_within_its_noise():
    batch = zoo.text_batch(N, T)
    truth = squares_one_by_one(made("llama"), [batch], next_token)
    errors = {}
    for limit in (None, 3 * V * 4):
        found = fk.estimate(made("llama").bfloat16(), [batch], likelihood=fk.CausalLM(logits_bytes=limit))
        errors[limit] = {n: ((found[n] - truth[n]).norm() / truth[n].norm()).item() for n in truth}
    for name, error in errors[3 * V * 4].items():
        assert error < 1.5 * errors[None][name] + 0.01, name


def test_autocast_holds_in_backward_too():
    model, batch = made("llama", torch.float32), zoo.text_batch(N, T)
    found = []
    for limit in (None, 4 * V * 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(fk.estimate(model, [batch], likelihood=fk.CausalLM(logits_bytes=limit)))
    plain, chunked = found
    for name, value in plain.items():
        assert (chunked[name] - value).norm() < 0.03 * value.norm(), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_activation_checkpointing(family, reentrant):
    model, batch = made(family), zoo.text_batch(N, T)
    truth = squares_one_by_one(model, [batch], next_token)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    estimator = Wide()
    found = fk.estimate(model.train(), [batch], estimator, likelihood=fk.CausalLM(logits_bytes=9 * POSITION))
    assert estimator.logits.startswith("in chunks")
    assert worst(found, truth) < EXACT


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("several", [False, True], ids=["one row", "several rows"])
@pytest.mark.parametrize("limit", [POSITION, 12 * POSITION])
def test_packed_rows(family, several, limit):
    model, docs = rows.made(family), rows.documents()
    batch = rows.in_rows(docs, rows.ROWS) if several else rows.flat(docs)
    estimator = Wide()
    found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=limit))
    assert estimator.logits == f"in chunks of {limit} bytes"
    assert rows.worst(found, rows.alone(model, docs)) < EXACT


@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
def test_packed_rows_of_other_fishers(fisher_type):
    model, batch = rows.made("llama"), rows.flat(rows.documents((3, 2, 2)))
    estimator = Wide(fisher_type, max_label_passes=10**4)
    truth = fk.estimate(model, [batch], copy.copy(estimator), likelihood=whole())
    found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=3 * POSITION))
    assert estimator.logits.startswith("in chunks")
    assert worst(found, truth) < EXACT


@pytest.mark.parametrize("make", [zoo.bert, zoo.modernbert], ids=["bert", "modernbert"])
def test_masked_language_models(make):
    """Few positions have a label, and the others need no logits."""
    torch.manual_seed(0)
    specimen, estimator = make(), Wide()
    model, batch = specimen.model.double(), specimen.batch(N, T)
    found = fk.estimate(model, [batch], estimator, likelihood=fk.MaskedLM(logits_bytes=4 * POSITION))
    assert estimator.logits.startswith("in chunks")
    assert worst(found, squares_one_by_one(model, [batch], per_token)) < EXACT


def adapted(targets: list[str] | str, family: str = "llama", **options) -> nn.Module:
    import peft

    model = made(family)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


ADAPTED = {
    "layers alone": lambda: adapted(["q_proj", "v_proj"]),
    "layers alone, tied": lambda: adapted(["q_proj", "v_proj"], "llama, tied"),
    "the head too": lambda: adapted(["q_proj", "lm_head"]),
    "the head too, DoRA": lambda: adapted(["q_proj", "lm_head"], use_dora=True),
    "a trained head": lambda: adapted(["q_proj"], modules_to_save=["lm_head"]),
    "some tokens": lambda: adapted(["q_proj"], "llama, tied", trainable_token_indices=[3, 5, 7]),
}


@pytest.mark.parametrize("which", ADAPTED)
def test_adapters(which):
    pytest.importorskip("peft")
    model, batch, estimator = ADAPTED[which](), zoo.text_batch(N, T), Wide()
    slow = pytest.warns(UserWarning, match="take the slow exact path") if which == "some tokens" else nullcontext()
    with slow:
        found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=15 * POSITION))
    assert estimator.logits.startswith("in chunks")
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < EXACT


@contextmanager
def largest_logits(model: nn.Module):
    """The most positions of which logits were in one tensor."""
    most = [0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                of_classes = isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[-1] == V
                of_classes = of_classes and leaf.shape[-2] != model.config.hidden_size  # a gradient of the weight
                if of_classes and leaf.untyped_storage().data_ptr() not in weights and leaf.is_floating_point():
                    most[0] = max(most[0], leaf.numel() // V)
            return out

    with Watching():
        yield most


@pytest.mark.parametrize(
    ("parameters", "limit", "most"),
    [("*proj*", 3, T), ("*proj*", T, T), ("*", 3, 2 * T), ("*", 2 * T, 2 * T)],
    ids=["layers", "layers, an example", "all", "all, two examples"],
)
def test_no_more_logits_than_said(parameters, limit, most):
    """One example's in the comparison with the model's own loss; two where the survey looks at the head itself."""
    model, batch = made("llama"), zoo.text_batch(N, T)
    with largest_logits(model) as seen:
        likelihood = fk.CausalLM(logits_bytes=limit * POSITION)
        fk.estimate(model, [batch], Wide(), parameters=parameters, likelihood=likelihood)
    assert seen[0] == most
    with largest_logits(model) as seen:
        fk.estimate(model, [batch], Wide(), parameters=parameters, likelihood=whole())
    assert seen[0] == (N - 2) * T  # two examples were taken before


def test_positions_without_a_label_are_not_computed():
    model, batch = made("llama"), zoo.text_batch(N, T)
    batch["labels"][:, 3:] = -100
    rows_of_head = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows_of_head.append(output.shape[:2].numel()))
    likelihood = fk.CausalLM(logits_bytes=12 * POSITION)
    fk.estimate(model, [batch], Wide(), parameters="*q_proj*", likelihood=likelihood, check=False)
    assert rows_of_head[-1] == int((batch["labels"][:, 1:] != -100).sum()) < N * T


def numbers(values: object) -> list[Tensor]:
    """The tensors of one entry of a statistic, whatever it is made of."""
    parts = [values] if isinstance(values, Tensor) else vars(values) if hasattr(values, "__dict__") else values
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
@pytest.mark.parametrize(
    "estimator",
    [fk.SketchedFisher(draws=3), fk.GroupFisher(by="row"), fk.DiagonalKronecker(), fk.DirectionEnergy()],
    ids=lambda one: type(one).__name__,
)
def test_every_statistic(estimator, family):
    model, batch = made(family), zoo.text_batch(N, T)
    likelihood = fk.CausalLM(logits_bytes=9 * POSITION)
    found = fk.estimate(model, [batch], estimator, likelihood=likelihood)
    truth = fk.estimate(model, [batch], estimator, likelihood=whole())
    tied = isinstance(estimator, fk.DiagonalKronecker) and family == "llama, tied"
    said = "whole: model.embed_tokens.weight is used elsewhere" if tied else "in chunks of"
    assert found.provenance["runs"][0]["logits"].startswith(said)
    for name in truth:
        for one, other in zip(numbers(found[name]), numbers(truth[name]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_the_survey_of_another_batch_and_a_prepared_pass():
    """Batches above and below the limit in one pass, and many passes after one preparation."""
    model = made("llama, tied")
    batches = [zoo.text_batch(2, 4), zoo.text_batch(N, T, seed=1), zoo.text_batch(1, T, seed=2)]
    likelihood = fk.CausalLM(logits_bytes=9 * POSITION)
    truth = squares_one_by_one(model, batches, next_token)
    assert worst(fk.estimate(model, batches, Wide(), likelihood=likelihood), truth) < EXACT
    prepared = fk.prepare(model, batches[1], Wide(), likelihood=likelihood)
    for _ in range(2):
        assert worst(fk.estimate(model, batches, prepared=prepared), truth) < EXACT


def test_the_model_is_left_as_found():
    model, batch = made("llama"), zoo.text_batch(N, T)
    hooks = [dict(module._forward_pre_hooks) | dict(module._forward_hooks) for module in model.modules()]
    likelihood = fk.CausalLM(logits_bytes=POSITION)
    fk.estimate(model, [batch], likelihood=likelihood)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="the loss of example"):
        fk.estimate(model, [batch], likelihood=likelihood)
    assert [dict(one._forward_pre_hooks) | dict(one._forward_hooks) for one in model.modules()] == hooks
    assert "forward" not in vars(model.lm_head)


def test_hooks_of_the_user_on_the_head_run():
    """One that changes its input and one that changes its output."""
    model, batch = made("llama"), zoo.text_batch(N, T)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    model.lm_head.register_forward_hook(lambda module, args, output: output.clone())
    estimator = Wide()
    found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=9 * POSITION))
    assert estimator.logits.startswith("in chunks")
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < EXACT


@pytest.mark.parametrize("parameters", ["lm_head*", "*norm*", ["*.1.*", "lm_head*"]], ids=str)
def test_some_parameters(parameters):
    """Where only the head is asked for, its input needs no gradient."""
    model, batch, estimator = made("llama"), zoo.text_batch(N, T), Wide()
    options = {"parameters": parameters, "likelihood": fk.CausalLM(logits_bytes=9 * POSITION)}
    found = fk.estimate(model, [batch], estimator, **options)
    assert estimator.logits.startswith("in chunks")
    truth = squares_one_by_one(model, [batch], next_token)
    assert worst(found, {name: truth[name] for name in found}) < EXACT


def test_a_quantised_head():
    """Its weight is no parameter of autograd's: what the module computes is asked of the module."""
    model, batch, estimator = made("llama"), zoo.text_batch(N, T), Wide()
    model.lm_head = Packed(V, 24)
    plain, options = Wide(), {"parameters": "all"}
    truth = fk.estimate(model, [batch], plain, likelihood=whole(), **options)
    found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=9 * POSITION), **options)
    assert estimator.logits.startswith("in chunks")
    assert "lm_head.weight" in found
    assert worst(found, truth) < 1e-6  # sums of a stored weight are float32


def test_prompt_tuning_adds_positions():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch, estimator = peft.get_peft_model(made("llama"), config).double(), zoo.text_batch(N, T), Wide()
    with pytest.warns(UserWarning, match="take the slow exact path"):
        found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=4 * POSITION))
    assert estimator.logits.startswith("in chunks")
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < EXACT


def test_logits_of_some_positions():
    """With ``logits_to_keep`` the head gets the last positions, and the labels are theirs."""
    model, batch, estimator = made("llama"), zoo.text_batch(N, T, low=T), Wide()
    labels = F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    short = {**batch, "logits_to_keep": 3, "shift_labels": labels[:, -3:]}
    found = fk.estimate(model, [short], estimator, likelihood=fk.CausalLM(logits_bytes=4 * POSITION))
    assert estimator.logits.startswith("in chunks")
    earlier = torch.cat([torch.full_like(labels[:, :-3], -100), labels[:, -3:]], dim=1)
    truth = fk.estimate(model, [{**batch, "shift_labels": earlier}], Wide(), likelihood=whole())
    assert worst(found, truth) < EXACT


class Changed(transformers.LlamaForCausalLM):
    """LLaMA that does something else around its head."""

    def __init__(self, config, how: str) -> None:
        super().__init__(config)
        self.how = how
        if how == "scales":
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        if self.how == "transposes":
            hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        logits = self.lm_head(hidden)
        if self.how == "bends":
            logits = logits + 1e-3 * logits.square()
        elif self.how == "scales":
            logits = logits * self.scale
        elif self.how == "calls twice":
            logits = (logits + self.lm_head(hidden)) / 2
        elif self.how == "adds the input":
            logits = logits + self.model.embed_tokens(input_ids).sum(-1, keepdim=True)
        elif self.how == "reads its logits":
            logits.view(input_ids.shape[0], input_ids.shape[1], -1)
        elif self.how == "cuts":
            logits = logits[..., :-1]
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize("parameters", [None, "*proj*"], ids=["all", "layers"])
def test_hidden_states_of_another_layout(parameters):
    torch.manual_seed(0)
    model, batch = Changed(zoo.llama().model.config, "transposes").double().eval(), zoo.text_batch(N, T)
    estimator, likelihood = Wide(), fk.CausalLM(logits_bytes=4 * POSITION)
    found = fk.estimate(model, [batch], estimator, parameters=parameters, likelihood=likelihood)
    assert estimator.logits.startswith("in chunks")
    truth = squares_one_by_one(model, [batch], next_token)
    assert worst(found, {name: truth[name] for name in found}) < EXACT
    sketch = fk.estimate(model, [batch], fk.SketchedFisher(draws=1), likelihood=likelihood)
    plain = fk.estimate(model, [batch], fk.SketchedFisher(draws=1), likelihood=whole())
    torch.testing.assert_close(dict(sketch), dict(plain), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("bends", "between its head and the logits the model computes what is not known (AddBackward0, "),
        ("scales", "between its head and the logits the model computes what is not known (MulBackward0)"),
        ("calls twice", "the model calls its head several times"),
        ("adds the input", "between its head and the logits the model computes what is not known (AddBackward0"),
        ("reads its logits", "the model does not run with the logits of one position (RuntimeError: shape"),
        ("cuts", "the logits are not what the head gives"),
    ],
)
def test_another_way_to_make_logits_is_said_and_exact(how, why):
    torch.manual_seed(0)
    config = zoo.llama().model.config
    model, batch, estimator = Changed(config, how).double().eval(), zoo.text_batch(N, T), Wide()
    batch["labels"] %= V - 1  # one class less where they are cut
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["labels"], -100)
    slow = pytest.warns(UserWarning, match="take the slow exact path") if how == "scales" else nullcontext()
    with slow:
        found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=4 * POSITION))
    assert estimator.logits.startswith(f"whole: {why}")
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < EXACT


def test_a_bound_that_is_not_known_is_not_taken_for_none(monkeypatch):
    """Small logits hardly show it in their values."""
    model, batch, estimator = made("gemma2, a bound"), zoo.text_batch(N, T), Wide()
    model.config.final_logit_softcapping = 30.0
    monkeypatch.setattr(heads, "_BOUNDS", ())
    found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=4 * POSITION))
    assert estimator.logits.startswith("whole: between its head and the logits")
    assert "Tanh" in estimator.logits
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < ROUNDED["gemma2"]


class Fused(transformers.LlamaForCausalLM):
    """As Liger patches it: with labels in training, or with ``skip_logits``, a fused loss and no logits."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, skip_logits=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        if skip_logits and labels is None:
            raise ValueError("skip_logits is True, but labels and shift_labels are None")
        skip_logits = self.training and labels is not None if skip_logits is None else skip_logits
        loss, logits = None, None if skip_logits else self.lm_head(hidden)
        if labels is not None:
            scores = F.linear(hidden, self.lm_head.weight) if skip_logits else logits
            loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("asked", [False, True], ids=["in training", "asked for"])
@pytest.mark.parametrize("limit", [None, 4 * POSITION])
def test_a_fused_loss_that_leaves_the_logits_out(asked, limit):
    torch.manual_seed(0)
    model, batch = Fused(zoo.llama().model.config).double().train(), zoo.text_batch(N, T)
    truth = squares_one_by_one(model, [batch], next_token)
    model.train()
    given = {**batch, "skip_logits": True} if asked else batch
    estimator = Wide()
    found = fk.estimate(model, [given], estimator, likelihood=fk.CausalLM(logits_bytes=limit))
    assert estimator.logits.startswith("in chunks") == (limit is not None)
    assert worst(found, truth) < EXACT


def test_a_likelihood_of_ones_own_gets_its_logits_whole():
    class Tempered(fk.CausalLM):
        def predictive(self, model, batch):
            assert model(input_ids=batch["input_ids"]).logits.shape[1] == batch["input_ids"].shape[1]
            return super().predictive(model, batch)

    estimator = Wide()
    fk.estimate(made("llama"), [zoo.text_batch(N, T)], estimator, likelihood=Tempered(logits_bytes=POSITION))
    assert estimator.logits == ""


@pytest.mark.parametrize("bytes_", [0, -1, 2.5, True])
def test_a_limit_that_is_none(bytes_):
    with pytest.raises((TypeError, ValueError), match="logits_bytes"):
        fk.CausalLM(logits_bytes=bytes_)
    with pytest.raises((TypeError, ValueError), match="logits_bytes"):
        fk.MaskedLM(logits_bytes=bytes_)


@pytest.mark.slow
def test_a_plan_says_which_it_is():
    batch = zoo.text_batch(N, T)
    options = {"parameters": "*q_proj*", "check": False, "likelihood": fk.CausalLM(logits_bytes=4 * POSITION)}
    plan = fk.plan(made("gemma2, a bound"), batch, **options)
    assert plan.logits == f"in chunks of {4 * POSITION} bytes"
    assert f"logits: in chunks of {4 * POSITION} bytes" in str(plan)
    other = Changed(zoo.llama().model.config, "bends").double().eval()
    assert fk.plan(other, batch, **options).logits.startswith("whole: between its head and the logits")
    small = fk.plan(made("llama"), batch, parameters="*q_proj*", check=False)
    assert small.logits == ""
    assert "logits" not in str(small)


def test_a_plan_needs_less_with_chunks():
    ids = torch.randint(20000, (8, 32))
    with torch.device("meta"):
        model = zoo.llama(vocab_size=20000).model
    batch = {"input_ids": ids, "labels": ids}
    peaks = [
        fk.plan(model, batch, parameters="*q_proj*", check=False, likelihood=fk.CausalLM(logits_bytes=limit)).peak_bytes
        for limit in (None, 20000 * 4 * 16)
    ]
    assert peaks[1] < peaks[0] / 4


class OddHead(nn.Module):
    """A head that is more than a product with a weight at each position."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.proj = how, nn.Linear(24, V, bias=False)
        self.by_place = nn.Parameter(torch.randn(T, V)) if how == "a bias of each place" else None
        self.table = nn.Embedding(1, V) if how == "a module called on something else" else None

    def forward(self, hidden):
        if self.how == "a mean over positions":
            return self.proj(hidden - hidden.mean(1, keepdim=True))
        if self.how == "the position before":
            return self.proj(hidden + F.pad(hidden, (0, 0, 1, -1)))
        logits = self.proj(hidden)
        if self.by_place is not None:
            return logits + self.by_place[: hidden.shape[1]]
        return logits if self.table is None else logits + self.table(torch.zeros(hidden.shape[:2], dtype=torch.long))


def with_head(how: str) -> nn.Module:
    model = made("llama")
    torch.manual_seed(1)
    model.lm_head = OddHead(how).double().eval()
    return model


@pytest.mark.parametrize("how", ["a bias of each place", "a mean over positions", "the position before"])
def test_a_head_that_looks_at_places_gets_all_of_them(how):
    """Also where the first example is short enough to be looked at whole."""
    model, batch, estimator = with_head(how), zoo.text_batch(N, T), Wide()
    options = {"parameters": "*q_proj*", "likelihood": fk.CausalLM(logits_bytes=9 * POSITION)}
    found = fk.estimate(model, [batch], estimator, **options)
    assert estimator.logits == "whole: the logits are not what the head gives for each position alone"
    truth = squares_one_by_one(model, [batch], next_token)
    assert worst(found, {name: truth[name] for name in found}) < EXACT


def test_a_module_in_the_head_that_does_not_get_the_hidden_states():
    """No gradient of them passes through it, and the check by autograd is off."""
    model, batch, estimator = with_head("a module called on something else"), zoo.text_batch(N, T), Wide()
    found = fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=9 * POSITION), check=False)
    assert estimator.logits.startswith("in chunks")
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < EXACT


def test_a_gradient_that_is_changed_on_its_way_to_the_head():
    """By a hook on the logits, which leaves no trace in autograd's graph."""

    def halve(module, args, output):
        if output.logits.requires_grad:
            output.logits.register_hook(lambda grad: grad / 2)

    model, batch, estimator = made("llama"), zoo.text_batch(N, T), Wide()
    model.register_forward_hook(halve)
    options = {"likelihood": fk.CausalLM(logits_bytes=9 * POSITION), "check": False}
    found = fk.estimate(model, [batch], estimator, **options)
    assert estimator.logits == "whole: the gradient that arrives at the head is not that of the logits"
    assert worst(found, squares_one_by_one(model, [batch], next_token)) < EXACT


class Tempered(transformers.LlamaForCausalLM):
    """Divides its logits where the batch says so."""

    def forward(self, input_ids=None, attention_mask=None, temperature=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0])
        logits = logits if temperature is None else logits / temperature[:, None, None]
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_logits_that_a_later_batch_changes_are_refused():
    torch.manual_seed(0)
    model = Tempered(zoo.llama().model.config).double().eval()
    batches = [zoo.text_batch(N, T), {**zoo.text_batch(N, T, seed=1), "temperature": torch.full((N,), 2.0).double()}]
    options = {"parameters": "*q_proj*", "likelihood": fk.CausalLM(logits_bytes=9 * POSITION)}
    with pytest.raises(ValueError, match="changes its logits, otherwise than on the first example"):
        fk.estimate(model, batches, Wide(), **options)


@pytest.mark.parametrize("limit", [None, 9 * POSITION], ids=["whole", "in chunks"])
@pytest.mark.parametrize("parameters", ["*q_proj*lora*", None], ids=["layers", "all"])
def test_an_adapter_for_each_row(parameters, limit):
    """PEFT puts hooks on the layers for the time of the call, and the first two rows take the active adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(made("llama"), config, adapter_name="a")
    model.add_adapter("b", config)
    for name, parameter in model.double().named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    batch, estimator = {**zoo.text_batch(N, T), "adapter_names": ["a", "a", "b", "a", "b"]}, Wide()
    options = {"parameters": parameters, "likelihood": fk.CausalLM(logits_bytes=limit)}
    slow = pytest.warns(UserWarning, match="take the slow exact path") if parameters is None else nullcontext()
    with slow:
        found = fk.estimate(model.eval(), [batch], estimator, **options)
    if limit is not None:
        assert estimator.logits == "whole: the model puts hooks on its head while it runs"
    parameters = {name: one for name, one in model.named_parameters() if name in found}
    truth = {name: torch.zeros_like(one) for name, one in parameters.items()}
    for n in range(N):
        loss = next_token(model, {key: value[n : n + 1] for key, value in batch.items()})
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            truth[name] += 0 if grad is None else grad.square() / N
    assert worst(found, truth) < EXACT


def test_many_positions_of_the_models_own():
    """More than the text has: they count where it is decided whether logits are large."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)
    model, batch, estimator = peft.get_peft_model(made("llama"), config).double(), zoo.text_batch(N, 4), Wide()
    with pytest.warns(UserWarning, match="take the slow exact path"):
        fk.estimate(model, [batch], estimator, likelihood=fk.CausalLM(logits_bytes=2 * N * 4 * POSITION))
    assert estimator.logits.startswith("in chunks")


# Planted errors: each must make the comparison above fail.


def error_with(monkeypatch, family: str, limit: int, **options) -> float:
    model, batch = made(family), zoo.text_batch(N, T)
    truth = squares_one_by_one(model, [batch], next_token)
    found = fk.estimate(model, [batch], Wide(), likelihood=fk.CausalLM(logits_bytes=limit), check=False, **options)
    return worst(found, truth)


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_a_dropped_chunk_shows(monkeypatch, family):
    chunks = head_logits._chunks
    monkeypatch.setattr(head_logits, "_chunks", lambda counted, most: list(chunks(counted, most))[:-1])
    with pytest.raises(ValueError, match="the loss of example"):  # already where examples alone are compared
        error_with(monkeypatch, family, 3 * POSITION)


def test_a_dropped_part_shows(monkeypatch):
    whole_parts = parts.parts_of
    monkeypatch.setattr(capture, "parts_of", lambda *args: list(whole_parts(*args))[:-1])
    assert error_with(monkeypatch, "llama", 2 * T * POSITION) > 1e-2


def test_squares_before_the_sum_over_chunks_show(monkeypatch):
    """Parts of half an example each."""

    def halves(num_rows, num_positions, documents, most):
        middle = num_positions // 2
        for n in range(num_rows):
            row = slice(n, n + 1)
            yield parts.Part(row, row, slice(0, middle))
            yield parts.Part(row, row, slice(middle, num_positions))

    monkeypatch.setattr(capture, "parts_of", halves)
    assert error_with(monkeypatch, "llama", T * POSITION) > 1e-2


def test_rows_of_a_tied_weight_that_belong_to_another_part_show(monkeypatch):
    original = Uses.part

    def first_part(self, examples):
        return original(self, slice(0, examples.stop - examples.start))

    monkeypatch.setattr(Uses, "part", first_part)
    with pytest.raises(IndexError):  # rows of some examples are missing
        error_with(monkeypatch, "llama, tied", 2 * T * POSITION)


def texts(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(1, V, (2, length), generator=generator) for length in lengths]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


def test_a_pass_that_goes_on_after_its_large_logits_knows_of_them(tmp_path):
    """The batch on which the model was tried without its logits is tried once more."""

    def breaking():
        yield from batches[:3]
        raise ConnectionError

    batches, options = texts(3, 12, 3, 12), {"likelihood": fk.CausalLM(logits_bytes=18 * POSITION)}
    model = zoo.llama().model.double().eval()
    expected = fk.estimate(model, batches, **options)
    assert expected.provenance["runs"][0]["logits"].startswith("in chunks")
    for last in (3, 4):
        options["checkpoint"] = tmp_path / "fisher.part"
        expected = fk.estimate(model, batches[:last], **options)
        with pytest.raises(ConnectionError):
            fk.estimate(model, breaking(), **options)
        assert Checkpoint.read(tmp_path / "fisher.part").planned == [0, 1]
        assert fk.estimate(model, batches[:last], **options) == expected
    with pytest.raises(ConnectionError):
        fk.estimate(model, breaking(), **options)
    with pytest.raises(ValueError, match=r"likelihood was CausalLM\(.*logits_bytes=\d+\) and is .*logits_bytes=None\)"):
        fk.estimate(model, batches, **options | {"likelihood": whole()})


def test_parts_with_logits_in_chunks_and_whole_form_a_union():
    model = zoo.llama().model.double().eval()
    ways = {"model.norm.*": fk.CausalLM(logits_bytes=POSITION), "*q_proj*": whole()}
    parts = [fk.estimate(model, texts(5), likelihood=way, parameters=name) for name, way in ways.items()]
    (run,) = fk.union(*parts).provenance["runs"]
    assert run["logits"] == [f"in chunks of {POSITION} bytes", None]
