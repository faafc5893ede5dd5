"""FISH-Tuning on the packed rows of TRL's SFTTrainer, from the start to the delta: its documents are the examples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.selection import load_start, save_start
from tests.support import zoo

peft = pytest.importorskip("peft")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

import datasets  # noqa: E402

from fishkern.integrations.trainer import FisherMixin  # noqa: E402
from tests.integrations.test_trainer import SHORT, assert_only_the_selection_moved, values  # noqa: E402

TEXTS = ["the sea falls", "rain on old stones", "all night long", "rain", "stones"]
SAYS = "{% generation %}{{ one['content'] }} </s> {% endgeneration %}"
TEMPLATE = (
    "{% for one in messages %}{% if one['role'] == 'assistant' %}"
    + SAYS
    + "{% else %}{{ one['content'] }} {% endif %}{% endfor %}"
)
CHAT = [("user", "the sea"), ("assistant", "falls on"), ("user", "rain"), ("assistant", "all night long")]
MESSAGES = [[{"role": role, "content": says} for role, says in CHAT[:turns]] for turns in (4, 2)]

DATA = {
    "text": {"text": TEXTS * 4},
    "completion_only_loss": {"prompt": ["the sea", "rain on old"] * 8, "completion": [" falls all", " stones"] * 8},
    "assistant_only_loss": {"messages": MESSAGES * 6},
}
PACKED = {
    "bfd": dict(packing=True, max_length=16),
    "bfd_split": dict(packing=True, packing_strategy="bfd_split", max_length=8),
    "bfd, padded": dict(packing=True, max_length=16, pad_to_multiple_of=8),
    "padding-free": dict(padding_free=True, max_length=None),
    "wrapped": dict(packing=True, packing_strategy="wrapped", max_length=16),
}
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")


class FisherSFT(FisherMixin, trl.SFTTrainer): ...


def base(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = zoo.llama(vocab_size=zoo.V).model
    model.set_attn_implementation(attention)
    return model


def sft(folder: Path, packing: str, data: str = "text", *, attention: str = "sdpa", **own) -> FisherSFT:
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATE
    options = {**SHORT, "output_dir": str(folder / "out"), "bf16": False, **PACKED[packing]}
    return FisherSFT(
        base(attention),
        trl.SFTConfig(**options, assistant_only_loss=data == "assistant_only_loss"),
        train_dataset=datasets.Dataset.from_dict(DATA[data]),
        processing_class=tokenizer,
        peft_config=LORA,
        **{"select": partial(fk.fish_tuning, density=0.3), **own},
    )


def examples(trainer: FisherSFT) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each document, or of each wrapped row, as the dataset has them before it is collated."""
    for row in trainer.train_dataset:
        tokens, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        lengths = row.get("seq_lengths", [len(tokens)])
        yield from zip(tokens.split(lengths), labels.split(lengths), strict=True)


def alone(trainer: FisherSFT) -> tuple[dict[str, Tensor], int]:
    """The oracle: the squared gradient of each example's own loss, by ordinary autograd, in float64."""
    model = peft.get_peft_model(base(), LORA)  # a copy would run the forward that TRL has bound to the original
    model.load_state_dict(trainer.model.state_dict())
    model.double().eval()
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    total, count = {name: torch.zeros_like(one) for name, one in parameters.items()}, 0
    for tokens, labels in examples(trainer):
        if not (labels[1:] != -100).any():
            continue
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], labels[1:])
        for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += grad.square()
        count += 1
    return {name: value / count for name, value in total.items()}, count


CASES = [
    ("bfd", "text", "eager"),
    ("bfd", "completion_only_loss", "sdpa"),
    ("bfd_split", "assistant_only_loss", "eager"),
    ("bfd, padded", "assistant_only_loss", "sdpa"),
    ("padding-free", "text", "sdpa"),
    ("padding-free", "completion_only_loss", "eager"),
    ("wrapped", "text", "sdpa"),
]


@pytest.mark.parametrize(("packing", "data", "attention"), CASES)
def test_the_scores_are_those_of_documents_alone(tmp_path, packing, data, attention):
    """However TRL deals them to rows, and with the labels that it leaves them; wrapped rows are examples themselves."""
    trainer = sft(tmp_path, packing, data, attention=attention)
    expected, count = alone(trainer)
    statistics = fk.estimate(trainer.model, trainer.get_train_dataloader())
    rows = len(trainer.train_dataset)
    assert statistics.count == count
    assert rows < count if packing.startswith("bfd") else rows == count
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name].double(), value, rtol=1e-3, atol=1e-5 * float(value.max()))


@pytest.mark.parametrize("packing", ["bfd", "padding-free"])
def test_from_the_start_to_the_delta(tmp_path, packing):
    """Select on the packed rows that are trained on, train, save the delta, and load it into the base model again."""

    def select(model, batches):
        selection = fk.fish_tuning(model, batches, density=0.3)
        save_start(model, selection, tmp_path / "start.safetensors")
        return selection

    trainer = sft(tmp_path, packing, select=select)
    start, scores = values(trainer.model), alone(trainer)[0]
    trainer.train()
    selection = trainer.selection
    assert_only_the_selection_moved(trainer.model, selection, start)
    assert selection.overlap(fk.select(scores, fk.GlobalTopK(k=selection.count))) > 0.99
    fk.delta(trainer.model, selection).save(tmp_path / "delta.safetensors")

    again = peft.get_peft_model(base(), LORA)
    load_start(again, tmp_path / "start.safetensors")
    fk.apply_delta(again, fk.Delta.load(tmp_path / "delta.safetensors"))
    batch = zoo.text_batch(3, 7)
    with torch.no_grad():
        expected, untrained = trainer.model.eval()(**batch).logits, peft.get_peft_model(base(), LORA)(**batch).logits
        assert torch.equal(again.eval()(**batch).logits, expected)
    assert (expected - untrained).abs().max() > 1e-2


def test_other_rows_to_select_on(tmp_path):
    """Packed training and padded rows to select on: by the same documents, the same entries."""
    rows = [{"input_ids": tokens[None], "labels": tokens[None]} for tokens, _ in examples(sft(tmp_path, "bfd"))]
    selections = []
    for own in ({}, {"select_data": [one for one in rows if one["labels"].numel() > 1]}):
        trainer = sft(tmp_path, "bfd", **own)
        trainer.args.max_steps = 1
        trainer.train()
        selections.append(trainer.selection)
    assert selections[0].overlap(selections[1]) > 0.99


def test_a_loss_of_trl_that_is_not_the_models_own_is_told(tmp_path):
    trainer = sft(tmp_path, "bfd")
    trainer.args.loss_type, trainer.args.max_steps = "dft", 1
    with pytest.warns(UserWarning, match="does not train the model's own loss .loss_type='dft'."):
        trainer.train()
