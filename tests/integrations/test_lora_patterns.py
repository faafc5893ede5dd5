"""Ranks of single modules in the fields of PEFT and axolotl: each pattern means its own module only."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")
from peft.utils.other import get_pattern_key  # noqa: E402

from fishkern.integrations.lora_patterns import axolotl_yaml, peft_patterns, targets  # noqa: E402

PATHS = ["layers.1.q", "layers.11.q", "encoder.layers.1.q", "decoder.layers.1.q", "encoderxlayers.1.q", "a-b.c'd.q"]
RANKS = {path: n + 1 for n, path in enumerate(PATHS)}


def resolved(fields: dict, path: str) -> tuple[int, float]:
    """Rank and alpha that PEFT gives a module."""
    rank = fields["rank_pattern"].get(get_pattern_key(fields["rank_pattern"], path), fields["r"])
    return rank, fields["alpha_pattern"].get(get_pattern_key(fields["alpha_pattern"], path), fields["lora_alpha"])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scaling", [2.0, 0.3, {path: 1 / (n + 1) for n, path in enumerate(PATHS)}])
def test_each_module_gets_its_rank_and_scaling(scaling, rslora):
    fields = peft_patterns(RANKS, scaling=scaling, rslora=rslora)
    assert fields["r"] == max(RANKS.values())
    for path, rank in RANKS.items():
        found, alpha = resolved(fields, path)
        expected = scaling[path] if isinstance(scaling, dict) else scaling
        assert found == rank
        assert alpha / (math.sqrt(rank) if rslora else rank) == pytest.approx(expected, rel=1e-9)
    for other in ("layers.111.q", "x.layers.1.q", "layers.1.qq", "layersx1.q"):
        assert get_pattern_key(fields["rank_pattern"], other) == other


def test_equal_ranks_need_no_patterns():
    fields = peft_patterns(dict.fromkeys(PATHS, 4), scaling=2)
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"], fields["alpha_pattern"]) == (4, 8, {}, {})
    assert fields["target_modules"] == PATHS


def test_a_loader_without_patterns_scales_right():
    fields = peft_patterns(RANKS, scaling=1.5)
    assert fields["lora_alpha"] / fields["r"] == 1.5
    assert isinstance(peft_patterns(RANKS, scaling=0.5)["lora_alpha"], int)  # 3


@pytest.mark.parametrize(
    ("ranks", "scaling", "match"),
    [
        ({}, 1.0, "at least one module, got none"),
        ({"a": 0, "b": 2}, 1.0, r"a rank is at least 1: .*\(a\)"),
        ({"a": 2}, 0.0, "scaling must be a positive number, got 0.0 for a"),
        ({"a": 2}, math.nan, "scaling must be a positive number"),
        ({"a": 2, "b": 2}, {"a": 1.0}, r"scaling lacks 1 of the modules that have a rank \(b\)"),
    ],
)
def test_refusals(ranks, scaling, match):
    with pytest.raises(ValueError, match=match):
        peft_patterns(ranks, scaling=scaling)
    with pytest.raises(TypeError, match="the rank of a must be an integer"):
        peft_patterns({"a": 1.5})


def test_axolotl_reads_the_same():
    fields = peft_patterns(RANKS, scaling=2)
    read = yaml.safe_load(axolotl_yaml(RANKS, scaling=2))
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_target_modules": "target_modules"}
    names |= {f"lora_{name}": name for name in ("rank_pattern", "alpha_pattern")}
    assert {names[name]: value for name, value in read.items()} == fields
    assert set(yaml.safe_load(axolotl_yaml(dict.fromkeys(PATHS, 4)))) == set(names) - {
        "lora_rank_pattern",
        "lora_alpha_pattern",
    }
    with pytest.raises(ValueError, match=r"axolotl takes whole numbers as alpha.*choose a scaling such as 1 or 2"):
        axolotl_yaml(RANKS, scaling=0.3)


def test_targets_are_a_list_unless_another_module_ends_in_one_of_them():
    assert targets(["a.q", "b.q"], ["a.q", "b.q", "c.q", "aa.q", "a.q.inner"]) == ["a.q", "b.q"]
    assert targets(["q", "a.q"], ["q", "a.q"]) == ["q", "a.q"]
    assert targets(["a.q", "b.q"], ["a.q", "b.q", "c.a.q"]) == r"a\.q|b\.q"
