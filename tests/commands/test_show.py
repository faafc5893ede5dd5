"""``fishkern show`` and ``fishkern select``: the content of a file, and a selection from it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch

import fishkern as fk
from tests.support.command import command, refused

NAMES = ["embed.weight", *(f"layers.{n}.{m}.weight" for n in range(3) for m in ("up", "down"))]


@pytest.fixture
def saved(tmp_path):
    scores = {name: torch.rand(8, 25) for name in NAMES}
    definition = {"estimator": "DiagonalFisher", "fisher_type": "empirical", "unit": "example"}
    runs = [{"model": "LlamaForCausalLM", "dtype": ["float32"], "data": "glue/cola"}]
    statistics = fk.Statistics(scores, count=7, provenance={"definition": definition, "runs": runs})
    return statistics.save(tmp_path / "fisher.safetensors")


def test_statistics(capsys, saved):
    status, output, error = command(capsys, "show", saved)
    assert (status, error) == (0, "")
    assert all(word in output for word in ("embed", "layer 2", "down", "glue/cola", "mean over 7 examples"))


def test_statistics_as_json(capsys, saved):
    status, output, _ = command(capsys, "show", saved, "--json", "--density", 0.1)
    found = json.loads(output)
    assert status == 0
    assert found["count"] == 7
    assert found["whole"]["coordinates"] == 1400
    assert found["whole"]["selected"] == 140
    assert found["runs"][0]["data"] == "glue/cola"


def test_what_no_fisher_holds_is_pointed_out(capsys, tmp_path):
    definition = {"estimator": "DiagonalFisher", "fisher_type": "empirical"}
    scores = {"layers.0.up.weight": torch.tensor([1.0, torch.inf, -2.0, 3.0])}
    path = fk.Statistics(scores, count=1, provenance={"definition": definition}).save(tmp_path / "bad")
    status, output, error = command(capsys, "show", path)
    assert status == 0
    assert "infinite" in output
    infinite, negative = error.splitlines()
    assert infinite.startswith("note: 1 of 4 entries are infinite and left out of every sum")
    assert negative.startswith("note: 1 of 4 entries are negative, which a mean of squares cannot be")
    assert "Infinity" not in command(capsys, "show", path, "--json")[1]
    scores = {"w": torch.tensor([1.0, -2.0])}
    path = fk.Statistics(scores, count=1, provenance={"definition": {"estimator": "Own"}}).save(tmp_path / "own")
    assert command(capsys, "show", path)[::2] == (0, "")


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_picture(capsys, saved, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    status, output, error = command(capsys, "show", saved, "--plot", tmp_path / f"a{suffix}")
    assert (status, error) == (0, "")
    assert f"a{suffix}" in output
    assert (tmp_path / f"a{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((), fk.GlobalTopK(density=0.005)),
        (("--density", 0.1, "--never", "embed.*"), fk.GlobalTopK(density=0.1, never="embed.*")),
        (("--rule", "per-tensor", "--k", 3, "--smallest"), fk.PerTensorTopK(k=3, order="smallest")),
        (("--rule", "per-row", "--k", 2, "--always", "*.up.*"), fk.PerRowTopK(2, always="*.up.*")),
        (("--rule", "random", "--density", 0.1, "--seed", 4), fk.Random(density=0.1, seed=4)),
        (("--rule", "per-row", "--density", 0.5, "--never", "embed.*"), fk.PerRowTopK(density=0.5, never="embed.*")),
        (("--rule", "n-of-m", "--n", 1, "--m", 5, "--smallest"), fk.NofM(1, 5, "smallest")),
        (("--rule", "contribution"), fk.ContributionTopK(top=0.2)),
        (
            (
                "--rule",
                "contribution",
                "--density",
                0.3,
                "--by",
                "parameter",
                "--share",
                "count-per-entry",
                "--most-per-row",
                12,
            ),
            fk.ContributionTopK(density=0.3, by="parameter", share="count-per-entry", most_per_row=12),
        ),
        (
            ("--rule", "contribution", "--top", 0.4, "--least-per-row", 2, "--share", "sum", "--smallest"),
            fk.ContributionTopK(0.4, least_per_row=2, share="sum", order="smallest"),
        ),
    ],
    ids=str,
)
def test_a_selection_is_that_of_its_rule(capsys, saved, tmp_path, arguments, rule):
    out = tmp_path / "selection.safetensors"
    status, output, _ = command(capsys, "select", saved, *arguments, "--out", out)
    assert status == 0
    assert str(out) in output
    chosen = fk.select(fk.Statistics.load(saved), rule)
    assert fk.Selection.load(out) == chosen
    assert fk.Selection.load(out).provenance == chosen.provenance


@pytest.mark.parametrize(
    ("rule", "times"), [("global", 1), ("per-tensor", 1), ("per-row", 1), ("random", 0)], ids=lambda value: str(value)
)
def test_the_share_that_is_read_is_shown(capsys, tmp_path, monkeypatch, rule, times):
    """Entry by entry as they are read, and whole at the end."""
    told = []

    @contextmanager
    def progress(what, unit):
        assert (what, unit) == ("reading", "entries")
        yield lambda *done: told.append(done)

    monkeypatch.setattr(import_module("fishkern.commands.select"), "progress", progress)
    scores = {"a": torch.rand(3, 2**19), "b": torch.rand(2, 5)}
    saved = fk.Statistics(scores, count=7).save(tmp_path / "fisher")
    total = 3 * 2**19 + 10
    assert command(capsys, "select", saved, "--rule", rule, "--k", 2, "--out", tmp_path / "selection")[0] == 0
    assert told == sorted(told)
    assert all(of == total for _, of in told)
    assert [done for done, _ in told][-1:] == [total] * times
    if rule == "random":
        assert not told
    else:
        assert len(told) >= 3


def test_a_second_reading_is_counted_on(capsys, tmp_path, monkeypatch):
    told = []

    @contextmanager
    def progress(what, unit):
        yield lambda *done: told.append(done)

    monkeypatch.setattr(import_module("fishkern.commands.select"), "progress", progress)
    saved = fk.Statistics({"w": torch.zeros(50)}, count=7).save(tmp_path / "fisher")
    status, _, error = command(capsys, "select", saved, "--k", 2, "--out", tmp_path / "selection")
    assert (status, told) == (0, [(50, 50), (100, 100)])  # once more to count the entries that are not zero
    assert "exceeds the 0 non-zero scores" in error


def test_what_each_layer_contributes_is_shown(capsys, saved, tmp_path):
    out = tmp_path / "selection.safetensors"
    rule = fk.ContributionTopK(top=0.3, never="embed.*")
    arguments = ("select", saved, "--rule", "contribution", "--top", 0.3, "--never", "embed.*", "--out", out)
    selected = command(capsys, *arguments)[1]
    shown = command(capsys, "show", out)[1]
    contributions = rule.connections(fk.Statistics.load(saved))
    for output in (selected, shown):
        assert "in the top 0.3" in output
        for path, one in contributions.layers.items():
            cells = next(line for line in output.splitlines() if f" {path} " in line).split("│")[2:6]
            expected = [f"{one.top_count}", f"{one.share:.1%}", f"{one.connections}", f"{one.count} of {one.numel}"]
            assert [cell.strip() for cell in cells] == expected
    said = json.loads(command(capsys, *arguments, "--json")[1])
    assert said["contributions"]["layers"]["layers.1"]["top_count"] == contributions.layers["layers.1"].top_count


def test_a_selection_is_shown_drawn_and_compared(capsys, saved, tmp_path):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    status, output, _ = command(capsys, "select", saved, "--density", 0.1, "--out", one, "--json")
    assert status == 0
    assert json.loads(output)["count"] == 140
    command(capsys, "select", saved, "--density", 0.05, "--out", other)
    status, output, _ = command(capsys, "show", one)
    assert status == 0
    assert "140 of 1,400" in output
    assert "layer 2" in output
    found = json.loads(command(capsys, "show", one, "--json")[1])
    assert sum(part["selected"] for part in found["layers"].values()) == 140
    status, output, _ = command(capsys, "show", one, other)
    assert status == 0
    assert "overlap 50.00%" in output
    assert json.loads(command(capsys, "show", one, other, "--json")[1])["shared"] == 70
    pytest.importorskip("matplotlib")
    assert command(capsys, "show", one, "--plot", tmp_path / "a.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def trained(tmp_path):
    """A delta, and the start that it moved from, in a folder as tune leaves them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 25, bias=False), torch.nn.Linear(25, 3))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    chosen = fk.Selection(shapes, {"0.weight": torch.arange(0, 200, 10)}, whole=["1.bias"])
    fk.selection.save_start(model, chosen, tmp_path / "start")
    with torch.no_grad():
        model[0].weight.view(-1)[:20] += torch.arange(20) / 8  # of the selected ones 0 and 10
        model[1].bias += 0.5
    return fk.delta(model, chosen).save(tmp_path / "delta")


