"""Known failures of other ways to a Fisher, a selection and sparse training: ``python -m benchmarks failures``.

Each is run as its users run it, on a tiny model with random weights, and compared with batch size 1 in float64; so is
``fishkern`` on the same. A row says what came of it: an exception, parameters without a result, or the largest
error (``|result - truth| / |truth|``). ``right`` means that this version does not have the failure. Practices that are
common in published code, and not one library's, are written out in :mod:`benchmarks.rivals.practices`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine import RESULTS
from benchmarks.engine.origin import machine
from benchmarks.engine.process import in_short
from benchmarks.engine.records import Records
from benchmarks.rivals import as_found, vmap_grad
from benchmarks.rivals.backpack import backpack
from benchmarks.rivals.kronfluence import kronfluence
from benchmarks.rivals.nngeometry import covariance_diagonal, nngeometry
from benchmarks.rivals.opacus import opacus
from benchmarks.rivals.oracle import RIGHT, coverage, float64_loop, largest_error
from benchmarks.rivals.practices import batch_gradient, each_position, squared_in_model_dtype
from benchmarks.rivals.providers import PASSES, squares
from benchmarks.subjects import failing as models
from benchmarks.subjects.failing import CLASSES, RAGGED, TOKENS, VECTORS, Batches
from fishkern.ops import streaming_topk

IN_16_BITS = 0.05  # the error that a 16-bit model may have: that of its own gradients
Row = dict[str, Any]
Squares = Callable[[nn.Module, Batches], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Failure:
    """One row of the table.

    Args:
        rival: A key of :data:`benchmarks.rivals.providers.PASSES`, or whose practice it is.
        what: The model and data that it runs on, or the practice.
        run: Gives ``outcome`` and ``came``, ``error`` where there is one, and the same of ``fishkern``.
    """

    rival: str
    what: str
    run: Callable[[], Row]

    def record(self) -> Row:
        library = PASSES.get(self.rival)
        row: Row = {"rival": self.rival, "what": self.what}
        if library and library.why_not:
            return {**row, "outcome": "left out", "left out": library.why_not}
        version = library.version if library else torch.__version__
        return {**row, "version": version, **self.run()}


def against(
    rival: Squares,
    make: Callable[[], nn.Module],
    batches: Batches,
    losses=None,
    *,
    right: float = RIGHT,
    only: str = "",
) -> Row:
    """Compare a rival and fishkern with the loop, on one model.

    Args:
        rival: Gives sums over examples of squared gradients.
        make: Makes the model.
        batches: The data.
        losses: ``(model, batch) -> losses [N]`` where the model has no loss of its own.
        right: The error from which a result is called wrong.
        only: Compare only parameters whose names contain this.
    """
    model = make()
    loss = {} if losses is None else {"loss": lambda model, row: losses(model, row).sum()}
    truth = float64_loop(model, batches, **loss)
    judge = partial(_judge, model, {name: values for name, values in truth.items() if only in name}, right)
    with as_found(model):
        ours = fk.estimate(model, batches, likelihood=losses)
    ours = judge(squares(ours))
    try:
        with as_found(model):
            result = rival(model, batches)
        theirs = judge(result)  # of the model without the rival's wrappers
    except Exception as error:
        theirs = {"outcome": "raises", "came": in_short(error)}
    return {**theirs, **{f"fishkern {key}": value for key, value in ours.items()}}


def _judge(model: nn.Module, truth: dict[str, Tensor], right: float, result: Mapping[str, Tensor]) -> Row:
    given = {name: values for name, values in result.items() if name in truth}
    covered = coverage(model, result)
    of = largest_error(given, truth)
    missing = len(truth) - len(given)
    if of["error"] > right:
        also = f", {missing} of {len(truth)} parameters missing" if missing else ""
        came = f"{of['worst']} is {of['error']:.0%} off{also}"
        return {"outcome": "wrong", "came": came, "error": of["error"]}
    if missing:
        kinds = ", ".join(covered["missed"])
        came = f"{missing} of {len(truth)} parameters missing ({kinds}), {covered['entries']:.0%} of entries there"
        return {"outcome": "incomplete", "came": came, "error": of["error"]}
    return {"outcome": "right", "came": f"largest error {of['error']:.1e}", "error": of["error"]}


def threshold_on_ties() -> Row:
    """``scores >= threshold`` where the threshold is the k-th largest score."""
    scores, k = torch.cat([torch.ones(10), torch.zeros(990)]), 100
    selected = int((scores >= scores.topk(k).values[-1]).sum())
    ours = fk.select({"weight": scores}, fk.GlobalTopK(k=k)).count
    return _counted(selected, ours, k)


def _counted(theirs: int, ours: int, k: int) -> Row:
    names = {True: "right", False: "wrong"}
    return {
        "outcome": names[theirs == k],
        "came": f"{theirs} entries for k = {k}",
        "fishkern outcome": names[ours == k],
        "fishkern came": f"{ours} entries",
    }


def quantile() -> Row:
    """A threshold for the largest 0.5 % by ``torch.quantile``."""
    scores = torch.rand(2**24 + 1, generator=torch.Generator().manual_seed(0))
    k = len(scores) // 200
    ours = sum(map(len, streaming_topk([scores], k)))
    try:
        return _counted(int((scores >= scores.quantile(1 - k / len(scores))).sum()), ours, k)
    except RuntimeError as error:
        return {**_counted(0, ours, k), "outcome": "raises", "came": in_short(error)}


def topk_of_ties() -> Row:
    """Equal scores: do the first ones win, as in a stable sort, on every machine?"""
    scores = torch.randint(0, 4, (10_000,), generator=torch.Generator().manual_seed(0)).float()
    first = scores.sort(descending=True, stable=True).indices[:1000].sort().values
    theirs = scores.topk(1000).indices.sort().values
    (ours,) = streaming_topk([scores], 1000)
    other = int((~torch.isin(theirs, first)).sum())
    came = f"{other} of 1000 indices are not those of a stable sort, which it does not promise"
    ours_other = int((~torch.isin(ours, first)).sum())
    return {
        "outcome": "differs" if other else "right",
        "came": came,
        "fishkern outcome": "wrong" if ours_other else "right",
        "fishkern came": f"{ours_other} of 1000",
    }


def topk_beyond_32_bits() -> Row:
    """The largest of more than 2^32 scores (pytorch#173622)."""
    if not torch.cuda.is_available():
        return {"outcome": "left out", "left out": "needs a GPU that holds 2^32 scores"}
    scores = torch.zeros(2**32 + 1000, dtype=torch.bfloat16, device="cuda")
    scores[2**32 + 500] = 1
    (ours,) = streaming_topk([scores], 1)
    ours_right = ours.item() == 2**32 + 500
    ours_only = {"fishkern outcome": "right" if ours_right else "wrong", "fishkern came": f"index {ours.item()}"}
    try:
        index = scores.topk(1).indices.item()
    except RuntimeError as error:
        return {**ours_only, "outcome": "raises", "came": in_short(error)}
    return {**ours_only, "outcome": "right" if index == 2**32 + 500 else "wrong", "came": f"index {index}"}


def decayed() -> Row:
    """A mask on gradients and ``AdamW`` with weight decay: other entries should stay at 1."""
    moved = {}
    for who in ("theirs", "ours"):
        model = nn.Linear(40, 25, bias=False)
        nn.init.ones_(model.weight)
        selection = fk.select({"weight": torch.rand(25, 40)}, fk.GlobalTopK(k=100))
        mask = selection.mask("weight")
        step = dict(lr=1e-2, weight_decay=0.1)
        dense = torch.optim.AdamW(model.parameters(), **step)
        adam = dense if who == "theirs" else fk.MaskedAdamW(model, selection, **step)
        for _ in range(100):
            model.weight.grad = torch.randn(25, 40) * (mask if who == "theirs" else 1)
            adam.step()
        moved[who] = (model.weight.detach()[~mask] - 1).abs().max().item()
    return {
        "outcome": "wrong" if moved["theirs"] else "right",
        "came": f"entries that are not selected went from 1 to {1 - moved['theirs']:.3f} in 100 steps",
        "fishkern outcome": "wrong" if moved["ours"] else "right",
        "fishkern came": f"moved by {moved['ours']:.0f}",
    }


def _nngeometry_tied(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    def losses(inputs: Tensor, labels: Tensor) -> Tensor:
        return models.cross_entropies(model, {"input": inputs, "labels": labels})[:, None]

    (batch,) = batches
    return covariance_diagonal(model, losses, (batch["input"], batch["labels"]), len(batch["labels"]))


shared_positions = {library: partial(library, own_positions=False) for library in (opacus, backpack)}
all_layers = partial(nngeometry, ignore_unknown=False)
LLAMA, BERT, GPT2, MIXTRAL = (
    (models.llama, TOKENS),
    (models.bert, CLASSES),
    (models.gpt2, TOKENS),
    (models.mixtral, TOKENS),
)
TIED = (partial(models.llama, tie_word_embeddings=True), TOKENS)
CHECKPOINTED, REENTRANT = ((partial(models.checkpointed, reentrant), TOKENS) for reentrant in (False, True))
IN_BF16 = (partial(models.linear, torch.bfloat16), models.MANY, models.cross_entropies)
IN_FP16 = (partial(models.linear, torch.float16), VECTORS, models.small_cross_entropies)
TIED_LINEARS = (models.tied_linears, VECTORS, models.cross_entropies)
bf16_sums = partial(squared_in_model_dtype, into=None, losses=models.cross_entropies)
fp16_squares = partial(squared_in_model_dtype, into=torch.float32, losses=models.small_cross_entropies)

FAILURES = [
    Failure("backpack", "tied embedding and head, LLaMA", partial(against, backpack, *TIED)),
    Failure("nngeometry", "two linears that share a weight", partial(against, _nngeometry_tied, *TIED_LINEARS)),
    Failure("kronfluence", "tied embedding and head, LLaMA", partial(against, kronfluence, *TIED)),
    Failure("opacus", "tied embedding and head, LLaMA", partial(against, opacus, *TIED)),
    Failure("opacus", "position embeddings of GPT-2", partial(against, shared_positions[opacus], *GPT2)),
    Failure("backpack", "position embeddings of GPT-2", partial(against, shared_positions[backpack], *GPT2)),
    Failure("opacus", "non-reentrant checkpointing, LLaMA", partial(against, opacus, *CHECKPOINTED)),
    Failure("opacus", "reentrant checkpointing, LLaMA", partial(against, opacus, *REENTRANT)),
    Failure("vmap_grad", "checkpointing, LLaMA", partial(against, vmap_grad, *CHECKPOINTED)),
    Failure("opacus", "fused experts, Mixtral", partial(against, opacus, *MIXTRAL)),
    Failure("backpack", "fused experts, Mixtral", partial(against, backpack, *MIXTRAL)),
    Failure("vmap_grad", "fused experts, Mixtral", partial(against, vmap_grad, *MIXTRAL)),
    Failure("opacus", "LayerNorm without bias, ModernBERT", partial(against, opacus, models.modernbert, CLASSES)),
    Failure("backpack", "BERT, extended as a whole", partial(against, partial(backpack, whole=True), *BERT)),
    Failure("backpack", "RMSNorm, LLaMA", partial(against, backpack, *LLAMA)),
    Failure("backpack", "LLaMA in bfloat16", partial(against, backpack, models.llama_bf16, TOKENS, right=IN_16_BITS)),
    Failure("nngeometry", "LLaMA, all layers", partial(against, all_layers, *LLAMA)),
    Failure("nngeometry", "LLaMA, known layers alone", partial(against, nngeometry, *LLAMA)),
    Failure("nngeometry", "BERT, known layers alone", partial(against, nngeometry, *BERT)),
    Failure("nngeometry", "GPT-2, all layers", partial(against, all_layers, *GPT2)),
    Failure("kronfluence", "Conv1D, GPT-2", partial(against, kronfluence, *GPT2)),
    Failure("backpack", "Conv1D, GPT-2", partial(against, backpack, *GPT2)),
    Failure("opacus", "rows of several lengths, token-mean loss", partial(against, opacus, models.llama, RAGGED)),
    Failure("vmap_grad", "rows of several lengths", partial(against, models.vmap_with_mask, models.llama, RAGGED)),
    Failure("Avalanche's EWC, RoSA", "square of the batch's gradient", partial(against, batch_gradient, *LLAMA)),
    Failure("ASDL, TrueGrad", "square of each position, keys", partial(against, each_position, *LLAMA, only="k_proj")),
    Failure(
        "SqueezeLLM's gradients", "sums of squares in bfloat16", partial(against, bf16_sums, *IN_BF16, right=IN_16_BITS)
    ),
    Failure("loops over .grad", "squares in float16", partial(against, fp16_squares, *IN_FP16, right=IN_16_BITS)),
    Failure("FISH-Tuning, LT-SFT, mttl", "scores >= threshold, with ties", threshold_on_ties),
    Failure("FISH, FISH-Tuning", "masked gradients under AdamW with weight decay", decayed),
    Failure("torch.topk", "ties", topk_of_ties),
    Failure("torch.topk", "more than 2^32 scores", topk_beyond_32_bits),
    Failure("torch.quantile", "a threshold of 2^24 + 1 scores", quantile),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks failures", description="Reproduce failures of rivals.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose rival or subject contains this")
    options = parser.parse_args(arguments)
    requested = [failure for failure in FAILURES if options.only in f"{failure.rival}: {failure.what}"]
    if not requested:
        parser.error(f"no failure contains {options.only!r}")
    rows = []
    for number, failure in enumerate(requested, 1):
        print(f"{number} of {len(requested)}: {failure.rival}, {failure.what}", file=sys.stderr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about themselves
            rows.append(failure.record())
    records = Records(options.results / machine()["machine"] / "failures.jsonl", study="failures")
    print(table(records.append(*rows)))
    return 0


def table(records: list[Row]) -> str:
    """Markdown, one row for each record."""
    lines = ["| rival | version | what | outcome | what came | fishkern on the same |", "|" + "---|" * 6]
    for record in records:
        said = record.get("came") or record["left out"]
        ours = f"{record['fishkern outcome']}: {record['fishkern came']}" if "fishkern came" in record else ""
        version = record.get("version") or ""
        lines.append(f"| {record['rival']} | {version} | {record['what']} | {record['outcome']} | {said} | {ours} |")
    return "\n".join(lines)
