"""Pictures show every part, keep their axes logarithmic, and reach the disk whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import fishkern as fk
from fishkern.report import locate, summarise

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
