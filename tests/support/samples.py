"""The content of the sample files in ``tests/old_files``: models, selections and training, made from formulas.

``python -m tests.old_files.write`` saves it with the revision at hand, and ``tests/test_old_files.py`` demands it from
what earlier revisions saved. No value is drawn at random, so it does not depend on the version of torch.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fishkern as fk
from fishkern.freezing import Track
from fishkern.freezing.saved import FreezerState, Read
from fishkern.statistics import Covered, Precision
from fishkern.tokens import TokenReduction
from tests.support import zoo

FOLDER = Path(__file__).resolve().parents[1] / "old_files"

TOKEN_REDUCTION = TokenReduction([4, 7, 10], 0.7, merge=False, place="after_layer")


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Multiples of 1/64 between -50/64 and 50/64, others for each name; every floating dtype holds them exactly."""
    first = zlib.crc32(name.encode()) % 101
    return ((torch.arange(math.prod(shape)) * 37 + first) % 101 - 50).view(shape) / 64


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """The same model with the numbers of its parameters' names."""
    for name, parameter in model.named_parameters():
        parameter.copy_(numbers(name, parameter.shape))
    return model


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 3), nn.LayerNorm(3)).to(dtype))


POOL = {"0.weight": (20, 16), "0.bias": (20,), "1.weight": (3, 20), "1.bias": (3,)}

PROVENANCE = {
    "definition": {"estimator": "DiagonalFisher", "fisher_type": "empirical", "unit": "example"},
    "runs": [{"model": "Sequential", "seed": 0}, {"model": "Sequential", "seed": 1}],
}

COVERAGE = {
    "0.weight": Covered("fused", 320),
    "0.bias": Covered("generic", 20, "a module without a rule"),
    "1.weight": Covered("loop", 60, "not used by its own module"),
    "1.bias": Covered("sketch", 3),
    "2.weight": Covered("left out", 3, "requires_grad=False"),
}

STATISTICS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "shards": {"max_shard_size": 300},
    "bare": {},
}
"""Files of statistics, and the options each is saved with; the bare one has neither provenance nor coverage."""


def statistics(name: str) -> fk.Statistics:
    tensors = {name: numbers(name, shape).abs() for name, shape in POOL.items()}
    described = {} if name == "bare" else {"provenance": PROVENANCE, "coverage": COVERAGE}
    return fk.Statistics(tensors, count=12, **described)


PRECISION = Precision(12, 4, 403, 403, 1.5, {0.2: 2.5})


def precise_statistics() -> fk.Statistics:
    tensors = {name: numbers(name, shape).abs() for name, shape in POOL.items()}
    return fk.Statistics(tensors, count=12, provenance=PROVENANCE, coverage=COVERAGE, precision=PRECISION)


def tied_llama() -> zoo.Specimen:
    """Its embedding and its head are one parameter, under the name of the embedding."""
    specimen = zoo.llama(hidden_size=8, intermediate_size=8, num_hidden_layers=1, tie_word_embeddings=True)
    filled(specimen.model)
    return specimen


INDICES = {"0.weight": torch.tensor([3, 50, 51, 120, 200, 257, 319]), "1.weight": torch.arange(0, 60, 2)}
WHOLE = ("1.bias",)

SELECTED_BY = {"rule": {"name": "GlobalTopK", "k": 40, "density": None, "order": "largest"}, "k": 40}

SELECTIONS = ("forms", "shards", "bound", "nothing", "everything")
"""Files of selections. The first has a parameter of each form: a list, bits, none and whole."""


def selection(name: str = "forms") -> fk.Selection:
    if name == "nothing":
        return fk.Selection(POOL, {})
    if name == "everything":
        return fk.Selection(POOL, {}, whole=list(POOL))
    plain = fk.Selection(POOL, INDICES, whole=WHOLE, provenance=SELECTED_BY)
    return fk.selection.bound_to_start(plain, small()) if name == "bound" else plain


def later_selection() -> fk.Selection:
    """The selection after ``reselect``: some entries stay, some are dropped, some are added."""
    indices = {"0.weight": [3, 51, 60, 319], "1.weight": range(0, 60, 3), "1.bias": [1]}
    return fk.Selection(POOL, {name: torch.tensor(list(at)) for name, at in indices.items()}, whole=["0.bias"])


def ranged_selection() -> fk.Selection:
    """Ranges of rows and of columns, which a file stores in its header, beside the other forms."""
    ranges = {"0.weight": fk.Rows((2, 5), (7, 20)), "1.weight": fk.Columns((0, 8), (12, 13))}
    return fk.Selection(POOL, {"0.bias": torch.arange(3)}, whole=WHOLE, ranges=ranges, provenance=SELECTED_BY)


def wide() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(64, 64)))


def coded_selection() -> fk.Selection:
    """Few enough entries of a parameter for a delta to store them in the code of Elias and Fano."""
    at = {"0.weight": torch.arange(41).square() * 2 + 7, "0.bias": torch.arange(0, 64, 3)}
    return fk.Selection({"0.weight": (64, 64), "0.bias": (64,)}, at, provenance=SELECTED_BY)


