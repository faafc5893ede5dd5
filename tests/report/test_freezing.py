"""What a freezer's state tells of its events, and the picture of it."""

from __future__ import annotations

import pytest
import torch

import fishkern as fk
from fishkern.freezing import Track
from fishkern.freezing.saved import FreezerState, Read
from fishkern.report import summarise_freezer

SHAPES = {**{f"layers.{n}.up.weight": (4, 3) for n in range(2)}, "head.weight": (2, 3)}
UP, DEEP, HEAD = SHAPES
HALVES = {name: [(name, 0), (name, 1)] for name in SHAPES}


def state(**changes) -> FreezerState:
    """Halves of three matrices: (UP, 1) stops after the reading at step 4, (DEEP, 0) after the last; HEAD is late."""
    up, deep, head = HALVES.values()
    first = dict.fromkeys(up + deep, 0.0)
    history = [
        Read(0, 30, first),
        Read(2, 30, dict.fromkeys(first, 0.25)),
        Read(4, 30, {**dict.fromkeys(first, 0.5), up[1]: 0.25, **dict.fromkeys(head, 0.0)}),
        Read(6, 24, {up[0]: 1.0, deep[0]: 0.5, deep[1]: 0.75, head[0]: 0.125, head[1]: 0.0}),
    ]
    left = fk.Selection(SHAPES, {UP: torch.arange(6), DEEP: torch.arange(6, 12)}, whole=[HEAD])
    fields = {
        "count": 6,
        "number": 3,
        "read_before": 4,
        "digest": "ab",
        "settings": {"drift": str(fk.JensenShannon()), "slices": str(fk.Slices(2))},
        "initial": fk.Selection(SHAPES, {}, whole=list(SHAPES)),
        "selection": left,
        "tracks": {key: Track((torch.zeros(1),)) for key in (up[0], deep[1], *head)},
        "history": history,
    }
    return FreezerState(**{**fields, **changes})


def test_events_are_told_by_what_is_missing_later():
    summary = summarise_freezer(state())
    assert [(one.step, one.slices, one.entries, one.left) for one in summary.events] == [
        (4, ((UP, 1),), 6, 24),
        (6, ((DEEP, 0),), 6, 18),
    ]
    assert summary.stopped == {(UP, 1): 4, (DEEP, 0): 6}
    assert summary.kept == [30, 30, 24, 18]
    assert list(summary.scores) == [key for name in SHAPES for key in HALVES[name]]
    assert summary.scores[UP, 1] == [0.0, 0.25, 0.25, None]
    assert summary.scores[HEAD, 0] == [None, None, 0.0, 0.125]


def test_parts_add_up():
    summary = summarise_freezer(state())
    assert vars(summary.parameters[UP]) == {"entries": 12, "kept": 6, "slices": 2, "stopped": 1}
    assert vars(summary.layers["layer 1"]) == {"entries": 12, "kept": 6, "slices": 2, "stopped": 1}
    assert vars(summary.modules["head"]) == {"entries": 6, "kept": 6, "slices": 2, "stopped": 0}
    assert vars(summary.whole) == {"entries": 30, "kept": 18, "slices": 6, "stopped": 2}
    plain = summary.to_dict()
    assert plain["slices"][UP][1] == {"slice": 1, "scores": [0.0, 0.25, 0.25, None], "stopped_after": 4}
    assert plain["events"][1] == {"step": 6, "slices": 1, "entries": 6, "left": 18}


def test_it_tells_what_a_freezer_has_decided(tmp_path):
    """A real one: its own events are the oracle."""
    from tests.freezing.training import EAGER, trained

    _, freezer, events = trained(24, rule=EAGER)
    freezer.save(tmp_path / "freezer")
    summary = summarise_freezer(FreezerState.load(tmp_path / "freezer"))
    stopped = [event for event in events if event.frozen]
    assert len(stopped) > 1
    assert [(one.step, set(one.slices), one.entries, one.left) for one in summary.events] == [
        (event.step, set(event.frozen), event.entries_frozen, event.entries_kept) for event in stopped
    ]
    counts = freezer.selection.counts
    assert {name: part.kept for name, part in summary.parameters.items()} == counts


def test_what_its_pool_has_not_is_refused():
    history = [Read(0, 30, {("other\x1b.weight", 0): 0.0})]
    with pytest.raises(ValueError, match=r"follows other.*weight, which is not in its pool"):
        summarise_freezer(state(history=history))


@pytest.fixture
def drawn():
    pytest.importorskip("matplotlib")
    from fishkern.report.freezing_picture import draw_freezer

    figure = draw_freezer(summarise_freezer(state()), title="A run", score="score [√nat]")
    figure.canvas.draw()
    return figure


def test_every_slice_has_a_row_and_every_axis_a_unit(drawn):
    above, bar, below = drawn.axes
    cells = above.collections[0].get_array()
    assert cells.shape == (6, 4)  # a column after the last reading, too
    assert cells[0].tolist() == [0.25, 0.5, 1.0, 1.0]
    assert cells[1].tolist() == [0.25, 0.25, None, None]
    assert cells[4].tolist() == [None, 0.0, 0.125, 0.125]
    assert [label.get_text() for label in above.get_yticklabels()] == ["up", "up", "head"]
    layers = above.child_axes[0]
    assert [label.get_text() for label in layers.get_yticklabels()] == ["layer 0", "layer 1", "outside"]
    assert above.get_ylim() == (6, 0)
    assert bar.get_ylabel() == "score [√nat] (square-root scale)"
    assert below.get_xlabel().startswith("steps of the optimizer")
    assert below.get_ylabel() == "entries in training\n[% of those at first]"


def test_what_has_stopped_is_hatched_from_then_on(drawn):
    above, _, below = drawn.axes
    hatched = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_y()) for bar in above.patches]
    assert hatched == [(4, 8, 1.0), (6, 8, 2.0)]
    assert all(bar.get_hatch() for bar in above.patches)
    (kept, *events) = below.lines
    assert kept.get_xydata().tolist() == [[0, 100], [2, 100], [4, 80], [6, 60], [8, 60]]
    assert [line.get_xdata()[0] for line in events] == [4, 6]


def test_a_deep_model_is_labelled_by_its_layers():
    pytest.importorskip("matplotlib")
    from fishkern.report.freezing_picture import draw_freezer

    shapes = {f"layers.{n}.{m}.weight": (4, 3) for n in range(40) for m in "abcdefg"}
    everything = fk.Selection(shapes, {}, whole=list(shapes))
    scores = {(name, n): 0.5 for name in shapes for n in range(4)}
    history = [Read(step, everything.total, scores) for step in range(3)]
    tracks = {key: Track((torch.zeros(1),)) for key in scores}
    changed = state(initial=everything, selection=everything, history=history, tracks=tracks)
    figure = draw_freezer(summarise_freezer(changed))
    assert len(figure.axes[0].get_yticklabels()) == 40
    assert figure.get_size_inches()[1] < 24


def test_one_reading_is_no_picture():
    pytest.importorskip("matplotlib")
    from fishkern.report.freezing_picture import draw_freezer

    with pytest.raises(ValueError, match="from its second reading on"):
        draw_freezer(summarise_freezer(state(history=state().history[:1])))
