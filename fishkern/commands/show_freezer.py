"""What ``fishkern show`` says of a freezer."""

from __future__ import annotations

import json
from pathlib import Path

from fishkern.commands.output import console
from fishkern.files import in_brief
from fishkern.freezing.saved import FreezerState
from fishkern.report import FreezerSummary, summarise_freezer
from fishkern.report.tables import events_table, freezing_table

_HEADINGS = ("step of the reading", "slices stopped", "entries stopped", "entries left", "of those at first")


def show_freezer(state: FreezerState, file: Path, picture: Path | None, *, as_json: bool) -> None:
    """Print what a freezer has stopped, and draw it.

    Args:
        state: What the file holds.
        file: Its name.
        picture: Where to save the picture, if one is asked for.
        as_json: Whether to print JSON instead of tables.

    Raises:
        ValueError: The freezer is damaged, or a picture is asked for and there are fewer than two readings.
    """
    summary = summarise_freezer(state)
    figure = None
    if picture is not None:
        from fishkern.report.freezing_picture import draw_freezer

        figure = draw_freezer(summary, title=f"{file.name}: {_in_words(state)}", score=_score(state))
    if as_json:
        numbers = {"count": state.count, "decisions": state.number, "settings": state.settings}
        print(json.dumps({"file": str(file), **numbers, **summary.to_dict()}, indent=2))
    else:
        _print(state, summary, file)
    if figure is not None:
        from fishkern.report.plots import save

        save(figure, picture)


def _print(state: FreezerState, summary: FreezerSummary, file: Path) -> None:
    say = console().print
    say(f"{file}: {_in_words(state)}\n")
    for what, said in state.settings.items():
        say(f"{in_brief(what, 40):9} {in_brief(_plain(said), 400)}")
    say()
    first = max(summary.whole.entries, 1)
    if summary.events:
        rows = [
            (f"{one.step:,}", f"{len(one.slices):,}", f"{one.entries:,}", f"{one.left:,}", f"{one.left / first:.1%}")
            for one in summary.events
        ]
        say(events_table(rows, _HEADINGS))
    else:
        say("Nothing has stopped.")
    say(freezing_table(summary))


def _plain(said: str) -> str:
    """Write a definition, which is JSON, as ``fishkern estimate`` does; other words stay."""
    try:
        definition = json.loads(said)
    except (ValueError, RecursionError):
        return said
    return ", ".join(f"{key} = {value}" for key, value in definition.items()) if isinstance(definition, dict) else said


def _in_words(state: FreezerState) -> str:
    numbers = {"decision": state.number, "reading": len(state.history)}
    many = " and ".join(f"{number:,} {what}{'s' * (number != 1)}" for what, number in numbers.items())
    kept = f"{state.selection.count:,} of {state.initial.count:,} entries stay in training"
    return f"a freezer after {state.count:,} steps, {many}; {kept}"


def _score(state: FreezerState) -> str:
    """Name the scores, and the unit that the square root of a divergence in nats has."""
    drift = state.settings.get("drift", "")
    if "total-variation" in drift:
        return "score: total variation of the distance [√nat]"
    return "score: mean distance [√nat]" if "mean" in drift else "score [√nat]"
