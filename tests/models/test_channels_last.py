"""Images in ``channels_last``: in a process of its own, since torch's fault with group norms ends the process."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishkern as fk
from tests.support.oracle import squares_one_by_one, worst_error

SCRIPT = """
import torch
from torch import nn
from torch.nn import functional as F
import fishkern as fk
from tests.support.oracle import squares_one_by_one, worst_error

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.group_norm(x, 2, self.weight, self.bias)

class Block(nn.Module):  # nothing but the whole block has a rule for its scale
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x):
        return self.norm(self.conv(x)) * self.scale

LAYERS = {"norm": lambda: nn.GroupNorm(2, 6), "function": Functional, "block": Block}
PARAMETERS = {"all": None, "norms": lambda name, parameter: name.startswith("0.1") and "conv" not in name}

def loss(model, row):
    return F.cross_entropy(model(row["x"]), row["y"])

def losses(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

for case in sys.argv[1:]:
    print(case, end=" ", flush=True)
    layer, only = LAYERS[case.split()[0]], PARAMETERS[case.split()[1]]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), layer(), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(model, nn.Linear(6, 3)).double().to(memory_format=torch.channels_last)
    x, y = torch.randn(4, 3, 8, 8).double().to(memory_format=torch.channels_last), torch.tensor([0, 1, 2, 1])
    truth = squares_one_by_one(model, [{"x": x, "y": y}], loss)
    for options in (dict(), dict(check=False)):
        found = fk.estimate(model, [{"x": x, "y": y}], likelihood=losses, parameters=only, **options)
        error, name = worst_error(found, {name: truth[name] for name in found})
        assert error < 1e-6, (name, error)
    assert fk.verify(model, [{"x": x, "y": y}], likelihood=losses, parameters=only).ok
    print("exact")
"""
GROUP_NORMS = ("norm all", "norm norms", "block all", "block norms", "function all")


@pytest.mark.slow
def test_group_norm():
    """All in one process, which says where it ended."""
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n{SCRIPT}"
    run = subprocess.run([sys.executable, "-c", code, *GROUP_NORMS], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.splitlines()) == (0, [f"{case} exact" for case in GROUP_NORMS]), run.stderr


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("tracks", [False, True])
def test_instance_norm(batch_size, check, tracks):
    """Its gradients for one image alone are those of the same model in the ordinary order of memory."""
    torch.manual_seed(0)
    last, options = torch.channels_last, dict(affine=True, track_running_stats=tracks)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, **options), nn.Conv2d(6, 5, 3), nn.InstanceNorm2d(5, **options),
        nn.SiLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, 3),
    ).double().eval()  # fmt: skip
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 1])

    def loss(model, row):
        return F.cross_entropy(model(row["x"]), row["y"])

    def losses(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    truth = squares_one_by_one(copy.deepcopy(model), [{"x": x, "y": y}], loss)
    model = model.to(memory_format=last)
    rows = zip(x.split(batch_size), y.split(batch_size), strict=True)
    batches = [{"x": images.to(memory_format=last), "y": labels} for images, labels in rows]
    statistics = fk.estimate(model, batches, likelihood=losses, check=check)
    # A norm over the image takes off again what these add. Their gradients are zero but for rounding, of which each
    # order of memory leaves another rest: it has no digits to compare, only a size.
    without_effect = set() if tracks else {"0.bias", "1.bias", "2.bias"}
    rounding = (16 * torch.finfo(torch.float64).eps) ** 2 * max(squares.max() for squares in truth.values())
    for name in without_effect:
        assert statistics[name].max() < rounding, name
    compared = truth.keys() - without_effect
    error, name = worst_error({name: statistics[name] for name in compared}, {name: truth[name] for name in compared})
    assert error < 1e-6, (name, error)
    assert fk.verify(model, batches, statistics, likelihood=losses).ok