def test_a_delta_is_shown_with_its_moves(capsys, trained, tmp_path):
    status, output, error = command(capsys, "show", trained)
    assert (status, error) == (0, "")
    assert "23 values in 2 parameters" in output
    assert f"4 of 23 have moved from {tmp_path / 'start.safetensors'}, by 1.25 at most" in output
    found = json.loads(command(capsys, "show", trained, "--json")[1])
    assert found["whole"]["coordinates"] == 200 + 75 + 3
    largest = fk.Delta.load(trained).values("0.weight").abs().max().item()
    plain = {"coordinates": 200, "values": 20, "moved": 1, "infinite": 0, "largest": largest}
    assert found["parameters"]["0.weight"] == plain | {"largest_move": pytest.approx(1.25)}
    assert [found["parameters"]["1.bias"][key] for key in ("values", "moved", "largest_move")] == [3, 3, 0.5]
    assert found["parameters"]["1.weight"]["values"] == 0


def test_a_delta_without_its_start_is_shown_too(capsys, trained, tmp_path):
    (tmp_path / "start.safetensors").rename(tmp_path / "elsewhere.safetensors")
    status, output, error = command(capsys, "show", trained)
    assert status == 0
    assert "largest value" in output
    assert "move" not in output
    assert "not known without the start: fishkern show DELTA START" in error
    assert "4 of 23 have moved" in command(capsys, "show", trained, tmp_path / "elsewhere.safetensors")[1]


