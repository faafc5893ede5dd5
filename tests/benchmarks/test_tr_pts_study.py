"""The comparison of TR-PTS: equal search, controls of equal size, and figures that mean what they say."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("PIL")
import fishkern as fk
from benchmarks.studies import tr_pts
from benchmarks.studies.comparing.command import LEFT
from benchmarks.studies.comparing.order import shuffled
from benchmarks.studies.comparing.runs import CHOOSING_SEED, FIRST, Step, plan
from benchmarks.studies.tr_pts import arms, controls
from benchmarks.studies.tr_pts.arms import ARMS, whole_of
from benchmarks.studies.tr_pts.log import TrPtsLog
from benchmarks.studies.tr_pts.pictures import Pictures, load
from benchmarks.studies.tr_pts.run import Training, counted, run
from benchmarks.studies.tr_pts.setting import SETTINGS
from fishkern.hosts import is_head

LAYERS, WIDTH, SIZE = 4, 16, 28
FEW = replace(SETTINGS["cifar-84"], size=SIZE, examples=12, choosing=4, scored=8, epochs=1, batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random weights and pictures, in the places where the comparison looks for them; patches have 7 pixels here."""
    import pyarrow
    from PIL import Image
    from pyarrow import parquet
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("data")
    images = folder / "vision" / "cifar10_slice"
    images.mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 10)):
        rows = []
        for _ in range(count):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=draws, dtype=torch.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "png")
            rows.append({"bytes": file.getvalue(), "path": None})
        table = {"img": rows, "label": [n % 10 for n in range(count)]}
        parquet.write_table(pyarrow.table(table), images / f"{part}.parquet")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, mlp_ratio=2, image_size=SIZE, patch_size=7,
        layerscale_value=0.5,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder / "models" / "dinov2_small_focus")
    return folder


@pytest.fixture(scope="module")
def task(data) -> Pictures:
    return Pictures(FEW, data)


def prepared(arm: str, task: Pictures, seed: int = 0) -> arms.Prepared:
    model = task.fresh(seed)
    torch.manual_seed(seed)
    return ARMS[arm].make(model, task, seed)


@pytest.fixture(scope="module")
def selections(task) -> dict[str, fk.Selection]:
    return {arm: prepared(arm, task).selection for arm in ("per-row", "gps", "random", "global", "tr-pts")}


@pytest.fixture(scope="module")
def ours(task) -> fk.TaskRelevance:
    return arms.relevance(task.fresh(0), task, keep=0.7)


def test_sparse_arms_train_the_same_parameters_whole(task, selections):
    """Head and biases of linear maps whole, norms, scales and positions nowhere, and some of each other weight."""
    ranked, whole = arms.parts(task.fresh(0))
    names = {name for name, value in task.fresh(0).named_parameters() if value.requires_grad}
    for arm, selection in selections.items():
        assert set(selection.names) >= names
        for name in names:
            count, size = selection.counts[name], selection.shapes[name].numel()
            if name in whole:
                assert count == size, (arm, name)
            elif name not in ranked:
                assert count == 0, (arm, name)
            elif arm != "global":
                assert 0 < count < size, (arm, name)
    assert {"classifier.weight", "classifier.bias", "dinov2.encoder.layer.0.attention.q_proj.bias"} <= set(whole)
    assert not any("norm" in name or "lambda1" in name or "position" in name for name in [*ranked, *whole])


def test_controls_have_as_many_connections(selections):
    selection, random = selections["tr-pts"], selections["random"]
    assert random.counts == selection.counts
    for name, shape in selection.shapes.items():
        if len(shape) > 1 and selection.counts[name]:
            assert torch.equal(*(each.mask(name).flatten(1).sum(1) for each in (random, selection))), name
    assert random.overlap(selection) < 0.9
    assert controls.same_counts(selection, 1).overlap(random) < 1
    assert selections["global"].count == selection.count


def test_token_reduction_is_elsewhere_in_controls(ours):
    counts = {entry.layer.number: entry.top_count for entry in ours.contributions.layers.values() if entry.layer}
    assert set(counts) == set(range(LAYERS))
    (sparse,), (dense,) = ours.reduction.layers, controls.densest(ours, 0)
    rest = {number: count for number, count in counts.items() if number}
    assert counts[sparse] == min(rest.values())
    assert counts[dense] == max(rest.values())
    drawn = [controls.drawn(ours, seed) for seed in range(30)]
    assert {layer for (layer,) in drawn} == set(rest)
    assert drawn[3] == controls.drawn(ours, 3)


