"""Selecting inside ``train()`` gives the same model as selecting before it, also after resuming."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.integrations.test_trainer import (
    SHORT,
    Rows,
    adapted,
    assert_only_the_selection_moved,
    selected,
    trainer,
    undropped,
    values,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from fishkern.integrations.trainer import FILE, FisherMixin  # noqa: E402


class FisherTrainer(FisherMixin, transformers.Trainer): ...


def selecting(folder: Path, model: nn.Module | None = None, select=None, **options) -> FisherTrainer:
    init, own = options.pop("model_init", None), options.pop("own", {})
    own |= {"select_data": options.pop("select_data")} if "select_data" in options else {}
    return FisherTrainer(
        model=model,
        model_init=init,
        args=transformers.TrainingArguments(**{**SHORT, "output_dir": str(folder), "weight_decay": 0.0, **options}),
        train_dataset=Rows(),
        select=partial(fk.fish_tuning, density=0.3) if select is None else select,
        **own,
    )


def test_it_selects_on_the_trainers_own_batches_and_trains_that(tmp_path):
    model, before = adapted(), adapted()
    start, selection = values(model), selected(before)
    training = selecting(tmp_path / "inside", model)
    with pytest.raises(ValueError, match="nothing has been selected yet"):
        training.selection  # noqa: B018
    training.train()
    assert training.selection == selection
    assert_only_the_selection_moved(model, selection, start)
    assert training.state.log_history[0]["trained_entries"] == selection.count
    trainer(before, tmp_path / "before", selection, weight_decay=0.0).train()
    expected = values(before)
    for name, value in values(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_the_order_of_training_is_what_it_would_be(tmp_path):
    """Estimating reads the data, and draws nothing from the generators that training goes on with."""
    read = selecting(tmp_path / "read", one := adapted())
    read.train()
    selection = read.selection
    given = selecting(tmp_path / "given", other := adapted(), select=lambda model, batches: selection)
    given.train()
    for name, value in values(one).items():
        assert torch.equal(value, values(other)[name]), name


def test_resuming_takes_the_selection_of_the_checkpoint(tmp_path):
    whole = adapted()
    selecting(tmp_path, whole).train()
    expected = values(whole)

    def never(model: nn.Module, batches: object) -> fk.Selection:
        raise AssertionError("it selected again")

    resumed = selecting(tmp_path, adapted(), never)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.selection == fk.Selection.load(tmp_path / "checkpoint-2" / FILE)
    for name, value in values(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    last = selecting(tmp_path, adapted(), never)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 4


def test_a_checkpoint_without_a_selection_says_why(tmp_path):
    selecting(tmp_path, adapted(), max_steps=2).train()
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no selection.safetensors: it was saved by a training with"):
        selecting(tmp_path, adapted()).train(resume_from_checkpoint=True)


def test_an_interrupt_gives_the_clipping_back(tmp_path):
    class Interrupting(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    training = selecting(tmp_path, adapted(), max_grad_norm=0.05)
    training.add_callback(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert training.args.max_grad_norm == 0.05


def test_every_call_of_model_init_gets_a_selection_of_its_own(tmp_path):
    seen = []

    def select(model: nn.Module, batches: object) -> fk.Selection:
        seen.append(model)
        return fk.fish_tuning(model, batches, density=0.3)

    training = selecting(tmp_path, select=select, model_init=adapted)
    training.train()
    training.train()
    assert len(seen) == 2
    assert seen[0] is not seen[1]
    assert sum(type(callback).__name__ == "FisherCallback" for callback in training.callback_handler.callbacks) == 1


def test_weight_decay_has_the_trainers_exceptions(tmp_path):
    training = selecting(tmp_path, adapted(), weight_decay=0.1, max_grad_norm=2.0)
    optimizer = training.create_optimizer()
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {decay for name, decay in decays.items() if name.endswith("bias")} == {0.0}
    assert {decay for name, decay in decays.items() if not name.endswith("bias")} == {0.1}
    assert optimizer.max_grad_norm == 2.0
    assert training.create_optimizer() is optimizer


def test_a_rule_selects_by_the_fisher_of_the_trainers_data(tmp_path):
    model = adapted()
    start, expected = values(model), fk.select(fk.estimate(adapted(), [Rows().batch]), fk.GlobalTopK(density=0.1))
    training = selecting(tmp_path, model, fk.GlobalTopK(density=0.1))
    training.train()
    assert training.selection.overlap(expected) > 0.99  # equal but for ties of rounding
    assert_only_the_selection_moved(model, training.selection, start)


def test_it_selects_on_data_of_its_own(tmp_path):
    """Training goes on with the Trainer's."""
    seen = []

    def select(model: nn.Module, batches: object) -> fk.Selection:
        seen.extend(batches)
        return fk.fish_tuning(model, seen, density=0.3)

    own = [{key: value[:3] for key, value in Rows().batch.items()}]
    training = selecting(tmp_path, adapted(), select, select_data=own)
    training.train()
    assert seen == own
    assert training.selection == fk.fish_tuning(adapted(), own, density=0.3)
    assert training.state.global_step == 4


