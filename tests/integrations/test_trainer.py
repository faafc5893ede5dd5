"""transformers' Trainer with a masked optimizer: trains the selection alone, clips by it, stops and goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.methods import fish_tuning
from fishkern.statistics.shards import Ranks
from tests.support import zoo

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
from fishkern.integrations.trainer import FILE, FisherCallback  # noqa: E402


class Rows(torch.utils.data.Dataset):
    def __init__(self, size: int = 16) -> None:
        self.batch = zoo.class_batch(size, 7)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, n: int) -> dict:
        return {key: value[n] for key, value in self.batch.items()}


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights="pissa", task_type="SEQ_CLS")
    return peft.get_peft_model(zoo.bert_classifier().model, config).to(dtype)


def undropped() -> nn.Module:
    model = adapted()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def selected(model: nn.Module) -> fk.Selection:
    return fish_tuning(model, [Rows().batch], density=0.3)


SHORT = dict(  # a training of four steps on a CPU
    max_steps=4,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    weight_decay=0.1,
    logging_steps=1,
    save_steps=2,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    seed=1,
)


def trainer(model: nn.Module, folder: Path, selection: fk.Selection, **options) -> transformers.Trainer:
    evaluated = options.pop("eval_dataset", None)
    arguments = transformers.TrainingArguments(**{**SHORT, "output_dir": str(folder), **options})
    optimizer = fk.MaskedAdamW(model, selection, lr=1e-2, weight_decay=arguments.weight_decay)
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        eval_dataset=evaluated,
        optimizers=(optimizer, None),
        callbacks=[FisherCallback(selection)],
    )


def test_a_prefix_that_checkpointing_would_drop_is_not_trained(tmp_path):
    """The Trainer switches checkpointing on after the optimizer is made; the prefix would stay as it is."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    model = peft.get_peft_model(zoo.bert_classifier().model, config)
    selection = fish_tuning(model, [], k=5, order="magnitude")
    with pytest.raises(fk.UnsupportedModuleError, match="loses its prefix: switch checkpointing off"):
        trainer(model, tmp_path, selection, gradient_checkpointing=True).train()
    model.gradient_checkpointing_disable()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer(model, tmp_path, selection, max_steps=1).train()
    assert any((parameter != before[name]).any() for name, parameter in model.named_parameters() if "prompt" in name)


def assert_only_the_selection_moved(model: nn.Module, selection: fk.Selection, start: dict) -> None:
    """And nearly all of it did: a few gradients are zero."""
    moved = {name: value != start[name] for name, value in values(model).items()}
    for name, where in moved.items():
        allowed = selection.mask(name) if name in selection else torch.zeros_like(where)
        assert not (where & ~allowed).any(), name
    assert sum(int(moved[name].sum()) for name in selection.names) > 0.9 * selection.count


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=["plain", "accumulation", "checkpointing", "bf16"],
)
def test_only_the_selection_moves(tmp_path, options):
    model = adapted()
    selection, start = selected(model), values(model)
    trainer(model, tmp_path, selection, **options).train()
    assert_only_the_selection_moved(model, selection, start)


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"gradient_checkpointing": True}],
    ids=["accumulation", "checkpointing"],
)
def test_what_is_trained_does_not_depend_on_how(tmp_path, options):
    """Adam is blind to the scale of a loss, which accumulation may change, as long as nothing is clipped."""
    found = []
    for name, changes in (("plain", {}), ("other", options)):
        model = undropped()
        trainer(model, tmp_path / name, selected(model), max_grad_norm=0, **changes).train()
        found.append(values(model))
    for name, value in found[1].items():
        torch.testing.assert_close(value, found[0][name], rtol=0, atol=1e-4)


def test_clipping_is_by_the_norm_of_what_moves(tmp_path):
    model = adapted()
    selection = selected(model)
    training = trainer(model, tmp_path, selection, max_grad_norm=1e-3)
    training.train()
    assert training.args.max_grad_norm == 1e-3
    logged = [entry for entry in training.state.log_history if "loss" in entry]
    assert all(entry["trained_entries"] == selection.count for entry in logged)
    assert logged[-1]["grad_norm"] == pytest.approx(training.optimizer.optimizer.grad_norm.item())
    assert training.optimizer.optimizer.max_grad_norm == 1e-3


def test_stopping_and_going_on_is_not_stopping(tmp_path):
    whole = adapted()
    selection = selected(whole)
    trainer(whole, tmp_path / "whole", selection).train()
    stopped = adapted()
    trainer(stopped, tmp_path / "part", selection, max_steps=4).train()
    checkpoint = tmp_path / "part" / "checkpoint-2"
    assert fk.Selection.load(checkpoint / FILE) == selection
    state = torch.load(checkpoint / "optimizer.pt")["state"]
    assert sum(len(kept["exp_avg"].view(-1)) for kept in state.values()) == selection.count  # compact
    resumed = adapted()
    trainer(resumed, tmp_path / "part", selection).train(resume_from_checkpoint=str(checkpoint))
    expected = values(whole)
    for name, value in values(resumed).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_the_best_checkpoint_stays_loaded(tmp_path):
    """In 16 bits the optimizer keeps float32 copies, which must not bring back the weights of the last step."""
    model = adapted(torch.bfloat16)
    selection = selected(model)
    options = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    options |= dict(metric_for_best_model="eval_loss", greater_is_better=True, eval_dataset=Rows())
    training = trainer(model, tmp_path, selection, **options)
    training.train()
    assert training.state.best_global_step < 4
    best, optimizer = values(model), training.optimizer.optimizer
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(**Rows().batch).loss.backward()
    optimizer.step()
    for name, value in values(model).items():
        assert torch.equal(value, best[name]), name


