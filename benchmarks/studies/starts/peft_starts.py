"""The starts that PEFT has: LoRA, PiSSA, EVA, CorDA and LoRA-GA, as its users call them, at one rank for all."""

from __future__ import annotations

from torch import nn

from benchmarks.studies.starts.attach import lora_config
from benchmarks.studies.starts.tasks import Language, Task


def lora(model: nn.Module, task: Task, seed: int) -> nn.Module:
    import peft

    return peft.get_peft_model(model, lora_config(task))


def pissa(model: nn.Module, task: Task, seed: int) -> nn.Module:
    import peft

    return peft.get_peft_model(model, lora_config(task, init_lora_weights="pissa"))


def eva(model: nn.Module, task: Task, seed: int) -> nn.Module:
    """Rho 1 keeps all ranks equal: with another one EVA trains more parameters than the budget."""
    import peft

    config = lora_config(task, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    adapted = peft.get_peft_model(model, config)
    batches = list(task.batches(task.drawn(seed)))
    for batch in batches:
        if not task.language:
            del batch["labels"]  # EVA reads labels as those of tokens
    peft.initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    return adapted


def corda(model: nn.Module, task: Task, seed: int) -> nn.Module:
    """Of a language model the knowledge-preserving mode on its own stories, else the instruction-previewing mode."""
    import peft
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    if isinstance(task, Language):
        method, rows = "kpm", task.drawn(seed, rows=task.knowledge)
    else:
        method, rows = "ipm", task.drawn(seed)
    config = lora_config(task, init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))

    def run_model() -> None:
        for batch in task.batches(rows, 1):  # its hooks take one row at a time
            model(**batch)

    preprocess_corda(model, config, run_model)
    return peft.get_peft_model(model, config)


def lora_ga(model: nn.Module, task: Task, seed: int) -> nn.Module:
    import peft

    config = lora_config(task, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def train_step() -> None:
        for batch in task.batches(task.drawn(seed)):
            model(**batch).loss.backward()

    peft.preprocess_loraga(model, config, train_step)
    return peft.get_peft_model(model, config)
