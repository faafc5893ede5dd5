"""Sharded models of many families and of accelerate, and sharded models that do unusual things."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.support.ranks import launched

PROGRAM = "tests.statistics.sharded_families"
pytestmark = pytest.mark.slow  # the quick ones of their kind are in test_sharded_ranks.py
QUICK = ["parameter as input", "unit that runs twice", "family t5"]
FAMILIES = [
    "llama", "qwen3", "gemma3", "gpt2", "opt", "bert", "modernbert", "deberta", "vit", "swin", "mixtral", "Qwen3Moe",
    "GptOss", "lora", "dora", "t5, checkpointed reentrantly", "mixtral, checkpointed",
]  # fmt: skip
UNUSUAL = [
    "one rank without data", "ignored parameters", "without the rest", "entries of other names and orders",
    "compiled layers", "gradients in progress", "token losses",
]  # fmt: skip
ACCELERATE = [f"accelerate{option}" for option in ("", ", tied", ", checkpointed", ", kept", ", from one rank")]
LOOPED = {
    "deberta": ["deberta.encoder.rel_embeddings.weight"],
    "t5": [f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")],
}  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> list[dict]:
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("quick"), QUICK)


@pytest.mark.parametrize("case", ["parameter as input", "unit that runs twice"])
def test_unusual_models_give_what_one_process_gives(quick, case):
    for report in quick:
        assert report[case]["error"] < 2e-7
        assert report[case]["paths"] == ["fused"]


def test_a_host_with_units_inside_is_left_to_the_slow_path(quick):
    for report in quick:
        assert report["family t5"]["error"] < 2e-7
        assert sorted(report["family t5"]["looped"]) == sorted(LOOPED["t5"])
        (note,) = report["family t5"]["notes"]
        assert "encoder would run once more for each example, and FSDP2 shards encoder.block.0" in note
        assert "call fully_shard on encoder alone" in note


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[dict]:
    cases = [*(f"family {kind}" for kind in FAMILIES), *UNUSUAL, *ACCELERATE]
    return launched(PROGRAM, 2, tmp_path_factory.mktemp("many"), cases)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_gives_what_the_loop_gives(many, kind):
    for report in many:
        one = report[f"family {kind}"]
        assert one["error"] < 3e-7, one["where"]  # Gemma's norms compute in float32
        assert one["count"] == 5
        assert sorted(one["looped"]) == sorted(LOOPED.get(kind.partition(",")[0], []))


@pytest.mark.slow
@pytest.mark.parametrize("case", UNUSUAL)
def test_more_unusual_models_give_what_one_process_gives(many, case):
    for report in many:
        assert report[case]["error"] < (2e-5 if case == "compiled layers" else 2e-7)  # in float32, both
    assert all(report["gradients in progress"]["twice"] for report in many)


@pytest.mark.slow
@pytest.mark.parametrize("case", ACCELERATE)
def test_what_accelerate_prepares_is_estimated_and_trains_as_before(many, case):
    for report in many:
        assert report[case]["error"] < 2e-7
        assert report[case]["count"] == report[case]["examples"]
        assert report[case]["trained alike"]
