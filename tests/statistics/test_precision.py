"""How precise statistics are: standard errors, the expected overlap of tops, and passes that stop there."""

from __future__ import annotations

import math
import sys
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from fishkern.statistics import Precision, following
from fishkern.statistics.base import ParameterInfo
from fishkern.statistics.following import Following, Until
from fishkern.statistics.precision import noise_of_unit
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States

SIZES = (3, 1, 4, 2, 5, 3, 2, 4, 1, 3)


def model(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def data(*sizes: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)) for N in sizes]


def estimated(batches, estimator=None, **options) -> fk.Statistics:
    return fk.estimate(model(), batches, estimator, **{"likelihood": fk.Classification(), **options})


def sums_of(batches) -> dict[str, Tensor]:
    """Sums of squared gradients of each batch, one example at a time, in float64: ``[B, P]`` by name."""
    net = model().double()
    names, parameters = zip(*net.named_parameters(), strict=True)
    sums = {name: torch.zeros(len(batches), one.numel(), dtype=torch.float64) for name, one in net.named_parameters()}
    for number, (inputs, labels) in enumerate(batches):
        for row, label in zip(inputs.double(), labels, strict=True):
            grads = torch.autograd.grad(nn.functional.cross_entropy(net(row), label), parameters)
            for name, grad in zip(names, grads, strict=True):
                sums[name][number] += grad.flatten().square()
    return sums


def fed(sums: Tensor, units: list[int], until: Until | None = None) -> Following:
    """Follow one parameter, to which these sums ``[B, P]`` are added batch by batch."""
    value = torch.zeros(sums.shape[1])
    info = ParameterInfo("weight", value, value.shape, torch.float32, value.device)
    states = States({"weight": info}, fk.DiagonalFisher())
    followed = Following(states, until)
    for number, (batch, N) in enumerate(zip(sums, units, strict=True)):
        states["weight"].add_(batch)
        followed.add([N], number)
        if followed.reached:
            break
    return followed


