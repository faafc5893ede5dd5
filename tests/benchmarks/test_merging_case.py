"""The case of merging checkpoints: its figures, in small, and that nothing stays on the disk."""

from __future__ import annotations

import tempfile

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("typer")
import fishkern as fk
from benchmarks.cases import merging

SMALL = merging.Case(tensors=3, size=64)

pytestmark = pytest.mark.skipif(not hasattr(fk, "merge_checkpoints"), reason="this fishkern merges no checkpoints")


def test_figures_and_an_empty_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    figures = merging.measured(SMALL, 1)
    assert figures["fishkern"].keys() == {"seconds", "peak_mib", "read_bytes", "written_bytes", "share_of_disk"}
    assert figures["disk"]["read_bytes"] > 2 * (SMALL.checkpoint_bytes + 2 * SMALL.checkpoint_bytes)
    assert figures["disk"]["written_bytes"] > SMALL.checkpoint_bytes
    assert list(tmp_path.iterdir()) == []


def test_the_command_merges_what_the_case_has_written(tmp_path):
    with merging.inputs(SMALL) as folder:
        merging.by_command(str(folder), str(tmp_path / "merged"))
        a, b = (load_file(folder / name / "model-00001-of-00002.safetensors") for name in "ab")
        fishers = [fk.Statistics.load(folder / f"{name}-fisher") for name in "ab"]
    merged = load_file(tmp_path / "merged" / "model-00001-of-00002.safetensors")
    for name, tensor in merged.items():
        first, second = (one[name].double() for one in fishers)
        expected = (first * a[name].double() + second * b[name].double()) / (first + second)
        assert torch.equal(tensor, expected.bfloat16())