def test_a_start_is_shown(capsys, trained, tmp_path):
    status, output, error = command(capsys, "show", tmp_path / "start.safetensors")
    assert (status, error) == (0, "")
    assert "a start of 3 parameters" in output
    assert json.loads(command(capsys, "show", tmp_path / "start.safetensors", "--json")[1])["whole"]["values"] == 278


def test_another_models_start_is_refused(capsys, trained, tmp_path, saved):
    other = torch.nn.Sequential(torch.nn.Linear(9, 25, bias=False))
    fk.selection.save_start(other, fk.Selection({"0.weight": (25, 9)}, {}), tmp_path / "other")
    assert "it is another run's start" in refused(capsys, "show", trained, tmp_path / "other.safetensors")
    assert "holds statistics" in refused(capsys, "show", trained, saved)
    assert "--plot" in refused(capsys, "show", trained, "--plot", tmp_path / "a.png")
    assert "--density" in refused(capsys, "show", trained, "--density", 0.1)


def test_a_file_that_is_none_of_ours(capsys, tmp_path):
    from safetensors.torch import save_file

    expected = (
        "expected statistics, a selection, a delta, a start, energies, an adapter's start, a freezer or a token "
        "reduction; made by fishkern estimate / select / tune / ranks / init."
    )
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    line = refused(capsys, "show", tmp_path / "model.safetensors")
    assert "cannot be shown (its header says format=pt)" in line
    assert line.endswith(expected)
    (tmp_path / "table.csv").write_text("text,label\nthe sea,1\n" * 9)
    assert refused(capsys, "show", tmp_path / "table.csv").endswith(expected)
    fk.Statistics({"w": torch.ones(3)}, count=1).save(tmp_path / "fisher")
    line = refused(capsys, "show", tmp_path)
    assert "is a folder: name a file in it, such as" in line
    assert "fisher.safetensors" in line


def test_a_sum_is_no_number_of_entries(capsys, saved):
    """total counts, as it does in Statistics and Selection."""
    found = json.loads(command(capsys, "show", saved, "--json")[1])
    statistics = fk.Statistics.load(saved)
    assert "total" not in found["whole"]
    assert found["whole"]["sum"] == pytest.approx(sum(value.double().sum().item() for value in statistics.values()))
    assert list(found["parameters"]) == list(statistics)
    for name, value in statistics.items():
        assert found["parameters"][name]["sum"] == pytest.approx(value.double().sum().item())


def test_a_size_is_that_of_the_file_alone(capsys, saved, tmp_path):
    """Neighbours whose names begin alike are other files."""
    from fishkern.commands.output import size_on_disk

    statistics = fk.Statistics.load(saved)
    statistics.save(tmp_path / "fisher.csv.safetensors")
    statistics.save(tmp_path / "fisher-2.safetensors")
    assert size_on_disk(saved) == f"{saved.stat().st_size / 1e3:.1f} kB"
    index = statistics.save(tmp_path / "large", max_shard_size=2000)
    files = [index, *tmp_path.glob("large-0*.safetensors")]
    assert len(files) > 2
    assert size_on_disk(index) == f"{sum(file.stat().st_size for file in files) / 1e3:.1f} kB"


