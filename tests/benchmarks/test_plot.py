"""Pictures show what the records say, and nothing else."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from benchmarks import __main__ as command
from benchmarks import plots
from benchmarks.plots import glue, scaling, style

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ORIGIN = {"machine": "some-cpu", "commit": "abcdef0123", "dirty": False, "time": "2026-01-02T03:04:05+00:00"}
CASE = {"T": 16, "N": 8, "batches": 16, "layers": 4, "hidden": 512}


def timed(provider: str, seconds: float, **changed) -> dict:
    record = {"op": "whole_pass", "quantity": "time", "case": CASE, "provider": provider, **ORIGIN}
    return {**record, "seconds": {"median": seconds}, **changed}


def words(figure) -> str:
    texts = [figure.get_supxlabel()]
    for axes in figure.axes:
        ticks = (*axes.get_yticklabels(), *axes.get_xticklabels())
        texts += [axes.get_title(loc="left"), *(text.get_text() for text in (*axes.texts, *ticks))]
    return " | ".join(texts)


def grown(provider: str, size: int, quantity: str = "time", **figures) -> dict:
    record = {"op": "whole_pass", "quantity": quantity, "grows": "N", "case": {"T": 16, "layers": 2, "N": size}}
    return {**record, "provider": provider, "limit_gib": 2, **figures, **ORIGIN}


def scored(arm: str, seed: int, score: float, lr: float = 1e-4) -> dict:
    record = {"setting": {"task": "cola"}, "encoder": "MiniLM", "arm": arm, "seed": seed, "lr": lr}
    return {**record, "score": score, "trained": 10, **ORIGIN}


def test_every_file_of_records_has_a_picture_or_says_why_not():
    assert not plots.PLOTS.keys() & plots.WITHOUT.keys()
    names = {path.stem for path in RESULTS.glob("*/*.jsonl")}
    assert {name for name in names if not name[:8].isdigit()} <= plots.PLOTS.keys() | plots.WITHOUT.keys()
    assert all(find_spec(f"benchmarks.plots.{name}") for name in plots.PLOTS)


DRAWN = [path for path in sorted(RESULTS.glob("*/*.jsonl")) if path.stem in plots.PLOTS]


@pytest.mark.matrix
@pytest.mark.parametrize("path", DRAWN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_records_are_drawn(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    figure = plots.draw(path.stem, records)
    assert all(record["commit"][:7] in words(figure) for record in records[-1:])


def test_bars_are_the_newest_records():
    records = [timed("fishkern", 9.0), timed("fishkern", 2.5), timed("opacus", 1.0)]
    del records[-1]["seconds"]
    records[-1]["left out"] = "does not run"
    figure = plots.draw("whole_pass", records)
    assert [patch.get_width() for axes in figure.axes for patch in axes.patches] == [2.5]
    assert "2.50 s" in words(figure)
    assert "does not run" in words(figure)
    assert "abcdef0" in words(figure)


def test_changes_that_are_not_committed_are_said():
    assert "with changes" in words(plots.draw("whole_pass", [timed("fishkern", 1.0, dirty=True)]))
    assert "with changes" not in words(plots.draw("whole_pass", [timed("fishkern", 1.0)]))


def test_exponents_are_of_the_largest_sizes():
    flat_then_square = [(1, 5.0), (2, 5.0), (4, 16.0), (8, 64.0), (16, 256.0), (32, 1024.0)]
    assert scaling.exponent(flat_then_square) == pytest.approx(2.0)
    figure = plots.draw("scaling", [grown("fishkern", x, seconds={"median": y}) for x, y in flat_then_square])
    assert "^2.00" in words(figure)
    (names,) = (axes.get_legend().get_texts() for axes in figure.axes if axes.get_legend())
    assert [name.get_text() for name in names] == ["fishkern"]


def test_only_what_ran_out_of_memory_is_marked():
    records = [grown("vmap_grad", size, "memory", peak_mib=float(size)) for size in (4, 8)]
    records += [grown("vmap_grad", 16, "memory", **{"left out": "out of memory above 2 GiB"})]
    records += [grown("vmap_grad", 32, "memory", **{"left out": "not tried: out of memory above 2 GiB at N = 16"})]
    assert scaling.out_of_memory(records, "N") == {"vmap_grad": 16}
    assert scaling.points_of(records, "N", "memory") == {"vmap_grad": [(4, 4.0), (8, 8.0)]}
    crosses = [line for axes in plots.draw("scaling", records).axes for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [16]


def test_differences_are_of_the_same_seed():
    """The runs that choose a learning rate count nowhere else."""
    runs = [scored("fish", 0, 0.5), scored("fish", 1, 0.7), scored("random", 1, 0.6), scored("random", 0, 0.3)]
    runs += [scored("random", 2, 0.9), *(scored(arm, glue.CHOOSING_SEED, 0.99) for arm in ("fish", "random"))]
    assert glue.scores(runs) == {"fish": [0.5, 0.7], "random": [0.3, 0.6, 0.9]}
    assert glue.differences(runs) == {"random": [pytest.approx(0.2), pytest.approx(0.1)]}
    figure = plots.draw("glue", runs)
    dots = [list(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sorted(map(len, dots)) == [2, 3]
    assert "60.00" in words(figure)


def test_a_provider_has_one_colour_everywhere():
    assert style.colours(["one_by_one", "fishkern"])["fishkern"] == style.OURS
    together = ["fishkern", "one_by_one", "vmap_grad", "opacus", "backpack", "nngeometry", "kronfluence"]
    assert len(set(style.colours([*together, "unheard", "of"]).values())) == len(together) + 2


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2.884, "s", "2.88 s"), (0.0781, "s", "78.1 ms"), (0.0000123, "s", "12.3 us"), (2048.0, "MiB", "2.00 GiB"),
     (922.4, "MiB", "922 MiB"), (0.0, "s", "0 s")],
)  # fmt: skip
def test_numbers(value, unit, text):
    assert style.number(value, unit) == text


def test_the_command(tmp_path, capsys):
    """A picture for each file of records; a file that nothing draws is named."""
    folder = tmp_path / "some-cpu"
    folder.mkdir()
    (folder / "whole_pass.jsonl").write_text(json.dumps(timed("fishkern", 1.0)) + "\n")
    (folder / "strange.jsonl").write_text("{}\n")
    assert command.main(["plot", "--results", str(tmp_path)]) == 0
    assert (folder / "whole_pass.png").read_bytes().startswith(b"\x89PNG")
    assert "strange.jsonl" in capsys.readouterr().err
    assert command.main(["plot", "nothing", "--results", str(tmp_path)]) == 2
    assert "whole_pass" in capsys.readouterr().err
    assert command.main(["plot", "scaling", "--results", str(tmp_path)]) == 2
    assert "no records of scaling" in capsys.readouterr().err


def test_every_study_is_here_and_has_its_own_help(capsys):
    for name, (module, _) in command.STUDIES.items():
        assert find_spec(module), name
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("run", "compare", "plot", "gpu", "tune", *command.STUDIES))
