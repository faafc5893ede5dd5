"""The comparison of freezing: its controls keep what our arm keeps, and its figures are those of single images."""

import pytest
import torch

import fishkern as fk
from benchmarks.plots import freezing as plot
from benchmarks.studies import freezing
from benchmarks.studies.comparing.runs import CHOOSING_SEED, FIRST, Step
from benchmarks.studies.freezing import controls, nuclei
from benchmarks.studies.freezing.arms import ARMS, OURS
from benchmarks.studies.freezing.log import FreezingLog, shock
from benchmarks.studies.freezing.setting import SETTINGS, Setting
from benchmarks.studies.freezing.tasks import Task
from fishkern.freezing import ReferenceRule

SHORT = Setting(
    "short", rates=(0.1,), examples=8, choosing=4, scored=4, shock=4, epochs=1, batch_size=2, every=2, read_every=1
)


class Stack(torch.nn.Module):
    """Three linear layers in a list of layers, after an embedding, before a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(8, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = torch.nn.Linear(4, 8, bias=False)


def control_of(order, kept, model=None, setting=SHORT):
    model = model or Stack()
    pool = {name: value.shape for name, value in model.named_parameters()}
    optimizer = fk.MaskedAdamW(model, fk.Selection(pool, {}, whole=pool), lr=0.1)
    return controls.Control(model, optimizer, Task(setting), 0, kept, order), optimizer


@pytest.mark.parametrize("order", [controls.bottom, controls.largest, controls.drawn, controls.smallest_change])
def test_a_control_keeps_as_many_entries_as_it_is_told(order):
    control, optimizer = control_of(order, [80, 40])
    assert optimizer.selection.count == 32 + 3 * 16 + 32
    assert control.step() is None  # no event
    assert control.step().count == 80
    assert control.step() is None
    assert control.step().count == 40


def test_a_control_stops_what_comes_first_in_its_order():
    control, optimizer = control_of(controls.bottom, [112 - 32 - 16])
    control.step()
    control.step()
    counts = optimizer.selection.counts
    assert counts["embedding.weight"] == 0
    assert counts["layers.0.weight"] == 0
    assert counts["layers.1.weight"] == 16
    assert not control.model.layers[0].weight.requires_grad
    control, optimizer = control_of(controls.largest, [112 - 64])
    control.step()
    control.step()
    assert {name for name, count in optimizer.selection.counts.items() if count} == {
        f"layers.{n}.weight" for n in range(3)
    }


def test_what_moved_least_stops_first():
    model = Stack()
    control, optimizer = control_of(controls.smallest_change, [112 - 16], model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value += 0.1 if name == "layers.1.weight" else 1
    control.step()
    control.step()
    assert optimizer.selection.counts["layers.1.weight"] == 0


def test_a_spared_parameter_never_stops():
    control, optimizer = control_of(controls.drawn, [32], setting=freezing.replace(SHORT, spare=("head*",)))
    control.step()
    control.step()
    assert {name for name, count in optimizer.selection.counts.items() if count} == {"head.weight"}


def test_a_control_follows_our_run_of_the_same_seed_and_rate(tmp_path):
    log = FreezingLog(tmp_path / "freezing.jsonl", "freezing", SETTINGS["minilm-sst2"], "MiniLM")
    with pytest.raises(LookupError, match="run that with seed 1000 first"):
        log.kept(2e-5, CHOOSING_SEED)
    for n, lr in enumerate(log.setting.rates):
        record = {"curve": [{"step": 1, "choice": float(n), "nll": 1.0}], "events": [{"kept": 10 + n}, {"kept": n}]}
        log.append(Step(OURS, lr, CHOOSING_SEED), record)
    assert log.kept(2e-5, CHOOSING_SEED) == [10, 0]
    log.append(Step(OURS, 2e-4, 0), {"curve": [], "events": [{"kept": 7}]})  # the rate that it has chosen
    assert log.kept(2e-5, 0) == [7]


def test_the_shock_is_the_worst_fall_of_a_run():
    first = [{"before": 0.9, "after": 0.8}, {"before": 0.8, "after": 0.5}, {"before": 0.9, "after": None}]
    assert shock([{"events": first}, {"events": [{"before": 0.5, "after": 0.6}]}]) == pytest.approx((0.3 - 0.1) / 2)


def test_controls_come_after_the_arm_that_they_follow():
    names = list(ARMS)
    assert all(names.index(name) > names.index(OURS) for name, arm in ARMS.items() if arm.follows)
    assert {"none", OURS, "reference", "reference-1.3", "random", "bottom"} == set(names[:FIRST])


def test_the_published_arms_have_the_published_rule(monkeypatch):
    """Without the limits of ours, which would keep most of the model."""
    given = {}
    monkeypatch.setattr(fk, "fisher_adaptune", lambda *_, **options: given.update(options))
    for name, margin in (("reference", 1.0), ("reference-1.3", -1.3)):
        ARMS[name].make(Stack(), Task(SHORT), None, 0, ())
        assert given["rule"] == ReferenceRule(margin)
        assert given["rule"].most is None
        assert given["compat"] == "reference"


def test_dice_is_that_of_each_image():
    found = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(nuclei.dice(found, masks), torch.tensor([3 / 4, 1.0]))


def test_shifts_of_images():
    pixels = torch.zeros(1, 3, 5, 5)
    pixels[:, :, 2, 2] = 0.9
    assert torch.equal(nuclei.shifted(pixels, "inverted"), 1 - pixels)
    blurred = nuclei.shifted(pixels, "blurred")
    assert blurred[0, 0, 1:4, 1:4] == pytest.approx(torch.full((3, 3), 0.1))
    assert blurred.sum() == pytest.approx(3 * 0.9)
    noisy = nuclei.shifted(pixels, "noisy")
    assert torch.equal(noisy, nuclei.shifted(pixels, "noisy"))
    assert not torch.equal(noisy, pixels)
    assert noisy.min() >= 0


def ran(arm: str, seed: int, score: float, kept: tuple[int, int] = (100, 100), shifts: bool = False) -> dict:
    """A record of a run with two events, at each of which a hundredth is lost."""
    around = {"before": score, "after": score - 0.01}
    events = [{"step": 10 * (n + 1), "kept": count, "peak_mib": 4.0 - n, **around} for n, count in enumerate(kept)]
    last = {"score": score, **(dict.fromkeys(plot.SHIFTS, score / 2) if shifts else {})}
    about = {"quantity": "run", "setting": {"task": "nuclei" if shifts else "sst2"}, "model": "small", "arm": arm}
    origin = {"machine": "some-cpu", "commit": "abcdef0123", "dirty": False, "time": "2026-01-02T03:04:05+00:00"}
    return {**about, "lr": 0.1, "seed": seed, "curve": [last], "events": events, "trained": 100, **origin}


def test_the_picture_shows_what_is_recorded():
    pytest.importorskip("matplotlib")
    runs = [ran("none", seed, 0.8) for seed in (0, 1)] + [ran(OURS, seed, 0.7, (75, 50 - 20 * seed)) for seed in (0, 1)]
    assert plot.in_training(runs) == {"none": [(0, 1), (10, 1), (20, 1)], OURS: [(0, 1), (10, 0.75), (20, 0.4)]}
    assert plot.around_events(runs)[OURS] == pytest.approx([-0.01] * 4)
    assert plot.peaks(runs)[OURS] == [3.0, 3.0]
    others = [ran(arm, 0, 0.6, shifts=True) for arm in ("none", "bottom")]
    assert plot.shifted(others) == {"none": [pytest.approx(0.3)], "bottom": [pytest.approx(0.3)]}
    figure = plot.draw([*runs, ran(OURS, CHOOSING_SEED, 0.99), *others])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "sst2: score"
    assert titles[5] == "nuclei: score"
    places = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert 0.99 not in places
    assert places[:2] == [0.8, 0.8]


def test_every_arm_has_a_colour():
    assert plot.COLOURS.keys() == ARMS.keys()