def test_the_sum_of_gradients_is_that_of_all_examples(task):
    model = task.fresh(0)
    sums = arms.summed_gradients(model, task.ranked())
    assert all(value.grad is None for value in model.parameters())
    images = task.train
    logits = model(pixel_values=images.pixels).logits
    torch.nn.functional.cross_entropy(logits, images.labels, reduction="sum").backward()
    assert set(sums) == set(arms.parts(model)[0])
    for name, value in model.named_parameters():
        if name in sums:
            torch.testing.assert_close(sums[name], value.grad.abs(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arm", ["head", "full", "tr-pts-0.7", "lora"])
def test_a_run_trains_what_it_says_and_tells_what_that_took(arm, task, monkeypatch):
    if arm == "lora":
        pytest.importorskip("peft")
    models = []
    measure = task.measure
    monkeypatch.setattr(task, "measure", lambda model, **more: models.append(model) or measure(model, **more))
    measured = run(arm, 1e-3, 0, task, choosing=False, steps=2)
    (model,), start = models, dict(task.fresh(0).named_parameters())
    if arm != "lora":
        moved = sum(int((value != start[name]).sum()) for name, value in model.named_parameters())
        assert 0.5 * measured["trained"] < moved <= measured["trained"]  # what has no gradient stays
    assert measured["of"] == sum(value.numel() for value in start.values())
    assert measured["trained"] == {"head": 2 * WIDTH * 10 + 10}.get(arm, measured["trained"])
    assert set(measured["curve"][0]) == {"step", "score", "nll", "choice"}
    assert measured["flops"]["forward"] < measured["flops"]["step"]
    assert measured["peak_mib"] > 0
    assert measured["state_mib"] * 2**20 >= 2 * 4 * measured["trained"] * 0.99  # two moments of float32
    reducing = measured["reducing"]
    assert (reducing is not None) is (arm == "tr-pts-0.7")
    assert reducing is None or (reducing["keep"] == 0.7 and 0 not in reducing["layers"])


@pytest.mark.parametrize(
    ("arm", "head", "rest"), [("head", 0.5, set()), ("lora", 3e-3, {0.5}), ("per-row", 3e-3, {0.5})]
)
def test_the_classifier_has_a_rate_of_its_own(arm, head, rest, task, monkeypatch):
    if arm == "lora":
        pytest.importorskip("peft")
    rates = {}

    def go(self, batches, steps):
        for group in self.optimizer.param_groups:
            for name, value in self.model.named_parameters():
                if value.requires_grad and any(value is each for each in group["params"]):
                    rates[name] = group["lr"]
        self.seconds_of.append(1.0)
        self.losses.append(1.0)

    monkeypatch.setattr(Training, "go", go)
    run(arm, 0.5, 0, task, choosing=False, steps=1)
    assert {rates[name] for name in rates if "classifier" in name} == {head}
    assert {rates[name] for name in rates if "classifier" not in name} == rest


def test_flops_are_those_of_an_image(task):
    """Matrix products by hand: 2 for each weight of a linear map and token, and those of attention."""
    model = task.fresh(0)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.shape[:1] == (10,))  # the head alone: no backward pass below it
    tokens = 17
    layer = tokens * (4 * WIDTH**2 + 2 * 2 * WIDTH**2) + 2 * tokens**2 * WIDTH
    forward = 2 * (16 * 3 * 7**2 * WIDTH + LAYERS * layer + 2 * WIDTH * 10)
    flops = counted(model, task.batch([0, 1, 2]))
    assert flops["forward"] == forward
    assert flops["step"] == forward + 2 * 2 * WIDTH * 10
    assert all(value.grad is None or not value.grad.any() for value in model.parameters())


def test_accuracy_is_that_of_single_images(task):
    model = task.fresh(0).eval()
    measured = task.measure(model, choosing=False)
    assert model.training  # as it is trained
    images = load(task.folder.parents[1] / "vision" / "cifar10_slice" / "test.parquet", slice(8), SIZE)
    with torch.no_grad():
        alone = [model.eval()(pixel_values=pixels[None]).logits[0] for pixels in images.pixels]
    right = [logits.argmax().item() == label for logits, label in zip(alone, images.labels.tolist(), strict=True)]
    assert measured["score"] == measured["choice"] == sum(right) / 8
    losses = [-logits.double().log_softmax(0)[label] for logits, label in zip(alone, images.labels, strict=True)]
    assert measured["nll"] == pytest.approx(float(sum(losses)) / 8, rel=1e-5)
    assert task.measure(model, choosing=True)["nll"] != measured["nll"]


def test_pictures_are_scaled_and_normalised(tmp_path):
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 51)).save(file, "png")
    table = pyarrow.table({"img": [{"bytes": file.getvalue(), "path": None}] * 2, "label": [3, 7]})
    parquet.write_table(table, tmp_path / "train.parquet")
    images = load(tmp_path / "train.parquet", slice(1, 2), 14)
    assert images.pixels.shape == (1, 3, 14, 14)
    assert images.labels.tolist() == [7]
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(images.pixels[0, :, 5, 5], expected)


