"""Every figure on the page of measurements, and of what other pages say was measured, is in a committed record."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev

import pytest

from benchmarks.studies.precision import Setting, needed

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
PROVIDERS = ("fishkern", "one_by_one", "vmap_grad")
# What differed from the commit was the file of records alone, to which the comparison itself had added its first ones.
# That counted as a change of the sources then.
ADDED_RECORDS = {("starts", "5df9d9d1cc588e58434b88fb188253cc5e64eec3")}


@cache
def records(name: str) -> list[dict]:
    path = ROOT / "benchmarks" / "results" / "cpu-2-cores" / f"{name}.jsonl"
    committed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(record["dirty"] is False or (name, record["commit"]) in ADDED_RECORDS for record in committed)
    return committed


def text_of(section: str, level: str = "## ") -> str:
    """The text below a heading, up to the next one of its level or above."""
    return re.search(rf"^{level}{section}$(.*?)(^#{{2,{len(level) - 1}}} |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def rows_of(section: str, level: str = "## ") -> list[list[str]]:
    """The cells of every table row of a subsection, without the heads."""
    lines = text_of(section, level).splitlines()
    heads = {n - 1 for n, line in enumerate(lines) if line.startswith("|---")}
    rows = [line for n, line in enumerate(lines) if line.startswith("| ") and n not in heads]
    assert rows
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]


OF_LIBRARIES = {"A LLaMA", "A BERT", "Known failures"}
OF_RIVALS = {"Rivals on a LLaMA": "llama", "Rivals on a vision transformer": "vit"}
TABLES = {"Whole pass", *OF_LIBRARIES, "What exactness buys", "FISH-Tuning", "Exact top-k", "Masked steps"}
TABLES |= {*OF_RIVALS, "Sparse fine-tuning of the weights"}


def test_every_table_of_measurements_is_tested():
    """The tests below go through all tables that there are."""
    sections = re.split(r"^###? ", PAGE, flags=re.MULTILINE)
    assert {section.splitlines()[0] for section in sections if "\n|---" in section} == TABLES


@pytest.mark.parametrize("row", rows_of("Whole pass"), ids=lambda row: f"T={row[0]}")
def test_speed_of_the_whole_pass(row):
    matching = [r for r in records("whole_pass") if r["case"]["T"] == int(row[0])]
    seconds = {r["provider"]: r["seconds"]["median"] for r in matching if r["quantity"] == "time"}
    peaks = {r["provider"]: r["peak_mib"] for r in matching if r["quantity"] == "memory"}
    assert row[1:4] == [f"{seconds[name]:.1f} s" for name in PROVIDERS]
    assert row[4:7] == [f"{peaks[name]:.0f} MiB" for name in PROVIDERS]


@pytest.mark.parametrize("row", rows_of("Exact top-k"), ids=lambda row: " ".join(row[:2]))
def test_exact_topk(row):
    n, _, *_, where = row[0].split()
    selected, equal = re.fullmatch(r"([\d.]+)%(?:, ([\d.]+)% zero)?", row[1]).groups("0")
    density, zeros = (round(float(share) / 100, 6) for share in (selected, equal))
    matching = [
        r
        for r in records("streaming_topk")
        if (r["case"]["n"], r["where"]) == (float(n), where)
        and (r["case"]["density"], r["case"].get("zeros", 0.0)) == (density, zeros)
    ]
    assert matching
    assert all(20 <= r["case"]["blocks"] <= 200 for r in matching)
    seconds = {r["provider"]: r["seconds"]["median"] for r in matching if "seconds" in r}
    if where == "memory":
        providers = ("fishkern", "sampled_threshold", "kthvalue", "cat_topk")
        left_out = {r["provider"]: " ".join(r["left out"].split()[:3]) for r in matching if "left out" in r}
        expected = [left_out.get(name) or f"{seconds[name]:.2f} s" for name in providers]
    else:
        (memory,) = (r for r in matching if r["quantity"] == "memory")
        expected = [f"{seconds[name]:.1f} s" for name in ("fishkern", "one_cold_read")]
        expected += [f"{memory['peak_mib'] - memory['indices_mib']:.0f} MiB"]
    assert row[2:] == expected


@pytest.mark.parametrize("row", rows_of("Masked steps"), ids=lambda row: row[0])
def test_masked_steps(row):
    case = {"model": "llama", "density": round(float(row[0].rstrip("%")) / 100, 6)}
    matching = [r for r in records("masked_step") if r["case"] == case]
    times = {r["provider"]: 1000 * r["seconds"]["median"] for r in matching if r["quantity"] == "time"}
    peaks = {r["provider"]: r["peak_mib"] for r in matching if r["quantity"] == "memory"}
    providers = ("fishkern", "six_lines", "masked_fused")
    assert row[1:] == [f"{times[p]:.1f} ms" for p in providers] + [f"{peaks[p]:.0f} MiB" for p in providers]


def test_what_is_said_of_masked_steps():
    """Of what takes less time than ours, all is said, and how much less."""
    times = [r for r in records("masked_step") if r["quantity"] == "time"]
    of = {(r["case"]["model"], r["case"]["density"], r["provider"]): r["seconds"]["median"] for r in times}
    parts = {key: seconds / of[(*key[:2], "fishkern")] for key, seconds in of.items()}
    six = {density: parts["llama", density, "six_lines"] for density in (0.001, 0.005, 0.05, 0.5)}
    fused = {density: parts["llama", density, "masked_fused"] for density in six}
    lora = [parts["lora", density, "six_lines"] for density in six]
    assert [density for density, part in six.items() if part < 1] == [0.05]
    assert [density for density, part in fused.items() if part < 1] == [0.5]
    section = " ".join(text_of("Masked steps").split())
    assert f"At 5 % six lines take {six[0.05]:.2f} of our time" in section
    assert f"at the same four densities, {min(lora):.2f} to {max(lora):.2f};" in section
    assert f"at 50 % masked fused takes {fused[0.5]:.2f}." in section


def test_selection_of_fish_tuning():
    (record,) = records("fish_tuning")
    ours, loop = record["seconds"].values()
    said = f"takes {ours:.1f} s against the loop's {loop:.1f} s, and selects the same entries"
    assert said in " ".join(PAGE.split())
    assert record["overlap"] == 1.0


def test_the_model_of_the_picture():
    """Its size, as the README says it."""
    said = {int(number) for number in re.findall(r"LLaMA of (\d+) million parameters on two", README)}
    assert said == {round(record["weights"] / 1e6) for record in records("demonstration") if "weights" in record}


WAYS = {  # the names of the page by those of the records
    "`fk.estimate`": "fishkern",
    "`fk.estimate(check=False)`": "fishkern_unchecked",
    "batch-size-1 loop": "one_by_one",
    "`torch.func` vmap": "vmap_grad",
    "Opacus": "opacus",
    "BackPACK": "backpack",
    "kronfluence": "kronfluence",
    "nngeometry": "nngeometry",
}


def of_rivals(kind: str, way: str, quantity: str) -> dict[int, dict]:
    """The records of a library by tokens."""
    matching = [
        r for r in records("rivals") if (r["provider"], r["quantity"], r["case"]["kind"]) == (way, quantity, kind)
    ]
    return {record["case"]["T"]: record for record in matching}


@pytest.mark.parametrize(
    ("kind", "row"),
    [(kind, row) for section, kind in (("A LLaMA", "llama"), ("A BERT", "bert")) for row in rows_of(section, "### ")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_other_libraries(kind, row):
    name, *version = row[0].rsplit(" ", 1) if row[0][-1].isdecimal() else [row[0]]
    times, peaks = of_rivals(kind, WAYS[name], "time"), of_rivals(kind, WAYS[name], "memory")
    package = {"BackPACK": "backpack-for-pytorch"}.get(name, WAYS[name])
    assert name.startswith("`fk.") or {*version} == {record[package] for record in times.values() if package in record}
    if "left out" in times[128]:
        assert all("left out" in record for record in (*times.values(), *peaks.values()))
        assert row[1:] == ["raises", *4 * [""]]
        return
    speeds = [f"{times[T]['examples_per_second']:.1f}" for T in (32, 128, 512)]
    memory = f"{peaks[128]['peak_mib']:.0f} MiB" if peaks else ""
    entries = times[128]["coverage"]["entries"]
    covers = "all" if entries == 1 else f"{math.floor(1000 * entries) / 10}%"
    assert row[1:] == [covers, *speeds, memory]


def test_what_is_said_of_other_libraries():
    section = text_of("Other libraries")
    times = [r for r in records("rivals") if r["quantity"] == "time" and "examples" in r]
    counts = {record["examples"] for record in times}
    assert f"passes of {min(counts)} to {max(counts)} examples" in section
    errors = [r["error"] for r in records("rivals") if r["quantity"] == "error" and "error" in r]
    assert f"at most {max(errors):.1e}" in section


@pytest.mark.parametrize("row", rows_of("Known failures", "### "), ids=lambda row: f"{row[0]}, {row[1]}")
def test_known_failures(row):
    library, what, came = row
    name, version = library.rsplit(" ", 1)
    (record,) = (r for r in records("failures") if (r["rival"], r["what"]) == (WAYS[name], what))
    assert (record["version"], record["came"]) == (version, came)
    assert (record["outcome"] in ("wrong", "incomplete"), record["fishkern outcome"]) == (True, "right")


OVERLAPS = {  # the names of the page by those of the study
    "two exact ones, of other examples": "exact, other examples",
    "square of the gradient of 2 examples": "batch gradient, N = 2",
    "square of the gradient of 8 examples": "batch gradient, N = 8",
    "square of the gradient of 32 examples": "batch gradient, N = 32",
    "squares of single positions": "each position squared",
    "random signs, one draw (`fk.SketchedFisher(draws=1)`)": "sketch of 1 draw, N = 32",
    'labels drawn from the model (`"mc"`)': "drawn labels (mc)",
    "sums of squares in bfloat16": "sums in bfloat16, N = 1",
}


def of_exactness(subject: str, examples: int, label: str) -> list[dict]:
    key = (subject, examples, label)
    matching = [r for r in records("exactness") if (r["subject"], r["examples"], r["label"]) == key]
    return sorted(matching, key=lambda record: record["pair"])


def overlaps(subject: str, examples: int, label: str) -> list[float]:
    """With the exact selection of the same examples: of the largest 0.5 %, pair by pair."""
    return [record["top"]["0.005"]["overlap"] for record in of_exactness(subject, examples, label)]


def unseen(subject: str, examples: int, label: str) -> list[float]:
    """The same with that of other examples."""
    return [record["others"]["top"]["0.005"]["overlap"] for record in of_exactness(subject, examples, label)]


@pytest.mark.parametrize("row", rows_of("What exactness buys"), ids=lambda row: row[0])
def test_what_exactness_buys(row):
    columns = [overlaps(*subject, OVERLAPS[row[0]]) for subject in (("cola", 1024), ("sst2", 256))]
    assert row[1:] == [f"{100 * median(values):.1f}%" if values else "-" for values in columns]
    assert all(len(values) in (0, 3) for values in columns)


def test_what_is_said_of_exactness():
    """An estimator is below the noise floor if it overlaps less than any two exact Fishers do."""
    below = {
        (subject, label)
        for subject, examples in (("cola", 1024), ("sst2", 256))
        for label in ("batch gradient, N = 2", "batch gradient, N = 32", "each position squared")
        if max(overlaps(subject, examples, label)) < min(overlaps(subject, examples, "exact, other examples"))
    }
    large = "batch gradient, N = 32"
    assert below == {("cola", large), ("sst2", large), ("cola", "each position squared")}
    for subject, examples in (("cola", 1024), ("sst2", 256)):
        exact, two = (unseen(subject, examples, label) for label in ("exact, other examples", "batch gradient, N = 2"))
        assert all(few < many for few, many in zip(two, exact, strict=True))
        said = f"{100 * median(two):.1f}% against {100 * median(exact):.1f}% on"
        assert said in " ".join(text_of("What exactness buys").split())
    pools = {record["pool"] for record in records("exactness") if record["subject"] == "cola"}
    assert [f"{pool:,} parameters" in text_of("What exactness buys") for pool in pools] == [True]


RIVAL_ARMS = {  # the names of the page by those of the study
    "the exact Fisher": "exact",
    "the same of 32 examples": "few",
    'labels drawn from the model (`"mc"`)': "mc",
    "Adam's second moment": "adam",
    "squared gradients of batches of 8": "batch-8",
    "squared gradients of batches of 32": "batch-32",
    "random signs, one draw": "sketch-1",
    "random signs, eight draws": "sketch-8",
    "diagonal of K-FAC (`fk.DiagonalKronecker`)": "kfac",
    "diagonal of EK-FAC (kronfluence 1.0.1)": "ekfac",
    "1 for all entries": "ones",
    "the exact values, dealt out at random": "random",
}
RIVAL_USES = ("0.1", "0.3", "0.5", "merged", "consolidated")


def rivals_of(model: str, arm: str, quantity: str = "uses") -> list[dict]:
    key = (model, arm, quantity)
    runs = [r for r in records("cheaper_rivals") if (r["setting"]["model"], r["label"], r["quantity"]) == key]
    runs.sort(key=lambda record: record["seed"])
    assert [run["seed"] for run in runs] == [0, 1, 2]
    return runs


def losses(model: str, arm: str, use: str) -> list[float]:
    """By seed: of the first task where it is pruned, else the mean over both tasks."""
    runs = rivals_of(model, arm)
    return [mean(run[use]["scored"]) if use in run else run["pruned"][use] for run in runs]


def losses_more(model: str, arm: str, use: str) -> list[float]:
    """Than with the exact Fisher of the same seed."""
    return [own - exact for own, exact in zip(losses(model, arm, use), losses(model, "exact", use), strict=True)]


@pytest.mark.parametrize(
    ("model", "row"),
    [(model, row) for section, model in OF_RIVALS.items() for row in rows_of(section, "### ")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_cheaper_rivals(model, row):
    arm = RIVAL_ARMS[row[0]]
    runs = rivals_of(model, arm)
    cells = [f"{mean(run['cost'] for run in runs):.1f}"]
    cells += [f"{100 * mean(run['overlap'][top] for run in runs):.0f}%" for top in ("0.005", "0.05")]
    for use in RIVAL_USES:
        more = losses_more(model, arm, use)
        shown = f"{mean(losses(model, arm, use)):.3f}" if arm == "exact" else f"{mean(more):+.3f} ± {stdev(more):.3f}"
        cells.append(shown)
    assert row[1:] == cells


@pytest.mark.parametrize("section", OF_RIVALS)
def test_every_rival_is_shown(section):
    assert [row[0] for row in rows_of(section, "### ")] == list(RIVAL_ARMS)


FISHERS = set(RIVAL_ARMS.values()) - {"exact", "ones", "random"}


def test_what_is_said_of_cheaper_rivals():
    said = " ".join(text_of("Cheaper rivals").split())
    for model in OF_RIVALS.values():
        for top in ("0.005", "0.05"):
            found = {arm: mean(run["overlap"][top] for run in rivals_of(model, arm)) for arm in RIVAL_ARMS.values()}
            assert max(found, key=found.get) == "exact"
            assert set(sorted(found, key=found.get)[-3:]) == {"exact", "mc", "sketch-8"}
            assert found["exact"] - max(found["batch-32"], found["sketch-1"]) > 0.07
    costs = {arm: mean(run["cost"] for run in rivals_of("llama", arm)) for arm in RIVAL_ARMS.values()}
    assert costs["few"] < 1 / 6 < costs["few"] + 0.02
    assert costs["sketch-8"] > 5 * costs["exact"]
    half = {arm: mean(losses_more("llama", arm, "0.5")) for arm in RIVAL_ARMS.values()}
    assert f"by magnitude cost {half['ones']:.2f} more" in said
    assert f"at most {max(half[arm] for arm in FISHERS):.2f} more" in said
    assert mean(losses_more("vit", "ones", "0.5")) <= min(mean(losses_more("vit", arm, "0.5")) for arm in FISHERS)
    for model, plain in (("llama", "for the plain mean of two models"), ("vit", "for the plain mean")):
        most = max(abs(mean(losses_more(model, arm, use))) for arm in FISHERS for use in ("merged", "consolidated"))
        assert f"at most {most:.3f}" in said
        assert f"{mean(losses_more(model, 'ones', 'merged')):.3f} {plain}" in said
    assert max(losses_more("llama", "adam", "consolidated")) < 0
    for model in OF_RIVALS.values():
        kfac, ekfac = (rivals_of(model, arm) for arm in ("kfac", "ekfac"))
        assert all(b["overlap"]["0.005"] > a["overlap"]["0.005"] for a, b in zip(kfac, ekfac, strict=True))
        gains = [mean(losses_more(model, "kfac", u)) - mean(losses_more(model, "ekfac", u)) for u in RIVAL_USES]
        assert max(gains) < 0.006
    at_the_end = [
        arm
        for arm in RIVAL_ARMS.values()
        if sum(run["consolidated"]["weight"] == max(run["setting"]["penalties"]) for run in rivals_of("vit", arm)) >= 2
    ]
    assert at_the_end == [arm for arm in RIVAL_ARMS.values() if arm != "ones"]


CHOOSERS = {
    "the exact Fisher": "exact",
    "the same of 32 examples": "few",
    "squared gradients of batches of 32": "batch-32",
    "random signs, one draw": "sketch-1",
    "magnitude after an approximation of low rank": "lift",
    "weight times the norm of its input": "wanda",
    "magnitude": "magnitude",
    "at random": "random",
    "all of them, for comparison": "whole",
}


def test_sparse_fine_tuning():
    """Three seeds, each at the rate that is best on other rows; a star where that is an end of the grid."""
    rows = rows_of("Sparse fine-tuning of the weights", "### ")
    assert [row[0] for row in rows] == list(CHOOSERS)
    for name, *cells in rows:
        expected = []
        for model in OF_RIVALS.values():
            runs = rivals_of(model, CHOOSERS[name], "sparse")
            scored = [run["scored"][0] for run in runs]
            rates = runs[0]["setting"]["rates"]
            star = "*" if {run["lr"] for run in runs} & {min(rates), max(rates)} else ""
            middle = sorted(run["lr"] for run in runs)[1]
            expected += [f"{mean(scored):.3f} ± {stdev(scored):.3f}", f"{middle:g}{star}"]
        assert cells == expected


def test_what_is_said_of_sparse_fine_tuning():
    """Better or worse than random entries by seeds."""

    def scored(model: str, chooser: str) -> list[float]:
        return [run["scored"][0] for run in rivals_of(model, chooser, "sparse")]

    def seeds_better(model: str, chooser: str) -> int:
        pairs = zip(scored(model, chooser), scored(model, "random"), strict=True)
        return sum(own < other for own, other in pairs)

    better = {(m, chooser): seeds_better(m, chooser) for m in OF_RIVALS.values() for chooser in CHOOSERS.values()}
    assert (better["llama", "batch-32"], better["llama", "exact"]) == (3, 2)
    assert better["llama", "magnitude"] == better["llama", "wanda"] == 0
    assert {c for c in CHOOSERS.values() if c != "random" and better["vit", c]} == {"whole"}
    assert {run["lr"] for run in rivals_of("vit", "random", "sparse")} == {0.1}
    runs = {c: rivals_of("llama", c, "sparse") for c in CHOOSERS.values() if c != "whole"}
    of_llama = [sorted(run["lr"] for run in own)[1] for own in runs.values()]
    assert max(of_llama) / min(of_llama) == pytest.approx(0.1 / 0.003)


def scores(key: str = "score") -> dict[str, list[float]]:
    """Of each arm on SST-2, in the order of the seeds that count."""
    runs = sorted((r for r in records("glue") if r["setting"]["task"] == "sst2"), key=lambda record: record["seed"])
    assert {(r["trained"], r["setting"]["examples"], r["setting"]["epochs"]) for r in runs} == {(5378, 2000, 3)}
    assert {(r["setting"]["layers"], r["setting"]["pool"]) for r in runs} == {(2, 5)}
    arms = dict.fromkeys(record["arm"] for record in runs)
    return {arm: [r[key] for r in runs if r["arm"] == arm and r["seed"] < 5] for arm in arms}


def spread(values: list[float]) -> str:
    assert len(values) == 5
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def better_than(arm: str) -> list[float]:
    by_arm = scores()
    return [fish - own for fish, own in zip(by_arm["fish"], by_arm[arm], strict=True)]


@pytest.mark.parametrize("row", rows_of("FISH-Tuning"), ids=lambda row: row[0])
def test_fish_tuning_against_its_controls(row):
    arm = row[0]
    gap = "" if arm == "fish" else spread(better_than(arm))
    assert row[1:] == [spread(scores()[arm]), gap, f"{median(scores('seconds')[arm]):.0f} s"]


def test_what_is_said_of_fish_tuning():
    """A mean difference beyond its standard deviation is a difference; that of the others is not."""
    beyond = {arm: abs(mean(better_than(arm))) > stdev(better_than(arm)) for arm in scores() if arm != "fish"}
    assert beyond == {"original": True, "random": False, "reverse": False, "magnitude": False}


STARTS = (
    (ROOT / "docs" / "starts.md").read_text(encoding="utf-8").split("## What a start is worth")[1].split("\n## ")[0]
)
ARMS = {
    "LoRA, `B = 0`": "lora",
    "PiSSA": "pissa",
    "FARSS": "farss",
    "FARSS, exact": "farss-exact",
    "FILet": "filet",
    "random directions, sizes and ranks of FARSS": "random",
    "FARSS with its orders exchanged": "reversed",
}
START_COLUMNS = [("minilm-sst2", "score", 100, 1), ("minilm-cola", "score", 100, 1)] + [
    (f"stories-{texts}", key, 1, digits) for texts in ("sst2", "cola") for key, digits in (("nll", 3), ("kl", 2))
]


@pytest.mark.parametrize("row", [line.strip("| ").split(" | ") for line in STARTS.splitlines() if "±" in line])
def test_starts_of_adapters(row):
    """Three seeds of each arm, at the rate that it has chosen."""
    arm = ARMS[row[0]]
    runs = [r for r in records("starts") if r["quantity"] == "run" and r["arm"] == arm and r["seed"] < 3]
    for cell, (task, key, scale, digits) in zip(row[1:], START_COLUMNS, strict=True):
        values = [scale * r["curve"][-1][key] for r in runs if r["setting"]["task"] == task]
        assert cell == (f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) == 3 else "-")


def test_what_is_said_of_the_choice_of_starts():
    of_256 = [r for r in records("starts") if r["quantity"] == "statistic" and r["examples"] == 256]
    of_minilm = [r for r in of_256 if r["setting"]["task"] == "minilm-sst2"]
    shares = []
    for choice in ("farss, deep", "filet"):
        for comparison, fisher in (
            ("halves", "kronecker"), ("halves", "joint"), ("kinds", None), ("padding", "kronecker")
        ):  # fmt: skip
            found = [r for r in of_minilm if (r["comparison"], r["fisher"]) == (comparison, fisher)]
            assert len(found) == 3
            shares.append(f"{100 * mean(r['overlap'][choice] for r in found):.0f} %")
    said = STARTS.split("What the data choose")[1]
    assert re.findall(r"\d+ %", said) == shares


def section_of(page: str, heading: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def cells_of(text: str, head: str) -> list[list[str]]:
    """The rows of the table whose first heading this is."""
    lines = text.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


PRECISION_OF = {"stories260K, CoLA": "cola", "MiniLM, SST-2": "sst2"}


def test_what_promised_overlaps_are_worth():
    """The goals were 3 points for each set, and a stop within 20 % of the examples that are needed."""
    text = section_of("estimating.md", "How many examples are enough")
    rows, late = cells_of(text, "Model, data"), []
    measured = [r for r in records("precision") if r["quantity"] == "overlap"]
    assert len(rows) == len({(r["subject"], r["examples"]) for r in measured})
    for name, examples, *cells in rows:
        own = [r for r in measured if (r["subject"], r["examples"]) == (PRECISION_OF[name], int(examples))]
        shares = [f"{100 * mean(r[key] for r in own):.1f}%" for key in ("promised", "measured")]
        largest = max(abs(100 * (r["promised"] - r["measured"])) for r in own)
        assert largest < 3
        assert cells == [str(len(own)), *shares, f"{largest:.1f} points"]
    said = " ".join(text.split())
    for subject in PRECISION_OF.values():
        own = [r for r in records("precision") if r["subject"] == subject]
        setting = Setting(**own[0]["setting"])
        stops, need = sorted(r["stopped"] for r in own if r["quantity"] == "until"), needed(own, setting)
        listed = f"{', '.join(map(str, stops[:-1]))} and {stops[-1]}"
        assert re.search(
            rf"`until={setting.goal}` [\w\s-]* after {listed}( examples)?, [\w\s]* needs {need:.0f}[;.]", said
        )
        late += [stop / need - 1 for stop in stops]
    assert sum(abs(one) <= 0.2 for one in late) == 7
    assert len(late) == 9
    assert f"the two others were {max(late):.0%} late and {-min(late):.0%} early".replace("%", " %") in said


FREEZING_ARMS = {
    "nothing stops": "none",
    "`fisher_adaptune` (`probe`)": "probe",
    "published, margin 1": "reference",
    "published, margin -1.3": "reference-1.3",
    "slices by chance": "random",
    "bottom layers first": "bottom",
}


FREEZING_TASKS = {  # by the head of the table: the task, and the scores in its columns
    "MiniLM, SST-2, LoRA": ("minilm-sst2-lora", ["score"]),
    "MiniLM, SST-2, all weights": ("minilm-sst2", ["score"]),
    "nuclei, all weights": ("nuclei", ["score", "inverted", "blurred", "noisy"]),
}


def freezing_runs(task: str, arm: str) -> list[dict]:
    """The three seeds of an arm, at the rate that it has chosen."""
    own = [r for r in records("freezing") if (r["setting"]["task"], r["arm"]) == (task, arm) and r["seed"] < 3]
    assert len(own) == 3
    return own


@pytest.mark.parametrize("head", FREEZING_TASKS)
def test_what_freezing_is_worth(head):
    task, scores = FREEZING_TASKS[head]
    rows = cells_of(section_of("freezing.md", "What it is worth"), head)
    assert [row[0] for row in rows] == list(FREEZING_ARMS)
    for name, *cells in rows:
        own = freezing_runs(task, FREEZING_ARMS[name])
        values = [[100 * run["curve"][-1][score] for run in own] for score in scores]
        assert cells == [
            *(f"{mean(each):.1f} ± {stdev(each):.1f}" for each in values),
            f"{100 * mean(run['kept'] / run['trained'] for run in own):.1f} %",
            f"{mean(run['events'][-1]['peak_mib'] for run in own):.1f} MiB",
        ]


def test_what_is_said_of_freezing_nuclei():
    """Every arm is at its smallest rate; the published rule leaves nothing after its first event."""
    runs = {arm: freezing_runs("nuclei", arm) for arm in FREEZING_ARMS.values()}
    assert {run["lr"] for own in runs.values() for run in own} == {min(runs["none"][0]["setting"]["rates"])}
    assert all(event["kept"] < 1e-3 * run["trained"] for run in runs["reference"] for event in run["events"])


TR_PTS_ARMS = {
    "the classifier alone": "head",
    "all parameters": "full",
    "one connection of each neuron": "per-row",
    "TR-PTS's connections, all tokens": "contribution",
    "TR-PTS, keep 0.95 in four layers": "tr-pts",
    "as many of each neuron, by chance": "random",
}


def test_what_tr_pts_is_worth():
    """Three seeds of each arm, at the rate that it has chosen."""
    rows = cells_of(section_of("tr-pts.md", "What it is worth"), "ViT-S, CIFAR-10")
    assert [row[0] for row in rows] == list(TR_PTS_ARMS)
    runs = [r for r in records("tr_pts") if r["setting"]["task"] == "cifar-84" and r["seed"] < 3]
    at_the_edge = set()
    for name, *cells in rows:
        own = [run for run in runs if run["arm"] == TR_PTS_ARMS[name]]
        assert len(own) == 3
        scores = [100 * run["curve"][-1]["score"] for run in own]
        assert cells == [
            f"{mean(scores):.1f} ± {stdev(scores):.1f}",
            f"{100 * mean(run['trained'] / run['of'] for run in own):.2f} %",
            f"{mean(run['flops']['step'] for run in own) / 1e9:.2f}",
            f"{mean(run['peak_mib'] for run in own):.0f} MiB",
        ]
        if any(own[0]["lr"] == max(rates) for rates in own[0]["setting"]["rates"].values() if own[0]["lr"] in rates):
            at_the_edge.add(name)
    assert at_the_edge == set(TR_PTS_ARMS) - {"all parameters", "TR-PTS, keep 0.95 in four layers"}


def test_what_fewer_tokens_save():
    newest = {(r["case"]["size"], r["quantity"]): r for r in records("token_reduction") if r["provider"] == "fishkern"}
    rows = cells_of(section_of("tokens.md", "What it saves"), "images")
    sizes, quantities = {"one": 518, "eight": 224}, {"a forward pass": "forward", "a training step": "training step"}
    assert len(rows) == len(newest) == 4
    for images, of, *cells in rows:
        record = newest[sizes[images.split()[0]], quantities[of]]
        assert cells == [f"{100 * record[saved]:.1f} %" for saved in ("saved_flops", "saved_seconds")]


FROZEN = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}


def test_what_freezing_the_lowest_layers_saves():
    newest = {r["frozen"]: r for r in records("frozen_layers") if r["quantity"] == "layers"}
    rows = cells_of(section_of("freezing.md", "What it saves"), "lowest layers frozen")
    assert [row[0] for row in rows] == list(FROZEN)
    for name, *cells in rows:
        of = newest[FROZEN[name]]
        assert cells == [f"{of[key]:.2f}" for key in ("ratio", "ratio_at_best", "activations_ratio", "flops_ratio")]


def test_what_events_save():
    newest = {r["event"]: r for r in records("frozen_layers") if r["quantity"] == "events"}
    rows = cells_of(section_of("freezing.md", "What it saves"), "what has stopped")
    assert len(rows) == len(newest) == 4
    for number, (_, *cells) in enumerate(rows):
        of = newest[number]
        assert cells == [
            f"{100 * of['entries'] / of['of']:.0f} %",
            f"{1e3 * of['seconds']['median']:.0f} ms",
            f"{of['peak_mib']:.0f} MiB",
            f"{of['state_mib']:.0f} MiB",
        ]


def test_what_an_online_fisher_costs():
    times = {(r["case"]["T"], r["provider"]): r["seconds"]["median"] for r in records("online")}
    ratios = [f"{times[size, 'fishkern'] / times[size, 'step_alone']:.1f}" for size in (16, 64, 256)]
    text = section_of("online.md", "What it costs").replace("\n", " ")
    said = re.search(r"takes ([\d.]+) times as long .* ([\d.]+) times .* ([\d.]+) times", text)
    assert list(said.groups()) == ratios


def test_what_the_usual_top_trains():
    text = (ROOT / "docs" / "tr-pts.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"With the default, 0.2, ([\d.]+) % of a ViT-S train", text)
    runs = [r for r in records("tr_pts") if r["arm"] == "contribution" and r["seed"] == 1000]  # each head has its own
    assert {r["setting"]["top"] for r in runs} == {0.2}
    assert {f"{100 * r['trained'] / r['of']:.2f}" for r in runs} == {said}


def test_what_the_page_on_large_models_measured():
    page = " ".join((ROOT / "docs" / "large-models.md").read_text(encoding="utf-8").split())
    (measured,) = (one for one in records("parts") if one["quantity"] == "memory")
    assert "allocate" in measured["one_pass"]
    assert measured["parameters"] == measured["finite"] >= 3e8
    assert measured["limit_mib"] == pytest.approx(measured["accumulators_mib"] / 2, abs=0.1)
    assert f"a LLaMA of {measured['parameters'] / 1e6:.0f} million parameters" in page
    assert f"in {measured['passes']} passes under a limit of {measured['limit_mib']:.0f} MiB" in page
    assert f"half of the {measured['accumulators_mib']:,.0f} MiB of its sums" in page
    assert f"The plan of the {measured['passes']} passes was {measured['plan_mib']:.0f} MiB" in page
    assert f"resident memory rose by {measured['resident_peak_above_mib']:,.0f} MiB" in page
    (large,) = (one for one in records("parts") if one.get("budget") == "16GiB")
    assert large["plan_mib"] <= large["budget_mib"]
    largest = f"the largest of {large['plan_mib'] / 1024:.1f} GiB"
    assert f"a batch of {large['case']['N'] * large['case']['T']} tokens, 16 GiB above the weights" in page
    assert f"to need {large['passes']} passes, {largest}" in page


def test_what_a_merge_takes():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").replace("\n", " ")
    ours, disk = sorted(records("merging"), key=lambda one: one["provider"] == "disk")
    assert f"Two of {ours['checkpoint_bytes'] / 1e9:.1f} GB with their Fishers" in page
    assert f"took {ours['seconds']['median']:.0f} s and {ours['peak_mib']:.0f} MiB of memory on two cores" in page
    moved = disk["read_bytes"] + disk["written_bytes"]
    assert (ours["read_bytes"], ours["written_bytes"]) == (disk["read_bytes"], disk["written_bytes"])
    assert f"reading and writing the same {moved / 1e9:.1f} GB took {disk['seconds']['median']:.0f} s" in page


def test_what_a_sync_of_weights_takes():
    page = (ROOT / "docs" / "weight-sync.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    cells = {first: others for first, *others in rows}
    of = {(r["provider"], r["lr"]): r for r in records("weight_sync") if r["density"] == 0.005}
    providers = ("fishkern", "snapshot")
    kept = [of[name, 1e-6]["kept_bytes"] for name in providers]
    assert cells["bytes kept for it by the trainer"] == [f"{kept[0] / 1e3:.0f} kB", f"{kept[1] / 1e6:.0f} MB"]
    for lr in (1e-6, 1e-4):
        later = [of[name, lr]["later_bytes"] / 1e3 for name in providers]
        said = [f"{one:.1f} kB" if one < 100 else f"{one:.0f} kB" for one in later]
        assert cells[f"a sync at a learning rate of {lr:.0e}".replace("e-0", "e-")] == said
    first = [of[key]["first_bytes"] / 1e3 for key in (("fishkern", 1e-6), ("snapshot", 1e-6), ("snapshot", 1e-4))]
    assert cells["the first sync"] == [f"{first[0]:.0f} kB", f"{first[1]:.0f} kB, {first[2]:.0f} kB"]
    assert of["fishkern", 1e-4]["first_bytes"] < of["snapshot", 1e-4]["first_bytes"]
    ours, theirs = (of[name, 1e-6] for name in providers)
    behind = ours["first_bytes"] - theirs["first_bytes"]
    assert 50 < behind / (theirs["later_bytes"] - ours["later_bytes"]) < 100
    assert 2 * ours["compared"] == ours["kept_bytes"]
    assert f"LLaMA of {theirs['compared'] / 1e6:.0f} million parameters in 16 bits, 0.5 % trained" in page