def test_what_cannot_be_shown_is_refused(capsys, saved, tmp_path):
    assert "nothing to load" in refused(capsys, "show", tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:-10])
    assert "truncated" in refused(capsys, "show", tmp_path / "cut.safetensors")
    assert ".png" in refused(capsys, "show", saved, "--plot", tmp_path / "a.gif")
    assert "does not exist" in refused(capsys, "show", saved, "--plot", tmp_path / "none" / "a.png")
    assert "--density" in refused(capsys, "show", saved, "--density", 2)
    nan = fk.Statistics({"fine": torch.ones(2), "norm.bias": torch.tensor([torch.nan])}, count=1).save(tmp_path / "nan")
    assert "norm.bias holds NaN" in refused(capsys, "show", nan)
    chosen = fk.select(fk.Statistics.load(saved), fk.GlobalTopK(k=3)).save(tmp_path / "chosen")
    for files in ([chosen], [chosen, chosen]):
        assert "--density" in refused(capsys, "show", *files, "--density", 0.1)
    assert "only two selections" in refused(capsys, "show", saved, saved)


def test_what_cannot_be_selected_is_refused(capsys, saved, tmp_path):
    out = ("--out", tmp_path / "selection.safetensors")
    assert "--rule" in refused(capsys, "select", saved, "--rule", "best", *out)
    assert "--k" in refused(capsys, "select", saved, "--rule", "per-row", *out)
    assert "either --k or --density" in refused(capsys, "select", saved, "--k", 1, "--density", 0.1, *out)
    assert "--density" in refused(capsys, "select", saved, "--density", 0, *out)
    assert "--smallest" in refused(capsys, "select", saved, "--rule", "random", "--smallest", *out)
    for rule in ("global", "per-tensor", "per-row"):
        assert "--seed" in refused(capsys, "select", saved, "--rule", rule, "--k", 1, "--seed", 0, *out)
    for option in ("--top", "--least-per-row", "--most-per-row", "--n", "--m"):
        assert f"{option} is for --rule" in refused(capsys, "select", saved, "--k", 1, option, 1, *out)
    assert "--k is for --rule global, per-tensor, per-row or random: leave it out with --rule contribution" in refused(
        capsys, "select", saved, "--rule", "contribution", "--k", 1, *out
    )
    assert "--top" in refused(capsys, "select", saved, "--rule", "contribution", "--top", 0.1, "--density", 0.1, *out)
    assert "--share" in refused(capsys, "select", saved, "--rule", "contribution", "--share", "mass", *out)
    assert "--n and --m" in refused(capsys, "select", saved, "--rule", "n-of-m", "--n", 1, *out)
    assert "2,000" in refused(capsys, "select", saved, "--k", 2000, *out)
    assert "no.such" in refused(capsys, "select", saved, "--always", "no.such", *out)
    assert "not overwritten" in refused(capsys, "select", saved, "--out", saved)
    assert [path.name for path in tmp_path.iterdir()] == ["fisher.safetensors"]


def test_what_a_name_dictates_is_text(capsys, tmp_path):
    """A file of a stranger's clears no screen."""
    name = "layers.0.\x1b[2J\x1b]0;title\x07up.weight"
    provenance = {"definition": {"estimator": "\x1b[31mX"}, "runs": [{"model": "\x1b[2Jbad", "data": "a\nb"}]}
    statistics = fk.Statistics({name: torch.rand(4)}, count=1, provenance=provenance).save(tmp_path / "s")
    rule = {"rule": {"name": "\x1b[31mR"}}
    chosen = fk.Selection({name: (4,)}, {name: torch.tensor([1])}, provenance=rule).save(tmp_path / "c")
    for path in (statistics, chosen):
        status, output, error = command(capsys, "show", path)
        assert (status, error) == (0, "")
        assert "[2J" in output
        assert all(character.isprintable() or character == "\n" for character in output)
    line = refused(capsys, "show", tmp_path / "\x1b[2J.safetensors")
    assert line.isprintable()


