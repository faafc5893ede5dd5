"""The comparison of starts: equal budgets, equal search, runs that go on, controls, and its picture."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
import fishkern as fk
from benchmarks.studies import starts
from benchmarks.studies.comparing.command import LEFT
from benchmarks.studies.comparing.limit import Limit
from benchmarks.studies.comparing.runs import CHOOSING_SEED, FIRST, Step, plan, stages
from benchmarks.studies.starts import controls, informed, statistic, tasks
from benchmarks.studies.starts.arms import ARMS, CLASSES, LANGUAGE
from benchmarks.studies.starts.attach import Factors, adapters_of, attach, targets_of
from benchmarks.studies.starts.data import collated, sentences
from benchmarks.studies.starts.log import StartsLog
from benchmarks.studies.starts.run import run
from benchmarks.studies.starts.setting import SETTINGS

pytestmark = pytest.mark.matrix

ORIGIN = {"machine": "some-cpu", "commit": "abcdef0123", "dirty": False, "time": "2026-01-02T03:04:05+00:00"}
FEW = dict(examples=16, choosing=8, scored=8, batch_size=8, max_length=16, statistic=16, measured=1)


@pytest.fixture(scope="module")
def language(shared_data) -> tasks.Task:
    setting = replace(SETTINGS["stories-sst2"], **FEW, stories=8, story_tokens=16)
    return starts.task_of(setting, shared_data / "glue", llama=shared_data / "models" / "stories260K", encoder=None)


@pytest.fixture(scope="module")
def classes(shared_data, tmp_path_factory) -> tasks.Task:
    """A small BERT with random weights."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    setting = replace(SETTINGS["minilm-sst2"], **FEW)
    return starts.task_of(setting, shared_data / "glue", llama=folder, encoder=lambda: folder)


@pytest.fixture(params=["language", "classes"])
def task(request) -> tasks.Task:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_starts_where_the_model_was_and_trains_as_much_as_the_others(task, arm):
    """Its output at step 0 is the untrained model's, up to rounding; it trains LoRA's number of parameters."""
    if arm == "corda":
        pytest.importorskip("attr")
    measured = run(arm, 1e-3, 0, task, choosing=False, steps=2)
    assert measured["step_0_error"] <= 1e-5 * max(1.0, measured["logits"])
    lora = sum(task.setting.rank * (m.in_features + m.out_features) for m in targets_of(task.fresh(0), task).values())
    head = 0 if task.language else 2 * (32 + 1)
    assert (measured["trained"] == lora + head) is ARMS[arm].equal
    assert all(value is not None for value in measured["curve"][-1].values())


def test_a_start_that_is_not_taken_out_of_the_weights_is_noticed(language, monkeypatch):
    """The planted error of the test above: the same factors, and the weights left as they are."""

    def planted(model, task, seed):
        kept = {path: module.weight.detach().clone() for path, module in targets_of(model, task).items()}
        adapted = attach(model, controls.smallest(targets_of(model, task), task.setting.rank), task)
        for path, layer in adapters_of(adapted).items():
            layer.base_layer.weight.data.copy_(kept[path])
        return adapted

    monkeypatch.setitem(ARMS, "milora", replace(ARMS["milora"], make=planted))
    assert run("milora", 1e-3, 0, language, choosing=False, steps=1)["step_0_error"] > 1e-3