UPDATES = ("first", "values", "reselected")
"""The first update of a stream, one of values alone, and one with other entries than before."""


def updates() -> tuple[nn.Module, list[fk.DeltaUpdate]]:
    """A model after training, and what was streamed of it, from :func:`wide` on."""
    model, selected = wide(), coded_selection()
    later = selected - fk.Selection(selected.shapes, {"0.weight": selected.indices("0.weight")[::2]})
    stream, made = fk.Delta.stream(model), []
    for trained, sent in ((selected, selected), (selected, selected), (selected, later)):
        moved(model, trained)
        made.append(stream.update(sent))
    return model, made


def adapter_init() -> fk.AdapterInit:
    """The start of an adapter of the first two modules, with another rank and scaling for each."""
    modules = {}
    for path, rank, scaling in (("0", 3, 2.0), ("1", 2, 0.5)):
        O, I = POOL[f"{path}.weight"]
        factors = [numbers(f"{path} {part}", shape) for part, shape in (("A", (rank, I)), ("B", (O, rank)))]
        modules[path] = fk.ModuleInit(*factors, scaling, torch.arange(rank) * 2)
    provenance = {"rule": {"name": "DirectionInit", "ranks": {"0": 3, "1": 2}}}
    return fk.AdapterInit(modules, digests={"0": (4.5, -0.125), "1": (2.25, 1.5)}, provenance=provenance)


def energies() -> fk.Energies:
    """Energies of two matrices along singular vectors, one with the importance of a pass without it merged in."""
    tensors: dict[str, Tensor] = {}
    for name, importance in (("0.weight", True), ("1.weight", False)):
        O, I = POOL[name]
        K = min(O, I)
        for part in ("input", "output", "joint", "singular_values"):
            tensors[f"{name}/{part}"] = numbers(f"{name} {part}", (K,)).abs()
        tensors[f"{name}/positions"] = torch.tensor(6.5)
        tensors[f"{name}/matrix"] = torch.tensor([O, I, 4.5, -0.125])
        if importance:
            tensors[f"{name}/grams"] = numbers(f"{name} grams", (2, K, K))
    definition = {"estimator": "DirectionEnergy", "unit": "example", "basis": "svd", "importance": "kronecker"}
    return fk.Energies(tensors, count=3, provenance={"definition": definition, "runs": [{"model": "Small"}]})


def factored() -> fk.FactoredStatistics:
    """Factors of two weights, one of them that of a convolution, and the values of a bias."""
    tensors = {
        "0.weight/rows": numbers("0.weight rows", (20,)).abs(),
        "0.weight/columns": numbers("0.weight columns", (2, 8)).abs(),
        "0.bias/values": numbers("0.bias", (20,)).abs(),
        "1.weight/rows": numbers("1.weight rows", (3,)).abs(),
        "1.weight/columns": numbers("1.weight columns", (20,)).abs(),
    }
    tensors |= {f"{name}/positions": torch.tensor(6.5) for name in ("0.weight", "0.bias", "1.weight")}
    definition = {"estimator": "DiagonalKronecker", "fisher_type": "empirical", "unit": "position"}
    runs = [{"model": "Small"}]
    return fk.FactoredStatistics(tensors, count=3, provenance={"definition": definition, "runs": runs})


def freezer_state() -> FreezerState:
    """After one event, with a reference of values and one of a histogram."""
    before = selection()
    after = before - fk.Selection(POOL, {}, whole=["1.bias"])
    tracks = {
        ("0.weight", 1): Track((numbers("0.weight 1", (80,)).abs(),), 0.125, 0.25, 0.375, 2),
        ("1.weight", 0): Track((numbers("counts", (64,)).double(), numbers("edges", (65,)).double())),
    }
    scores = {key: track.variation for key, track in tracks.items()}
    history = [Read(0, before.count, {**scores, ("1.bias", 0): 0.5}), Read(5, after.count, scores)]
    settings = {"slices": "Slices()", "drift": "JensenShannon()", "statistic": "{}"}
    return FreezerState(7, 1, 2, "5" * 32, settings, before, after, tracks, history)


@torch.no_grad()
def moved(model: nn.Module, selected: fk.Selection | None = None) -> nn.Module:
    """The same model with its selected entries moved, as training would."""
    selected = selection() if selected is None else selected
    for name, parameter in model.named_parameters():
        if name in selected:
            parameter[selected.mask(name)] += 0.5
    return model


