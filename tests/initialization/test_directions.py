"""Starts from directions: which are chosen, how large they are, and what is refused."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from fishkern.digests import digest
from fishkern.statistics.bases import power_directions
from tests.support.energies import made_energies

NAMES = ["0.weight", "2.weight"]  # 5 x 7 and 9 x 5
K = 5


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 9))


def svd(model: nn.Module, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma, V of a weight by torch's own decomposition, float64."""
    U, sigma, Vh = torch.linalg.svd(model.get_parameter(name).detach().double(), full_matrices=False)
    return U, sigma, Vh.T


def scores_of(energies: fk.Energies, name: str, score: str, fisher: str) -> list[float]:
    one = energies[name]
    energy = one.joint if fisher == "joint" else one.input * one.output
    return (energy.double() * (one.singular_values.double() ** 2 if score == "weighted" else 1)).tolist()


@pytest.mark.parametrize("fisher", ["kronecker", "joint"])
@pytest.mark.parametrize("score", ["energy", "weighted"])
@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_the_chosen_directions_have_the_largest_or_smallest_scores(order, score, fisher):
    model = small()
    energies = made_energies(model)
    init = fk.initialize(model, energies, fk.DirectionInit(3, order=order, score=score, fisher=fisher))
    assert list(init) == ["0", "2"]
    for path, name in zip(init, NAMES, strict=True):
        scores = scores_of(energies, name, score, fisher)
        ranked = sorted(range(K), key=lambda k: (-scores[k] if order == "largest" else scores[k], k))
        assert init[path].chosen.tolist() == sorted(ranked[:3])
        U, sigma, V = svd(model, name)
        expected = sum(sigma[k] * torch.outer(U[:, k], V[:, k]) for k in ranked[:3])
        torch.testing.assert_close(init[path].delta().double(), expected, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_smaller_number():
    model = small()
    ones = {name: torch.ones(K) for name in NAMES}
    energies = made_energies(model, input=ones, output=ones)
    for order in ("largest", "smallest"):
        init = fk.initialize(model, energies, fk.DirectionInit(2, order=order))
        assert [one.chosen.tolist() for one in init.values()] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("magnitude", ["sigma", "energy", "uniform"])
def test_the_size_of_the_start_does_not_depend_on_the_scaling(magnitude, scaling):
    model = small()
    energies = made_energies(model)
    rule = fk.DirectionInit(3, magnitude=magnitude, scaling=scaling, floor=0.3, size=0.02)
    for path, one in fk.initialize(model, energies, rule).items():
        U, sigma, V = svd(model, f"{path}.weight")
        energy = (energies[f"{path}.weight"].input * energies[f"{path}.weight"].output).double()
        norm = sigma.norm()
        sizes = {
            "sigma": sigma[one.chosen],
            "energy": energy[one.chosen].clamp_min(0.3),
            "uniform": (0.02 * norm / math.sqrt(3)).expand(3),
        }[magnitude]
        expected = U[:, one.chosen] * sizes @ V[:, one.chosen].T
        torch.testing.assert_close(one.delta().double(), expected, rtol=1e-5, atol=1e-6)
        assert one.scaling == scaling
        assert one.alpha == 3 * scaling
        # both factors have their half of the size, and unit directions
        torch.testing.assert_close(one.A.norm(dim=1).double(), (sizes / scaling).sqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(one.B.norm(dim=0), one.A.norm(dim=1))
        if magnitude == "uniform":
            assert one.delta().norm().item() == pytest.approx(0.02 * norm.item(), rel=1e-5)


def test_what_is_left_of_the_weight_has_the_other_singular_values():
    model = small()
    for path, one in fk.initialize(model, made_energies(model), fk.DirectionInit(2)).items():
        sigma = svd(model, f"{path}.weight")[1]
        others = [value for k, value in enumerate(sigma.tolist()) if k not in one.chosen.tolist()]
        residual = torch.linalg.svdvals(model.get_parameter(f"{path}.weight").detach() - one.delta())
        torch.testing.assert_close(residual.tolist(), [*others, 0.0, 0.0], rtol=1e-4, atol=1e-6)


def test_smallest_and_largest_are_complements():
    model = small()
    energies = made_energies(model)
    for rank in range(1, K):
        least = fk.initialize(model, energies, fk.DirectionInit(rank, order="smallest"))
        most = fk.initialize(model, energies, fk.DirectionInit(K - rank, order="largest"))
        for path in least:
            assert sorted([*least[path].chosen.tolist(), *most[path].chosen.tolist()]) == list(range(K))


def test_ranks_and_orders_by_name_path_and_pattern():
    model = small()
    energies = made_energies(model)
    for ranks in ({"0.weight": 2, "2.weight": 3}, {"0": 2, "2": 3}, {"0.weight": 2, "*": 3}, {"*": 3, "0.weight": 2}):
        assert fk.initialize(model, energies, fk.DirectionInit(ranks)).ranks == {"0": 2, "2": 3}, ranks
    assert fk.initialize(model, energies, fk.DirectionInit({"*": 3, "0.*": 2})).ranks == {"0": 3, "2": 3}
    mixed = fk.initialize(model, energies, fk.DirectionInit(2, order={"0": "smallest", "*": "largest"}))
    least, most = (
        fk.initialize(model, energies, fk.DirectionInit(2, order=order)) for order in ("smallest", "largest")
    )
    assert mixed["0"] == least["0"]
    assert mixed["2"] == most["2"]
    with pytest.raises(ValueError, match=r"ranks= says nothing of 1 of 2 weights \(2.weight\): add them, or '\*' for"):
        fk.initialize(model, energies, fk.DirectionInit({"0.weight": 2}))
    with pytest.raises(ValueError, match=r"order='q_proj' matches none of 2 weights \(0.weight to 2.weight\)"):
        fk.initialize(model, energies, fk.DirectionInit(2, order={"q_proj": "largest", "*": "smallest"}))


def test_a_name_that_is_the_end_of_another():
    """As layers.1 is of layers.11: a pattern without stars means whole parts of a path."""
    model = nn.ModuleDict(
        {"encoder1": nn.Linear(4, 4), "1": nn.Linear(4, 4), "x": nn.ModuleDict({"1": nn.Linear(4, 4)})}
    )
    energies = made_energies(model)
    assert list(fk.initialize(model, energies, fk.DirectionInit(2, targets="1"))) == ["1", "x.1"]
    assert list(fk.initialize(model, energies, fk.DirectionInit(2, targets="1.weight"))) == ["1"]


def test_targets_leave_weights_out():
    model = small()
    assert list(fk.initialize(model, made_energies(model), fk.DirectionInit(2, targets="2.*"))) == ["2"]


def test_the_model_is_left_as_it_was():
    model = small()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    energies = made_energies(model)
    first, again = (fk.initialize(model, energies, fk.DirectionInit(3)) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_said_of_the_start():
    model = small()
    rule = fk.DirectionInit({"*": 3}, order={"0": "smallest", "2": "largest"})
    init = fk.initialize(model, made_energies(model), rule)
    provenance = init.provenance
    assert provenance["rule"].pop("name") == "DirectionInit"
    assert fk.DirectionInit(**provenance["rule"]) == rule
    assert provenance["energies"] == {"count": 10, "definition": {"estimator": "DirectionEnergy", "basis": "svd"}}
    assert provenance["modules"]["0"] == {
        "weight": "0.weight", "order": "smallest", "reached": True, "dead": 0, "at_floor": 0
    }  # fmt: skip
    assert init.digests == {path: pytest.approx(digest(model.get_parameter(f"{path}.weight"))) for path in init}
    init.check(model)


def test_a_wrapped_model():
    model = small()
    energies = made_energies(model)
    assert fk.initialize(nn.DataParallel(model), energies, fk.DirectionInit(2)) == fk.initialize(
        model, energies, fk.DirectionInit(2)
    )


def test_a_weight_that_is_stored_transposed():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(5, 7))
    plain = nn.Sequential(nn.Linear(7, 5))
    plain[0].weight.data = model[0].weight.detach().T.clone()
    init, expected = (fk.initialize(one, made_energies(one), fk.DirectionInit(3)) for one in (model, plain))
    assert init == expected
    assert (init["0"].A.shape, init["0"].B.shape) == ((3, 7), (5, 3))
    init.check(model)


# What the data do not reach


def with_dead(dead: list[int], name: str = "0.weight", value: float = 0.0) -> dict[str, Tensor]:
    energy = torch.arange(K) + 1.0
    energy[dead] = value
    return {name: energy}


def test_dead_directions_are_counted():
    model = small()
    energies = made_energies(model, output=with_dead([1, 3]), input={"0.weight": torch.ones(K)})
    message = (
        r"2 of 6 chosen directions are dead, in 1 of 2 modules \(0\): their energy is at most 1e-06 of the median, so "
        r"the data say little about them. dead='skip' leaves them out"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        init = fk.initialize(model, energies, fk.DirectionInit(3, order="smallest"))
    assert [warning.filename for warning in caught] == [__file__]
    assert init["0"].chosen.tolist() == [0, 1, 3]
    assert init.provenance["modules"]["0"]["dead"] == 2
    skipped = fk.initialize(model, energies, fk.DirectionInit(3, order="smallest", dead="skip"))
    assert skipped["0"].chosen.tolist() == [0, 2, 4]
    assert skipped["2"] == init["2"]
    with pytest.raises(ValueError, match="0.weight: rank 4 was asked for, and 3 of its 5 directions can be chosen"):
        fk.initialize(model, energies, fk.DirectionInit({"0": 4, "2": 3}, dead="skip"))


def test_dead_is_relative_to_the_median_of_what_is_alive():
    model = small()
    energies = made_energies(model, output=with_dead([0, 1, 2], value=2.9e-6), input={"0.weight": torch.ones(K)})
    # of 2.9e-6 (three times), 4 and 5 the median is 2.9e-6 itself: nothing is dead
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.initialize(model, energies, fk.DirectionInit(3, order="smallest"))
    energies = made_energies(model, output=with_dead([0, 1], value=2.9e-6), input={"0.weight": torch.ones(K)})
    with pytest.warns(UserWarning, match="2 of 6 chosen directions are dead"):
        fk.initialize(model, energies, fk.DirectionInit(3, order="smallest"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.initialize(model, energies, fk.DirectionInit(3, order="smallest", dead_below=1e-7))


def test_where_most_are_zero_the_median_is_that_of_the_others():
    model = small()
    energy = {"0.weight": torch.tensor([0.0, 0, 0, 0, 1e-8, 1, 2])}
    energies = made_energies(model, basis="power", output=energy, input={"0.weight": torch.ones(7)})
    with pytest.warns(UserWarning, match="5 of 10 chosen directions are dead"):
        fk.initialize(model, energies, fk.DirectionInit(5, order="smallest", magnitude="uniform"))


def test_a_matrix_that_no_example_reaches_starts_from_its_largest_directions():
    model = small()
    energies = made_energies(model, output={"0.weight": torch.zeros(K)})
    with pytest.warns(UserWarning, match=r"no example reaches 1 of 2 modules \(0\): they start from their largest dir"):
        init = fk.initialize(model, energies, fk.DirectionInit(2, order="smallest", score="weighted", dead="skip"))
    assert init["0"].chosen.tolist() == [0, 1]
    assert init.provenance["modules"]["0"]["reached"] is False
    power = made_energies(model, basis="power", output={"0.weight": torch.zeros(7)})
    with pytest.warns(UserWarning, match="no example reaches 1 of 2"):
        init = fk.initialize(model, power, fk.DirectionInit(2, magnitude="uniform"))
    longest = model[0].weight.norm(dim=0).topk(2).indices
    assert init["0"].chosen.tolist() == longest.sort().values.tolist()


def test_sizes_at_the_floor_are_announced_once():
    model = small()
    tiny = {name: torch.full((K,), 1e-6) for name in NAMES}
    energies = made_energies(model, output=tiny)
    with pytest.warns(
        UserWarning, match=r"6 of 6 chosen scores are at most floor=1e-05, so magnitude='energy'"
    ) as caught:
        init = fk.initialize(model, energies, fk.DirectionInit(3, magnitude="energy", floor=1e-5))
    assert len(caught) == 1
    assert [facts["at_floor"] for facts in init.provenance["modules"].values()] == [3, 3]
    torch.testing.assert_close(torch.linalg.svdvals(init["0"].delta())[:3], torch.full((3,), 1e-5))
    for quiet in (fk.DirectionInit(3, magnitude="energy", floor=1e-9), fk.DirectionInit(3, magnitude="uniform")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fk.initialize(model, energies, quiet)


def test_components_without_a_size_are_left_out():
    """Both factors would be zero, and get no gradients."""
    model = small()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(5, 3) @ torch.randn(3, 7))
    energies = made_energies(model, output=with_dead([]), input={"0.weight": torch.ones(K)})
    init = fk.initialize(model, energies, fk.DirectionInit(2))
    assert init["0"].chosen.tolist() == [1, 2]
    with pytest.raises(ValueError, match="0.weight: rank 4 was asked for, and 3 of its 5 directions can be chosen"):
        fk.initialize(model, energies, fk.DirectionInit(4))
    assert fk.initialize(model, energies, fk.DirectionInit(2, magnitude="uniform"))["0"].chosen.tolist() == [3, 4]


# The power basis


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_the_power_basis(order):
    model = small()
    energies = made_energies(model, basis="power")
    init = fk.initialize(model, energies, fk.DirectionInit(3, order=order, magnitude="energy"))
    for path, one in init.items():
        W = model.get_parameter(f"{path}.weight").detach().double()
        V = W.T @ W
        V = V / V.norm(dim=0)
        U = W @ V
        U = U / U.norm(dim=0)
        energy = (energies[f"{path}.weight"].input * energies[f"{path}.weight"].output).double()
        chosen = energy.sort(descending=order == "largest").indices[:3].sort().values
        assert one.chosen.tolist() == chosen.tolist()
        expected = U[:, chosen] * energy[chosen] @ V[:, chosen].T
        torch.testing.assert_close(one.delta().double(), expected, rtol=1e-4, atol=1e-6)


def test_the_uniform_size_of_directions_that_are_not_orthogonal():
    model = small()
    init = fk.initialize(model, made_energies(model, basis="power"), fk.DirectionInit(3, magnitude="uniform", size=0.1))
    for path, one in init.items():
        assert one.delta().norm().item() == pytest.approx(0.1 * model.get_parameter(f"{path}.weight").norm().item())


def test_columns_of_zeros_have_no_direction():
    model = small()
    with torch.no_grad():
        model[0].weight[:, [0, 4]] = 0
    energy = torch.tensor([1e-3, 2, 3, 4, 2e-3, 5, 0])
    energies = made_energies(model, basis="power", output={"0.weight": energy}, input={"0.weight": torch.ones(7)})
    init = fk.initialize(model, energies, fk.DirectionInit(3, order="smallest", magnitude="uniform", dead="skip"))
    assert init["0"].chosen.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="0.weight: rank 5 was asked for, and 4 of its 7 directions can be chosen"):
        fk.initialize(model, energies, fk.DirectionInit(5, magnitude="uniform", dead="skip"))


def test_directions_that_are_nearly_equal():
    model = small()
    with torch.no_grad():
        model[0].weight[:, 1] = 1.01 * model[0].weight[:, 0]  # their power steps are equal
    energy = {"0.weight": torch.tensor([1.0, 2, 3, 4, 5, 6, 7])}
    ones = {"0.weight": torch.ones(7)}
    energies = made_energies(model, basis="power", output=energy, input=ones)
    rule = dict(order="smallest", magnitude="uniform")
    assert fk.initialize(model, energies, fk.DirectionInit(2, **rule))["0"].chosen.tolist() == [0, 1]
    assert fk.initialize(model, energies, fk.DirectionInit(2, distinct=0.999, **rule))["0"].chosen.tolist() == [0, 2]
    basis = power_directions(model[0].weight)
    U, V, _ = basis.columns(torch.arange(7))
    alike = torch.minimum((U.T @ U).abs(), (V.T @ V).abs())
    for distinct in (0.2, 0.5, 0.8):
        greedy: list[int] = []
        for k in range(7):
            if all(alike[k, other] <= distinct for other in greedy):
                greedy.append(k)
        rank = min(len(greedy), 5)
        init = fk.initialize(model, energies, fk.DirectionInit({"0": rank, "2": 1}, distinct=distinct, **rule))
        assert init["0"].chosen.tolist() == greedy[:rank]
    with pytest.raises(
        ValueError, match=re.escape("and only 1 can be chosen; the others vanish, are dead, or are near")
    ):
        fk.initialize(model, energies, fk.DirectionInit(3, distinct=0.0, **rule))


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ranks": 0}, ValueError, "ranks must be at least 1, got 0"),
        ({"ranks": {"q": 0}}, ValueError, r"ranks\['q'\] must be at least 1, got 0"),
        ({"ranks": {}}, ValueError, "ranks= is empty"),
        ({"ranks": 2.5}, TypeError, "ranks must be an integer, got 2.5"),
        ({"order": "random"}, ValueError, r"order must be one of \('largest', 'smallest'\), got 'random'"),
        ({"order": {"q": "least"}}, ValueError, r"order\['q'\] must be one of"),
        ({"score": "sigma"}, ValueError, "score must be one of"),
        ({"fisher": "exact"}, ValueError, "fisher must be one of"),
        ({"magnitude": "pissa"}, ValueError, "magnitude must be one of"),
        ({"dead": "drop"}, ValueError, "dead must be one of"),
        ({"floor": 0}, ValueError, "floor must be a positive number, got 0"),
        ({"scaling": math.inf}, ValueError, "scaling must be a positive number, got inf"),
        ({"size": -1}, ValueError, "size must be a positive number, got -1"),
        ({"distinct": 1.5}, ValueError, "distinct must be from 0 to 1, got 1.5"),
        ({"dead_below": -1}, ValueError, "dead_below must be from 0 to 1, got -1"),
        ({"dead_below": None}, TypeError, "dead_below must be a number, got None"),
        ({"distinct": "0.9"}, TypeError, "distinct must be a number, got '0.9'"),
        ({"floor": "small"}, TypeError, "floor must be a number, got 'small'"),
        ({"targets": 3}, TypeError, "targets must be patterns of names such as"),
        ({"targets": ()}, ValueError, "targets= is empty"),
    ],
)
def test_what_is_no_recipe(options, error, match):
    with pytest.raises(error, match=match):
        fk.DirectionInit(**{"ranks": 2, **options})


def test_arguments_of_other_types():
    model = small()
    with pytest.raises(
        TypeError, match=r"energies come from fk.estimate\(model, batches, fk.DirectionEnergy\(\)\), got"
    ):
        fk.initialize(model, {"0.weight": 3}, fk.DirectionInit(2))
    with pytest.raises(TypeError, match=r"rule must be a DirectionInit such as DirectionInit\(ranks=16\), got 3"):
        fk.initialize(model, made_energies(model), 3)


def test_a_rank_above_the_smaller_side():
    model = small()
    with pytest.raises(ValueError, match=r"rank 6 of 0.weight exceeds .* 5 x 7 matrix: take a rank of at most 5"):
        fk.initialize(model, made_energies(model), fk.DirectionInit(6))


def test_energies_of_other_weights():
    energies = made_energies(small(seed=1))
    with pytest.raises(ValueError, match=r"the energies are of other weights: 0.weight had norm .* Load the weights"):
        fk.initialize(small(seed=0), energies, fk.DirectionInit(2))
    narrow = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9))
    with pytest.raises(
        ValueError, match="of another model: 0.weight maps 7 to 5 features in it, and 6 to 5 in this one"
    ):
        fk.initialize(narrow, energies, fk.DirectionInit(2))
    with pytest.raises(
        ValueError, match=r"of another model: 1 of 2 weights are no linear maps of Sequential \(2.weight"
    ):
        fk.initialize(nn.Sequential(nn.Linear(7, 5)), energies, fk.DirectionInit(2))


