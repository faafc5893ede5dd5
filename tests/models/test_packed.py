"""Packed rows: their documents are the examples, and equal a loop over the documents alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from tests.support import zoo

transformers = pytest.importorskip("transformers")

# the self-check would mend a rule that is wrong by the loop, and the result would be right all the same
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("error:.*take the slow exact path")]

LENGTHS = (7, 4, 11, 1, 2, 9, 5)
ROWS = ((0, 1, 2), (3, 4, 5, 6))


@dataclass(frozen=True)
class Document:
    """Tokens and labels of one text, without any batch."""

    tokens: Tensor
    labels: Tensor

    @property
    def counts(self) -> bool:
        return bool((self.labels[1:] != -100).any())


class Wide(fk.DiagonalFisher):
    """The same sums, as they are: statistics are float32."""

    def result(self, state, count):
        return state / count

    def collect(self, model, results, **described):
        return results


def documents(lengths: Sequence[int] = LENGTHS, vocabulary: int = zoo.V) -> list[Document]:
    """Of the third one a half has labels, as a prompt has none; the fourth is too short for one."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]
    made = [Document(tokens, tokens.clone()) for tokens in made]
    made[2].labels[:5] = -100
    return made


def flat(docs: Sequence[Document], **options) -> dict:
    """As transformers flattens them: one row, no padding."""
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    return collate([{"input_ids": one.tokens, "labels": one.labels} for one in docs])


def in_rows(docs: Sequence[Document], rows: Sequence[Sequence[int]]) -> dict:
    """Several rows of several documents, padded on the right with positions and tokens of zero, as TRL pads."""
    entries: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        entries["input_ids"].append(torch.cat([docs[n].tokens for n in row]))
        entries["labels"].append(torch.cat([docs[n].labels for n in row]))
        entries["position_ids"].append(torch.cat([torch.arange(len(docs[n].tokens)) for n in row]))
    values = {"input_ids": 0, "labels": -100, "position_ids": 0}
    pad = nn.utils.rnn.pad_sequence
    return {key: pad(parts, batch_first=True, padding_value=values[key]) for key, parts in entries.items()}


