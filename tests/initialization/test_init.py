"""The start of an adapter: what it holds, what it refuses, and its file."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

import fishkern as fk

DIGESTS = {"encoder.q": (3.0, -1.25), "encoder.v": (2.0, 0.5)}


def module(rank: int = 3, shape: tuple[int, int] = (6, 4), scaling: float = 2.0) -> fk.ModuleInit:
    O, I = shape
    return fk.ModuleInit(torch.randn(rank, I), torch.randn(O, rank), scaling, torch.arange(rank) * 2)


def made(**options: object) -> fk.AdapterInit:
    modules = {"encoder.q": module(), "encoder.v": module(rank=2, scaling=0.1)}
    return fk.AdapterInit(modules, digests=DIGESTS, **{"provenance": {"rule": {"name": "Mine"}}, **options})


def test_a_module_knows_its_rank_its_alpha_and_its_delta():
    one = module(rank=3, scaling=2.0)
    assert (one.rank, one.alpha, one.shape) == (3, 6.0, (6, 4))
    expected = 2.0 * sum(torch.outer(one.B[:, r], one.A[r]) for r in range(3))
    torch.testing.assert_close(one.delta(), expected)


def test_factors_of_other_dtypes_become_float32():
    A, B = torch.randn(2, 4, dtype=torch.float64), torch.randn(6, 2).bfloat16()
    one = fk.ModuleInit(A, B, 1, torch.tensor([1, 0], dtype=torch.int32))
    assert (one.A.dtype, one.B.dtype, one.chosen.dtype) == (torch.float32, torch.float32, torch.int64)
    torch.testing.assert_close(one.A.double(), A, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"A": torch.ones(3, 4)}, ValueError, r"one rank R >= 1, got \(3, 4\) and \(6, 2\)"),
        ({"A": torch.ones(0, 4), "B": torch.ones(6, 0)}, ValueError, "one rank R >= 1"),
        ({"A": torch.ones(2, 4).long()}, TypeError, "A must be a floating tensor, got torch.int64"),
        ({"B": torch.full((6, 2), math.nan)}, ValueError, "B has entries that are not finite"),
        ({"scaling": 0.0}, ValueError, "scaling must be a positive number, got 0.0"),
        ({"scaling": math.inf}, ValueError, "scaling must be a positive number, got inf"),
        ({"chosen": torch.tensor([1, 1])}, ValueError, r"2 different numbers of directions.*got \[1, 1\]"),
        ({"chosen": torch.tensor([1])}, ValueError, "2 different numbers of directions"),
        ({"chosen": torch.tensor([-1, 1])}, ValueError, "2 different numbers of directions"),
        ({"chosen": torch.tensor([0.0, 1.0])}, TypeError, "chosen must be a tensor of integers, got torch.float32"),
    ],
)
def test_what_is_no_start_of_a_module(changed, error, match):
    good = {"A": torch.ones(2, 4), "B": torch.ones(6, 2), "scaling": 1.0, "chosen": torch.tensor([0, 1])}
    fk.ModuleInit(**good)
    with pytest.raises(error, match=match):
        fk.ModuleInit(**good | changed)


def test_it_is_a_mapping_from_paths():
    init = made()
    assert list(init) == ["encoder.q", "encoder.v"]
    assert init.ranks == {"encoder.q": 3, "encoder.v": 2}
    assert init.alphas == {"encoder.q": 6.0, "encoder.v": pytest.approx(0.2)}
    assert init.digests == DIGESTS
    assert init.provenance == {"rule": {"name": "Mine"}}
    assert repr(init) == "AdapterInit(2 modules, ranks 2 to 3, 50 entries)"
    with pytest.raises(KeyError, match="encoder.k is none of the 2 modules"):
        init["encoder.k"]


def test_wrappers_are_taken_out_of_paths():
    paths = {f"_orig_mod.{path}": one for path, one in made().items()}
    init = fk.AdapterInit(paths, digests={f"_orig_mod.{path}": pair for path, pair in DIGESTS.items()})
    assert list(init) == ["encoder.q", "encoder.v"]


def test_it_is_frozen():
    init = made()
    with pytest.raises(AttributeError, match="AdapterInit is frozen"):
        init.more = 1
    with pytest.raises(FrozenInstanceError):
        init["encoder.q"].scaling = 1.0
    init.provenance["rule"] = None
    init.digests.clear()
    init.ranks.clear()
    assert init.provenance == {"rule": {"name": "Mine"}}
    assert init.digests == DIGESTS
    assert init.ranks


def test_equality_compares_the_contents():
    torch.manual_seed(0)
    init = made()
    torch.manual_seed(0)
    same = made(provenance={})
    assert init == same
    assert init["encoder.q"] == same["encoder.q"]
    parts = {"A": same["encoder.q"].A + 1, "B": same["encoder.q"].B + 1, "scaling": 1.0, "chosen": torch.arange(3)}
    for name, value in parts.items():
        kept = {part: getattr(same["encoder.q"], part) for part in parts}
        changed = fk.ModuleInit(**kept | {name: value})
        assert init["encoder.q"] != changed, name
        assert init != fk.AdapterInit({**same, "encoder.q": changed}, digests=DIGESTS), name
    assert init != fk.AdapterInit(dict(same), digests={**DIGESTS, "encoder.q": (3.0, 1.25)})
    assert init != fk.AdapterInit({"encoder.q": init["encoder.q"]}, digests={"encoder.q": (3.0, -1.25)})


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"modules": {}, "digests": {}}, ValueError, "at least one module, got none"),
        ({"modules": {"q": 3}}, TypeError, "that of q is int"),
        ({"digests": {}}, ValueError, "modules and digests differ in q"),
        ({"digests": {"q": (math.nan, 0.0)}}, ValueError, "digest of q is a norm and a sum"),
        ({"digests": {"q": (-1.0, 0.0)}}, ValueError, "digest of q is a norm and a sum"),
        ({"provenance": {"rule": object()}}, TypeError, "provenance must be JSON"),
    ],
)
def test_what_is_no_start_of_an_adapter(changed, error, match):
    good = {"modules": {"q": module()}, "digests": {"q": (1.0, 0.0)}, "provenance": {}}
    fk.AdapterInit(**good)
    with pytest.raises(error, match=match):
        fk.AdapterInit(**good | changed)


def test_it_is_loaded_as_it_was_saved(tmp_path: Path):
    init = made()
    path = init.save(tmp_path / "adapter_init")
    assert path == tmp_path / "adapter_init.safetensors"
    loaded = fk.AdapterInit.load(path)
    assert loaded == init
    assert list(loaded) == list(init)
    assert loaded.provenance == init.provenance
    assert loaded["encoder.v"].scaling == 0.1


def test_a_file_of_something_else(tmp_path: Path):
    path = fk.Selection({"w": (2, 2)}, {}).save(tmp_path / "selection")
    with pytest.raises(ValueError, match="fishkern.selection"):
        fk.AdapterInit.load(path)
    with pytest.raises(FileExistsError, match="holds no fishkern adapter-init"):
        made().save(path)
