"""The cases on a GPU, as far as they run on a CPU: inputs, rivals, refusals and records."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.cases import (
    expert_sum_grad_squared,
    group_sum_grad_squared,
    log_histogram,
    masked_adamw,
    project_sum_squared,
    roofs,
    siblings,
    streaming_topk,
    sum_grad_squared,
    whole_pass,
)
from benchmarks.gpu import timing, tune
from benchmarks.rivals import layers
from benchmarks.subjects.masks import MaskedStep
from benchmarks.subjects.scores import TopK
from benchmarks.subjects.transformers import Shape, Workload
from fishkern.ops.streaming_topk import streaming_topk_torch
from fishkern.ops.sum_grad_squared import sum_grad_squared_torch

CPU = torch.device("cpu")
ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in for the device")


class Stopwatch:
    """In place of a device event; nothing runs on the device."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Stopwatch) -> float:
        return 1000 * (end.at - self.at)


def test_a_rival_may_fail_and_fishkern_may_not(monkeypatch):
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "Event", Stopwatch)
    monkeypatch.setattr(timing, "FLUSHED_BYTES", 8)

    def fails() -> None:
        raise RuntimeError("out of memory\nand a long trace")

    figures = timing.time_providers({"ours": list, "theirs": fails}, ours="ours", device=CPU)
    assert figures["theirs"] == {"failed": "RuntimeError: out of memory"}
    assert figures["ours"].keys() == {"ms", "rounds", "cold_l2", "peak_mib"}
    assert figures["ours"]["ms"]["min"] <= figures["ours"]["ms"]["median"] <= figures["ours"]["ms"]["max"]
    assert figures["ours"]["rounds"] == timing.ROUNDS[1]
    with pytest.raises(RuntimeError, match="out of memory"):
        timing.time_providers({"ours": fails, "theirs": list}, ours="ours", device=CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
@pytest.mark.parametrize("name", ["gpu", "tune"])
def test_nothing_is_measured_without_a_device(name, capsys):
    assert command.main([name]) == 2
    assert "nothing is measured" in capsys.readouterr().err


def test_roofs_name_what_records_look_for():
    names = {part.name for part in roofs.parts(CPU)}
    assert names == {"copy", *(f"gemm {case.dtype}" for case in sum_grad_squared.CASES.values())}


def test_tiles_to_tune_fit():
    pytest.importorskip("triton")
    for I, T in product((4096, 128), (512, 16)):
        configs = list(tune.candidates(I, T, 2, 232_448))
        assert 10 < len(configs) < 120
        assert all(max(16, I) >= config.BLOCK_I and max(16, T) >= config.BLOCK_T for config in configs)
        named = {(config.BLOCK_O, config.BLOCK_I, config.maxnreg) for config in configs}
        assert {(64, 128, None), (128, 128, 128)} <= named  # three and two programs at once
        assert (128, 256, 128) not in named  # which leaves no register


@pytest.mark.parametrize("milliseconds, rounds", [(1.0, 50), (20.0, 25), (150.0, 5), (400.0, 3)])
def test_slow_providers_have_fewer_rounds(milliseconds, rounds, monkeypatch):
    """All of a part have the same number, that of the slowest."""
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: 0)
    times = {"fast": 0.5, "slow": milliseconds}
    monkeypatch.setattr(timing, "_milliseconds", lambda cache, run: times[run()])
    figures = timing.time_providers(
        {name: lambda name=name: name for name in times}, ours="fast", device=CPU, flush=False
    )
    assert {figure["rounds"] for figure in figures.values()} == {rounds}


@pytest.fixture
def device(monkeypatch):
    """A device of 1 GB, on which everything is run once and takes a millisecond."""
    for module in (log_histogram, masked_adamw, siblings, streaming_topk, sum_grad_squared, whole_pass):
        monkeypatch.setattr(module, "time_providers", run_once)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**9))
    return CPU


def run_once(providers: dict, **options) -> dict[str, dict]:
    for provider in providers.values():
        provider()
    return {name: {"ms": {"median": 1.0, "min": 1.0, "max": 1.0}} for name in providers}