def alone(model: nn.Module, docs: Sequence[Document], *, reduction: str = "mean", start: int = 0) -> dict[str, Tensor]:
    """The oracle: the squared gradient of each document's own loss, run alone by ordinary autograd, in mean."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    total = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in parameters.items()}
    counting = [one for one in docs if one.counts]
    for one in counting:
        positions = torch.arange(len(one.tokens))[None] + start
        logits = model(input_ids=one.tokens[None], position_ids=positions).logits[0]
        loss = F.cross_entropy(logits[:-1], one.labels[1:], reduction=reduction)
        for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += grad.double().square()
    return {name: value / len(counting) for name, value in total.items()}


def alone_without_positions(model: nn.Module, docs: Sequence[Document]) -> dict[str, Tensor]:
    """As :func:`alone`, of a model that numbers the positions of a row by itself."""
    forward = model.forward
    model.forward = lambda input_ids, position_ids: forward(input_ids=input_ids)
    try:
        return alone(model, docs)
    finally:
        model.forward = forward


def rows_of_one(docs: Sequence[Document]) -> list[dict]:
    return [{"input_ids": one.tokens[None], "labels": one.labels[None]} for one in docs if one.counts]


def worst(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert set(actual) == set(truth)
    largest = max(value.abs().max().item() for value in truth.values())
    # a gradient that is zero but for rounding is measured at the rounding of the model's largest
    return max(
        (actual[name].double() - one).abs().max().item() / max(one.abs().max().item(), 1e-20 * largest)
        for name, one in truth.items()
    )


MODELS = {
    "llama": lambda: zoo.llama().model,
    "llama-tied": lambda: zoo.llama(tie_word_embeddings=True).model,
    "qwen3": lambda: zoo.qwen3().model,
    "gemma": lambda: zoo.gemma().model,
    "gemma3": lambda: zoo.gemma3().model,
}


def made(family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[family]().to(dtype).eval()
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    return alone(made(), documents())


@pytest.mark.parametrize("family", MODELS)
def test_equals_the_loop_over_documents_alone(family):
    """Among them are tied heads, norms of each head, of which the positions are the third axis, and sliding windows."""
    model, docs = made(family), documents()
    wide, expected = fk.estimate(model, [flat(docs)], Wide()), alone(model, docs)
    in_float32 = {name for name in wide if family.startswith("gemma") and "norm" in name}  # Gemma's own norms
    assert worst(*({name: one[name] for name in one if name not in in_float32} for one in (wide, expected))) < 1e-10
    assert worst(wide, expected) < 1e-6
    statistics = fk.estimate(model, [flat(docs)])
    assert {one.path for one in statistics.coverage.values()} == {"fused"}
    assert statistics.count == 6


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_equals_the_loop_in_float32_by_eager_attention(family):
    model, docs = made(family, "eager", torch.float32), documents()
    assert worst(fk.estimate(model, [flat(docs)]), alone(copy.deepcopy(model).double(), docs)) < 1e-4
    assert worst(fk.estimate(model, [flat(docs)]), alone(model, docs)) < 1e-5


def test_bfloat16_to_its_own_noise():
    docs = documents()
    report = fk.verify(made(dtype=torch.bfloat16), [flat(docs)])
    assert report.ok, report
    assert report.examples == 6


PACKINGS = {
    "permuted": lambda docs: [flat([docs[n] for n in (5, 0, 3, 6, 2, 4, 1)])],
    "two batches": lambda docs: [flat(docs[:3]), flat(docs[3:])],
    "a lone document, then several": lambda docs: [flat(docs[:1]), flat(docs[1:])],
    "a lone one beside one without a label": lambda docs: [flat([docs[3], docs[0]]), flat([*docs[1:3], *docs[4:]])],
    "two rows": lambda docs: [in_rows(docs, ROWS)],
    "three rows": lambda docs: [in_rows(docs, [(6, 4), (2,), (5, 3, 0, 1)])],
    "a row for each": lambda docs: [in_rows(docs, [(0,), (1,), (2,), (3,), (4,), (5,), (6,)])],
    "cu_seq_lens": lambda docs: [flat(docs, return_flash_attn_kwargs=True)],
    "seq_idx": lambda docs: [flat(docs, return_seq_idx=True)],
    "everything": lambda docs: [flat(docs, return_flash_attn_kwargs=True, return_seq_idx=True)],
    "labels shifted before": lambda docs: [shifted(flat(docs))],
}


def shifted(batch: dict) -> dict:
    """The labels of the next tokens, also of those that belong to the next document, which must not count."""
    return {**batch, "shift_labels": F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_changes_nothing(packing, truth):
    batches = PACKINGS[packing](documents())
    assert worst(fk.estimate(made(), batches, Wide()), truth) < 1e-10


def test_no_label_crosses_a_border(truth):
    """Labels of first tokens count in a careless collator: they are predicted from the document before."""
    docs = documents()
    batch = {**flat(docs), "labels": torch.cat([one.labels for one in docs])[None]}
    assert (batch["labels"] != flat(docs)["labels"]).any()
    assert worst(fk.estimate(made(), [batch], Wide()), truth) < 1e-10


def test_positions_that_begin_elsewhere():
    docs, model = documents(), made("llama")
    batch = flat(docs, position_ids_start=2)
    assert worst(fk.estimate(model, [batch], Wide()), alone(model, docs, start=2)) < 1e-10


def test_sums_over_tokens():
    docs, model = documents(), made()
    statistics = fk.estimate(model, [flat(docs)], Wide(), likelihood=fk.CausalLM(reduction="sum"))
    assert worst(statistics, alone(model, docs, reduction="sum")) < 1e-10


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_under_checkpointing(reentrant):
    docs, model = documents(), made("llama-tied")
    expected = alone(model, docs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert worst(fk.estimate(model, [flat(docs)], Wide()), expected) < 1e-10


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_adapters(kind):
    peft = pytest.importorskip("peft")
    if kind == "vera":
        config = peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"])
    else:
        options = dict(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        config = peft.LoraConfig(**options, use_dora=kind == "dora")
    docs, model = documents(), peft.get_peft_model(made(), config).double()
    for one in model.parameters():
        if one.requires_grad and not bool(one.any()):
            nn.init.normal_(one, std=0.1)
    assert worst(fk.estimate(model, [flat(docs)], Wide()), alone(model, docs)) < 1e-10


def test_experts():
    """They choose by tokens, so their block runs once more for each document."""
    torch.manual_seed(0)
    docs, model = documents(), zoo.mixtral().model.double().eval()
    statistics = fk.estimate(model, [flat(docs)])
    assert worst(statistics, alone(model, docs)) < 1e-6
    assert {one.path for one in statistics.coverage.values()} <= {"fused", "generic"}


class Mixed(nn.Module):
    """A small causal model: embeddings, something in between, a head; ``position_ids`` separate its documents."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.between, self.head = nn.Embedding(zoo.V, 6), between, nn.Linear(6, zoo.V)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> object:
        hidden = self.embed(input_ids)
        numbers = torch.zeros_like(input_ids) if position_ids is None else (position_ids == 0).cumsum(1)
        before = torch.ones(input_ids.shape[1], input_ids.shape[1]).tril().bool()
        mask = before & (numbers[:, :, None] == numbers[:, None])
        mean = mask.to(hidden.dtype) @ hidden / mask.sum(2, keepdim=True)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.between(mean)))