def test_arguments_that_the_optimizer_does_not_have_are_said_once(tmp_path):
    """A Trainer that is given its optimizer ignores them without a word."""
    model = adapted()
    selection = selected(model)
    message = (
        r"no effect, since the Trainer was given its optimizer: learning_rate=0.5 \(the optimizer has 0.01\), "
        r"adam_beta2=0.9 \(the optimizer has 0.999\). Set them where"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        trainer(model, tmp_path, selection, learning_rate=0.5, adam_beta2=0.9, lr_scheduler_type="constant").train()
    assert len([one for one in warned if "no effect" in str(one.message)]) == 1


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0}, {"warmup_steps": 2}], ids=str)
def test_the_callback_leaves_nothing_to_warn_of(tmp_path, options):
    """It hands the clipping over before the first step, also that there is none; and defaults are nobody's wish."""
    model = adapted()
    selection = selected(model)
    arguments = transformers.TrainingArguments(**{**SHORT, "output_dir": str(tmp_path), "max_steps": 2, **options})
    arguments.learning_rate = transformers.TrainingArguments("x").learning_rate
    optimizer = fk.MaskedAdamW(model, selection, lr=1e-2, weight_decay=0.1, release_grads=True)
    training = transformers.Trainer(
        model, arguments, train_dataset=Rows(), optimizers=(optimizer, None), callbacks=[FisherCallback(selection)]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*|.*pin_memory.*")
        training.train()
    assert optimizer.max_grad_norm == (options.get("max_grad_norm", 1.0) or float("inf"))


def test_another_optimizer_or_selection_is_refused(tmp_path):
    model = adapted()
    selection = selected(model)
    plain = trainer(model, tmp_path, selection)
    plain.optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="needs a masked optimizer, and this Trainer has a AdamW"):
        plain.train()
    other = fish_tuning(model, [], density=0.1, order="random")
    with pytest.raises(ValueError, match="another selection"):
        training = trainer(model, tmp_path, selection)
        training.add_callback(FisherCallback(other))
        training.train()


class Interrupted(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_arguments_of_an_interrupted_training_still_clip(tmp_path):
    """Another optimizer with the same arguments clips to the norm in them, not to the 0 that the Trainer was shown."""
    model = adapted()
    selection = selected(model)
    first = trainer(model, tmp_path, selection, max_grad_norm=0.01)
    first.add_callback(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    model = adapted()
    optimizer = fk.MaskedAdamW(model, selection, lr=1e-2)
    callbacks = [FisherCallback(selection)]
    transformers.Trainer(
        model, first.args, train_dataset=Rows(), optimizers=(optimizer, None), callbacks=callbacks
    ).train()
    assert optimizer.max_grad_norm == 0.01
    assert first.args.max_grad_norm == 0.01


def test_a_checkpoint_holds_the_clipping_that_was_asked_for(tmp_path):
    model = adapted()
    trainer(model, tmp_path, selected(model), max_grad_norm=0.01).train()
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.max_grad_norm == 0.01


class Parts:
    """A selection of which each rank has its own entries; it counts how often this rank helps to gather it."""

    is_sharded, gatherings = True, 0

    def __init__(self, whole: fk.Selection) -> None:
        self.whole = whole

    def gathered(self) -> fk.Selection:
        self.gatherings += 1
        return self.whole


@pytest.mark.parametrize("writes", [True, False])
def test_every_rank_helps_to_gather_a_selection_that_one_saves(tmp_path, monkeypatch, writes):
    """The one that writes would wait for the others for ever."""
    model = adapted()
    monkeypatch.setattr("fishkern.integrations.trainer.check_selection", lambda selection: None)
    parts, state = Parts(selected(model)), SimpleNamespace(global_step=3, is_world_process_zero=writes)
    monkeypatch.setattr(Ranks, "gathered", lambda ranks, value: [value, True])
    (tmp_path / "checkpoint-3").mkdir()
    FisherCallback(parts).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None, model=model)
    assert parts.gatherings == 1
    saved = tmp_path / "checkpoint-3" / FILE
    assert fk.Selection.load(saved) == parts.whole if writes else not saved.exists()


def test_a_checkpoint_without_an_optimizer_goes_on(tmp_path):
    """As with torch's own, the state begins anew; the trained values are not taken for another start."""
    model = adapted()
    selection = selected(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer(model, tmp_path, selection, save_only_model=True).train()
    model = adapted()
    loaded = fk.Selection.load(tmp_path / "checkpoint-2" / FILE)
    later = trainer(model, tmp_path, loaded, save_only_model=True)
    assert later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 4
    assert_only_the_selection_moved(model, selection, start)