SMALL = {
    name: replace(case, O=24, I=20, N=5, T=6, dtype="float32") for name, case in sum_grad_squared.CASES.items()
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_inputs_and_error_of_a_layer(name):
    """Small, and of the case's kind; the operation is right on them."""
    pytest.importorskip("triton")
    case = SMALL[name]
    x, g, offsets = case.inputs(CPU)
    assert (x.shape[-1], g.shape[-1], g.numel()) == (20, 24, 5 * 6 * 24)
    assert (offsets is not None) == (case.lengths == "packed")
    assert (g.stride(-1) != 1) == (case.grads == "transposed")
    if not torch.cuda.is_available():
        assert sum_grad_squared.relative_error(case, x, g, offsets) < 1e-5


def test_lengths_of_packed_examples():
    case = sum_grad_squared.CASES["c gate packed"]
    lengths = sum_grad_squared.lognormal_offsets(case.N, case.N * case.T).diff()
    assert lengths.sum() == case.N * case.T
    assert 1 <= lengths.min() <= lengths.max() <= 8192
    assert lengths.max() > 4 * lengths.double().median()


@pytest.mark.parametrize(
    "rival",
    [layers.einsum_squares, layers.vmap_squares, *(lambda *o, r=r: layers.bmm_squares(*o, r) for r in (1, 5, 24))],
)
def test_rivals_of_a_layer_compute_the_same(rival):
    x, g, _ = SMALL["a gate 8x512"].inputs(CPU)
    torch.testing.assert_close(rival(x, g, torch.ones(24, 20)), 1 + sum_grad_squared_torch(x, g))


@ON_A_CPU
@pytest.mark.parametrize("part", ["a gate 8x512", "c gate packed", "with mean gradient"])
def test_records_of_a_layer(part, device):
    """Every provider of it runs; the record of fishkern has its error."""
    pytest.importorskip("triton")
    records = list(sum_grad_squared._measure(SMALL[part], device))
    assert float(records[0]["error"]) < 1e-5
    names = [record["provider"] for record in records]
    rivals = ["bmm_in_l2", "bmm", "opacus_einsum", "vmap_grad"]
    assert names == ["fishkern", "torch", "cublas_dw", *([] if "packed" in part else rivals)]


TINY = Workload(Shape(1, 16, 24, 31, 4, 2), T=5, N=2, batches=1)


@ON_A_CPU
@pytest.mark.parametrize("change", [{}, {"shape": replace(TINY.shape, tied=True)}, {"lora": 2}], ids=str)
def test_a_whole_pass_on_a_tiny_model(change):
    """All that is timed runs, and computes the Fisher of the same batches up to the number of examples."""
    pytest.importorskip("triton")
    case = replace(TINY, **change)
    model, batches = case.model(), case.data()
    assert whole_pass.disagreement(model, batches) < 1e-5
    providers = whole_pass.providers(case, model)
    providers.pop("one_by_one_graphed", None)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    results = {name: provider(batches) for name, provider in providers.items()}
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    expected = results["fishkern"]
    for name in results.keys() & {"one_by_one", "fishkern_torch"}:
        scale = case.N if name == "one_by_one" else 1
        for parameter, values in expected.items():
            torch.testing.assert_close(results[name][parameter], scale * values, rtol=1e-3, atol=1e-9)
    for module, values in results.get("per_layer_bmm", {}).items():
        expectation = case.N * expected[f"{module}.weight"]
        torch.testing.assert_close(values, expectation, rtol=1e-3, atol=1e-3 * expectation.max().item())


def test_a_graph_is_captured_last(monkeypatch):
    """Alone, after all that is ours: a capture that fails may disturb later allocations."""
    pytest.importorskip("triton")
    compared = []

    def time_providers(providers: dict, **options) -> dict[str, dict]:
        compared.append(list(providers))
        return {name: {"ms": {"median": 1.0, "min": 1.0, "max": 1.0}} for name in providers}

    monkeypatch.setattr(whole_pass, "time_providers", time_providers)
    monkeypatch.setattr(whole_pass, "disagreement", lambda model, batches: compared.append("ours") or 0.0)
    records = list(whole_pass.measure(TINY, CPU))
    assert len(compared) == 3
    assert compared[1:] == ["ours", ["one_by_one_graphed"]]
    assert [record["provider"] for record in records] == [*compared[0], "one_by_one_graphed"]


@pytest.mark.parametrize("name", masked_adamw.CASES)
def test_records_of_masked_steps(name, device, monkeypatch):
    """Every provider takes steps on tiny parameters of the case's dtype, after fishkern."""

    def tiny(case: MaskedStep) -> torch.nn.Module:
        trained = torch.nn.ParameterList([torch.ones(16, n, dtype=getattr(torch, case.dtype)) for n in (4, 8)])
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        return trained

    monkeypatch.setattr(MaskedStep, "trained", tiny)
    monkeypatch.setattr(masked_adamw, "_host_ms", lambda step: 0.5)
    case = replace(masked_adamw.CASES[name], model="lora", density=0.5, device="cpu")
    records = list(masked_adamw._measure(case, device))
    assert [record["against"] for record in records[::2]] == list(masked_adamw.PROVIDERS)[1:]
    assert all(record["provider"] == "fishkern" for record in records[::2])
    assert 60 < records[0]["entries"] < 132  # half of 192, at random


def test_parameters_of_masked_steps():
    meta = {name: MaskedStep(name, 0.5, device="meta").trained() for name in ("7B lora", "7B")}
    entries = {name: sum(parameter.numel() for parameter in trained.parameters()) for name, trained in meta.items()}
    assert entries == {"7B lora": 39_976_960, "7B": 6_738_415_616}


def test_what_the_device_has_no_room_for_is_recorded_as_such(device):
    """Otherwise each later call would take it up again."""
    for records in (
        masked_adamw._measure(MaskedStep("7B", 0.5, "bfloat16", "meta"), device),
        streaming_topk._measure(TopK(2**31, 0.1, 7), device),
    ):
        (record,) = records
        assert record["provider"] == "fishkern"
        assert record["failed"].startswith("needs ")


def test_entries_are_drawn_alike_and_at_random():
    parameters = torch.nn.ParameterList([torch.zeros(300, 40), torch.zeros(7)])
    selection = masked_adamw.drawn(parameters, 0.2)
    assert selection == masked_adamw.drawn(parameters, 0.2)
    assert 0.18 < selection.density < 0.22
    assert selection.indices("0").diff().max() > 15
    assert masked_adamw.drawn(parameters, 1.0).whole == ("0", "1")


@ON_A_CPU
def test_records_of_top_k(device):
    """All providers and the comparison of both backends, of scores as they come and of others."""
    pytest.importorskip("triton")
    for distribution in ("", "nine values"):
        records = list(streaming_topk._measure(TopK(1400, 0.1, 7), device, distribution))
        assert [record["provider"] for record in records] == ["fishkern", "torch", "one_read", "cat_topk"]
        assert all(record["bytes"] == 5600 for record in records)
        assert all(record["case"]["distribution"] == distribution for record in records)
    halves = list(streaming_topk._half(TopK(1400, 0.1, 7), device))
    assert [record["provider"] for record in halves] == ["fishkern", "moved"]


def test_distributions_of_scores_are_what_they_are_called():
    torch.manual_seed(0)
    blocks = {name: torch.randn(20_000).square() for name in streaming_topk.DISTRIBUTIONS}
    for name, block in blocks.items():
        streaming_topk.DISTRIBUTIONS[name](block)
    counts = {name: len(block.unique()) for name, block in blocks.items()}
    assert (counts["all equal"], counts["within an ulp"], counts["nine values"]) == (1, 2, 9)
    assert [case.zeros for name, case in streaming_topk.CASES.items() if "half zeros" in name] == [0.5, 0.5]
    assert 0.4 < (TopK(20_000, 0.6, 1, zeros=0.5).block(0) == 0).double().mean() < 0.6
    assert 0 < blocks["denormals"].max() < torch.finfo(torch.float32).tiny
    assert torch.equal(blocks["ascending"], blocks["ascending"].sort().values)
    assert blocks["infinities"].isinf().any()


@pytest.mark.parametrize("wrong", ["one less", "others", "another in the second call", "by the order of the blocks"])
def test_a_wrong_selection_is_not_recorded(wrong, monkeypatch):
    scores, calls = TopK(600, 0.1, 3).scores(), []

    def select(blocks: list[torch.Tensor], k: int, backend: str) -> list[torch.Tensor]:
        calls.append(backend)
        selected = streaming_topk_torch(blocks, k)
        ours = backend == "triton"
        if ours and wrong == "one less":
            selected[0] = selected[0][1:]
        elif ours and (wrong == "others" or (wrong == "another in the second call" and calls.count("triton") == 2)):
            selected[0] = (selected[0] + 1) % len(blocks[0])
        elif ours and wrong == "by the order of the blocks" and blocks[0] is scores[-1]:
            selected[-1] = selected[-1].flip(0)
        return selected

    monkeypatch.setattr(streaming_topk, "streaming_topk", select)
    with pytest.raises(ValueError, match="selected instead|than the reference|another order"):
        streaming_topk.check(scores, 60)


@ON_A_CPU
@pytest.mark.parametrize("name", log_histogram.CASES)
def test_histograms_in_small(name, device, monkeypatch):
    """Every provider runs; nearly all values are inside of the edges, and other counts than the reference's raise."""
    case = replace(log_histogram.CASES[name], n=3000)
    ours = log_histogram.log_histogram

    def count(values, edges, *, backend):
        return ours(values, edges, backend="torch") + (wrong if backend == "triton" else 0)

    monkeypatch.setattr(log_histogram, "log_histogram", count)
    wrong = 0
    records = list(log_histogram._measure(case, device))
    assert [record["provider"] for record in records] == ["fishkern", "torch", "one_read", "histc"]
    assert ours(*case.inputs(device)).sum() > 0.95 * 3000
    wrong = 1
    with pytest.raises(ValueError, match="otherwise than the reference"):
        list(log_histogram._measure(case, device))


@ON_A_CPU
@pytest.mark.parametrize("name", ["gate 8x512 by tensor", "gate packed by row", "lora_A r=16 by row"])
def test_groups_in_small(name, monkeypatch):
    """Every provider of it runs and gives the same sums; ours has its error in the record."""
    pytest.importorskip("triton")
    case = group_sum_grad_squared.CASES[name]
    case = type(case)(**{**vars(case), "O": 24, "I": 20, "N": 5, "T": 6, "dtype": "float32"})
    results = {}

    def called_once(providers, *, ours, device):
        results.update({provider: run() for provider, run in providers.items()})
        return {provider: {"ms": {}} for provider in providers}

    monkeypatch.setattr(group_sum_grad_squared, "time_providers", called_once)
    records = {record["provider"]: record for record in group_sum_grad_squared._measure(case, CPU)}
    assert float(records["fishkern"]["error"]) < 1e-6
    assert records["fishkern"]["bytes"] == 5 * 6 * (24 + 20) * 4 + 8 * results["fishkern"].numel()
    for provider in ("torch", "unreduced"):
        torch.testing.assert_close(results[provider], results["fishkern"], rtol=1e-5, atol=1e-5)


@ON_A_CPU
def test_experts_in_small(monkeypatch):
    """Every provider of them adds the same sums; ours has its error in the record."""
    pytest.importorskip("triton")
    case = expert_sum_grad_squared.ExpertCase(E=3, O=24, I=20, N=2, rows=9)
    inputs = case.inputs(CPU)
    monkeypatch.setattr(type(case), "inputs", lambda self, device: in_float32(inputs))
    results = {}

    def in_float32(inputs):
        return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}

    def called_once(providers, *, ours, device):
        total = providers["fishkern"].keywords["out"]
        for provider, run in providers.items():
            total.zero_()
            run()
            results[provider] = total.clone()
        return {provider: {"ms": {}} for provider in providers}

    monkeypatch.setattr(expert_sum_grad_squared, "time_providers", called_once)
    records = {record["provider"]: record for record in expert_sum_grad_squared._measure(case, CPU)}
    assert float(records["fishkern"]["error"]) < 1e-6
    for provider in ("torch", "each_expert"):
        torch.testing.assert_close(results[provider], results["fishkern"], rtol=1e-5, atol=1e-5)
    assert not results["fishkern"][0].any()
    assert results["fishkern"][1:].all()