class Twice(nn.Module):
    """Calls its modules twice: the sum over both comes before the square."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(self.norm(self.inner(self.norm(hidden)).tanh()))


class Gate(nn.Module):
    """A module without a rule, position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (hidden @ self.matrix).sigmoid()


class Flattened(nn.Module):
    """A linear map of flattened positions, whose rows are not those of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


class AlongTheRow(nn.Module):
    """A causal convolution along the row, as linear attention has before it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(6, 6, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.convolution(F.pad(hidden.mT, (2, 0))).mT


class Absolute(nn.Module):
    """Positions of the row, whatever position_ids say."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.positions[: hidden.shape[1]]


class Inward(nn.Module):
    """A linear map whose weight is read past its call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.inner.weight)


@pytest.mark.parametrize("between", [Gate, Flattened, Inward])
def test_modules_without_a_rule(between):
    docs, model = documents(), Mixed(between()).double()
    named = [name for name, _ in model.named_parameters() if not name.endswith("inner.bias")]
    model_alone = copy.deepcopy(model)
    for name, one in model_alone.named_parameters():
        one.requires_grad_(name in named)
    statistics = fk.estimate(model, [flat(docs)], likelihood=fk.CausalLM(), parameters=named)
    assert worst(statistics, alone(model_alone, docs)) < 1e-6
    assert {one.path for name, one in statistics.coverage.items() if "between" in name} <= {"generic", "left out"}


@pytest.mark.parametrize("estimator", [Wide(), fk.DiagonalKronecker()], ids=["squares", "factors"])
def test_modules_that_are_called_twice(estimator):
    docs, model = documents(), Mixed(Twice()).double()
    options = {"estimator": estimator, "likelihood": fk.CausalLM()}
    packed, expected = (fk.estimate(model, one, **options) for one in ([in_rows(docs, ROWS)], rows_of_one(docs)))
    assert worst(packed, {name: expected[name].double() for name in expected}) < 1e-6
    if isinstance(estimator, Wide):
        assert worst(packed, alone(model, docs)) < 1e-10


