"""The delta of trained values: out of a model, through a file, into the base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from tests.support import zoo


def model(dtype=torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3)).to(dtype)


def selection(of: nn.Module, seed: int = 0, density: float = 0.01) -> fk.Selection:
    """A sparse parameter, a dense one (stored as bits), a whole one, and one without selected entries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in of.named_parameters()}
    picked = {"0.weight": torch.rand(2000, generator=generator) < density, "1.weight": torch.arange(150) % 2 == 0}
    return fk.Selection(shapes, {n: mask.nonzero().view(-1) for n, mask in picked.items()}, whole=["1.bias"])


def trained(base: nn.Module, chosen: fk.Selection, by: float) -> nn.Module:
    with torch.no_grad():
        for name, p in base.named_parameters():
            p[chosen.mask(name)] += by
    return base


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(dtype, tmp_path):
    chosen = selection(model())
    tuned = trained(model(dtype), chosen, 1.0)
    delta = fk.delta(tuned, chosen)
    assert delta.count == chosen.count
    loaded = fk.Delta.load(delta.save(tmp_path / "task"))
    assert loaded.selection == chosen
    base = model(dtype)
    before = fk.apply_delta(base, loaded)
    assert same(base, tuned)
    fk.apply_delta(base, before)
    assert same(base, model(dtype))


def test_file_has_the_size_of_the_selection(tmp_path):
    of = nn.Linear(1000, 1000, bias=False)
    chosen = fk.Selection({"weight": (1000, 1000)}, {"weight": torch.arange(0, 1_000_000, 200)})
    file = fk.delta(of, chosen).save(tmp_path / "task")
    assert file.stat().st_size < 8 * chosen.count + 1000


def test_several_tasks_over_one_base():
    """A delta follows another of its selection; one of another selection waits until the first is undone."""
    first, second = selection(model()), selection(model(), seed=1)
    tasks = [
        fk.delta(trained(model(), chosen, by), chosen) for chosen, by in ((first, 1.0), (first, 2.0), (second, 3.0))
    ]
    base = model()
    before = fk.apply_delta(base, tasks[0])
    fk.apply_delta(base, tasks[1])
    assert same(base, trained(model(), first, 2.0))
    with pytest.raises(ValueError, match="undo a delta of another selection first"):
        fk.apply_delta(base, tasks[2])
    fk.apply_delta(base, before)
    fk.apply_delta(base, tasks[2])
    assert same(base, trained(model(), second, 3.0))


def test_another_base_is_refused_and_left_alone():
    chosen = selection(model())
    delta = fk.delta(trained(model(), chosen, 1.0), chosen)
    other = model(seed=1)
    with pytest.raises(ValueError, match="3 of 4 parameters differ where nothing is selected, such as 0.weight"):
        fk.apply_delta(other, delta)
    assert same(other, model(seed=1))
    with pytest.raises(ValueError, match=r"holds 0.weight as torch.float32, the model as torch.bfloat16"):
        fk.apply_delta(model(torch.bfloat16), delta)
    with pytest.raises(ValueError, match="the selection does not fit the model"):
        fk.apply_delta(nn.Linear(3, 3), delta)
    cast = model(torch.bfloat16)
    fk.apply_delta(cast, delta, check=False)
    assert torch.equal(cast[1].bias, trained(model(), chosen, 1.0)[1].bias.bfloat16())


def test_strided_and_tied_parameters():
    base = nn.Embedding(7, 5)
    base.weight = nn.Parameter(torch.randn(5, 7).mT)
    chosen = fk.Selection({"weight": (7, 5)}, {"weight": torch.tensor([1, 12, 34])})
    before = base.weight.detach().clone()
    delta = fk.delta(trained(base, chosen, 1.0), chosen)
    with torch.no_grad():
        base.weight.copy_(before)
    fk.apply_delta(base, delta)
    assert torch.equal(base.weight, before + chosen.mask("weight"))


def test_rename():
    chosen = selection(model())
    delta = fk.delta(trained(model(), chosen, 1.0), chosen).rename(lambda name: f"inner.{name}")
    outer = nn.ModuleDict({"inner": model()})
    fk.apply_delta(outer, delta)
    assert same(outer["inner"], trained(model(), chosen, 1.0))


def test_damaged_and_foreign_files(tmp_path):
    chosen = selection(model())
    with pytest.raises(ValueError, match="holds no fishkern delta"):
        fk.Delta.load(chosen.save(tmp_path / "selection"))
    file = fk.delta(model(), chosen).save(tmp_path / "task")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated, damaged"):
        fk.Delta.load(file)


def test_frozen():
    delta = fk.delta(model(), selection(model()))
    with pytest.raises(AttributeError, match="frozen"):
        delta.selection = None


def test_plain_transformers_checkpoint(tmp_path):
    """Train at 0.5 %, keep the delta; base + delta is saved and loaded as any checkpoint."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    specimen = zoo.llama()
    tuned = specimen.model
    tuned.save_pretrained(tmp_path / "base")
    scores = {name: torch.rand_like(p) for name, p in tuned.named_parameters()}
    chosen = fk.select(scores, fk.GlobalTopK(density=0.005))
    optimizer = fk.MaskedAdamW(tuned, chosen, lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        tuned(**specimen.batch(seed=seed)).loss.backward()
        optimizer.step()
    file = fk.delta(tuned, chosen).save(tmp_path / "task")

    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    fk.apply_delta(base, fk.Delta.load(file))
    base.save_pretrained(tmp_path / "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert same(merged, tuned)
