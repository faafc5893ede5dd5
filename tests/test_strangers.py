"""Files of strangers: whatever they hold, a loader gives a value or one line of our own, in bounded memory and time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fishkern as fk
from tests.support import damage
from tests.support.damage import DEEP, LOADERS, file_of, good_files, header_of, tried

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_file_gives_one_line(name: str, tmp_path: Path):
    if name == "adapter" and not find_spec("transformers"):
        pytest.skip("needs transformers")
    good = good_files(name, tmp_path / "good")
    LOADERS[name].load(tmp_path / "good" / good[0])
    faults = [tried(name, good, tmp_path / str(seed), seed) for seed in range(60)]
    assert not list(filter(None, faults))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_thousands_of_damaged_files_in_little_memory():
    """A size of 2^60 or a header of thousands of levels takes no more memory than the file."""
    pytest.importorskip("transformers")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.damage", "500", "0.5"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{500 * len(LOADERS)} files tried\n"
    assert time.monotonic() - begun < 600


def test_the_damages_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loader that lets Python's own errors through is found out."""
    good = good_files("statistics", tmp_path / "good")
    loose = damage.Loader(lambda path: header_of(path.read_bytes()), LOADERS["statistics"].write)
    monkeypatch.setitem(LOADERS, "statistics", loose)
    assert any(tried("statistics", good, tmp_path / str(seed), seed) for seed in range(60))


def rewritten(path: Path, **metadata: str) -> Path:
    header, data = header_of(path.read_bytes())
    header["__metadata__"] |= metadata
    path.write_bytes(file_of(header, data))
    return path


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("key", ["provenance", "coverage"])
def test_a_header_of_thousands_of_levels(tmp_path: Path, key: str, lazy: bool):
    path = rewritten(damage.statistics().save(tmp_path / "s"), **{key: DEEP})
    with pytest.raises(ValueError, match="has a damaged header: JSON of more than 500 levels. Copy or save it again"):
        fk.Statistics.load(path, lazy=lazy)


def test_what_is_saved_of_many_unions_loads(tmp_path: Path):
    """Each nests the provenance of those before."""
    made = fk.Selection({"w": (200,)}, {})
    for place in range(100):
        made = made | fk.Selection({"w": (200,)}, {"w": torch.tensor([place])})
    assert fk.Selection.load(made.save(tmp_path / "s")).count == 100


def test_bits_of_no_axes(tmp_path: Path):
    for name in ("selection", "delta"):
        path = LOADERS[name].write(tmp_path / name)
        header, data = header_of(path.read_bytes())
        entry = header["1.weight" if name == "selection" else "entries:1.weight"]
        entry["shape"], entry["data_offsets"][1] = [], entry["data_offsets"][0] + 1
        others = {key: value for key, value in header.items() if value is entry or key == "__metadata__"}
        entry["data_offsets"] = [0, 1]
        path.write_bytes(file_of(others, data[:1]))
        with pytest.raises(ValueError, match="its header and its tensors disagree on"):
            LOADERS[name].load(path)
    pool = '{"w": [[8], "bits"]}'
    said = {"format": "fishkern.selection", "format_version": "1", "pool": pool, "provenance": "{}"}
    header = {"__metadata__": said, "w": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}
    (tmp_path / "s.safetensors").write_bytes(file_of(header, b"\1"))
    with pytest.raises(ValueError, match=r"holds no valid selection: w is said to be bits of \(8,\), and is not"):
        fk.Selection.load(tmp_path / "s")


def test_a_size_beyond_all_memory(tmp_path: Path):
    """Its number of entries wraps around to 0."""
    said = {"format": "fishkern.selection", "format_version": "1", "provenance": "{}"}
    pool = '{"w": [[1152921504606846976, 1152921504606846976], "whole"]}'
    (tmp_path / "s.safetensors").write_bytes(file_of({"__metadata__": said | {"pool": pool}}, b""))
    with pytest.raises(ValueError, match=r"the shape of w: \[1152921504606846976, .* is the shape of no"):
        fk.Selection.load(tmp_path / "s")


def test_what_a_delta_holds_besides_is_not_passed_over(tmp_path: Path):
    path = LOADERS["delta"].write(tmp_path / "s")
    header, data = header_of(path.read_bytes())
    header["values:more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    path.write_bytes(file_of(header, data + bytes(4)))
    with pytest.raises(ValueError, match="its header and its tensors disagree on values:more"):
        fk.Delta.load(path)


def test_what_shards_hold_besides_is_not_passed_over(tmp_path: Path):
    index = LOADERS["shards"].write(tmp_path / "s")
    text = index.read_text()
    index.write_text(text.replace('"0.bias": "s-00002-of-00002.safetensors",', ""))
    assert index.read_text() != text
    with pytest.raises(ValueError, match=r"s.safetensors.index.json is damaged: it does not name '0.bias' of s-00002"):
        fk.Statistics.load(index)


def test_a_state_of_another_kind():
    made = damage.optimizer()
    for state in (None, 3, {}, {"state": {}}, {"state": {}, "param_groups": {}}):
        with pytest.raises(ValueError, match="this is no state of an optimizer"):
            made.load_state_dict(state)
    plain = torch.optim.AdamW(damage.small_model().parameters()).state_dict()
    with pytest.raises(ValueError, match="it is not that of a masked optimizer"):
        made.load_state_dict(plain)


def test_an_option_that_a_state_does_not_know_stays():
    """As torch has it: such a state comes from before there was the option."""
    made = damage.optimizer()
    state = made.state_dict()
    del state["param_groups"][0]["maximize"]
    made.load_state_dict(state)
    assert made.param_groups[0]["maximize"] is False
    made.step()


@pytest.mark.parametrize(
    ("key", "value"), [("lr", None), ("lr", 2**70), ("betas", 0.9), ("betas", (0.9, 1.0)), ("maximize", "yes")]
)
def test_an_option_of_another_kind(key: str, value: object):
    made = damage.optimizer()
    state = made.state_dict()
    state["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"the state is damaged: {key} of group 0 is"):
        made.load_state_dict(state)


def test_the_state_of_groups_that_are_dealt_otherwise():
    """The options of a group are taken by its place."""
    model = damage.small_model()
    named = dict(model.named_parameters())

    def dealt(first: list[str]) -> fk.MaskedAdamW:
        parts = [first, [name for name in named if name not in first]]
        groups = [{"params": [(n, named[n]) for n in part], "lr": 10.0**-i} for i, part in enumerate(parts)]
        return fk.MaskedAdamW(groups, damage.selection())

    state = dealt(["0.weight"]).state_dict()
    dealt(["0.weight"]).load_state_dict(state)
    with pytest.raises(ValueError, match="group 0 of the state holds other parameters than group 0"):
        dealt(["1.weight"]).load_state_dict(state)