class Fourth(fk.Estimator):
    """A statistic of whole gradients, of a user's own."""

    @property
    def definition(self):
        return {"estimator": "Fourth"}

    def update_(self, state, grads, parameter, backend=None):
        for n in range(grads.num_examples):
            state += grads.example(n) ** 4


def test_a_statistic_of_your_own_reads_whole_gradients():
    docs, model = documents(), made("llama-tied")
    packed, expected = (fk.estimate(model, one, Fourth()) for one in ([in_rows(docs, ROWS)], rows_of_one(docs)))
    assert worst(packed, {name: expected[name].double() for name in expected}) < 1e-6


def test_the_loop_runs_documents_unpacked():
    docs, model = documents(), Mixed(nn.Identity()).double()
    model.extra = nn.Parameter(torch.ones(6, dtype=torch.float64))
    model.forward = lambda input_ids, position_ids=None: Mixed.forward(_scaled(model), input_ids, position_ids)
    with pytest.warns(UserWarning, match="slow exact path"):
        statistics = fk.estimate(model, [flat(docs)], likelihood=fk.CausalLM())
    assert worst(statistics, alone(model, docs)) < 1e-6
    assert statistics.coverage["extra"].path == "loop"


def _scaled(model: nn.Module) -> nn.Module:
    """The same modules, with what comes between scaled by a parameter of the model itself."""
    view = copy.copy(model)
    view._modules = {**model._modules, "between": lambda hidden: hidden * model.extra}
    return view


@pytest.mark.parametrize("between", [AlongTheRow, lambda: Absolute()], ids=["convolution", "absolute"])
def test_what_does_not_separate_is_refused(between):
    model = Mixed(between()).double()
    with pytest.raises(ValueError, match="does not keep documents apart|see each other"):
        fk.estimate(model, [flat(documents())], likelihood=fk.CausalLM())


@pytest.mark.parametrize(
    "estimator",
    [None, fk.SketchedFisher(), fk.DiagonalFisher(unit="batch")],
    ids=["captured", "sketched", "of batches"],
)
def test_a_mask_of_ones_leaks(estimator):
    batch = flat(documents())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(ValueError, match="does not keep documents apart.*leave it out of packed batches"):
        fk.estimate(made(), [batch], estimator)


def apart(batch: dict) -> Tensor:
    """A mask of pairs of positions of one document, ``[R, 1, T, T]``."""
    numbers = (batch["position_ids"] == 0).cumsum(1)
    T = numbers.shape[1]
    return ((numbers[:, :, None] == numbers[:, None]) & torch.ones(T, T).tril().bool())[:, None]


def test_a_mask_that_separates_serves(truth):
    batch = flat(documents())
    assert worst(fk.estimate(made(), [{**batch, "attention_mask": apart(batch)}], Wide()), truth) < 1e-10


@pytest.mark.parametrize("prepared", [False, True])
def test_a_mask_must_separate_in_every_batch(prepared):
    """The second mask has the form of the first, and lets one token of the last document see the one before."""
    docs, model = documents(), made()
    batches = [{**flat(some), "attention_mask": apart(flat(some))} for some in (docs[:3], docs[4:])]
    options = {"prepared": fk.prepare(model, batches[0])} if prepared else {}
    assert fk.estimate(model, batches, **options).count == 6
    batches[1]["attention_mask"][0, 0, -1, 3] = True
    with pytest.raises(ValueError, match="batch 1 .* lets position 15 of row 0 attend to position 3"):
        fk.estimate(model, batches, **options)


def test_each_form_of_a_mask_is_proved():
    """Eager attention adds a mask, so that one of bool separates nothing."""
    docs, model = documents(), made(attention="eager")
    mask = apart(flat(docs))
    masks = [torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf), mask]
    first, second = ({**flat(docs), "attention_mask": mask} for mask in masks)
    assert fk.estimate(model, [first, first]).count == 12
    for batches in ([second], [first, second], [first, {**first, "attention_mask": torch.ones(1, 39)}]):
        with pytest.raises(ValueError, match="does not keep documents apart"):
            fk.estimate(model, batches)