def test_attaching_subtracts_what_the_adapter_adds(language):
    """In float64; a scaling that is not 1, and ranks that differ between paths that end alike."""
    model = language.fresh(0)
    before = {path: module.weight.detach().double().clone() for path, module in targets_of(model, language).items()}
    draws = torch.Generator().manual_seed(0)
    start = {
        path: Factors(
            torch.randn(1 + n % 3, weight.shape[1], generator=draws),
            torch.randn(len(weight), 1 + n % 3, generator=draws),
            scaling=0.25 * (1 + n % 2),
        )
        for n, (path, weight) in enumerate(before.items())
    }
    layers = adapters_of(attach(model, start, language))
    for path, (A, B, scaling) in start.items():
        assert layers[path].r["default"] == len(A)
        residual = before[path] - scaling * B.double() @ A.double()
        torch.testing.assert_close(layers[path].base_layer.weight.double(), residual, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            computed = layers[path](torch.eye(A.shape[1]))
        torch.testing.assert_close(computed.T.double(), before[path], rtol=1e-5, atol=1e-5)
    del start[next(iter(start))]
    with pytest.raises(ValueError, match=r"these differ: model\.layers\.0\.self_attn\.q_proj"):
        attach(language.fresh(0), start, language)


@pytest.mark.parametrize("arms", [LANGUAGE, CLASSES])
@pytest.mark.parametrize("seeds", [2, 5])
def test_every_arm_is_searched_alike(arms, seeds):
    """The same rates on the same seed, the same seeds at the chosen one; the first arms are done before the others."""
    assert set(arms) == set(ARMS)
    rates = (1e-3, 1e-2)
    steps = plan(arms, lambda arm: rates, seeds)
    assert len(steps) == len(set(steps)) == len(arms) * (len(rates) + seeds)
    for arm in arms:
        own = [step for step in steps if step.arm == arm]
        assert own == [*(Step(arm, lr, CHOOSING_SEED) for lr in rates), *(Step(arm, None, n) for n in range(seeds))]
    first, further, late = stages(arms, lambda arm: rates, seeds)
    assert [*first, *further, *late] == steps
    assert {step.arm for step in first} == set(arms[:FIRST])
    assert {step.seed for step in late} == set(range(3, seeds))
    assert not {"random", "lora", "farss"} - set(arms[:FIRST])  # the baseline and a control are among them


@pytest.mark.parametrize(("name", "layers"), [("stories-sst2", 5), ("minilm-sst2", 6)])
def test_the_ranks_of_deep_and_shallow_layers_keep_the_budget(name, layers):
    setting = SETTINGS[name]
    shallow = setting.shallow + 1
    total = shallow * setting.shallow_rank(layers) + (layers - shallow) * setting.deep_rank
    assert total == layers * setting.rank
    assert setting.shallow_rank(layers) < setting.rank < setting.deep_rank


def test_ranks_are_dealt_out_among_equal_shapes():
    shapes = {"a": (4, 4), "b": (4, 4), "c": (8, 4), "d": (8, 4), "e": (8, 4)}
    importances = {"a": 1.0, "b": 3.0, "c": 1.0, "d": 1.0, "e": 100.0}
    rule = informed.WithinShapes(fk.InverseImportance(average=3, most=5), shapes)
    ranks = fk.allocate_ranks(importances, rule)
    assert ranks == {**fk.allocate_ranks({"a": 1.0, "b": 3.0}, rule.rule), "c": 4, "d": 4, "e": 1}
    dealt = [fk.allocate_ranks(importances, replace(rule, dealt=seed)) for seed in range(20)]
    for group in ("ab", "cde"):
        assert all(sorted(map(other.get, group)) == sorted(map(ranks.get, group)) for other in dealt)
    assert len({tuple(other.values()) for other in dealt}) == 6  # 2 ways for the first shape, 3 for the second


def test_random_directions_have_the_sizes_of_the_start():
    draws = torch.Generator().manual_seed(3)
    start = {"a": Factors(torch.randn(3, 7, generator=draws), torch.randn(5, 3, generator=draws), 0.5)}
    A, B, scaling = controls.randomised(start, 1)["a"]
    torch.testing.assert_close(A @ A.T, torch.diag(start["a"].A.norm(dim=1) ** 2))
    torch.testing.assert_close(B.T @ B, torch.diag(start["a"].B.norm(dim=0) ** 2))
    assert scaling == 0.5
    assert not torch.allclose(A, controls.randomised(start, 2)["a"].A)


def test_what_is_forgotten_is_the_divergence_from_the_untrained_model(language):
    """Against float64, position by position; nothing is forgotten before training."""
    base, changed = language.fresh(0), language.fresh(0)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.3)
    assert language.measure(base, choosing=False)["kl"] == 0
    measured = language.measure(changed, choosing=False)
    stories = torch.tensor([row["input_ids"] for row in language.stories])
    with torch.no_grad():
        p, q = (model(stories).logits[:, :-1].double().log_softmax(-1) for model in (base, changed))
    assert measured["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    story_nll = -q.gather(2, stories[:, 1:, None]).mean()
    assert measured["story_nll"] == pytest.approx(float(story_nll), rel=1e-5)
    with torch.no_grad():
        rows = [changed(**collated([row], language=True)).loss * (len(row["input_ids"]) - 1) for row in language.scored]
    tokens = sum(len(row["input_ids"]) - 1 for row in language.scored)
    assert measured["nll"] == pytest.approx(float(sum(rows)) / tokens, rel=1e-5)


def test_rates_are_chosen_on_rows_that_give_no_figure(task):
    ids = [{tuple(row["input_ids"]) for row in rows} for rows in (task.train, task.choosing, task.scored)]
    assert [len(rows) for rows in (task.train, task.choosing, task.scored)] == [16, 8, 8]
    assert not ids[2] & (ids[0] | ids[1])
    model = task.fresh(0)
    assert task.measure(model, choosing=True)["nll"] != task.measure(model, choosing=False)["nll"]


def test_all_arms_of_a_seed_get_the_same_rows(task):
    assert task.steps(3) == task.steps(3) != task.steps(4)
    trained = [row["input_ids"] for batch in task.steps(3) for row in batch]
    assert sorted(trained) == sorted(row["input_ids"] for row in task.train)
    assert task.drawn(3) == task.drawn(3) != task.drawn(4)
    assert all(row in task.train for row in task.drawn(3))


def pretend(monkeypatch, interrupted_after: int | None = None) -> list[Step]:
    """Runs that take no time; gives the list that they are added to."""
    made: list[Step] = []

    def pretended(arm, lr, seed, task, *, choosing, steps=None):
        assert choosing is (seed == CHOOSING_SEED)
        if len(made) == interrupted_after:
            raise KeyboardInterrupt
        made.append(Step(arm, lr, seed))
        best = {"lora": 1e-2}.get(arm, 3e-3)
        return ended(-abs(lr - best), nll=1.0 + abs(lr - best), score=0.5 + seed / 10_000)

    monkeypatch.setattr(starts, "run", pretended)
    monkeypatch.setattr(starts, "task_of", lambda *_, **__: object())
    return made


def ended(choice: float, **figures) -> dict:
    figures = {"nll": 1.0, "kl": 0.1, "story_nll": 1.2, **figures, "choice": choice}
    record = {"curve": [{"step": 1, **figures}], "losses": [0.7, 0.5], "base": None, "trained": 10, "logits": 1.0}
    return {**record, "step_0_error": 0.0, "starting": 0.1, "seconds": 1.0, "measuring": 0.1}


def options(tmp_path, *more: str) -> list[str]:
    return ["--data", str(tmp_path), "--encoder", str(tmp_path), "--results", str(tmp_path), *more]


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    given = options(tmp_path, "--task", "minilm-sst2", "--arms", "farss", "lora", "--seeds", "2")
    rates = SETTINGS["minilm-sst2"].rates
    first = pretend(monkeypatch, interrupted_after=2 * len(rates) + 1)
    with pytest.raises(KeyboardInterrupt):
        starts.main(given)
    second = pretend(monkeypatch)
    assert starts.main(given) == 0
    steps = [step._replace(lr=step.lr or max(rates)) for step in plan(("lora", "farss"), lambda arm: rates, 2)]
    assert [(step.arm, step.seed) for step in first + second] == [(step.arm, step.seed) for step in steps]
    (path,) = tmp_path.glob("*/starts.jsonl")
    assert len(path.read_text().splitlines()) == len(steps)
    printed = capsys.readouterr().out
    assert f"minilm-sst2: {len(steps)} of {len(steps)} runs" in printed
    third = pretend(monkeypatch)
    assert starts.main(given) == 0
    assert not third
    assert capsys.readouterr().out == printed


def test_each_arm_keeps_the_rate_that_was_best_for_it(tmp_path, monkeypatch):
    made = pretend(monkeypatch)
    starts.main(options(tmp_path, "--task", "stories-sst2", "--arms", "farss", "lora", "--seeds", "1"))
    assert {step.arm: step.lr for step in made if step.seed == 0} == {"lora": 1e-2, "farss": 3e-3}


def test_training_that_diverged_is_recorded_and_not_chosen(tmp_path):
    log = StartsLog(tmp_path / "starts.jsonl", "starts", SETTINGS["minilm-sst2"], "MiniLM")
    small, *larger = log.setting.rates
    log.append(Step("lora", small, CHOOSING_SEED), ended(0.1))
    assert log.best_rate("lora") is None  # not all rates ran
    for lr in larger:
        log.append(Step("lora", lr, CHOOSING_SEED), {**ended(0.0), "curve": [{"step": 1, "choice": None, "nll": None}]})
    assert log.best_rate("lora") == small


def test_of_equal_scores_the_loss_decides(tmp_path):
    """Matthews' correlation is 0 for every classifier that always answers the same."""
    log = StartsLog(tmp_path / "starts.jsonl", "starts", SETTINGS["minilm-cola"], "MiniLM")
    for lr, nll in zip(log.setting.rates, (0.62, 0.61, 0.63), strict=True):
        log.append(Step("lora", lr, CHOOSING_SEED), ended(0.0, nll=nll))
    assert log.best_rate("lora") == log.setting.rates[1]


def test_an_arm_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    made = pretend(monkeypatch)
    pretended = starts.run

    def failing(arm, *arguments, **more):
        if arm == "farss":
            raise RuntimeError("no energy")
        return pretended(arm, *arguments, **more)

    monkeypatch.setattr(starts, "run", failing)
    given = options(tmp_path, "--task", "minilm-cola", "--arms", "farss", "lora", "filet", "--seeds", "1")
    assert starts.main(given) == 1
    assert "minilm-cola: farss fails: RuntimeError: no energy" in capsys.readouterr().err
    assert {step.arm for step in made} == {"lora", "filet"}


def test_no_run_begins_that_may_end_too_late(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    limit = Limit(10)
    for seconds, allowed in ((4, True), (3, True), (0, False)):
        assert limit.allows() is allowed
        with limit.timed():
            now[0] += seconds
    assert limit.reached
    assert Limit(None).allows()
    monkeypatch.undo()
    made = pretend(monkeypatch)
    assert starts.main(options(tmp_path, "--task", "minilm-cola", "--seconds", "-1")) == LEFT
    assert not made


def test_a_rehearsal_takes_a_step_of_each_arm_and_records_nothing(language, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(starts, "task_of", lambda *_, **__: language)
    given = options(tmp_path, "--task", "stories-sst2", "--arms", "lora", "pissa", "--dry-run")
    assert starts.main(given) == 0
    said = capsys.readouterr().err
    assert "stories-sst2: lora: start" in said
    assert "stories-sst2: pissa: start" in said
    assert not list(tmp_path.rglob("*.jsonl"))


def test_overlap_and_correlation():
    sigma = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    energies = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}  # weighted: 16, 18, 12, 4
    other = {"a": torch.tensor([5.0, 1.0, 1.0, 9.0])}  # weighted: 80, 9, 4, 9
    largest, smallest = statistic.CHOICES["farss, deep"], statistic.CHOICES["filet"]
    assert statistic.overlap(energies, energies, sigma, largest, 2) == 1
    assert statistic.overlap(energies, other, sigma, largest, 1) == 0
    assert statistic.overlap(energies, other, sigma, smallest, 2) == 0.5
    assert statistic.spearman({"x": 1.0, "y": 2.0, "z": 9.0}, {"z": 5.0, "x": 0.1, "y": 0.2}) == pytest.approx(1)
    assert statistic.spearman({"x": 1.0, "y": 2.0}, {"x": 2.0, "y": 1.0}) == pytest.approx(-1)


def test_statistics_of_disjoint_sets(language, tmp_path):
    """Four comparisons; what is there is not measured again."""
    log = statistic.log_of(tmp_path / "starts.jsonl", language, "stories260K")
    statistic.complete(language, log, Limit(None), pairs=1, sizes=(4,))
    records = log.find()
    assert len(records) == 4
    for record in records:
        assert all(0 <= value <= 1 for value in record["overlap"].values())
        assert 0 < record["chance"] < 0.5
    statistic.complete(language, log, Limit(-1), pairs=1, sizes=(4,))
    assert len(log.find()) == 4
    assert "padding" in statistic.table(log)


def test_padding_is_in_some_energies(language):
    """In those of all positions of what enters a module; a gradient is 0 there, and so is its product."""
    rows = [{**row, "input_ids": row["input_ids"][:n]} for n, row in zip((4, 9, 15, 16), language.train, strict=False)]
    attended, every = (statistic.estimated(language.fresh(0), language, rows, at) for at in ("attended", "all"))
    for name in attended.joint:
        torch.testing.assert_close(attended.joint[name], every.joint[name], rtol=1e-4, atol=1e-9)
        assert not torch.allclose(attended.kronecker[name], every.kronecker[name], rtol=1e-2, atol=0)


def test_parquet_is_read_without_datasets(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"sentence": ["so it goes ", "no"], "label": [1, 0], "idx": [0, 1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    assert sentences(tmp_path, "train") == (["so it goes", "no"], [1, 0])


def drawn(task: str, arm: str, seed: int, lr: float = 1e-3, **figures) -> dict:
    setting = {"task": task, "stories": 256 if task.startswith("stories") else 0, "epochs": 1, "rates": [1e-3, 1e-2]}
    about = {"study": "starts", "quantity": "run", "setting": setting, "model": "small", "arm": arm}
    return {**about, "seed": seed, "lr": lr, **ended(-0.5, **{"nll": 2.0, "score": 0.8, **figures}), **ORIGIN}


def test_the_picture_shows_each_seed_and_what_was_chosen():
    pytest.importorskip("matplotlib")
    from benchmarks import plots
    from benchmarks.plots import starts as plot

    records = [drawn("minilm-sst2", arm, n, score=0.5 + n / 10 + (arm == "farss") / 100) for arm in ("lora", "farss")
               for n in range(3)]  # fmt: skip
    records += [drawn("minilm-sst2", "lora", CHOOSING_SEED, lr, score=0.9) for lr in (1e-3, 1e-2)]
    records += [drawn("stories-cola", arm, n, kl=n + 1.0) for arm in ("lora", "random") for n in (0, CHOOSING_SEED)]
    compared = {"study": "starts", "quantity": "statistic", "setting": records[0]["setting"], "model": "small"}
    compared |= {"overlap": dict.fromkeys(statistic.CHOICES, 0.7), "importance_spearman": 0.2, "chance": 0.1, "pair": 0}
    records += [
        {**compared, "examples": size, "comparison": comparison, "fisher": "kronecker", **ORIGIN}
        for size in (16, 64)
        for comparison in ("halves", "padding")
    ]
    sst2 = [record for record in records if record["quantity"] == "run" and record["setting"]["task"] == "minilm-sst2"]
    assert plot.finals(sst2, "score") == {"lora": [0.5, 0.6, 0.7], "farss": pytest.approx([0.51, 0.61, 0.71])}
    assert plot.differences(sst2, "score", "lora") == {"farss": pytest.approx([0.01] * 3)}
    assert plot.frontier(sst2, lambda run: run["lr"], lambda run: 1.0) == {"lora": [(1e-3, 1.0), (1e-2, 1.0)]}
    records.append(drawn("minilm-only-rates", "lora", CHOOSING_SEED))
    figure = plots.draw("starts", json.loads(json.dumps(records)))
    titles = " | ".join(axes.get_title(loc="left") for axes in figure.axes)
    assert "minilm-sst2: score" in titles
    assert "only-rates" not in titles
    assert "stories-cola: loss" in titles
    assert "farss, deep: overlap" in titles
    arms = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert {"lora", "farss", "random"} <= set(arms)
    assert "abcdef0" in figure.get_supxlabel()


def test_every_arm_has_a_colour_and_a_line_that_says_what_it_is(capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.plots.starts import COLOURS, FRONTIER

    assert COLOURS.keys() == ARMS.keys() >= set(FRONTIER)
    assert starts.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ARMS)
