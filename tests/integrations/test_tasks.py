"""The table of tasks agrees with transformers, with PEFT, and with what the library itself recognises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from fishkern import hosts
from fishkern.integrations.columns import CANDIDATES
from fishkern.integrations.examples import Encoder
from fishkern.integrations.tasks import TASKS, task_of_adapter, task_of_config

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LOSSES = {  # the names that hosts has for a head with two classes
    "sequence-classification": "classification",
    "image-classification": "classification",
}


def architectures(task: str) -> list[str]:
    """Every class of transformers that its auto class loads for a task."""
    names = getattr(transformers, TASKS[task].auto_class)._model_mapping._model_mapping.values()
    return sorted({name for entry in names for name in ([entry] if isinstance(entry, str) else entry)})


def config_of(architecture: str, encoder_decoder: bool) -> SimpleNamespace:
    return SimpleNamespace(
        architectures=[architecture], is_encoder_decoder=encoder_decoder, problem_type=None, num_labels=2
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_complete(name):
    task = TASKS[name]
    assert architectures(name)
    assert hasattr(Encoder, "_" + name.replace("-", "_"))
    assert {*task.columns, *task.optional} <= CANDIDATES.keys()
    if task.peft_type is not None:
        assert task.peft_type in list(peft.TaskType)
        assert task_of_adapter({"task_type": task.peft_type}) == name


def test_an_adapter_without_a_task_has_none():
    assert task_of_adapter({}) is task_of_adapter({"task_type": None}) is None


@pytest.mark.parametrize("name", TASKS)
def test_the_library_recognises_the_same_task(name):
    """By the name of the class; hosts also distinguishes the losses of a classifier."""
    for architecture in architectures(name):
        config = config_of(architecture, encoder_decoder=name == "seq2seq-lm")
        model = type(architecture, (nn.Module,), {})()
        model.config = config
        task = task_of_config(config)
        assert hosts.task(model) == LOSSES.get(task, task), architecture