class FromTheLowest(Mixed):
    """Begins a document at the lowest position of a single row alone, as flash attention of transformers does."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> object:
        return super().forward(input_ids, position_ids - position_ids.min())


@pytest.mark.parametrize("estimator", [None, fk.SketchedFisher()], ids=["captured", "sketched"])
def test_documents_that_do_not_begin_at_the_lowest_position_are_looked_at(estimator):
    docs, model = documents(), FromTheLowest(nn.Linear(6, 6)).double()
    options = {"estimator": estimator, "likelihood": fk.CausalLM()}
    plain, jumping = flat(docs), flat(docs)
    assert fk.estimate(model, [plain], **options).count == 6
    jumping["position_ids"][0, -5:] += 20
    for batches in ([jumping], [plain, jumping]):
        with pytest.raises(ValueError, match="does not keep documents apart"):
            fk.estimate(model, batches, **options)


def qwen_vl(kind: str) -> nn.Module:
    """The text model of it alone is trained: there is no image in the batches."""
    torch.manual_seed(0)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=24)
    sizes = dict(vocab_size=zoo.V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10_000.0}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 6, "rope_parameters": rope, "bos_token_id": 0}
    ids = dict(image_token_id=1, video_token_id=2, vision_start_token_id=0, vision_end_token_id=0)
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "eos_token_id": 0}, vision_config=vision, **ids
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).double().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    return model


@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Qwen3VL"])
def test_positions_of_several_kinds(kind):
    docs, model = documents(), qwen_vl(kind)
    expected = alone_without_positions(model, docs)
    for batch in (flat(docs), in_rows(docs, ROWS)):
        positions = batch["position_ids"]
        with_text = {**batch, "position_ids": positions.expand(4, *positions.shape)}
        assert worst(fk.estimate(model, [with_text], Wide()), expected) < 1e-10
        with pytest.raises(ValueError, match="time, height and width do not say where a document ends"):
            fk.estimate(model, [{**batch, "position_ids": positions.expand(3, *positions.shape)}])
    if kind == "Qwen2_5_VL":
        with pytest.raises(ValueError, match=r"Qwen2-VL's reads \[4, R, T\] alone"):
            fk.estimate(model, [flat(docs)])


@pytest.mark.parametrize("kinds", [3, 4])
def test_positions_of_several_kinds_of_padded_rows(kinds):
    """As many rows as kinds, so that only the second axis can be theirs."""
    model, rows = qwen_vl("Qwen2_5_VL"), zoo.text_batch(kinds, 7)
    positions = torch.arange(7) + 5 * torch.arange(kinds)[:, None]  # another start for each row, which turns nothing
    positions[:, 4:] += 3 * torch.arange(kinds)[:, None]  # a jump of another size for each, which does
    batch = {**rows, "position_ids": positions.expand(kinds, kinds, 7)}
    one_by_one = [
        {**{key: one[n : n + 1] for key, one in rows.items()}, "position_ids": batch["position_ids"][:, n : n + 1]}
        for n in range(kinds)
    ]
    expected = fk.estimate(model, one_by_one, Wide())
    assert worst(fk.estimate(model, [batch], Wide()), expected) < 1e-10
    assert worst(fk.estimate(model, [rows], Wide()), expected) > 1e-3


def test_borders_that_the_attention_does_not_read_are_refused():
    batch = flat(documents(), return_flash_attn_kwargs=True, return_position_ids=False)
    with pytest.raises(ValueError, match="does not keep documents apart.*no position_ids"):
        fk.estimate(made(), [batch])


def test_every_set_of_entries_is_proved():
    """The first batch separates, the second, with a mask, does not."""
    docs = documents()
    leaking = flat(docs[4:])
    leaking["attention_mask"] = torch.ones_like(leaking["input_ids"])
    with pytest.raises(ValueError, match="does not keep documents apart"):
        fk.estimate(made(), [flat(docs[:3]), leaking])
    first = in_rows(docs, [(0, 3), (1, 3)])  # in each row a document without labels, behind the only example
    first["attention_mask"] = torch.ones_like(first["input_ids"])
    with pytest.raises(ValueError, match="does not keep documents apart"):
        fk.estimate(made(), [first, leaking])


@pytest.mark.parametrize("counts", [True, False], ids=["an example", "no example"])
def test_a_leak_beside_a_lone_document_is_seen(counts):
    """The first example has a row of its own; in the second row the leak is from an example, or from what is none."""
    docs = documents()
    docs[1].labels[:] = docs[1].tokens if counts else -100
    batch = in_rows(docs, [(0,), (1, 4)])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(ValueError, match=r"does not keep documents apart"):
        fk.estimate(made(), [batch])


class InOneRow(Mixed):
    """Reads where position_ids restart in a single row alone, as flash attention of transformers does."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> object:
        return super().forward(input_ids, position_ids if len(input_ids) == 1 else None)


