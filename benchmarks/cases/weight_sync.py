"""What a sync of weights takes from a trainer to a sampler: the stream of a delta against a snapshot and comparison.

A LLaMA of 21 million parameters with random weights in 16 bits trains a few of its entries, with master weights, at a
learning rate of reinforcement learning and at one of ordinary training. After every step both ways make the sampler's
weights equal to the trainer's, which is checked to the bit. The snapshot is a copy of all weights, and what differs
from it is sent with its int32 index, which is what an engine takes. Bytes do not depend on the machine.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine.records import Record
from benchmarks.subjects.transformers import LLAMA_21M, Workload

TESTS = {"run": ["tests/selection/test_stream.py", "tests/selection/test_elias_fano.py"]}
CASE = Workload(LLAMA_21M, T=16, N=1, batches=11, dtype="bfloat16")
DENSITIES = (0.005, 0.026)
RATES = (1e-6, 1e-4)
SMALLER = 1.5  # times fewer bytes than the snapshot, in every sync but the first

pytestmark = pytest.mark.skipif(not hasattr(fk, "DeltaStream"), reason="this fishkern has no stream")


@dataclass
class Snapshot:
    """The other way: a copy of the weights that the sampler has, and what differs from it.

    Args:
        model: The trainer's, in the state that the sampler has.
    """

    model: nn.Module
    held: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.held = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def kept(self) -> int:
        """Bytes of the copy."""
        return sum(tensor.nbytes for tensor in self.held.values())

    def sync(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, int32 indices and values of what differs, which the copy then has too."""
        sent = []
        for name, parameter in self.model.named_parameters():
            now, before = parameter.detach().view(-1), self.held[name].view(-1)
            at = (now.view(torch.int16) != before.view(torch.int16)).nonzero().view(-1)
            if len(at):
                before[at] = now[at]
                sent.append((name, at.int(), now[at]))
        return sent


def measured(case: Workload, density: float, lr: float) -> dict[str, Record]:
    """Bytes of each sync by both ways, of one training."""
    model, data = case.model(), case.data()
    samplers, reader = (copy.deepcopy(model), copy.deepcopy(model)), fk.DeltaReader()
    scores = fk.estimate(model, data[:1], fk.DiagonalFisher(), check=False)
    optimizer = fk.MaskedAdamW(model, fk.select(scores, fk.GlobalTopK(density=density)), lr=lr, max_grad_norm=1.0)
    snapshot, stream = Snapshot(model), fk.Delta.stream(model)
    bytes_of: dict[str, list[int]] = {"fishkern": [], "snapshot": []}
    for batch in data[1:]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update, differing = stream.update(optimizer.selection), snapshot.sync()
        reader.apply(update, samplers[0])
        for name, at, values in differing:
            samplers[1].get_parameter(name).data.view(-1)[at.long()] = values
        bytes_of["fishkern"].append(update.nbytes)
        bytes_of["snapshot"].append(sum(at.nbytes + values.nbytes for _, at, values in differing))
        for sampler in samplers:
            for ours, theirs in zip(sampler.parameters(), model.parameters(), strict=True):
                assert torch.equal(ours.detach().view(torch.int16), theirs.detach().view(torch.int16))
    selected, weights = optimizer.selection.count, snapshot.kept
    shared = {"selected": selected, "weights_bytes": weights, "syncs": len(data) - 1}
    compared = {"fishkern": selected, "snapshot": optimizer.selection.total}
    return {
        name: {
            **shared, "compared": compared[name], "kept_bytes": 2 * compared[name], "first_bytes": given[0],
            "later_bytes": int(median(given[1:])), "all_bytes": sum(given),
        }
        for name, given in bytes_of.items()
    }  # fmt: skip


@pytest.mark.parametrize("lr", RATES)
@pytest.mark.parametrize("density", DENSITIES)
def test_bytes(density, lr, record, capsys):
    figures = measured(CASE, density, lr)
    for name, one in figures.items():
        record("weight_sync", {**description(CASE, density, lr, name), **one})
    ours, theirs = (figures[name]["later_bytes"] for name in ("fishkern", "snapshot"))
    with capsys.disabled():
        print(f"\n    {density:.1%} at {lr:g}: {ours:,} bytes a sync, by a snapshot {theirs:,}", flush=True)
    assert SMALLER * ours <= theirs


def description(case: Workload, density: float, lr: float, provider: str) -> dict[str, Any]:
    """The fields of a record other than its figures."""
    shared = {"op": "weight_sync", "quantity": "bytes", "case": case.fields, "dtype": case.dtype}
    return {**shared, "provider": provider, "density": density, "lr": lr, "optimizer": "MaskedAdamW"}