@ON_A_CPU
@pytest.mark.parametrize("name", ["gate 8x512", "vit 64x197", "q 16x512 float32 directions"])
def test_projections_in_small(name, monkeypatch):
    """Every provider of them runs and gives the same sums; ours has its error in the record."""
    pytest.importorskip("triton")
    case = replace(project_sum_squared.CASES[name], O=24, I=20, N=5, T=6, dtype="float32", directions="float32")
    results = {}

    def called_once(providers, *, ours, device):
        results.update({provider: run() for provider, run in providers.items()})
        return {provider: {"ms": {}} for provider in providers}

    monkeypatch.setattr(project_sum_squared, "time_providers", called_once)
    records = {record["provider"]: record for record in project_sum_squared._measure(case, CPU)}
    assert float(records["fishkern"]["error"]) < 1e-6
    assert records["fishkern"]["flops"] == 2 * 5 * 6 * 20 * (24 + 20)
    assert records["fishkern"]["bytes"] == 4 * (5 * 6 * (24 + 20) + 20 * (24 + 20) + 3 * 20)
    for provider in ("torch", "plain", "covariances"):
        expected = results["fishkern"][: records[provider]["rows"]]
        torch.testing.assert_close(results[provider], expected, rtol=1e-5, atol=1e-5)


@ON_A_CPU
@pytest.mark.parametrize("case", project_sum_squared.ON_CPU, ids=str)
def test_projections_of_several_batches_in_small(case):
    """What is timed on a CPU is the same."""
    small = replace(case, O=24, I=20, N=3, T=6, padding=0.3)
    ours, plain, covariances = (run(*small.inputs(CPU)) for run in project_sum_squared.PROVIDERS.values())
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariances, ours[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", siblings.CASES)
def test_bytes_of_siblings(name, device):
    """The bytes are those of the inputs, and of the entries that are added to."""
    case = replace(siblings.CASES[name], N=2, T=3, D=4, vocabulary=5)
    *_, record = siblings._measure(case, device)
    inputs = 2 * 3 * 4 * 2
    if case.kind == "embedding":
        assert inputs + 2 * 3 * 8 + 8 * 4 <= record["bytes"] <= inputs + 2 * 3 * 8 + 5 * 8 * 4
    else:
        assert record["bytes"] == inputs * (2 if case.kind in ("scale", "norm") else 1) + 8 * 4