@pytest.mark.parametrize("estimator", [None, fk.SketchedFisher()], ids=["captured", "sketched"])
@pytest.mark.parametrize("rows", [ROWS, [(0, 1, 2), (3, 4), (5, 6)], [(0, 3), (1,)]], ids=str)
@pytest.mark.parametrize("first", [(), (5, 6)], ids=["at once", "after one row"])
def test_a_model_that_separates_the_documents_of_one_row_only(first, rows, estimator):
    docs, model = documents(), InOneRow(nn.Linear(6, 6)).double()
    batches = [flat([docs[n] for n in first])] if first else []
    options = {"estimator": estimator, "likelihood": fk.CausalLM()}
    if rows == [(0, 3), (1,)]:  # behind its example is a document without a label, on which a causal loss is not based
        assert fk.estimate(model, [*batches, in_rows(docs, rows)], **options).count == len(first) + 2
        rows = [(0,), (3, 1)]
    with pytest.raises(ValueError, match="does not keep documents apart"):
        fk.estimate(model, [*batches, in_rows(docs, rows)], **options)


def test_a_leak_from_before_is_seen_after_a_batch_that_shows_none():
    """In each row is one example: first before a document without labels, then behind it."""
    docs, model = documents(), InOneRow(nn.Linear(6, 6)).double()
    harmless, leaking = (in_rows(docs, rows) for rows in ([(0, 3), (1, 3), (2, 3)], [(0, 3), (1, 3), (3, 2)]))
    assert fk.estimate(model, [harmless], likelihood=fk.CausalLM()).count == 3
    for batches in ([leaking], [harmless, leaking]):
        with pytest.raises(ValueError, match="padding or a document without a label"):
            fk.estimate(model, batches, likelihood=fk.CausalLM())


def test_padding_in_a_mask_is_refused():
    """Beside a mask of ones flash attention reads position_ids, beside one with padding it does not."""
    batch = in_rows(documents(), ROWS)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    with pytest.raises(ValueError, match="padding in its attention_mask.*leave it out"):
        fk.estimate(made(), [batch])


def test_recurrent_mixers_are_refused():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=zoo.V, hidden_size=24, num_hidden_layers=1)
    with pytest.raises(ValueError, match="does not keep documents apart"):
        fk.estimate(transformers.MambaForCausalLM(config), [flat(documents(), return_seq_idx=True)])


def test_a_leak_above_all_trained_parameters_is_seen():
    """Only the head is trained, behind all attention: its own gradients are separate, what enters it is not."""
    batch = flat(documents())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(ValueError, match="does not keep documents apart"):
        fk.estimate(made(), [batch], parameters="lm_head.weight", check=False)


