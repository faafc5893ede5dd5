"""A union of parts is the estimate of all of their parameters; parts that do not belong together are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.statistics import Covered, Held

ESTIMATORS = {
    "empirical": fk.DiagonalFisher(),
    "mc": fk.DiagonalFisher("mc", seed=3),
    "rows": fk.GroupFisher(by="row"),
    "layers": fk.GroupFisher(by=lambda name: name.partition(".")[0]),
    "kronecker": fk.DiagonalKronecker(),
    "directions": fk.DirectionEnergy(importance="exact"),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(*sizes: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)) for N in sizes]


def part(parameters: str | list[str], estimator=None, batches=None, **options) -> Held:
    options = {"likelihood": fk.Classification(), **options}
    return fk.estimate(model(), batches or data(3, 2), estimator, parameters=parameters, **options)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_parts_in_any_order_are_the_whole(kind, tmp_path):
    estimator = ESTIMATORS[kind]
    whole = part("*.weight", estimator)
    first, second = part("0.weight", estimator), part("2.weight", estimator)
    path = second.save(tmp_path / "second")
    for parts in ((first, second), (second, first), (first, type(first).load(path, lazy=True))):
        joined = fk.union(*parts)
        assert type(joined) is type(whole)
        assert joined == whole
        assert list(joined) == list(whole)  # in the model's order
    assert fk.union(whole) == whole


def test_three_parts_of_one_model_are_the_whole():
    names = ("2.bias", "0.*", "2.weight")
    joined = fk.union(*(part(one) for one in names))
    assert joined == part("all")
    assert joined["2.bias"].data_ptr() != 0
    assert {covered.path for covered in joined.coverage.values()} == {"fused"}


def test_a_union_of_merged_parts_is_a_merger_of_unions():
    early, late = data(3, 2), data(4, seed=2)
    some = fk.merge(part("0.*", batches=early), part("0.*", batches=late))
    others = fk.merge(part("2.*", batches=early), part("2.*", batches=late))
    assert fk.union(some, others) == fk.merge(part("all", batches=early), part("all", batches=late))


def test_what_parts_say_of_how_they_were_made_is_kept():
    other = part("2.*", batches=[tuple(map(torch.cat, zip(*data(3, 2), strict=True)))], check=False)
    (run,) = fk.union(part("0.*"), other).provenance["runs"]
    assert (run["batches"], run["checked"], run["examples"]) == ([2, 1], [True, False], 5)
    mixed = model()
    mixed[2].double()
    losses = {"likelihood": lambda model, batch: (model[2](model[:2](batch[0]).double()) ** 2).sum(1)}
    both = [fk.estimate(mixed, data(3), parameters=name, **losses) for name in ("0.*", "2.*")]
    assert fk.union(*both).provenance["runs"][0]["dtype"] == ["float32", "float64"]


def test_a_parameter_that_no_part_has_stays_left_out():
    joined = fk.union(part("0.weight"), part("2.weight"))
    assert joined.coverage["2.bias"] == Covered("left out", 3, "the parameters argument")
    assert joined == part("*.weight")


REFUSED = {
    "the same parameter": (lambda: part(["0.*", "2.bias"]), r"disjoint .* and 0\.weight, 0\.bias are in several"),
    "another estimator": (lambda: part("2.*", fk.SketchedFisher()), "one definition form a union; these differ in est"),
    "another seed": (lambda: part("2.*", fk.DiagonalFisher("mc")), r"these differ in fisher_type"),
    "more examples": (lambda: part("2.*", batches=data(3, 3)), r"same data .* means over 5, 6 units"),
    "more runs": (
        lambda: fk.merge(part("2.*", batches=data(3)), part("2.*", batches=data(2))),
        r"same data form a union; these are of 1, 2 runs",
    ),
    "another model": (
        lambda: fk.estimate(nn.Sequential(*model(), nn.Linear(3, 3)), data(3, 2), parameters="2.*",
                            likelihood=fk.Classification()),
        r"different models: 3\.bias, 3\.weight in one of them only",
    ),
    "another width": (
        lambda: fk.estimate(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), data(3, 2), parameters="2.*",
                            likelihood=fk.Classification()),
        r"different models: 0\.weight has 20 coordinates in one and 24",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_belong_together_is_refused(what):
    other, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        fk.union(part("0.*"), other())


def test_seeds_of_draws_must_be_equal():
    with pytest.raises(ValueError, match=r"same data form a union; these differ in seed \(1 and 2\)"):
        fk.union(part("0.*", fk.DiagonalFisher("mc", seed=1)), part("2.*", fk.DiagonalFisher("mc", seed=2)))


def test_what_is_no_result_is_refused():
    one = part("0.*")
    for wrong, message in (
        ((), r"union takes statistics one by one: union\(a, b\)"),
        (([one, one],), r"union\(\*parts\), not union\(parts\)"),
        ((one, {"a": torch.ones(2)}), "union takes statistics, such as estimate gives, got dict"),
        ((one, part("2.weight", fk.DirectionEnergy())), "results of one kind, got Statistics and Energies"),
    ):
        with pytest.raises(TypeError, match=message):
            fk.union(*wrong)


def test_groups_that_several_parts_share_are_refused():
    by = fk.GroupFisher(by=lambda name: "all")
    with pytest.raises(ValueError, match="disjoint parameters form a union, and all is in several"):
        fk.union(part("0.*", by), part("2.*", by))


@pytest.mark.parametrize("kind", ["empirical", "kronecker", "directions"])
def test_to_brings_every_tensor_to_a_device(kind, tmp_path):
    statistics = part("*.weight", ESTIMATORS[kind])
    stored = type(statistics).load(statistics.save(tmp_path / "fisher"), lazy=True)
    moved = stored.to("meta")
    assert {tensor.device.type for tensor in moved.blocks.values()} == {"meta"}
    assert (moved.shapes, moved.count, moved.coverage) == (stored.shapes, stored.count, stored.coverage)
    assert moved.provenance == stored.provenance
    here = stored.to(torch.device("cpu"))
    assert all(isinstance(tensor, torch.Tensor) for tensor in here.blocks.values())
    assert here == statistics
    same = statistics.to("cpu")
    assert [tensor.data_ptr() for tensor in same.blocks.values()] == [t.data_ptr() for t in statistics.blocks.values()]
