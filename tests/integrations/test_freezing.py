"""A freezer in transformers' Trainer: it acts after each step, is in every checkpoint, and goes on from there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
from fishkern.integrations.freezing import FILE, FreezingCallback  # noqa: E402
from fishkern.integrations.trainer import FILE as SELECTION  # noqa: E402
from fishkern.integrations.trainer import FisherCallback  # noqa: E402

BATCH = zoo.class_batch(16, 7)
PROBE = [{key: value[:4] for key, value in BATCH.items()}]


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(BATCH["labels"])

    def __getitem__(self, n: int) -> dict:
        return {key: value[n] for key, value in BATCH.items()}


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights="pissa", task_type="SEQ_CLS")
    return peft.get_peft_model(zoo.bert_classifier().model, config)


def everything(model: nn.Module) -> fk.Selection:
    shapes = {fk.canonical_name(name): p.shape for name, p in model.named_parameters() if p.requires_grad}
    return fk.Selection(shapes, {}, whole=shapes)


class Run:
    """A Trainer with a masked optimizer, a freezer and both callbacks."""

    def __init__(self, folder: Path, selection: fk.Selection | None = None, **options) -> None:
        self.model = adapted()
        selection = everything(self.model) if selection is None else selection
        self.optimizer = fk.MaskedAdamW(self.model, selection, lr=1e-2, weight_decay=0.1)
        rule = fk.FreezeRule(margin=0.5, most=0.4)
        self.freezer = fk.fisher_adaptune(
            self.model, PROBE, optimizer=self.optimizer, every=2, read_every=1, slices=fk.Slices(2), rule=rule
        )
        self.callback = FreezingCallback(self.freezer)
        arguments = dict(max_steps=6, per_device_train_batch_size=4, save_steps=3, logging_steps=1, report_to=[])
        arguments |= dict(use_cpu=True, disable_tqdm=True, seed=1, weight_decay=0.1, output_dir=str(folder))
        self.trainer = transformers.Trainer(
            self.model,
            transformers.TrainingArguments(**{**arguments, **options}),
            train_dataset=Rows(),
            optimizers=(self.optimizer, None),
            callbacks=[FisherCallback(selection), self.callback],
        )

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def test_it_acts_after_each_step_and_says_so(tmp_path, caplog):
    run = Run(tmp_path, max_steps=3, save_steps=2)
    with caplog.at_level(logging.INFO, logger="fishkern.integrations.freezing"):
        run.trainer.train()
    (event,) = run.callback.events
    assert event.step == 2
    assert event.frozen
    assert [record.args[0] for record in caplog.records] == [event]
    logged = [entry["trained_entries"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert logged == [run.freezer.initial.count, event.entries_kept, event.entries_kept]
    checkpoint = tmp_path / "checkpoint-2"
    assert fk.Selection.load(checkpoint / SELECTION) == event.selection
    assert fk.Freezer.saved_selection(checkpoint / FILE) == event.selection
    sizes = [len(kept["exp_avg"]) for kept in torch.load(checkpoint / "optimizer.pt")["state"].values()]
    assert sum(sizes) == event.entries_kept


def test_training_again_goes_on(tmp_path):
    """The optimizer's selection has shrunk since the callback was made, and that is no mistake."""
    run = Run(tmp_path, max_steps=2, save_strategy="no")
    run.trainer.train()
    run.trainer.train()
    assert [event.step for event in run.callback.events] == [2, 4]


def test_another_optimizer_is_refused(tmp_path):
    run = Run(tmp_path, max_steps=1)
    run.trainer.optimizer = fk.MaskedAdamW(run.model, run.optimizer.selection, lr=1e-2)
    with pytest.raises(ValueError, match="another optimizer than the freezer"):
        run.trainer.train()


def resumed(folder: Path, step: int) -> Run:
    checkpoint = folder / f"checkpoint-{step}"
    run = Run(folder, fk.Selection.load(checkpoint / SELECTION))
    run.trainer.train(resume_from_checkpoint=str(checkpoint))
    return run


def test_the_same_freezer_goes_back_to_a_checkpoint(tmp_path):
    """As after an interruption, in one process: what it has read since then is forgotten."""
    run = Run(tmp_path, max_steps=4, save_steps=1)
    run.freezer.every = 10
    run.trainer.train()
    before = run.freezer.history
    run.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.freezer.count == 4
    assert run.freezer.history == before


def test_a_checkpoint_without_a_freezer_is_refused(tmp_path):
    Run(tmp_path, max_steps=1, save_steps=1).trainer.train()
    (tmp_path / "checkpoint-1" / FILE).unlink()
    with pytest.raises(ValueError, match=r"training resumes at step 1, and .*checkpoint-1 has no freezer.safetensors"):
        resumed(tmp_path, 1)


@pytest.mark.slow
def test_stopping_after_an_event_and_going_on_is_not_stopping(tmp_path):
    whole = Run(tmp_path / "whole")
    whole.trainer.train()
    stopped = Run(tmp_path / "part")
    stopped.trainer.train()
    run = resumed(tmp_path / "part", 3)
    assert len(run.callback.events) == 2
    assert run.callback.events == whole.callback.events[1:]
    assert any(event.frozen for event in run.callback.events)
    for name, value in whole.values().items():
        assert torch.equal(run.values()[name], value), name
    ours, theirs = whole.freezer.state_dict(), run.freezer.state_dict()
    assert ours["header"] == theirs["header"]
    assert all(torch.equal(tensor, theirs["tensors"][name]) for name, tensor in ours["tensors"].items())
