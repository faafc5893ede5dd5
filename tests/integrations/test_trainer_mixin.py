"""Selecting inside ``train()``: what comes out is what selecting before it gives, also after resuming."""

from __future__ import annotations

import os
import subprocess
import sys
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
    init = options.pop("model_init", None)
    return FisherTrainer(
        model=model,
        model_init=init,
        args=transformers.TrainingArguments(**{**SHORT, "output_dir": str(folder), "weight_decay": 0.0, **options}),
        train_dataset=Rows(),
        select=select or partial(fk.fish_tuning, density=0.3),
    )


def test_it_selects_on_the_trainers_own_batches_and_trains_that(tmp_path):
    model, before = adapted(), adapted()
    start, selection = values(model), selected(before)
    training = selecting(tmp_path / "inside", model)
    training.train()
    assert training.optimizer.optimizer.selection == selection
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
    selection = read.optimizer.optimizer.selection
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
    assert resumed.optimizer.optimizer.selection == fk.Selection.load(tmp_path / "checkpoint-2" / FILE)
    for name, value in values(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    last = selecting(tmp_path, adapted(), never)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 4


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
training.optimizer.optimizer.selection.save(folder / f"{rank}.safetensors")
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
