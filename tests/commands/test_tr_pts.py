"""``fishkern tune --method tr-pts`` on folders of images, and what ``fishkern show`` says of its token reduction."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fishkern as fk
from fishkern.tokens import TokenReduction
from tests.commands.test_resuming import assert_same, interrupted  # noqa: F401 - a fixture
from tests.support.command import command, refused

transformers = pytest.importorskip("transformers")

RECIPE = "token_reduction.json"
STEPS = 6  # 12 images, 4 in a batch, 2 epochs


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Folders of classes, four images each to train on and two to measure on."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("test", 2)):
        for number, name in enumerate(("bird", "cat", "ship")):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = torch.randint(256, (16, 16, 3), generator=generator)
                pixels[..., number] //= 2  # so that there is something to learn
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / split / name / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def arguments(models, images) -> list:
    data = ["--data", images, "--eval-split", "test", "--batch-size", 4, "--epochs", 2, "--lr", 1e-2]
    return ["tune", models / "vit", *data, "--method", "tr-pts", "--keep", 0.5, "--token-layers", 0, "--density", 0.1]


@pytest.fixture(scope="module")
def tuned(arguments, tmp_path_factory) -> SimpleNamespace:
    """The folder of a run, and what it has printed."""
    import contextlib
    import io

    from fishkern import cli

    folder, output = tmp_path_factory.mktemp("tuned") / "run", io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in [*arguments, "--out", folder]])
    assert not end.value.code
    return SimpleNamespace(folder=folder, output=output.getvalue())


def test_the_folder_holds_the_delta_and_the_recipe(tuned):
    folder = tuned.folder
    assert {file.name for file in folder.iterdir()} == {
        "delta.safetensors", "report.json", "selection.safetensors", RECIPE
    }  # fmt: skip
    report, relevance = json.loads((folder / "report.json").read_text()), fk.TaskRelevance.load(folder)
    delta = fk.Delta.load(folder / "delta.safetensors")
    assert report["trained"] == relevance.selection.count == delta.count < report["pool"] == report["parameters"]
    assert report["connections"] == relevance.contributions.count
    assert relevance.reduction == TokenReduction([0], keep=0.5)
    assert (report["method"], report["token_layers"], report["keep"]) == ("tr-pts", [0], 0.5)
    assert report["layers"]["vit.layers.0"]["tokens"] == [16, 9], "half of the patches, and the merged one"
    assert report["fisher_samples"] == 1000
    assert report["after"]["loss"] < report["before"]["loss"]
    assert not {"adapter", "order", "k", "events"} & report.keys()


def test_it_says_what_it_has_done(tuned):
    report = json.loads((tuned.folder / "report.json").read_text())
    assert f"trained   {report['trained']:,} of {report['pool']:,} entries of the model" in tuned.output
    assert "tokens    16 of an image, 9 after layer 0, which keeps 50%" in tuned.output
    assert "delta.safetensors, along with selection, token reduction and report" in tuned.output
    lines = [line for line in tuned.output.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == list(report["layers"])
    for line, row in zip(lines, report["layers"].values(), strict=True):
        cells = [cell.strip() for cell in line.split("│")[2:-1]]
        assert cells[:3] == [f"{row['top_count']:,}", f"{row['share']:.1%}", str(row["connections"])]
        assert cells[3:] == [f"{row['selected']:,} of {row['numel']:,}", "16 to 9" if "tokens" in row else ""]


def test_the_printed_line_makes_the_tuned_model(tuned, images):
    """Which gives the loss that the run has measured in the end."""
    from PIL import Image

    line = next(line for line in tuned.output.splitlines() if line.startswith("or in Python:  "))
    scope: dict = {}
    exec(line.removeprefix("or in Python:  "), scope)
    model = scope["model"].eval()
    assert fk.tokens.attached(model) == TokenReduction([0], keep=0.5)
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    files = sorted((images / "test").rglob("*.png"))
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([["bird", "cat", "ship"].index(file.parent.name) for file in files])
    report = json.loads((tuned.folder / "report.json").read_text())
    with torch.no_grad():
        assert model(pixel_values=pixels, labels=labels).loss.item() == pytest.approx(report["after"]["loss"], rel=1e-5)
        fk.tokens.detach(model)
        plain = model(pixel_values=pixels, labels=labels).loss.item()
    assert plain != pytest.approx(report["after"]["loss"], rel=1e-4), "measured with the reduction"


def test_an_interrupted_run_ends_as_a_whole_one(capsys, arguments, interrupted, tuned, tmp_path):  # noqa: F811
    """Its unfinished file holds what trains, and not the model."""
    out = ["--save-every", 0, "--out", tmp_path / "out"]
    interrupted.at = 4
    assert command(capsys, *arguments, *out)[0] == 130
    held = torch.load(tmp_path / "out" / "unfinished.pt", weights_only=True)["state"]
    counts = fk.Selection.load(tmp_path / "out" / "selection.safetensors").counts
    assert {name: value.numel() for name, value in held["values"].items()} == {
        name: count for name, count in counts.items() if count
    }
    assert "not keep 0.9" in refused(capsys, *arguments, "--keep", 0.9, *out)
    interrupted.at, interrupted.steps = None, 4
    status, _, error = command(capsys, *arguments, *out)
    assert "16 of 24 examples seen" in error
    assert (status, interrupted.steps) == (0, STEPS)
    assert_same(tuned.folder, tmp_path / "out")
    assert (tmp_path / "out" / RECIPE).read_bytes() == (tuned.folder / RECIPE).read_bytes()


def test_parameters_alone_on_a_text_model(capsys, models, rows, tmp_path):
    """A model without image tokens says how to go on; without that half it has no recipe."""
    arguments = ["tune", models / "classifier", "--data", rows / "text.jsonl", "--method", "tr-pts", "--epochs", 1]
    line = refused(capsys, *arguments, "--out", tmp_path / "a")
    assert line.endswith("To select parameters alone, give --token-layers none.")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / RECIPE).write_text("of another run")
    status, output, error = command(capsys, *arguments, "--token-layers", "none", "--out", tmp_path / "a")
    assert status == 0, error
    assert not (tmp_path / "a" / RECIPE).exists()
    assert "along with selection and report" in output
    assert "tokens" not in output
    assert "TokenReduction" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--adapter", "lora", "--size", 2],
            "with no adapter: leave out --adapter and --size.",
        ),
        (["--layers", "0"], "leave out --layers."),
        (["--k", 5, "--order", "largest"], "chooses by --top or --density: leave out --k and --order."),
        (["--allow-zeros", "--trainable", 4], "leave out --trainable and --allow-zeros."),
        (["--margin", 1], "with --method tr-pts nothing stops: leave out --margin"),
        (["--top", 0.1], "--top and --density decide the same: give one of them."),
        (["--token-layers", "1-x"], "--token-layers is like 0-4 or 0,2,5, got '1-x'."),
        (["--token-layers", "none"], "--token-layers none keeps all tokens: leave out --keep."),
        (["--keep", 1.5], "--keep must be above 0 and at most 1"),
        (["--token-layers", "7"], "the layers 0 to 1"),
        (["--density", 1e-4], "less than --least-per-row 1 of each row"),
        (["--density", 0.9, "--most-per-row", 2], "are left to choose from with --most-per-row 2 of each row"),
        (["--method", "fish"], "an adapter is trained: leave out --keep and --token-layers, or take --method tr-pts."),
        (["--method", "fisher-adaptune", "--top", 0.1], "leave out --top and --keep and --token-layers, or take"),
    ],
    ids=str,
)
def test_refusals(capsys, arguments, tmp_path, options, message):
    assert message in refused(capsys, *arguments, *options, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_and_what_it_left_are_refused(capsys, models, rows, images, arguments, tmp_path):
    line = refused(
        capsys,
        "tune",
        models / "lora-classifier",
        "--data",
        rows / "text.jsonl",
        "--method",
        "tr-pts",
        "--out",
        tmp_path,
    )
    assert "is an adapter, and --method tr-pts trains the model itself" in line
    (tmp_path / "adapter").mkdir()
    assert "adapter is the adapter of another run" in refused(capsys, *arguments, "--out", tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / RECIPE).touch()
    line = refused(capsys, "tune", models / "vit", "--data", images, "--out", tmp_path / "b")
    assert f"{RECIPE} is the token reduction of another run" in line


def test_a_token_reduction_is_shown(capsys, tuned, models, images, tmp_path):
    file = tuned.folder / RECIPE
    status, output, error = command(capsys, "show", file)
    assert (status, error) == (0, "")
    assert output.strip() == (
        f"{file}: a token reduction in layer 0, which keeps 50% of its image tokens, between attention and MLP; the "
        "others become one token"
    )
    assert json.loads(command(capsys, "show", file, "--json")[1])["layers"] == [0]
    (tmp_path / "mine.json").write_bytes(file.read_bytes())
    assert "a token reduction in layer 0" in command(capsys, "show", tmp_path / "mine.json")[1]
    pytest.importorskip("matplotlib")
    picture = tmp_path / "kept.png"
    shown = [word for name in ("bird/0.png", "cat/1.png") for word in ("--image", images / "test" / name)]
    status, output, error = command(capsys, "show", file, "--model", models / "vit", *shown, "--plot", picture)
    assert status == 0, error
    assert f"with the trained values of {tuned.folder / 'delta.safetensors'}" in error
    assert f"The picture is in {picture}." in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    answer = command(capsys, "show", file, "--model", models / "vit", *shown, "--plot", picture, "--json")[1]
    assert json.loads(answer)["tokens"] == {"0": {"entering": 16, "leaving": 9}}


def test_what_cannot_be_shown(capsys, tuned, models, images, rows, tmp_path):
    file, picture = tuned.folder / RECIPE, ["--plot", tmp_path / "a.png"]
    image = ["--image", images / "test" / "cat" / "0.png"]
    for some in (picture, image, ["--model", models / "vit"], [*image, *picture]):
        assert "give --model, --image and --plot, or none." in refused(capsys, "show", file, *some)
    assert "holds a token reduction: show it alone" in refused(capsys, "show", file, file)
    line = refused(capsys, "show", tuned.folder / "selection.safetensors", *image)
    assert "--image is for a token reduction, and" in line
    for_all = ["--model", models / "vit", *picture]
    assert "is no image that can be read" in refused(capsys, "show", file, "--image", rows / "text.jsonl", *for_all)
    assert "missing.png" in refused(capsys, "show", file, "--image", tmp_path / "missing.png", *for_all)
    changed = transformers.ViTForImageClassification.from_pretrained(models / "vit")
    with torch.no_grad():
        changed.vit.layernorm.weight += 1
    changed.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    line = refused(capsys, "show", file, *image, "--model", tmp_path / "other", *picture)
    assert "the model is not the delta's base" in line
    assert "--no-check" not in line
    assert "copy the token reduction into another folder" in line
    (tmp_path / RECIPE).write_bytes(file.read_bytes()[:-9])
    assert "is damaged" in refused(capsys, "show", tmp_path / RECIPE)
    assert not (tmp_path / "a.png").exists()