@pytest.mark.parametrize(
    "estimator",
    [
        fk.GroupFisher(by="row"),
        fk.GroupFisher(by="column"),
        fk.GroupFisher(by="layer"),
        fk.DiagonalFisher(unit="position"),
        fk.DiagonalFisher(fisher_type="mc", mc_samples=2),
        fk.DiagonalKronecker(),
    ],
    ids=lambda one: f"{type(one).__name__} {getattr(one, 'by', '')}{getattr(one, 'unit', '')}",
)
@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_other_statistics(estimator, family):
    """Of documents in rows with padding between them, against documents alone."""
    docs, model = documents(), made(family)
    packed = fk.estimate(model, [in_rows(docs, ROWS)], estimator)
    expected = fk.estimate(model, rows_of_one(docs), estimator)
    assert packed.count == expected.count == 6
    assert worst(packed, {name: expected[name].double() for name in expected}) < 1e-6


@pytest.mark.parametrize("options", [{}, {"positions": "labelled"}, {"importance": "kronecker"}], ids=str)
def test_energies(options):
    docs, model = documents(), made("gemma3")
    estimator = fk.DirectionEnergy(**options)
    packed = fk.estimate(model, [in_rows(docs, ROWS)], estimator)
    expected = fk.estimate(model, rows_of_one(docs), estimator)
    for name, energies in expected.items():
        for part in ("input", "output", "joint"):
            torch.testing.assert_close(getattr(packed[name], part), getattr(energies, part))


def test_sketches_have_the_same_signs_as_in_padded_rows():
    docs, model = documents(), made()
    rows = [one for one in docs if one.counts]
    padded = {
        "input_ids": nn.utils.rnn.pad_sequence([one.tokens for one in rows], batch_first=True),
        "labels": nn.utils.rnn.pad_sequence([one.labels for one in rows], batch_first=True, padding_value=-100),
    }
    packed, expected = (fk.estimate(model, [one], fk.SketchedFisher()) for one in (flat(docs), padded))
    assert worst(packed, {name: expected[name].double() for name in expected}) < 1e-6


def test_type_2():
    docs = documents((3, 2, 4), vocabulary=7)
    torch.manual_seed(0)
    model = zoo.llama(vocab_size=7).model.double().eval()
    estimator = fk.DiagonalFisher(fisher_type="type-2")
    packed, expected = (fk.estimate(model, one, estimator) for one in ([flat(docs)], rows_of_one(docs)))
    assert worst(packed, {name: expected[name].double() for name in expected}) < 1e-6


@pytest.mark.parametrize("rows", [None, [(0, 1), (2, 3, 4), (5, 6)]], ids=["one row", "three rows"])
def test_max_examples_counts_documents(rows):
    docs, model = documents(), made()
    batch = flat(docs) if rows is None else in_rows(docs, rows)
    statistics = fk.estimate(model, [batch], max_examples=4)
    assert statistics.count == 4
    assert worst(statistics, alone(model, docs[:5])) < 1e-6
    run = statistics.provenance["runs"][0]
    assert (run["examples"], run["batches"], run["documents_without_labels"]) == (4, 1, 1 if rows is None else 4)


def test_documents_without_labels_are_counted():
    docs = documents()
    run = fk.estimate(made(), [flat(docs), in_rows(docs, [(0, 1), (2,)])]).provenance["runs"][0]
    assert (run["examples"], run["documents_without_labels"]) == (9, 1)
    with pytest.raises(ValueError, match="none of their documents has a label"):
        fk.estimate(made(), [flat([docs[3], docs[3]])])


def test_draws_depend_on_the_number_of_the_document():
    """One more document before it, without a label, changes nothing; another one with labels does."""
    docs, model, estimator = documents(), made(), fk.DiagonalFisher(fisher_type="mc", seed=5)
    once = fk.estimate(model, [flat(docs)], estimator)
    again = fk.estimate(model, [flat(docs[:2]), flat(docs[2:])], estimator)
    assert worst(again, {name: once[name].double() for name in once}) < 1e-6


