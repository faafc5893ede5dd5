"""A selection belongs to the start that it was made on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern.selection import GlobalTopK, Selection, bound_to_start, check_start, load_start, save_start, select


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))


def plain(of: nn.Module) -> Selection:
    scores = {name: parameter.detach().square() for name, parameter in of.named_parameters()}
    return select(scores, GlobalTopK(k=5, always="1.*"))


def selected(of: nn.Module) -> Selection:
    return bound_to_start(plain(of), of)


def test_the_same_start_passes_and_another_raises():
    selection = selected(model())
    check_start(selection, model())
    with pytest.raises(ValueError, match=r"made for another start: 0.weight had norm .*load_start"):
        check_start(selection, model(seed=1))
    flipped = model()
    flipped[0].bias.data *= -1  # of the same norm
    with pytest.raises(ValueError, match=r"another start: 0.bias"):
        check_start(selection, flipped)


def test_rounding_passes():
    check_start(selected(model()), model().bfloat16())
    nudged = model()
    nudged[0].weight.data *= 1 + 1e-5
    check_start(selected(model()), nudged)


def test_the_selection_itself_is_unchanged_and_the_digest_is_saved(tmp_path):
    selection, expected = selected(model()), plain(model())
    assert (selection, selection.whole, selection.k) == (expected, expected.whole, expected.k)
    loaded = Selection.load(selection.save(tmp_path / "selection"))
    with pytest.raises(ValueError, match="another start"):
        check_start(loaded, model(seed=1))


def test_one_without_a_digest_passes():
    check_start(plain(model()), model(seed=1))


def test_a_saved_start_comes_back(tmp_path):
    selection, other = selected(model()), model(seed=1)
    path = save_start(model(), selection, tmp_path / "start")
    with pytest.raises(ValueError, match="another start"):
        save_start(other, selection, tmp_path / "wrong")
    load_start(other, path)
    check_start(selection, other)
    assert all(torch.equal(a, b) for a, b in zip(model().parameters(), other.parameters(), strict=True))
    small = nn.Sequential(nn.Linear(4, 2))
    before = small[0].weight.clone()
    with pytest.raises(ValueError, match=r"0.weight \(3, 4\), and Sequential has it as \(2, 4\)"):
        load_start(small, path)
    assert torch.equal(small[0].weight, before)


def test_another_number_of_threads_passes():
    """The singular vectors that PiSSA starts from need not be the same to the bit."""
    threads, starts = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            left, _, right = torch.linalg.svd(torch.randn(96, 64))
            starts.append(nn.ParameterList([left[:, :4].contiguous(), right[:4].contiguous()]))
    finally:
        torch.set_num_threads(threads)
    scores = {name: parameter.detach().abs() for name, parameter in starts[0].named_parameters()}
    check_start(bound_to_start(select(scores, GlobalTopK(k=9)), starts[0]), starts[1])


@pytest.mark.parametrize("make", [fk.MaskedAdamW, fk.MaskedSGD])
def test_the_first_step_of_an_optimizer_looks(make):
    """And a loaded state says that it is not the first."""
    first, other = model(), model(seed=1)
    selection = selected(first)
    trained, mistaken = make(first, selection, lr=0.1), make(other, selection, lr=0.1)
    for of in (first, other):
        of(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="made for another start"):
        mistaken.step()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model(seed=1).parameters(), strict=True))
    trained.step()
    mistaken.load_state_dict(trained.state_dict())
    mistaken.step()


def trained(selection: Selection, make=fk.MaskedSGD) -> nn.Module:
    of = model()
    optimizer = make(of, selection, lr=0.1)
    of(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return of


def test_a_second_stage_with_a_new_optimizer_goes_on(tmp_path):
    """A model trained with this very selection passes, also when the selection is loaded from its file."""
    selection = Selection.load(selected(model()).save(tmp_path / "selection"))
    of = trained(selection)
    before = of[0].weight.clone()
    optimizer = fk.MaskedSGD(of, selection, lr=0.1)
    of(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(of[0].weight != before, selection.mask("0.weight"))
    with pytest.raises(ValueError, match="another start"):  # the start itself must be the untrained one
        save_start(of, selection, tmp_path / "start")


def test_training_beside_the_selection_is_another_start():
    selection = selected(model())
    of = trained(selection)
    with torch.no_grad():
        of[0].weight += 0.1 * ~selection.mask("0.weight")
    of(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="made for another start"):
        fk.MaskedSGD(of, selection, lr=0.1).step()


def test_another_head_alone_is_another_start():
    """It is selected whole and nothing else has moved, so nothing shows that it was trained from the start."""
    selection, of = selected(model()), model()
    of[1].load_state_dict(model(seed=1)[1].state_dict())
    of(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="another start: 1.weight"):
        fk.MaskedSGD(of, selection, lr=0.1).step()


def test_a_selection_without_the_digest_of_the_rest_asks_for_the_start():
    """Files from before it was kept."""
    selection = selected(model())
    old = {key: value for key, value in selection.provenance.items() if key != "start_unselected"}
    indices = {name: selection.indices(name) for name in selection.names if name not in selection.whole}
    older = Selection(selection.shapes, indices, whole=selection.whole, provenance=old)
    of = trained(older)
    of(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="made for another start"):
        fk.MaskedSGD(of, older, lr=0.1).step()


def test_a_part_of_a_selection_goes_on_as_well():
    selection = selected(model())
    of = trained(selection)
    optimizer = fk.MaskedSGD(of, selection.restrict("0.*"), lr=0.1, outside="train")
    of(torch.ones(2, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("part", [False, True], ids=["whole", "restricted"])
def test_a_renamed_selection_still_knows_its_start(part):
    """As for the same adapter inside another model."""
    selection = selected(model()).restrict("0.*") if part else selected(model())
    renamed = selection.rename(lambda name: f"inner.{name}")
    for seed in (0, 1):
        outer = nn.Module()
        outer.inner = model(seed)
        outer.inner(torch.ones(2, 4)).sum().backward()
        optimizer = fk.MaskedSGD(outer, renamed, lr=0.1, outside="freeze")
        if seed:
            with pytest.raises(ValueError, match="another start: inner.0.weight"):
                optimizer.step()
        else:
            optimizer.step()
            check_start(selection, model())