def test_a_start_of_other_weights():
    model = small()
    init = fk.initialize(model, made_energies(model), fk.DirectionInit(2))
    init.check(nn.DataParallel(model))
    init.check(small().bfloat16())
    with pytest.raises(
        ValueError, match="was made for other weights: 0 had norm .* Load the model that it was made for"
    ):
        init.check(small(seed=1))
    with pytest.raises(ValueError, match="0 maps 7 to 5 features in it, and 6 to 5 in the model"):
        init.check(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9)))
    with pytest.raises(ValueError, match=r"1 of its 2 modules are no linear maps of it \(2\)"):
        init.check(nn.Sequential(nn.Linear(7, 5)))


def test_energies_that_rank_nothing():
    model = small()
    zeros = {name: torch.zeros(K) for name in NAMES}
    with pytest.raises(ValueError, match=r"all energies are zero \(0.weight, 2.weight\), so that the data do not rank"):
        fk.initialize(model, made_energies(model, output=zeros), fk.DirectionInit(2))
    nan = {"2.weight": torch.tensor([1.0, math.nan, 1, 1, 1])}
    with pytest.raises(ValueError, match=r"energies of 1 of 2 matrices are negative or not finite \(2.weight\)"):
        fk.initialize(model, made_energies(model, output=nan), fk.DirectionInit(2))
    fk.initialize(model, made_energies(model, output=nan), fk.DirectionInit(2, fisher="joint"))


def test_fewer_positions_than_the_rank():
    model = small()
    energies = made_energies(model, count=2, positions=1.0)
    message = "0.weight has met 2 positions in 2 examples, fewer than its rank 3"
    with pytest.raises(ValueError, match=message):
        fk.initialize(model, energies, fk.DirectionInit(3, order="smallest"))
    fk.initialize(model, energies, fk.DirectionInit(2, order="smallest"))
    fk.initialize(model, energies, fk.DirectionInit(3, order="largest"))


@pytest.mark.parametrize("options", [{"score": "weighted", "magnitude": "energy"}, {"magnitude": "sigma"}])
def test_the_power_basis_has_no_singular_values(options):
    model = small()
    with pytest.raises(ValueError, match="needs singular values, and these energies are of the power basis"):
        fk.initialize(model, made_energies(model, basis="power"), fk.DirectionInit(2, **options))