def test_prepared(truth):
    docs, model = documents(), made()
    prepared = fk.prepare(model, flat(docs))
    for batches in ([flat(docs)], [flat(docs[:3]), flat(docs[3:])]):
        assert worst(fk.estimate(model, batches, prepared=prepared), truth) < 1e-6
    leaking = flat(docs)
    leaking["attention_mask"] = torch.ones_like(leaking["input_ids"])
    with pytest.raises(ValueError, match="prepared for something else"):
        fk.estimate(model, [leaking], prepared=prepared)


def test_verify():
    docs, model = documents(), made()
    report = fk.verify(model, [flat(docs[:3]), in_rows(docs, [(3, 4), (5, 6)])])
    assert report.ok, report
    assert report.examples == 6
    statistics = fk.estimate(model, [flat(docs[:2])])
    statistics = {name: 1.01 * one for name, one in statistics.items()}
    assert not fk.verify(model, [flat(docs[:2])], statistics).ok


def test_what_packed_rows_do_not_serve():
    docs, model = documents(), made()
    with pytest.raises(ValueError, match="no plan can be made|where their documents end is read off values"):
        fk.plan(model, flat(docs))
    with pytest.raises(ValueError, match="no labels of positions"):
        fk.estimate(model, [flat(docs)], likelihood=fk.Classification())
    with pytest.raises(ValueError, match="'cu_seqlens'"):
        fk.estimate(model, [{**flat(docs), "cu_seqlens": torch.tensor([0, 39])}])
    model.train()
    with pytest.raises(ValueError, match="this batch is packed"), fk.OnlineFisher(model):
        model(**flat(docs)).loss.backward()
    tokens = {key: flat(docs)[key] for key in ("input_ids", "labels")}
    with pytest.raises(ValueError, match="'cu_seqlens'"), fk.OnlineFisher(model):
        model(**tokens, cu_seqlens=torch.tensor([0, 39])).loss.backward()


def test_rows_are_the_examples_of_a_function():
    """What an example is, a loss function decides: it is given the rows."""
    docs, model = documents(), made()

    def losses(model: nn.Module, batch: dict) -> Tensor:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        return F.cross_entropy(logits.mT, batch["labels"], reduction="none").sum(1)

    statistics = fk.estimate(model, [in_rows(docs, ROWS)], likelihood=losses)
    assert statistics.count == 2


def test_the_model_comes_back_as_found():
    docs, model = documents(), made("llama-tied")
    model.train()
    model.model.layers[0].requires_grad_(False)
    before = {name: (one.requires_grad, one.detach().clone()) for name, one in model.named_parameters()}
    fk.estimate(model, [flat(docs)])
    leaking = {**flat(docs), "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)}
    with pytest.raises(ValueError, match="apart"):
        fk.estimate(model, [leaking])
    assert model.training
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    for name, one in model.named_parameters():
        assert one.requires_grad == before[name][0]
        assert one.grad is None
        assert torch.equal(one, before[name][1])


class Masked(Mixed):
    """Takes a mask, and separates by position_ids."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None) -> object:
        return super().forward(input_ids, position_ids)


def test_a_mask_of_pairs_without_heads_marks_no_padding():
    """Statistics of factors count the positions that attention_mask marks, and packed documents have no padding."""
    docs, model = documents(), Masked(nn.Linear(6, 6)).double()
    plain, options = flat(docs), {"estimator": fk.DiagonalKronecker(), "likelihood": fk.CausalLM()}
    masked = {**plain, "attention_mask": apart(plain)[:, 0]}
    expected = {name: value.double() for name, value in fk.estimate(model, [plain], **options).items()}
    assert worst(fk.estimate(model, [masked], **options), expected) < 1e-6