def test_figures_stay_whole_on_a_narrow_terminal(capsys, saved, monkeypatch):
    from rich.console import Console

    from fishkern.report import summarise
    from fishkern.report.tables import summary_table

    console = Console(width=40, soft_wrap=True, force_terminal=False)
    summary = summarise(fk.Statistics.load(saved))
    console.print(summary_table(summary))
    shown = capsys.readouterr().out
    for part in summary.layers.values():
        assert f"{part.coordinates:,}" in shown
        assert f"{part.mean:.1e}" in shown
    assert "…" not in shown


def test_who_stops_reading_is_no_failure(saved):
    """1 would say that something does not hold."""
    import os
    import subprocess
    import sys

    from tests.support.command import ROOT

    reader, writer = os.pipe()
    os.close(reader)
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    code = f"{path}; from fishkern.cli import main; main(['show', {str(saved)!r}])"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.fixture
def measured(tmp_path):
    """Energies of six matrices 4 x 6 whose directions hold powers of two, the up-projections of layer 1 none."""
    tensors = {}
    for n in range(3):
        for module in ("up", "down"):
            name = f"layers.{n}.{module}.weight"
            energy = torch.zeros(4) if (n, module) == (1, "up") else torch.tensor([8.0, 2.0, 4.0, 1.0])
            tensors |= {f"{name}/{part}": energy * 10 for part in ("input", "joint")}
            tensors[f"{name}/output"] = torch.full((4,), 10.0)
            tensors[f"{name}/positions"] = torch.tensor(10.0)
            tensors[f"{name}/matrix"] = torch.tensor([4.0, 6.0, 1.0, 0.5])
            tensors[f"{name}/importance"] = torch.tensor(24.0 * (n + 1))
    definition = {"estimator": "DirectionEnergy", "basis": "svd", "importance": "exact"}
    runs = [{"model": "LlamaForCausalLM", "data": "glue/sst2"}]
    return fk.Energies(tensors, count=7, provenance={"definition": definition, "runs": runs}).save(
        tmp_path / "energies"
    )


def test_factored_statistics_are_shown_by_their_entries(capsys, tmp_path):
    tensors = {f"{name}/positions": torch.tensor(2.0) for name in ("layers.0.up.weight", "layers.1.up.weight")}
    tensors |= {f"layers.{n}.up.weight/rows": torch.full((4,), 2.0 * (n + 1)) for n in range(2)}
    tensors |= {f"layers.{n}.up.weight/columns": torch.tensor([2.0, 4.0, 6.0]) for n in range(2)}
    runs = [{"model": "LlamaForCausalLM", "data": "glue/sst2"}]
    held = fk.FactoredStatistics(tensors, count=7, provenance={"runs": runs})
    path = held.save(tmp_path / "factored")
    status, output, error = command(capsys, "show", path)
    assert (status, error) == (0, "")
    assert all(word in output for word in ("glue/sst2", "2 matrices by their factors", "layer 1", "mean over 7"))
    found = json.loads(command(capsys, "show", path, "--json", "--density", 0.25)[1])
    assert found["parameters"]["layers.1.up.weight"]["sum"] == 4 * 2 * (1 + 2 + 3)
    assert found["whole"]["selected"] == 6


def test_energies_are_shown(capsys, measured):
    status, output, error = command(capsys, "show", measured)
    assert (status, error) == (0, "")
    assert "glue/sst2" in output
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in output.splitlines() if "│" in line}
    assert list(rows) == ["layer 0", "layer 1", "layer 2", "up", "down"]
    # of 8 + 4 + 2 + 1 three directions hold 14, more than nine tenths
    assert [cell.strip() for cell in rows["layer 0"]] == ["2", "8", "3.8e+00", "3.8e+01", "75.0%", "1.0e+00", "0"]
    assert [cell.strip() for cell in rows["up"]] == ["3", "12", "2.5e+00", "2.5e+01", "50.0%", "2.0e+00", "1"]


def test_energies_as_json(capsys, measured):
    found = json.loads(command(capsys, "show", measured, "--json")[1])
    assert found["count"] == 7
    assert found["whole"]["matrices"] == 6
    assert found["whole"]["energy"] == pytest.approx(5 * 15)
    assert found["counts"] == [1, 2, 4]
    assert found["shares"]["up"] == pytest.approx([8 / 15, 12 / 15, 1])  # without the matrix that has none
    assert found["parameters"]["layers.2.down.weight"]["importance"] == pytest.approx(3)


