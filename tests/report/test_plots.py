"""Pictures show every part, keep their axes logarithmic, and reach the disk whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import fishkern as fk
from fishkern.report import locate, summarise, summarise_energies, summarise_start

pytest.importorskip("matplotlib")

from fishkern.report import plots

NAMES = ["embed.weight", *(f"layers.{n}.{m}.weight" for n in range(3) for m in ("up", "down")), "head.weight"]


@pytest.fixture
def scores() -> dict[str, torch.Tensor]:
    return {name: torch.rand(5, 7) * 10.0**-n for n, name in enumerate(NAMES)}


def labels(axes) -> tuple[list[str], list[str]]:
    return tuple([label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis))


def test_every_part_has_a_cell_and_every_axis_a_unit(scores):
    figure = plots.draw(summarise(scores), title="A model", quantity="Fisher information", unit="nats²")
    figure.canvas.draw()
    inside, outside, bar, distribution = figure.axes
    assert labels(inside) == (["layer 0", "layer 1", "layer 2"], ["up", "down"])
    assert labels(outside)[0] == ["embed", "head"]
    means = [scores[f"layers.{n}.{m}.weight"].mean().item() for n in range(3) for m in ("up", "down")]
    assert inside.collections[0].get_array().flatten().tolist() == pytest.approx(means)
    assert bar.get_ylabel() == "mean"  # the title names the statistic and its unit
    assert distribution.get_xlabel() == "Fisher information of a coordinate [nats²]"
    assert (distribution.get_xscale(), distribution.get_yscale()) == ("log", "log")
    assert "top 0.50%" in distribution.get_legend().get_texts()[0].get_text()


def test_colours_can_be_told_apart_in_grey():
    """Their lightness rises all the way."""
    from matplotlib import colormaps

    red, green, blue = colormaps[plots._COLOURS](torch.linspace(0, 1, 50).numpy())[:, :3].T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (lightness[1:] > lightness[:-1]).all()


@pytest.mark.parametrize(
    "names", [["weight"], ["layers.0.up.weight"], [f"layers.{n}.up.weight" for n in range(90)]], ids=len
)
def test_any_number_of_layers(names, tmp_path):
    summary = summarise({name: torch.rand(3) for name in names})
    assert plots.save(plots.draw(summary), tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_all_zero(tmp_path):
    plots.save(plots.draw(summarise({"layers.0.up.weight": torch.zeros(3)})), tmp_path / "a.png")


def test_what_is_not_drawn_is_said(tmp_path):
    values = torch.tensor([1.0, 2.0, torch.inf, torch.inf, 0.0, -1.0])
    figure = plots.draw(summarise({"layers.0.up.weight": values, "head.weight": torch.tensor([torch.inf])}))
    assert any("1 zero, 1 negative, 3 infinite and not drawn" in axes.get_title() for axes in figure.axes)
    plots.save(figure, tmp_path / "a.png")


def test_a_selection(scores, tmp_path):
    parts = locate(fk.select(scores, fk.GlobalTopK(k=28)))
    figure = plots.draw_selection(parts, title="selected")
    densities = [part.density or 0.0 for place, part in parts.cells.items() if place.layer]
    drawn = figure.axes[0].collections[0].get_array().flatten()
    assert drawn.filled(0.0).tolist() == pytest.approx(densities, nan_ok=True)
    plots.save(figure, tmp_path / "a.svg")


def test_a_picture_is_whole_or_not_there(scores, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        plots.save(plots.draw(summarise(scores)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_other_endings_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg"):
        plots.checked_picture(tmp_path / "a.gif")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plots.checked_picture(tmp_path / "none" / "a.png")


def energies(importance: bool = True) -> fk.Energies:
    """Two layers of two matrices, of which the last has no energy."""
    tensors = {}
    for number, name in enumerate(f"layers.{n}.{module}.weight" for n in range(2) for module in ("up", "down")):
        values = torch.zeros(5) if number == 3 else torch.tensor([16.0, 8.0, 4.0, 2.0, 2.0]) * 10.0**-number
        tensors |= {f"{name}/input": values, f"{name}/joint": values, f"{name}/output": torch.ones(5)}
        tensors |= {f"{name}/positions": torch.tensor(1.0), f"{name}/matrix": torch.tensor([5.0, 7.0, 1.0, 1.0])}
        tensors |= {f"{name}/importance": torch.tensor(35.0 * number)} if importance else {}
    return fk.Energies(tensors, count=3, provenance={"definition": {"basis": "svd"}})


@pytest.mark.parametrize("importance", [False, True])
def test_energies_by_layer_and_the_directions_that_hold_them(importance):
    summary = summarise_energies(energies(importance))
    figure = plots.draw_energies(summary, title="A model")
    figure.canvas.draw()
    inside, bar, curves = figure.axes
    assert labels(inside) == (["layer 0", "layer 1"], ["up", "down"])
    drawn = inside.collections[0].get_array().flatten()
    expected = [None, 1.0, 2.0, 3.0] if importance else [32 / 5, 0.32 * 2, 0.032 * 2, None]
    assert [None if drawn.mask[n] else drawn[n] for n in range(4)] == [
        None if value is None else pytest.approx(value) for value in expected
    ]
    assert bar.get_ylabel() == "mean"
    by_module = {line.get_label(): list(line.get_ydata()) for line in curves.get_lines()}
    assert list(curves.get_lines()[0].get_xdata()) == [1, 2, 4, 5]
    for shares in by_module.values():
        assert shares == pytest.approx([16 / 32, 24 / 32, 30 / 32, 1])
    assert set(by_module) == {"up", "down"}


def test_ranks_and_sizes_of_a_start():
    modules = {
        f"layers.{n}.up": fk.ModuleInit(torch.eye(6)[: n + 1], torch.eye(5)[:, : n + 1], 2.0, torch.arange(n + 1))
        for n in range(3)
    }
    init = fk.AdapterInit(modules, digests=dict.fromkeys(modules, (10.0, 1.0)))
    figure = plots.draw_start(summarise_start(init), title="start")
    figure.canvas.draw()
    ranks, _, sizes, _ = figure.axes
    assert ranks.collections[0].get_array().flatten().tolist() == [1, 2, 3]
    assert ranks.collections[0].norm.vmin == 0
    expected = [0.2 * (n + 1) ** 0.5 for n in range(3)]
    assert sizes.collections[0].get_array().flatten().tolist() == pytest.approx(expected)
