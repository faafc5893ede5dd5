"""A Trainer with a penalty: the steps are those of a loop that writes the objective out, also when it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.integrations.test_trainer import SHORT, Rows, values
from tests.support import zoo
from tests.support.ranks import launched

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fishkern.integrations.penalty import FILE, PenaltyMixin  # noqa: E402

PROGRAM = "tests.integrations.penalty_program"


class PenaltyTrainer(PenaltyMixin, transformers.Trainer): ...


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = zoo.bert_classifier().model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def fisher_of(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters() if "classifier" not in n}


def trainer(folder: Path, model: nn.Module, penalty, **options) -> PenaltyTrainer:
    plain = dict(optim="sgd", lr_scheduler_type="constant", learning_rate=0.05, weight_decay=0.0, max_grad_norm=0.0)
    arguments = transformers.TrainingArguments(**{**SHORT, **plain, "output_dir": str(folder), **options})
    return PenaltyTrainer(model, arguments, train_dataset=Rows(), penalty=penalty, compute_loss_func=mean_loss)


def mean_loss(outputs, labels, num_items_in_batch):
    """The mean over all examples of a step; this model's own loss is not divided by the number of batches."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def by_hand(model: nn.Module, batches: list[list[dict]], fisher: dict, weight: float, lr: float = 0.05) -> None:
    """Gradient descent on the mean of the losses of a step plus the penalty, written out."""
    anchor = values(model)
    for step in batches:
        model.zero_grad()
        loss = sum(model(**batch).loss for batch in step) / len(step)
        terms = [(fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters() if n in fisher]
        (loss + weight / 2 * sum(terms)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_step_has_the_penalty_once(tmp_path, accumulated):
    model, twin = model_of(), model_of()
    fisher = fisher_of(model)
    sizes = dict(gradient_accumulation_steps=accumulated, per_device_train_batch_size=16 // 4 // accumulated)
    seen: list[dict] = []

    class Watching(PenaltyTrainer):
        def compute_loss(self, model, inputs, **options):
            seen.append({key: value.clone() for key, value in inputs.items()})
            return super().compute_loss(model, inputs, **options)

    training = trainer(tmp_path, model, fk.QuadraticPenalty(fisher, model, weight=3), **sizes)
    training.__class__ = Watching
    training.train()
    steps = [seen[n : n + accumulated] for n in range(0, len(seen), accumulated)]
    assert len(steps) == 4
    wrong = model_of()
    by_hand(twin, steps, fisher, 3)
    by_hand(wrong, steps, fisher, 6)  # as if the penalty were added twice
    for name, value in values(twin).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-5, atol=1e-6)
    apart = [(values(wrong)[name] - value).abs().max() for name, value in values(twin).items()]
    assert max(apart) > 1e-4, "the comparison would not see a penalty that is added twice"
    logged = [entry["penalty"] for entry in training.state.log_history if "loss" in entry]
    assert logged[0] == 0
    assert logged == sorted(logged)
    assert logged[-1] > 0


def test_evaluation_and_the_logged_loss_leave_it_out(tmp_path):
    model, plain = model_of(), model_of()
    training = trainer(tmp_path, model, fk.QuadraticPenalty(fisher_of(model), model, weight=1e-6), max_steps=1)
    training.train()
    arguments = training.args
    reference = transformers.Trainer(plain, arguments, train_dataset=Rows(), compute_loss_func=mean_loss)
    reference.train()
    losses = [next(e["loss"] for e in one.state.log_history if "loss" in e) for one in (training, reference)]
    assert losses[0] == losses[1]
    assert training.evaluate(Rows()).keys() == reference.evaluate(Rows()).keys()


def test_a_resumed_training_goes_on_to_the_same_bits(tmp_path):
    whole = model_of()
    trainer(tmp_path, whole, fk.QuadraticPenalty(fisher_of(whole), whole, weight=3), optim="adamw_torch").train()
    expected = values(whole)
    assert json.loads((tmp_path / "checkpoint-2" / FILE).read_text())["weight"] == 3
    model = model_of()
    resumed = trainer(tmp_path, model, fk.QuadraticPenalty(fisher_of(model), model, weight=3), optim="adamw_torch")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in values(model).items():
        assert torch.equal(value, expected[name]), name

    trained = type(model).from_pretrained(tmp_path / "checkpoint-2")
    late = trainer(tmp_path, trained, fk.QuadraticPenalty(fisher_of(trained), trained, weight=3))
    with pytest.raises(ValueError, match=r"another penalty than it had \(digest differ\): make it as before"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = trainer(tmp_path, model_of(), fk.QuadraticPenalty(fisher_of(model), model, weight=3))
    with pytest.raises(ValueError, match="the penalty is of another model than the Trainer's"):
        other.train()
    (tmp_path / "checkpoint-2" / FILE).unlink()
    model = model_of()
    with pytest.raises(ValueError, match="it was trained without a penalty"):
        trainer(tmp_path, model, fk.QuadraticPenalty(fisher_of(model), model, weight=3)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_it_resumes_from_the_folder_that_train_is_given(tmp_path):
    """Whatever another training has saved in the output folder."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    whole = model_of()
    trainer(first, whole, fk.QuadraticPenalty(fisher_of(whole), whole, weight=3)).train()
    model = model_of()
    trainer(second, model, fk.QuadraticPenalty(fisher_of(model), model, weight=9)).train()
    model = model_of()
    with pytest.raises(ValueError, match=r"another penalty than it had \(weight differ\)"):
        trainer(second, model, fk.QuadraticPenalty(fisher_of(model), model, weight=9)).train(
            resume_from_checkpoint=str(first / "checkpoint-2")
        )
    model = model_of()
    resumed = trainer(third, model, fk.QuadraticPenalty(fisher_of(model), model, weight=3))
    resumed.train(resume_from_checkpoint=str(first / "checkpoint-2"))
    assert resumed.args.resume_from_checkpoint is None
    for name, value in values(model).items():
        assert torch.equal(value, values(whole)[name]), name


def test_a_penalty_of_a_model_that_was_resized_is_refused_by_name():
    model = zoo.llama().model
    fisher = {"model.embed_tokens.weight": torch.ones_like(model.model.embed_tokens.weight)}
    penalty = fk.QuadraticPenalty(fisher, model, weight=1)
    model.resize_token_embeddings(zoo.V + 3)
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight is \(\d+, \d+\) now, and was .* make it after resizing"
    ):
        penalty()


def test_the_penalty_is_clipped_with_the_loss(tmp_path):
    model = model_of()
    start = values(model)
    fisher = fisher_of(model)
    penalty = fk.QuadraticPenalty(fisher, model, weight=1e6)
    with torch.no_grad():
        model.bert.pooler.dense.weight += 1  # far from the anchor: the penalty dominates
    start = values(model)
    trainer(tmp_path, model, penalty, max_grad_norm=1.0, max_steps=1).train()
    norm = sum((value - start[name]).square().sum() for name, value in values(model).items()).sqrt()
    torch.testing.assert_close(norm, torch.tensor(0.05), rtol=1e-3, atol=0)


def test_what_is_refused(tmp_path):
    model = model_of()
    for wrong in (None, lambda: 0, fk.QuadraticPenalty):
        with pytest.raises(TypeError, match=r"penalty must be a penalty such as fishkern.QuadraticPenalty"):
            trainer(tmp_path, model, wrong)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path):
    """Under DistributedDataParallel the penalty counts once, not once for each rank, also over several batches."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (one,) = launched(PROGRAM, 1, tmp_path / "one", ["one batch", "two batches"])
    two = launched(PROGRAM, 2, tmp_path / "two", ["one batch", "two batches"])
    assert two[0] == two[1]
    for case, values_of_one in one.items():
        assert values_of_one[-1] > 1e-4  # the penalty has something to say
        torch.testing.assert_close(torch.tensor(two[0][case]), torch.tensor(values_of_one), rtol=1e-4, atol=1e-4)
    assert abs(one["one batch"][0] - one["two batches"][0]) < 1e-3  # the same steps, in other batches