@pytest.fixture
def start_of_adapter(tmp_path):
    """Starts of four modules 5 x 6, of ranks 1 to 4, on weights of norm 10."""
    modules = {}
    for n, rank in enumerate((1, 2, 3, 4)):
        A, B = torch.eye(6)[:rank], torch.eye(5)[:, :rank]
        modules[f"layers.{n // 2}.{('up', 'down')[n % 2]}"] = fk.ModuleInit(A, B, 2.0, torch.arange(rank))
    facts = {path: {"order": "smallest" if "0" in path else "largest", "dead": 1} for path in modules}
    provenance = {"modules": facts, "method": {"name": "FARSS"}, "inputs": {"from": "my-model", "data": "text.jsonl"}}
    init = fk.AdapterInit(modules, digests=dict.fromkeys(modules, (10.0, 1.0)), provenance=provenance)
    return init.save(tmp_path / "adapter_init")


def test_the_start_of_an_adapter_is_shown(capsys, start_of_adapter):
    status, output, error = command(capsys, "show", start_of_adapter)
    assert (status, error) == (0, "")
    assert all(words in output for words in ("FARSS", "my-model", "text.jsonl"))
    ranks, parts = output.split("┏")[1:]
    grid = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
            for line in ranks.splitlines() if "│" in line}  # fmt: skip
    assert grid == {"layer 0": ["1", "2", "1.5"], "layer 1": ["3", "4", "3.5"], "mean": ["2.0", "3.0", "2.5"]}
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
            for line in parts.splitlines() if "│" in line}  # fmt: skip
    # |2 B A| = 2 sqrt(rank): of layer 0 sqrt(4 + 8) on sqrt(200)
    assert rows["layer 0"] == ["2", "1 to 2", "1.5", "33", "0.24", "smallest", "2"]
    assert rows["down"] == ["2", "2 to 4", "3", "66", "0.35", "largest and smallest", "2"]


def test_the_start_of_an_adapter_as_json(capsys, start_of_adapter):
    found = json.loads(command(capsys, "show", start_of_adapter, "--json")[1])
    assert found["method"] == {"name": "FARSS"}
    assert found["parameters"]["layers.1.down.weight"]["rank"] == 4
    whole = {"modules": 4, "rank": 10, "least": 1, "most": 4, "entries": 110, "dead": 4}
    assert {key: found["whole"][key] for key in whole} == whole
    assert found["whole"]["start"] == pytest.approx(4 * 10)


def test_energies_and_starts_are_drawn(capsys, measured, start_of_adapter, tmp_path):
    pytest.importorskip("matplotlib")
    for file in (measured, start_of_adapter):
        assert command(capsys, "show", file, "--plot", tmp_path / "a.png")[0] == 0
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_energies_and_starts_stand_alone(capsys, measured, start_of_adapter, saved):
    for file in (measured, start_of_adapter):
        assert "show it alone" in refused(capsys, "show", file, measured)
        assert "--density" in refused(capsys, "show", file, "--density", 0.1)
    assert "holds energies" in refused(capsys, "show", measured, saved)


def test_energies_that_no_data_have(capsys, tmp_path, measured):
    tensors = {entry: block.read() for entry, block in fk.Energies.load(measured, lazy=True).blocks.items()}
    tensors["layers.2.up.weight/joint"] = torch.tensor([1.0, torch.nan, 0.0, 0.0])
    provenance = fk.Energies.load(measured).provenance
    path = fk.Energies(tensors, count=7, provenance=provenance).save(tmp_path / "nan")
    assert "the energies of layers.2.up.weight are negative or not finite" in refused(capsys, "show", path)


@pytest.mark.parametrize("name", ["ranks.json", "ranks.yaml"])
def test_a_text_is_not_called_damaged(capsys, tmp_path, name):
    (tmp_path / name).write_text("{}")
    status, output, error = command(capsys, "show", tmp_path / name)
    assert (status, output) == (2, "")
    assert f"{name} is a text, which any editor shows: expected statistics, a selection" in " ".join(error.split())


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        (fk.DiagonalFisher().definition, ("Fisher information", "nats² per parameter unit²")),
        ({"estimator": "Saliency", "score": "fisher * weight^2"}, ("fisher * weight^2", "")),
        ({"estimator": "AdamSecondMoment", "unit": "batch"}, ("AdamSecondMoment", "")),
        ({}, ("score", "")),
    ],
)
def test_a_picture_says_what_its_numbers_are(definition, expected):
    assert import_module("fishkern.commands.show")._quantity(definition) == expected