def test_standard_errors_are_those_of_batch_sums():
    batches = data(*SIZES)
    precision = estimated(batches).precision
    units = torch.tensor(SIZES, dtype=torch.float64)[:, None]
    size = spread = 0.0
    for name, sums in sums_of(batches).items():
        mean = sums.sum(0) / units.sum()
        variance = ((sums - units * mean).square() / units).sum(0) / (len(SIZES) - 1)
        entries = precision.entries[name]
        assert torch.equal(entries.indices, torch.arange(sums.shape[1]))
        torch.testing.assert_close(entries.means, mean, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(entries.standard_errors, (variance / units.sum()).sqrt(), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(entries.relative_errors, entries.standard_errors / entries.means)
        size, spread = size + mean.square().sum(), spread + variance.sum()
    assert precision.relative_error == pytest.approx(math.sqrt(spread / size / 28), rel=1e-4)
    assert (precision.count, precision.batches, precision.total, precision.followed) == (28, 10, 83, 83)


def test_the_variance_is_unbiased_whatever_the_sizes_of_batches():
    """Squares of normal numbers have variance 2; of a million entries the mean estimate shows it to a percent."""
    generator = torch.Generator().manual_seed(3)
    sums = torch.stack([torch.randn(N, 20_000, generator=generator).square().sum(0) for N in (1, 9, 2, 7, 1)])
    precision = fed(sums, [1, 9, 2, 7, 1]).precision(Ranks())
    assert precision.entries["weight"].standard_errors.square().mean() * 20 == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("kind", ["mc", "type-2", "position", "batch"])
def test_every_kind_of_fisher_is_followed(kind):
    estimator = fk.DiagonalFisher(kind) if kind in ("mc", "type-2") else fk.DiagonalFisher(unit=kind)
    statistics = estimated(data(*SIZES), estimator)
    precision = statistics.precision
    assert precision.count == statistics.count
    for name, entries in precision.entries.items():
        torch.testing.assert_close(entries.means.float(), statistics[name].flatten()[entries.indices])
        assert (entries.standard_errors > 0).any()


def test_adapters_are_followed():
    """Each batch on its own gives what it has added; its precision is none, so nothing of it is used here."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 31, (10, 6)).split([3, 1, 2, 4])]
    precision = fk.estimate(adapted, batches).precision
    alone = [fk.estimate(adapted, [batch]) for batch in batches]
    assert set(precision.entries) == set(alone[0])
    assert all("lora_" in name for name in precision.entries)
    units = torch.tensor([3.0, 1, 2, 4], dtype=torch.float64)[:, None]
    for name, entries in precision.entries.items():
        means = torch.stack([one[name].flatten().double() for one in alone])
        mean = (units * means).sum(0) / 10
        variance = (units * (means - mean).square()).sum(0) / 3
        torch.testing.assert_close(entries.means, mean, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(entries.standard_errors, (variance / 10).sqrt(), rtol=1e-3, atol=1e-8)


def test_other_recipes_and_a_single_batch_have_none():
    assert estimated(data(4, 4), fk.SketchedFisher(2)).precision is None
    assert estimated(data(4, 4), fk.GroupFisher(by="row")).precision is None
    assert estimated(data(8)).precision is None


def test_following_changes_no_bit(monkeypatch):
    followed = estimated(data(*SIZES))
    monkeypatch.setattr(sys.modules["fishkern.statistics.estimate"], "follows", lambda _: False)
    alone = estimated(data(*SIZES))
    assert alone.precision is None
    assert followed.precision is not None
    assert alone == followed


def scores(generator: torch.Generator, *shape: int) -> Tensor:
    """Errors of squares, of mean 1 and with a heavy tail."""
    return (1.2 * torch.randn(*shape, generator=generator, dtype=torch.float64) - 0.72).exp()


def truth(entries: int, generator: torch.Generator) -> Tensor:
    """Values with the tail of a power."""
    return torch.rand(entries, generator=generator, dtype=torch.float64).pow(-0.8)


@pytest.mark.parametrize("batches", [8, 11, 40])
def test_the_promise_holds_where_the_truth_is_known(batches):
    generator = torch.Generator().manual_seed(0)
    values = truth(40_000, generator)
    sums = values * torch.stack([scores(generator, 4, 40_000).sum(0) for _ in range(batches)])
    precision = fed(sums.float(), [4] * batches).precision(Ranks())
    others = values * sum(scores(generator, 4, 40_000).sum(0) for _ in range(batches))
    for density in (0.005, 0.05):
        k = round(density * 40_000)
        top, true, other = (set(one.topk(k).indices.tolist()) for one in (sums.sum(0), values, others))
        assert precision.overlap(density) == pytest.approx(len(top & true) / k, abs=0.03)
        assert precision.overlap(density, others=4 * batches) == pytest.approx(len(top & other) / k, abs=0.03)
        assert precision.overlap(density, others=4 * batches) < precision.overlap(density) - 0.01


def test_the_noise_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1000, generator=generator)
    second = first + 0.1 * second
    expected = []
    for k in (60, 200):
        h = len(set(first.topk(k).indices.tolist()) & set(second.topk(k).indices.tolist())) / k
        assert 0.2 < h < 1
        expected.append(-NormalDist().inv_cdf(h / 2) / math.sqrt(1 / 3 + 1 / 5))
    assert noise_of_unit([(first, second)], [(3, 5)], [60, 200]) == pytest.approx(expected)


def test_of_equal_entries_a_top_takes_the_first():
    """As a selection does, so that ties make up no more agreement than selections would have."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(0, 6, (2, 1000), generator=generator).float()
    expected = []
    for k in (60, 400, 900):
        first, second = (set(half.sort(descending=True, stable=True).indices[:k].tolist()) for half in halves)
        h = sum(bool(halves[0, i] and halves[1, i]) for i in first & second) / k
        expected.append(-NormalDist().inv_cdf(h / 2) / math.sqrt(2))
    assert noise_of_unit([tuple(halves)], [(1, 1)], [60, 400, 900]) == pytest.approx(expected)


def test_entries_that_no_example_has_reached_are_in_no_top():
    """Such as rows of an embedding: equal zeros must not look like agreement."""
    generator = torch.Generator().manual_seed(0)
    values = torch.zeros(20_000)
    values[torch.randperm(20_000, generator=generator)[:200]] = 1 + torch.rand(200, generator=generator)
    precision = fed(values.expand(8, -1), [2] * 8).precision(Ranks())
    assert precision.overlap(0.01) == 1
    assert noise_of_unit([(values, values)], [(1, 1)], [400]) == [
        pytest.approx(-NormalDist().inv_cdf(0.25) / math.sqrt(2))
    ]
    assert precision.overlap(0.2) < 0.3


def test_equal_halves_promise_the_whole_top():
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    precision = fed(values.expand(8, -1), [2] * 8).precision(Ranks())
    assert precision.overlap() == 1
    assert precision.relative_error < 1e-3


def test_densities_between_and_beyond_those_that_are_known():
    precision = Precision(100, 10, 1000, 1000, 2.0, {0.05: 1.0, 0.1: 2.0})
    middle = precision.overlap(math.sqrt(0.05 * 0.1))
    assert middle == pytest.approx(2 * NormalDist().cdf(-1.5 / 10))
    with pytest.raises(ValueError, match=r"densities from 0.05 to 0.1, got 0.005: 1,000 entries of 1,000 are followed"):
        precision.overlap()
    with pytest.raises(ValueError, match="at least 50 followed entries of a top"):
        Precision(100, 10, 83, 83, 2.0, {}).overlap()


@pytest.mark.parametrize(("total", "count"), [(50, 50), (1000, 400), (10**12, 300)])
def test_entries_are_drawn_without_replacement_and_by_seed(total, count):
    drawn = following._drawn(total, count)
    assert len(drawn) == count
    assert (drawn.diff() > 0).all()
    assert 0 <= drawn[0] <= drawn[-1] < total
    assert torch.equal(drawn, following._drawn(total, count))
    assert abs(drawn.double().mean() / total - 0.5) < 0.06


def test_some_entries_of_a_large_pool(monkeypatch):
    monkeypatch.setattr(following, "MOST", 40)
    statistics = estimated(data(*SIZES))
    precision = statistics.precision
    assert (precision.followed, precision.total) == (40, 83)
    assert sum(len(entries.indices) for entries in precision.entries.values()) == 40
    for name, entries in precision.entries.items():
        torch.testing.assert_close(entries.means.float(), statistics[name].flatten()[entries.indices])


def many(batches: int, seed: int = 0) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    values = truth(20_000, generator)
    return (values * torch.stack([scores(generator, 2, 20_000).sum(0) for _ in range(batches)])).float(), [2] * batches


def test_a_pass_stops_when_the_overlap_is_reached():
    sums, units = many(60)
    followed = fed(sums, units, Until(0.85, 0.01))
    stopped = int(followed._batches)
    assert 8 < stopped < 60
    assert followed.precision(Ranks()).overlap(0.01) >= 0.85
    # a sixteenth before, it was not yet there
    before = fed(sums[: int(stopped * 15 / 17)], units[: int(stopped * 15 / 17)]).precision(Ranks())
    assert before.overlap(0.01) < 0.87


def test_a_pass_stops_by_what_it_sees_there():
    """Seven batches agree, and an eighth, small as it is, has another top: it must be looked at before a stop."""
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    sums = torch.cat([16 * values.expand(7, -1), 1e6 * values.flip(0)[None]])
    followed = fed(sums, [16] * 7 + [1], Until(0.9, 0.01))
    assert not followed.reached
    assert followed.precision(Ranks()).overlap(0.01) < 0.9


def test_a_batch_without_units_tells_nothing():
    sums, units = many(9)
    empty = torch.zeros(1, sums.shape[1])
    filled = fed(torch.cat([sums, empty]), [*units, 0]).precision(Ranks())
    assert filled.plain() == fed(sums, units).precision(Ranks()).plain()


def test_an_overlap_of_too_few_entries_is_not_watched():
    states = States({"weight": ParameterInfo("weight", *of_zeros(1000))}, fk.DiagonalFisher())
    followed = Following(states, watching=True)
    for number in range(9):
        states["weight"].add_(torch.rand(1000, generator=torch.Generator().manual_seed(number)))
        followed.add([2], number)
    assert followed.overlap is None  # of five entries


def of_zeros(entries: int) -> tuple:
    value = torch.zeros(entries)
    return value, value.shape, torch.float32, value.device


def test_the_memory_of_followed_entries():
    followed = fed(torch.rand(2, 20_000), [1, 1])
    kept = [followed._before, followed._now, *followed.tensors.values(), *followed._indices.values()]
    assert sum(one.nbytes for one in kept if one.numel() > 8) == 52 * 20_000


def wide(batches: int) -> dict:
    generator = torch.Generator().manual_seed(5)
    scale = torch.logspace(-2, 2, 6)
    return {
        "model": model(400),
        "batches": [
            (torch.randn(4, 6, generator=generator) * scale, torch.randint(3, (4,), generator=generator))
            for _ in range(batches)
        ],
        "likelihood": fk.Classification(),
    }


def test_estimate_stops_and_says_so(recwarn):
    statistics = fk.estimate(**wide(100), until=(0.5, 0.2))
    assert 32 <= statistics.count < 400
    assert statistics.precision.overlap(0.2) >= 0.5
    assert not recwarn.list
    whole = fk.estimate(**{**wide(100), "batches": wide(100)["batches"][: statistics.count // 4]})
    assert whole == statistics


def test_data_that_end_before_are_told():
    with pytest.warns(UserWarning, match=r"until= was not reached: after all 40 examples .* of the top 20"):
        statistics = fk.estimate(**wide(10), until=(0.999, 0.2))
    assert statistics.count == 40
    with pytest.warns(UserWarning, match="after all 12 examples"):
        fk.estimate(**wide(10), until=(0.999, 0.2), max_examples=12)
    with pytest.warns(UserWarning, match="the data was a single one: give smaller batches"):
        fk.estimate(**wide(1), until=(0.9, 0.2))


@pytest.mark.parametrize(
    ("until", "error", "says"),
    [
        (0, ValueError, "until must"),
        (1, ValueError, "until must be below 1"),
        (90, ValueError, "until must"),
        ((0.9, 0.5), ValueError, "a top of at most 20%"),
        ((0.9, 0.1, 3), TypeError, r"a tuple of two, \(overlap, density\): .*, got \(0.9, 0.1, 3\)"),
        ([0.9, 0.1], TypeError, r"a number such as 0.9.* or a tuple of two, .*, got \[0.9, 0.1\]"),
        ((0.9, None), TypeError, r"a tuple of two, .*, got \(0.9, None\)"),
        ({"overlap": 0.9}, TypeError, "a tuple of two"),
        (True, TypeError, "got True"),
        ("0.9", TypeError, "got '0.9'"),
        ((0.9, 0), ValueError, "the density of until must be above 0"),
        (0.9, ValueError, r"the top 0.50% of the pool of 83 has 0 that are followed: give a larger density"),
    ],
)
def test_goals_that_cannot_be_are_refused(until, error, says):
    with pytest.raises(error, match=says):
        estimated(data(4, 4), until=until)


def test_other_recipes_are_refused_by_name():
    with pytest.raises(ValueError, match="DiagonalFisher, and SketchedFisher is another recipe: give the number"):
        estimated(data(4, 4), fk.SketchedFisher(2), until=0.9)


def interrupted(batches, after: int):
    yield from batches[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_checkpoint_goes_on_to_the_same_precision(tmp_path, after):
    batches, options = data(*SIZES), {"checkpoint": tmp_path / "part", "save_every": 0}
    with pytest.raises(KeyboardInterrupt):
        estimated(interrupted(batches, after), **options)
    resumed, whole = estimated(batches, **options).precision, estimated(batches).precision
    assert resumed.plain() == whole.plain()
    for name, entries in whole.entries.items():
        assert all(torch.equal(*both) for both in zip(entries, resumed.entries[name], strict=True))


def test_a_checkpoint_of_another_goal_is_refused(tmp_path):
    given, options = wide(10), {"checkpoint": tmp_path / "part", "save_every": 0}
    with pytest.raises(KeyboardInterrupt):
        fk.estimate(**{**given, "batches": interrupted(given["batches"], 4)}, until=(0.99, 0.2), **options)
    with pytest.raises(ValueError, match="another call: the argument until"):
        fk.estimate(**given, until=(0.5, 0.2), **options)


def test_files_keep_the_summary(tmp_path):
    statistics = fk.estimate(**wide(10))
    loaded = fk.Statistics.load(statistics.save(tmp_path / "fisher"))
    assert loaded.precision.plain() == statistics.precision.plain()
    assert loaded.precision.overlap(0.05) == statistics.precision.overlap(0.05)
    assert loaded.precision.entries == {}
    assert "of the top 0.5 %" not in repr(loaded.precision)  # 26 entries are too few
    assert estimated(data(4)).save(tmp_path / "none").exists()
    assert fk.Statistics.load(tmp_path / "none").precision is None


def test_it_goes_along_with_the_statistics():
    statistics = estimated(data(*SIZES))
    renamed = statistics.rename(lambda name: f"base.{name}").to("cpu").precision
    assert list(renamed.entries) == [f"base.{name}" for name in statistics]
    assert renamed.plain() == statistics.precision.plain()


def test_merged_statistics():
    one, other = estimated(data(*SIZES)), estimated(data(*SIZES, 9, seed=2))
    merged, a, b = fk.merge(one, other).precision, one.precision, other.precision
    assert merged.count == a.count + b.count
    mean = math.sqrt((a.count * a.deviation**2 + b.count * b.deviation**2) / merged.count)
    assert merged.deviation == pytest.approx(mean)
    assert fk.merge(one, other, weights=[1, 1]).precision is None
    assert fk.merge(one, estimated(data(8))).precision is None
    # and twice the same is as precise as twice as many
    twice = fk.merge(one, one).precision
    assert twice.relative_error == pytest.approx(a.relative_error / math.sqrt(2))


def test_the_union_of_parts_has_none():
    weights, biases = (estimated(data(*SIZES), parameters=f"*.{kind}") for kind in ("weight", "bias"))
    assert fk.union(weights, biases).precision is None


def test_progress_shows_the_overlap(capsys, monkeypatch):
    times = iter(range(1000))
    monkeypatch.setattr("fishkern.statistics.data.time.monotonic", lambda: next(times))
    fk.estimate(**wide(12), progress=True, until=(0.2, 0.2))
    assert "overlap " in capsys.readouterr().err