REFUSED = {
    "nothing callable": (0.3, r"select must be a function .*, or a rule such as .*; got float"),
    "a class": (fk.GlobalTopK, "got the class GlobalTopK: call it"),
    "a selection": (fk.Selection({"w": (2,)}, {}), r"got a Selection: to train one, use a plain Trainer"),
}


@pytest.mark.parametrize("select, message", REFUSED.values(), ids=REFUSED)
def test_what_selects_is_checked_when_it_is_made(tmp_path, select, message):
    """Not minutes later, when training starts."""
    with pytest.raises(TypeError, match=message):
        selecting(tmp_path, adapted(), select)


def test_what_it_gives_is_checked(tmp_path):
    with pytest.raises(TypeError, match="select must give a Selection, got dict"):
        selecting(tmp_path, adapted(), lambda model, batches: {"w": [0]}).train()


def smoothed(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.3)


def losses(model, batch):
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3, reduction="none")


OTHERS = {"compute_loss_func": {"compute_loss_func": smoothed}, "label_smoothing_factor=0.3": {"smoothing": 0.3}}


@pytest.mark.parametrize("said, options", OTHERS.items(), ids=OTHERS)
def test_a_loss_that_the_scores_are_not_of_is_warned_of(tmp_path, said, options):
    arguments = {"label_smoothing_factor": options["smoothing"]} if "smoothing" in options else {}
    own = {key: value for key, value in options.items() if key != "smoothing"}
    message = rf"does not train the model's own loss \({said}\), and the scores are those of the model's own: give"
    with pytest.warns(UserWarning, match=message):
        selecting(tmp_path, adapted(), **arguments, own=own).create_optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        told = partial(fk.fish_tuning, density=0.3, likelihood=losses)
        selecting(tmp_path, adapted(), told, **arguments, own=own).create_optimizer()
        selecting(tmp_path, adapted()).create_optimizer()


def test_another_algorithm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trains with MaskedAdamW: leave optim='adamw_torch', got 'adafactor'"):
        selecting(tmp_path, adapted(), optim="adafactor").train()


PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.integrations.test_trainer import undropped, values
from tests.integrations.test_trainer_mixin import selecting
folder, rank = Path(sys.argv[1]), sys.argv[2]
options = dict(per_device_train_batch_size=2, weight_decay=0.1, max_grad_norm=0, ddp_backend="gloo")
training = selecting(folder / "run", undropped(), **options)
training.train()
assert torch.distributed.get_world_size() == 2
training.selection.save(folder / f"{rank}.safetensors")
torch.save(values(training.model), folder / f"{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_select_and_train_as_one(tmp_path):
    """Under torchrun's variables: each step has the rows that one process would take, two on each rank."""
    root = Path(__file__).resolve().parents[2]
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | launched | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(root)},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    alone, start = undropped(), values(undropped())
    selecting(tmp_path / "alone", alone, weight_decay=0.1, max_grad_norm=0).train()
    expected = values(alone)
    one, other = (fk.Selection.load(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert one == other == selected(adapted())
    for found in (torch.load(tmp_path / f"{rank}.pt") for rank in range(2)):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
            kept = ~one.mask(name) if name in one else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value[kept], start[name][kept]), name


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_an_optimizer_of_the_users_is_refused(tmp_path, given):
    """Everything would be trained by it, or it would be left out."""
    model = adapted()
    own = (torch.optim.SGD(model.parameters(), lr=0.1), None) if given == "optimizers" else (torch.optim.SGD, {})
    with pytest.raises(ValueError, match="makes the optimizer of what it selects.*leave optimizers="):
        selecting(tmp_path, model, own={given: own})


class FullyShardedDataParallel(torch.nn.Module):
    """By its name what FSDP1 wraps a model in."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_model_that_fsdp1_shards_is_refused(tmp_path):
    trainer = selecting(tmp_path, adapted())
    with pytest.raises(fk.UnsupportedModuleError, match="FSDP shards the parameters of 'the model'.* by FSDP2"):
        trainer.create_optimizer(FullyShardedDataParallel(adapted()))


def test_a_compute_loss_of_the_users_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(FisherTrainer, "compute_loss", lambda self, *args: None, raising=False)
    with pytest.warns(UserWarning, match=r"does not train the model's own loss \(FisherTrainer.compute_loss\)"):
        selecting(tmp_path, adapted()).create_optimizer()