def test_rows_are_drawn_anew_in_each_pass():
    steps = shuffled(10, 4, 2, 3)
    assert [len(rows) for rows in steps] == [4, 4, 2] * 2
    passes = [[n for rows in half for n in rows] for half in (steps[:3], steps[3:])]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1]
    assert steps == shuffled(10, 4, 2, 3) != shuffled(10, 4, 2, 4)


def pretend(monkeypatch) -> list[Step]:
    """Runs that take no time; gives the list that they are added to."""
    made: list[Step] = []

    def pretended(arm, lr, seed, task, *, choosing, steps=None):
        assert choosing is (seed == CHOOSING_SEED)
        made.append(Step(arm, lr, seed))
        end = {"step": 1, "score": 0.5 + seed / 1e4, "nll": 1.0, "choice": -abs(lr - 1e-3)}
        sizes = {"trained": 5, "of": 100, "flops": {"forward": 10**9, "step": 3 * 10**9}, "reducing": None}
        costs = dict.fromkeys(
            ("seconds_a_step", "seconds_an_image", "ranking", "seconds", "peak_mib", "state_mib"), 1.0
        )
        return {"curve": [end], "losses": [0.7], **sizes, **costs}

    monkeypatch.setattr(tr_pts, "run", pretended)
    monkeypatch.setattr(tr_pts, "Pictures", lambda *_: object())
    return made


def test_every_arm_is_searched_alike_and_runs_once(tmp_path, monkeypatch, capsys):
    """The first arms first; a second call has nothing to do; without --task no run of the GPU's task is made."""
    given = ["--data", str(tmp_path), "--results", str(tmp_path), "--revision", "some"]
    made = pretend(monkeypatch)
    assert tr_pts.main([*given, "--seconds", "0"]) == LEFT
    assert tr_pts.main(given) == 0
    log = TrPtsLog(tmp_path / "x", "tr-pts", SETTINGS["cifar-84"], "model")
    expected = plan(list(ARMS), log.rates, 3)
    assert [(step.arm, step.seed) for step in made] == [(step.arm, step.seed) for step in expected]
    assert {len(log.rates(arm)) for arm in ARMS} == {3}
    first = {step.arm for step in made[: 6 * FIRST]}
    assert first == {"head", "full", "per-row", "contribution", "tr-pts", "random"}
    chosen = {step.arm: step.lr for step in made if step.seed == 0}
    assert chosen == {arm: 1e-4 if arm == "full" else 1e-3 for arm in ARMS}
    printed = capsys.readouterr().out
    assert f"cifar-84: {len(made)} of {len(made)} runs" in printed
    assert "cifar-224" not in printed
    count = len(made)
    assert tr_pts.main(given) == 0
    assert len(made) == count


def test_an_arm_is_tried_before_the_comparison(data, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SETTINGS, "cifar-84", FEW)
    given = ["--data", str(data), "--results", str(tmp_path), "--dry-run", "--arms", "head", "tr-pts"]
    assert tr_pts.main(given) == 0
    printed = capsys.readouterr().err
    assert "cifar-84: tr-pts: ranking" in printed
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(arms, "relevance", lambda *_, **__: 1 / 0)
    assert tr_pts.main(given) == 1
    assert "tr-pts fails: ZeroDivisionError" in capsys.readouterr().err


def test_every_arm_says_what_it_is(capsys):
    assert tr_pts.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ARMS)
    with pytest.raises(SystemExit):
        tr_pts.main([])
    assert "--data is needed" in capsys.readouterr().err


def test_the_head_is_always_trained(task):
    model = task.fresh(0)
    heads = [name for name, _ in model.named_parameters() if is_head(name)]
    assert heads == ["classifier.weight", "classifier.bias"]
    assert whole_of(model, is_head).count == 2 * WIDTH * 10 + 10
    for arm in ("full", "bitfit", "head-tokens", "dense"):
        counts = prepared(arm, task).selection.counts
        assert all(counts[name] for name in heads), arm