DELTAS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Training:
    """How the optimizer of one sample is made, and what it does before it is saved.

    Attributes:
        cls: The class.
        dtype: Of all weights.
        options: For the class.
        grouped: Whether biases are a group with options of their own.
        reselected: Whether the second of the two steps is that of :func:`later_selection`.
        ranges: Whether ranges move, of which torch's fused update steps the rows.
    """

    cls: type[fk.optim.MaskedOptimizer]
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    grouped: bool = False
    reselected: bool = False
    ranges: bool = False

    def optimizer(self, model: nn.Module, selected: fk.Selection) -> fk.optim.MaskedOptimizer:
        groups: list[dict[str, Any]] = [{"params": list(model.named_parameters())}]
        if self.grouped:
            named = groups[0]["params"]
            groups = [{"params": [one for one in named if "weight" in one[0]]}]
            groups += [{"params": [one for one in named if "bias" in one[0]], "lr": 0.25, "weight_decay": 0.0}]
        return self.cls(groups, selected, **{"lr": 0.125, "outside": "freeze", **self.options})

    def begun(self) -> tuple[nn.Module, fk.optim.MaskedOptimizer]:
        """A model after two steps."""
        model = small(self.dtype)
        optimizer = self.optimizer(model, ranged_selection() if self.ranges else selection())
        advance(model, optimizer, step=1)
        if self.reselected:
            optimizer.reselect(later_selection())
        advance(model, optimizer, step=2)
        return model, optimizer

    @property
    def selected(self) -> fk.Selection:
        """What moves when the sample is saved."""
        if self.ranges:
            return ranged_selection()
        return later_selection() if self.reselected else selection()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Do one step, with gradients that its number determines."""
    for name, parameter in model.named_parameters():
        parameter.grad = numbers(f"{step} {name}", parameter.shape).to(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every weight, and everything that the optimizer keeps for it."""
    tensors = {f"weight {name}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key} {name}": torch.as_tensor(value).clone() for key, value in state.items()}
    return tensors


OPTIMIZERS = {
    "adamw": Training(fk.MaskedAdamW, torch.float32, {"lr": torch.tensor(0.125), "max_grad_norm": 1.0}, grouped=True),
    "adamw-masters": Training(fk.MaskedAdamW, torch.bfloat16, grouped=True),
    "adamw-reselected": Training(fk.MaskedAdamW, torch.bfloat16, {"weight_decay": 0.1}, reselected=True),
    "adamw-16-bit": Training(fk.MaskedAdamW, torch.bfloat16, {"master_weights": False}),
    "sgd": Training(fk.MaskedSGD, torch.float32, {"momentum": 0.9, "nesterov": True, "outside": "train"}),
    "sgd-masters": Training(fk.MaskedSGD, torch.bfloat16, {"momentum": 0.9, "dampening": 0.1}, grouped=True),
    "sgd-reselected": Training(fk.MaskedSGD, torch.float32, {"momentum": 0.9, "weight_decay": 0.1}, reselected=True),
    "sgd-plain": Training(fk.MaskedSGD, torch.float32),
}

OPTIMIZERS_OF_RANGES = {
    "adamw": Training(fk.MaskedAdamW, torch.float32, {"max_grad_norm": 1.0}, grouped=True, ranges=True),
    "sgd-masters": Training(fk.MaskedSGD, torch.bfloat16, {"momentum": 0.9}, ranges=True),
}


_TINY = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
_TINY |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # their masks differ between processors


def classifier() -> nn.Module:
    return filled(zoo.bert_classifier(**_TINY).model)


def adapted() -> nn.Module:
    """A classifier with LoRA."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    return filled(peft.get_peft_model(zoo.bert_classifier(**_TINY).model, config))


CHECKPOINT = "checkpoint-2"


def trainer(model: nn.Module, selected: fk.Selection, folder: Path) -> Any:
    """A Trainer of four steps, each with all examples, so that their order decides nothing; it saves after two."""
    import transformers

    from fishkern.integrations.trainer import FisherCallback

    optimizer = fk.MaskedAdamW(model, selected, lr=1e-2, weight_decay=0.1)
    callback = FisherCallback(selected)
    return transformers.Trainer(model, **_of_a_trainer(folder), optimizers=(optimizer, None), callbacks=[callback])


def selecting_trainer(model: nn.Module, select: Any, folder: Path) -> Any:
    """The same, but the Trainer itself calls ``select`` and makes the optimizer, in groups with and without decay."""
    import transformers

    from fishkern.integrations.trainer import FisherMixin

    class FisherTrainer(FisherMixin, transformers.Trainer): ...

    return FisherTrainer(model, **_of_a_trainer(folder), select=select)


def _of_a_trainer(folder: Path) -> dict[str, Any]:
    import transformers

    batch = zoo.class_batch(4, 7)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        weight_decay=0.1, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    return {"args": arguments, "train_dataset": [{key: value[n] for key, value in batch.items()} for n in range(4)]}


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


# Not LoRA, whose PiSSA start has signs that differ between libraries of linear algebra.
TUNE = "tune model --data rows.jsonl --adapter bottleneck --size 2 --density 0.5 --eval-split train --epochs 2 "
TUNE += "--batch-size 2 --lr 0.01 --weight-decay 0.1 --device cpu --save-every 0 --out run"


def write_tune_inputs(folder: Path) -> None:
    """The model and the data of :data:`TUNE`, which is to run in that folder."""
    model = classifier()
    model.save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(zoo.WORDS[4 + (n + i) % 10] for i in range(2 + n % 3)) for n in range(6)]
    rows = [json.dumps({"text": text, "label": n % 3}) for n, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
