"""Sums in files and parameters in parts: the same bits as in memory and in one pass, within the planned memory."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.files import mapped_zeros
from fishkern.statistics.staging import Staging
from tests.support import zoo

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc", mc_samples=2, seed=3),
    "sketch": fk.SketchedFisher(draws=2),
    "rows": fk.GroupFisher(by="row"),
    "energies": fk.DirectionEnergy(),
    "a layer a pass": fk.DirectionEnergy(layers_per_pass=1),
}


class Broken(Exception):
    pass


class Data:
    """Batches that can be read again; in the given reading they raise before the given batch."""

    def __init__(self, reading: int = 0, before: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            (torch.randn(3, 128, generator=generator), torch.randint(3, (3,), generator=generator)) for _ in range(4)
        ]
        self.reading, self.before, self.readings = reading, before, 0

    def __iter__(self):
        self.readings += 1
        for number, batch in enumerate(self.batches):
            if (self.readings, number) == (self.reading, self.before):
                raise Broken
            yield batch


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 160), nn.Tanh(), nn.Linear(160, 130), nn.Tanh(), nn.Linear(130, 3))


def of(kind: str, data: object = None, **options) -> fk.statistics.Held:
    named = {} if kind in ("empirical", "mc", "sketch") else {"parameters": "*.weight"}
    data = Data() if data is None else data
    return fk.estimate(net(), data, ESTIMATORS[kind], likelihood=fk.Classification(), **named, **options)


def mapped_files() -> list[str]:
    """Files of sums that this process has mapped, as the system lists them."""
    gc.collect()  # an exception refers to the frames that it went through
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/.fishkern-" in line]


@pytest.mark.parametrize("shape", [(200, 300), (3, 70_000), (2, 3), (0, 5), ()])
def test_zeros_in_a_file(shape, tmp_path):
    values = mapped_zeros(tmp_path, shape, torch.float32)
    assert values.shape == torch.Size(shape)
    assert not values.any()
    assert os.listdir(tmp_path) == []
    assert len(mapped_files()) == (values.nbytes >= 2**16)
    values += 1
    assert torch.equal(values, torch.ones(shape))
    del values
    assert mapped_files() == []


def test_room_on_the_disk_is_reserved(tmp_path, monkeypatch):
    """A disk that is full when a page is written back would end the process by a signal."""
    sizes = []
    reserve = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda file, *range: sizes.append(range) or reserve(file, *range))
    mapped_zeros(tmp_path, (2**15,), torch.float64)
    assert sizes == [(0, 2**18)]

    def full(file: int, *range: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="has no room for another 81,920 bytes of sums.*free some") as raised:
        of("empirical", accumulate_on=tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    assert not mapped_zeros(tmp_path, (5_000_000,), torch.float32).any()


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_sums_in_files_have_the_same_bits(kind, tmp_path):
    whole = of(kind)
    there = of(kind, accumulate_on=tmp_path)
    assert len(mapped_files()) == (2 if kind in ("empirical", "mc", "sketch") else 0)  # two weights are large enough
    assert there == whole
    del there
    assert mapped_files() == []
    assert os.listdir(tmp_path) == []


def test_sums_in_files_go_on_from_a_checkpoint(tmp_path):
    options = {"accumulate_on": str(tmp_path), "checkpoint": tmp_path / "fisher.part"}
    with pytest.raises(Broken):
        of("mc", Data(1, 2), **options)
    assert mapped_files() == []
    assert os.listdir(tmp_path) == ["fisher.part"]
    assert of("mc", **options) == of("mc")
    assert os.listdir(tmp_path) == []


PARTS = [["0.weight"], ["0.bias", "2.weight"], ["2.bias", "4.weight", "4.bias"]]


@pytest.mark.parametrize("kind", ["empirical", "mc", "sketch"])
@pytest.mark.parametrize("results_on", [None, "cpu", "folder"])
def test_parts_are_the_whole(kind, results_on, tmp_path):
    whole = of(kind)
    parts = of(kind, parts=PARTS, results_on=tmp_path if results_on == "folder" else results_on)
    assert len(mapped_files()) == 2 * (results_on == "folder")
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert parts.coverage == whole.coverage
    assert parts.provenance["definition"] == whole.provenance["definition"]
    assert parts.provenance["runs"] == [whole.provenance["runs"][0] | {"passes": 3}]
    by_hand = fk.union(*(of(kind, parameters=part) for part in PARTS))
    assert all(torch.equal(parts[name], by_hand[name]) for name in whole)
    saved = parts.save(tmp_path / "fisher.safetensors")
    del parts
    assert fk.Statistics.load(saved)["0.weight"].equal(whole["0.weight"])


def test_parts_of_an_estimator_with_passes_of_its_own():
    names = [["0.weight", "4.weight"], ["2.weight"]]
    parts, whole = of("a layer a pass", parts=names), of("energies")
    assert parts.provenance["runs"][0]["passes"] == 3
    assert list(parts.blocks) == list(whole.blocks)
    assert all(torch.equal(parts.blocks[entry], whole.blocks[entry]) for entry in whole.blocks)
    together = of("energies", parts=names)
    assert together.provenance["runs"][0]["passes"] == 2


def test_the_same_call_goes_on_at_the_right_part(tmp_path, monkeypatch):
    options = {"parts": PARTS, "checkpoint": tmp_path / "fisher.part", "results_on": tmp_path}
    with pytest.raises(Broken):
        of("mc", Data(2, 2), **options)
    assert sorted(os.listdir(tmp_path)) == ["fisher.part.pass-1", "fisher.part.pass-2"]
    with pytest.raises(ValueError, match="checkpoint of another call: the pass of 0.bias"):
        of("mc", **{**options, "parts": [PARTS[0] + PARTS[1], PARTS[2]]})
    run, batches = nn.Module.__call__, []
    monkeypatch.setattr(
        nn.Sequential, "__call__", lambda self, x: batches.append(len(x)) or run(self, x), raising=False
    )
    whole = of("mc", parts=PARTS)
    expected, batches[:] = len(batches), []
    assert of("mc", **options) == whole
    assert len(batches) == expected - 3 - 1  # three of the first pass, and one of the second, are not run again
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("parts", [PARTS[:2], [*PARTS, ["0.weight"]], [*PARTS, ["5.weight"]]])
def test_parts_that_are_not_the_request_are_refused(parts):
    with pytest.raises(ValueError, match="parts must have every requested parameter once"):
        of("empirical", parts=parts)


def test_places_that_are_none_are_refused(tmp_path):
    for wrong in (["0.weight"], 5, [None], [[0]], iter(PARTS)):
        with pytest.raises(TypeError, match="parts must be lists of names"):
            of("empirical", parts=wrong)
    for where in ("accumulate_on", "results_on"):
        with pytest.raises(ValueError, match=f"{where} cannot be the meta device, which holds no values"):
            of("empirical", **{where: "meta"})
    with pytest.raises(ValueError, match="accumulate_on names a device .* or a folder that exists, got 'scores.bin'"):
        of("empirical", accumulate_on="scores.bin")
    with pytest.raises(FileNotFoundError, match="sums of results_on does not exist"):
        of("empirical", results_on=tmp_path / "sums")
    with pytest.raises(TypeError, match="results_on must be a device or a folder, got int"):
        of("empirical", results_on=3)
    with pytest.raises(ValueError, match="iterator, which can be read once"):
        of("empirical", iter(Data()), parts=PARTS)


# ---- plans


def half_of(planned: fk.PassPlan) -> int:
    """What is beside the sums, and half of them."""
    return planned.beside_bytes + sum(planned.state_bytes.values()) // 2


def planned_llama(**options) -> fk.PassPlan:
    specimen = zoo.FAMILIES["llama"]()
    return fk.plan(specimen.model, specimen.batch(N=2, T=4), **options)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [fk.DiagonalFisher(), fk.DirectionEnergy("power")], ids=["squares", "energies"])
def test_each_part_fits(estimator):
    """By a plan of its own, which counts what is alive when this part alone is rehearsed."""
    whole = planned_llama(estimator=estimator)
    memory = half_of(whole)
    parts = whole.parts(memory)
    assert 1 < len(parts) <= 6
    assert [name for part in parts for name in part] == list(whole.paths)
    alone = [planned_llama(estimator=estimator, parameters=part, parts=[part]) for part in parts]
    assert all(one.peak_bytes <= memory for one in alone)
    assert sum(one.accumulator_bytes + one.basis_bytes for one in alone) == sum(whole.state_bytes.values())
    together = planned_llama(estimator=estimator, parts=parts, results_on="cuda")
    assert together.passes == len(parts)
    assert together.peak_bytes == pytest.approx(max(one.peak_bytes for one in alone), abs=256)
    assert whole.parts(whole.peak_bytes + 64) == [list(whole.paths)]


@pytest.mark.slow
def test_results_of_earlier_parts_stay_beside_the_rest():
    whole = planned_llama()
    parts = whole.parts(half_of(whole))
    stay = planned_llama(parts=parts)
    assert stay.peak_bytes > planned_llama(parts=parts, results_on="cuda").peak_bytes
    assert stay.peak_bytes >= sum(whole.state_bytes.values())


@pytest.mark.slow
def test_sums_in_files_take_no_memory(tmp_path):
    here, there = planned_llama(), planned_llama(accumulate_on=tmp_path, results_on=tmp_path)
    assert there.accumulator_bytes == here.accumulator_bytes
    assert there.peak_bytes == pytest.approx(here.peak_bytes - here.accumulator_bytes, abs=64)
    assert len(there.parts(there.peak_bytes)) == 1
    parts = here.parts(half_of(here))
    assert planned_llama(parts=parts, accumulate_on=tmp_path).peak_bytes <= there.peak_bytes + 64  # results stay there


def test_too_little_memory_is_refused():
    whole = planned_llama()
    with pytest.raises(ValueError, match=r"memory='1KiB' is not enough for .*embed_tokens.*Give at least"):
        whole.parts("1KiB")
    with pytest.raises(ValueError, match='memory must be a positive number of bytes or like "5GB"'):
        whole.parts("much")
    with pytest.raises(ValueError, match="depends on the batch: plan with one"):
        fk.plan(zoo.FAMILIES["llama"]().model).parts("1GB")


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_by_hand(ranks):
    """Rows are dealt out as torch.chunk does; all but the own part of the squares comes from other ranks."""
    model = zoo.FAMILIES["llama"]().model.to(torch.bfloat16)
    own = fk.plan(model, ranks=ranks).per_rank
    rows = {name: len(one.chunk(ranks)[0]) for name, one in model.named_parameters()}
    local = sum(rows[name] * one[0].numel() for name, one in model.named_parameters())
    buffers = sum(one.nbytes for one in model.buffers())
    assert (own.ranks, own.accumulator_bytes, own.weight_bytes) == (ranks, 4 * local, 2 * local + buffers)
    assert (own.reduced_bytes, own.gathered_bytes) == ((ranks - 1) * 4 * local, 2 * (ranks - 1) * 2 * local)
    layers = [sum(one.nbytes for one in layer.parameters()) for layer in model.model.layers]
    outside = sum(one.nbytes for one in model.parameters()) - sum(layers)
    assert own.unit_bytes == (ranks > 1) * (outside + sum(sorted(layers)[-2:]))
    assert own.peak_bytes is None  # without a batch
    assert own.block_bytes == (ranks > 1) * max(
        4 * ranks * rows[name] * one[0].numel() for name, one in model.named_parameters()
    )


def test_ranks_of_an_8b_shape():
    """The figures of the published shape: 4.0 GB of sums for each of eight ranks, and 28.1 GB received for a batch."""
    own = fk.plan(llama_8b(), ranks=8).per_rank
    assert own.accumulator_bytes == pytest.approx(4.02e9, rel=0.002)
    assert own.reduced_bytes == pytest.approx(28.1e9, rel=0.002)
    assert own.gathered_bytes == own.reduced_bytes  # two times 16 bits
    assert own.block_bytes == 2**26
    with pytest.raises(fk.UnsupportedModuleError, match="not computed on shards"):
        fk.plan(llama_8b(), estimator=fk.DiagonalKronecker(), ranks=8)
    computed_there = fk.GroupFisher(), fk.SketchedFisher(draws=2), fk.DirectionEnergy()  # and their sums are others
    for other in computed_there:
        with pytest.raises(fk.UnsupportedModuleError, match="ranks= counts the sums of a DiagonalFisher"):
            fk.plan(llama_8b(), estimator=other, ranks=8)
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        fk.plan(llama_8b(), ranks=0)


def llama_8b() -> nn.Module:
    sizes = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, dtype=torch.bfloat16)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.slow
def test_prices():
    planned = planned_llama()
    sums = planned.accumulator_bytes
    assert planned.traffic_bytes == {"device": 0, "cpu": sums, "file": 2 * sums}
    words = str(planned_llama(ranks=2))
    assert "to the CPU, or" in words
    assert "each of 2 ranks (FSDP2)" in words


@pytest.mark.parametrize("estimator", [fk.DiagonalFisher(), fk.DirectionEnergy()], ids=["squares", "energies"])
def test_out_of_memory_says_the_numbers_and_the_ways_out(estimator, monkeypatch):
    """Sums of 64 TiB are asked for: torch's own error comes, with a note."""
    large = nn.Linear(2**22, 2**22, bias=False, device="meta")
    large.weight = nn.Parameter(torch.zeros(()).expand(2**22, 2**22))
    if estimator != fk.DiagonalFisher():

        def full(*args: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 TiB.")

        large = nn.Linear(4, 3)
        monkeypatch.setattr(fk.DirectionEnergy, "init", full)
    with pytest.raises(RuntimeError, match="allocate") as raised:
        fk.estimate(large, [(torch.randn(2, 4), torch.zeros(2))], estimator, likelihood=fk.Classification())
    (note,) = raised.value.__notes__
    for way in ("accumulate_on='cpu'", "parts=fishkern.plan(model, batch).parts('8GB')", "batches smaller"):
        assert way in note
    if estimator == fk.DiagonalFisher():
        assert "The sums take 65536.00 GiB on cpu (of 17,592,186,044,416 entries of 1 parameters)" in note
    with pytest.raises(RuntimeError, match="another error") as raised:
        fk.estimate(nn.Linear(4, 3), failing(), likelihood=fk.Classification())
    assert not hasattr(raised.value, "__notes__")


def failing():
    raise RuntimeError("another error")
    yield


# ---- on their way to the CPU


def test_sums_arrive_in_their_order():
    """Float32 sums depend on it. What was sent may be written over, and each buffer serves tensors of several sizes."""
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (40, 2), (1,), (), (0, 4)]
    totals = [torch.zeros(shape) for shape in shapes]
    expected = [total.clone() for total in totals]
    staging = Staging(torch.device("cpu"))
    for number in range(30):
        place = number % len(shapes)
        added = torch.randn(shapes[place]) * 10.0 ** (number % 7)
        expected[place] += added
        staging.send(added, totals[place])
        added.fill_(float("nan"))
    staging.drain()
    assert all(torch.equal(one, other) for one, other in zip(totals, expected, strict=True))
    staging.drain()
    assert all(torch.equal(one, other) for one, other in zip(totals, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, from which sums are copied")
def test_sums_on_the_cpu_are_those_of_the_gpu():
    model, batches = net().cuda(), Data()
    there = fk.estimate(model, batches, likelihood=fk.Classification(), accumulate_on="cpu")
    here = fk.estimate(model, batches, likelihood=fk.Classification())
    assert all(torch.equal(there[name], here[name].cpu()) for name in here)
