"""transformers' Trainer with TR-PTS: the recipe is attached, in every checkpoint, and attached again on resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.tokens import TokenReduction

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fishkern.integrations.trainer import FILE, FisherCallback, FisherMixin  # noqa: E402
from tests.integrations.test_trainer import SHORT, assert_only_the_selection_moved, values  # noqa: E402
from tests.methods import test_tr_pts  # noqa: E402
from tests.methods.test_tr_pts import batches  # noqa: E402

vit = partial(test_tr_pts.vit, num_hidden_layers=3)
RECIPE = TokenReduction([0, 1], keep=0.5)
OPTIONS = {"save_steps": 2, "weight_decay": 0.0, "max_steps": 4}


class Images(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.batch = {key: torch.cat([batch[key] for batch in batches()]) for key in batches()[0]}

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, n: int) -> dict:
        return {key: value[n] for key, value in self.batch.items()}


class FisherTrainer(FisherMixin, transformers.Trainer): ...


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module")
def selection() -> fk.Selection:
    return fk.tr_pts(vit(), batches(), token_layers=[]).selection


def trainer(
    model: nn.Module, folder: Path, selection: fk.Selection, reduction: TokenReduction | None = None, **options
):
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**{**SHORT, **OPTIONS, "output_dir": str(folder), **options}),
        train_dataset=Images(),
        eval_dataset=Images(),
        optimizers=(fk.MaskedAdamW(model, selection, lr=1e-2), None),
        callbacks=[FisherCallback(selection, reduction)],
    )


def test_resuming_attaches_the_recipe_and_ends_in_the_same_bits(tmp_path, selection):
    model, start = vit(), values(vit())
    trainer(model, tmp_path, selection, RECIPE).train()
    assert fk.tokens.attached(model) == RECIPE
    assert_only_the_selection_moved(model, selection, start)
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert TokenReduction.load(folder / "token_reduction.json") == RECIPE
        assert fk.Selection.load(folder / FILE) == selection
    assert TokenReduction.load(tmp_path / "checkpoint-2" / "token_reduction.json") == RECIPE
    resumed = vit()  # as in another process, where nobody names the recipe
    trainer(resumed, tmp_path, selection).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fk.tokens.attached(resumed) == RECIPE
    for name, value in values(resumed).items():
        assert torch.equal(value, values(model)[name]), name


def test_recipes_that_differ_are_refused(tmp_path, selection):
    other = TokenReduction([2], keep=0.5)
    reduced = fk.tokens.attach(vit(), other)
    trainer(reduced, tmp_path / "a", selection, max_steps=2).train()
    assert TokenReduction.load(tmp_path / "a" / "checkpoint-2" / "token_reduction.json") == other, "nobody named it"
    with pytest.raises(ValueError, match=r"the callback has .*layers=\(0, 1\).*, the model has .*layers=\(2,\)"):
        trainer(reduced, tmp_path / "a", selection, RECIPE).train()
    assert fk.tokens.attached(reduced) == other
    trainer(model := vit(), tmp_path / "b", selection, RECIPE).train()
    trainer(without := vit(), tmp_path / "c", selection).train()
    assert fk.tokens.attached(without) is None
    assert not (tmp_path / "c" / "checkpoint-4" / "token_reduction.json").exists()
    assert any(not torch.equal(value, values(without)[name]) for name, value in values(model).items())
    with pytest.raises(ValueError, match=r"the checkpoint has .*layers=\(0, 1\).*, the callback has .*layers=\(2,\)"):
        trainer(vit(), tmp_path / "b", selection, other).train(resume_from_checkpoint=True)
    for model, given in ((reduced, None), (vit(), RECIPE)):
        with pytest.raises(ValueError, match="checkpoint-4 was trained without token reduction"):
            trainer(model, tmp_path / "c", selection, given).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_loaded(tmp_path, selection):
    """Although transformers saves the layers of a ViT under names that its Trainer does not find when it loads them."""
    model = vit()
    options = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    options |= dict(metric_for_best_model="eval_loss", greater_is_better=True)
    training = trainer(model, tmp_path, selection, RECIPE, **options)
    training.train()
    best = training.state.best_global_step
    assert best < 4
    steps = trainer(vit(), tmp_path / "again", selection, RECIPE, max_steps=4)
    steps.add_callback(StopAt(best))
    steps.train()
    for name, value in values(steps.model).items():
        assert torch.equal(values(model)[name], value), name


def test_a_mixin_takes_both_halves(tmp_path):
    """Selected inside ``train()``, and resumed from the checkpoint without selecting again."""
    select = partial(fk.tr_pts, keep=0.5)

    def never(model: nn.Module, batches: object) -> fk.Selection:
        raise AssertionError("it selected again")

    def training(model: nn.Module, select: object) -> FisherTrainer:
        arguments = transformers.TrainingArguments(**{**SHORT, **OPTIONS, "output_dir": str(tmp_path)})
        return FisherTrainer(model, arguments, train_dataset=Images(), select=select)

    whole, resumed, expected = vit(), vit(), select(vit(), batches())
    training(whole, select).train()
    folder = tmp_path / "checkpoint-2"
    assert fk.TaskRelevance.load(folder) == fk.TaskRelevance.load(tmp_path / "checkpoint-4")
    assert fk.TaskRelevance.load(folder).selection.overlap(expected.selection) > 0.95  # equal but for rounding
    assert fk.tokens.attached(whole) == TokenReduction.load(folder / "token_reduction.json")
    training(resumed, never).train(resume_from_checkpoint=str(folder))
    assert fk.tokens.attached(resumed) == fk.tokens.attached(whole)
    for name, value in values(resumed).items():
        assert torch.equal(value, values(whole)[name]), name


def fisher_trainer(folder: Path, model: nn.Module, **options) -> FisherTrainer:
    arguments = transformers.TrainingArguments(**{**SHORT, **OPTIONS, "output_dir": str(folder), **options})
    return FisherTrainer(model, arguments, train_dataset=Images(), select=fk.GlobalTopK(density=0.1))


def test_it_resumes_from_the_folder_that_train_is_given(tmp_path):
    """This model's checkpoints have other names, so its weights are loaded by us: never those of another training."""
    first, second = tmp_path / "first", tmp_path / "second"
    whole = vit()
    fisher_trainer(first, whole).train()
    fisher_trainer(second, vit(), learning_rate=0.1).train()
    checkpoint = str(first / "checkpoint-2")
    for folder in (second, tmp_path / "third"):
        model = vit()
        fisher_trainer(folder, model).train(resume_from_checkpoint=checkpoint)
        for name, value in values(model).items():
            assert torch.equal(value, values(whole)[name]), name


def test_a_callback_alone_asks_where_training_resumes(tmp_path, selection):
    first, second = tmp_path / "first", tmp_path / "second"
    whole = vit()
    trainer(whole, first, selection).train()
    trainer(vit(), second, selection, logging_steps=2).train()
    checkpoint = str(first / "checkpoint-2")
    with pytest.raises(ValueError, match="set resume_from_checkpoint= of its TrainingArguments to the folder, too"):
        trainer(vit(), second, selection).train(resume_from_checkpoint=checkpoint)
    model = vit()
    trainer(model, second, selection, resume_from_checkpoint=checkpoint).train(resume_from_checkpoint=checkpoint)
    for name, value in values(model).items():
        assert torch.equal(value, values(whole)[name]), name
