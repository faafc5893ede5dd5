"""TRL's trainers are built on transformers': the same optimizer and callback go over them."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import fishkern as fk
from tests.support import zoo

peft = pytest.importorskip("peft")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

import datasets  # noqa: E402

from fishkern.integrations.lora import FILE as INIT_FILE  # noqa: E402
from fishkern.integrations.lora import FOLDER, InitCallback, attach_init  # noqa: E402
from fishkern.integrations.trainer import FILE, FisherCallback, FisherMixin  # noqa: E402
from tests.integrations.test_trainer import SHORT, assert_only_the_selection_moved, values  # noqa: E402
from tests.support.oracle import worst_error  # noqa: E402
from tests.support.starts import start_of  # noqa: E402


def test_sft_moves_the_selection_alone(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = peft.get_peft_model(zoo.llama(vocab_size=41).model, config)
    selection = fk.fish_tuning(model, [zoo.text_batch(8, 7)], density=0.3)
    start = values(model)
    options = dict(output_dir=str(tmp_path), save_steps=4, max_length=16, bf16=False)
    arguments = trl.SFTConfig(**{**SHORT, **options})
    rows = datasets.Dataset.from_dict({"text": ["the sea falls", "rain on old stones", "all night long", "rain"] * 3})
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=rows,
        processing_class=zoo.tokenizer(),
        optimizers=(fk.MaskedAdamW(model, selection, lr=1e-2, weight_decay=0.1), None),
        callbacks=[FisherCallback(selection)],
    )
    trainer.train()
    assert_only_the_selection_moved(model, selection, start)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["trained_entries"] for entry in logged] == [selection.count] * arguments.max_steps
    assert all(entry["grad_norm"] > 0 for entry in logged)
    checkpoint = tmp_path / "checkpoint-4"
    assert fk.Selection.load(checkpoint / FILE) == selection
    assert json.loads((checkpoint / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"


def test_sft_trains_a_lora_with_a_start(tmp_path):
    torch.manual_seed(0)
    original = zoo.llama(vocab_size=41).model
    init = start_of(original, lambda n: 3)
    model = attach_init(copy.deepcopy(original), init, task_type="CAUSAL_LM")
    options = dict(output_dir=str(tmp_path), save_steps=4, max_length=16, bf16=False)
    rows = datasets.Dataset.from_dict({"text": ["the sea falls", "rain on old stones", "all night long", "rain"] * 3})
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**{**SHORT, **options}),
        train_dataset=rows,
        processing_class=zoo.tokenizer(),
        callbacks=[InitCallback(init)],
    )
    trainer.train()
    assert fk.AdapterInit.load(tmp_path / "checkpoint-4" / INIT_FILE) == init
    batch = zoo.text_batch(3, 7)
    with torch.no_grad():
        trained, before = model.eval()(**batch).logits, original.eval()(**batch).logits
        assert (trained - before).abs().max() > 1e-2
        loaded = peft.PeftModel.from_pretrained(original, tmp_path / FOLDER).eval()
        assert (loaded(**batch).logits - trained).abs().max() < 1e-5


class FisherDPO(FisherMixin, trl.DPOTrainer): ...


def dpo_trainer(tmp_path, select, options: dict | None = None, **own) -> FisherDPO:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    rows = {
        "prompt": ["the sea", "rain on"] * 8,
        "chosen": [" falls all", " old stones"] * 8,
        "rejected": [" rain", " long night long"] * 8,
    }
    return FisherDPO(
        zoo.llama(vocab_size=41).model,
        args=trl.DPOConfig(**{**SHORT, "output_dir": str(tmp_path), "bf16": False, **(options or {})}),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=zoo.tokenizer(),
        peft_config=config,
        select=select,
        **own,
    )


def test_preferences_are_trained_on_a_selection_by_answers(tmp_path):
    """Pairs of answers are no batch for the model's own loss: the refusal says where another goes."""
    select = partial(fk.fish_tuning, density=0.3)
    with pytest.raises(ValueError, match=r"as batches of preference pairs do.*fishkern.Preference\(") as refused:
        dpo_trainer(tmp_path, select).train()
    assert "the batches that FisherDPO trains on" in refused.value.__notes__[0]
    assert "select_data=" in refused.value.__notes__[0]
    trainer = dpo_trainer(tmp_path, select, select_data=[zoo.text_batch(8, 7)])
    start = values(trainer.model)
    trainer.train()
    assert_only_the_selection_moved(trainer.model, trainer.selection, start)


LOSSES = {
    "sigmoid": lambda margin, means: -F.logsigmoid(0.1 * margin),
    "hinge": lambda margin, means: torch.relu(1 - 0.1 * margin),
    "ipo": lambda margin, means: (means - 1 / (2 * 0.1)) ** 2,
}


def trl_loss(kind: str, model: torch.nn.Module, pair: dict) -> torch.Tensor:
    """As ``DPOTrainer._compute_loss`` computes it, of a batch of one pair."""
    mask = pair["completion_mask"]
    logits = model(input_ids=pair["input_ids"], attention_mask=pair["attention_mask"]).logits
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, pair["input_ids"][:, 1:, None])[..., 0]
    logps = (tokens * mask[:, 1:]).sum(1)
    references = torch.cat([pair["ref_chosen_logps"], pair["ref_rejected_logps"]])
    chosen, rejected = logps - references
    lengths = mask.sum(1).clamp(min=1.0)
    return LOSSES[kind](chosen - rejected, chosen / lengths[0] - rejected / lengths[1])


@pytest.mark.parametrize("kind", LOSSES)
def test_preferences_by_their_own_loss(tmp_path, kind):
    """On the Trainer's own batches, whose reference it has computed before: equal to a loop by TRL's formula."""
    seen: list[int] = []

    def select(model, batches):
        batches = list(batches)
        parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        total = {name: torch.zeros_like(one) for name, one in parameters.items()}
        for batch in batches:
            N = len(batch["ref_chosen_logps"])
            seen.append(N)
            for n in range(N):
                pair = {key: value[[n, N + n] if len(value) == 2 * N else [n]] for key, value in batch.items()}
                grads = torch.autograd.grad(trl_loss(kind, model, pair), list(parameters.values()))
                for name, grad in zip(parameters, grads, strict=True):
                    total[name] += grad.square()
        statistics = fk.estimate(model, batches, likelihood=fk.Preference(loss=kind))
        assert {one.path for one in statistics.coverage.values()} == {"fused", "left out"}
        assert statistics.count == sum(seen) == 16
        assert worst_error(statistics, {key: one.double() / 16 for key, one in total.items()}, torch.float32)[0] < 1e-4
        return fk.select(statistics, fk.GlobalTopK(density=0.3))

    options = {"loss_type": kind, "precompute_ref_log_probs": True, "disable_dropout": True}
    trainer = dpo_trainer(tmp_path, select, options)
    start = values(trainer.model)
    trainer.train()
    assert max(seen) > 1
    assert_only_the_selection_moved(trainer.model, trainer.selection, start)
