"""Two processes over gloo: each reads its part of the probe, and both decide as one process on all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch import distributed as dist, nn
import fishkern as fk
from tests.freezing.training import CLASSES, EAGER, PROBE, adamw, batches, freezer_of, network, train

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

data = [(x[rank::2], y[rank::2]) for x, y in batches(12)]

def parts(model, selection=None):
    optimizer = adamw(model, selection)
    freezer = freezer_of(model, optimizer, [PROBE[rank]])
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), optimizer, freezer

def run(training, data):
    return [event for event in train(*training, data) if event]

model = network()
training = parts(model)
events, freezer = run(training, data), training[-1]

# stopped after six steps, and gone on with in new objects
stopped = network()
training = parts(stopped)
before = run(training, data[:6])
_, optimizer, freezer_then = training
file = freezer_then.save(folder / f"freezer-{rank}.safetensors")
another = network()
another.load_state_dict(stopped.state_dict())
training = parts(another, fk.Freezer.saved_selection(file))
training[1].load_state_dict(optimizer.state_dict())
training[2].load(file)
after = run(training, data[6:])
same = [torch.equal(one, other) for one, other in zip(model.parameters(), another.parameters(), strict=True)]
report = {
    "frozen": [sorted(map(list, event.frozen)) for event in events],
    "scores": [[score for _, score in sorted(event.scores.items())] for event in events],
    "digest": freezer.state_dict()["header"]["digest"],
    "resumed": [before + after == events, len(before), len(after), all(same)],
}

class Odd(fk.FreezeRule):
    def choose(self, scores, sizes, total):
        return frozenset({("0.weight", rank)})

for what, probe, options in [("online", fk.OnlineFisher(network()), {}), ("compat", None, {"compat": "reference"})]:
    model = network()
    try:
        fk.fisher_adaptune(model, probe, optimizer=adamw(model), every=1, read_every=1, **options)
    except ValueError as error:
        report[what] = str(error)

try:
    freezer._rule = Odd()
    freezer._decide()
except RuntimeError as error:
    report["odd"] = str(error)
(folder / f"{rank}.json").write_text(json.dumps(report))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_decide_alike(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    ours, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert ours["frozen"] == theirs["frozen"]
    assert sum(map(len, ours["frozen"])) > 5
    assert ours["scores"] == theirs["scores"]
    assert ours["digest"] == theirs["digest"]
    assert ours["resumed"] == theirs["resumed"] == [True, 1, 2, True]
    assert ours["online"].startswith("an OnlineFisher reads each process's own batches")
    assert ours["compat"].startswith("compat='reference' reads each process's own batches")
    assert "rank 0 and rank 1 differ in the slices that stop" in ours["odd"]
