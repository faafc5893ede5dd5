"""What is carried to another machine: small, ignored by git, and what the comparisons read there."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from benchmarks.engine import ROOT
from benchmarks.studies import carry


def test_weights_of_32_bits_are_rounded_and_read_as_32(shared_data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shared_data / "models" / "stories260K"
    files = carry.half(source, tmp_path / "half")
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, tmp_path / "half")
    )
    for (name, value), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(value.half().float(), other), name
        assert other.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "half")("once")["input_ids"]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", source)]
    assert sizes[0] < 0.6 * sizes[1]
    assert set(files) == set((tmp_path / "half").iterdir())


def test_weights_of_16_bits_stay_as_they_are(tmp_path):
    from safetensors.torch import load_file, save_file

    values = torch.tensor([3e38, 1e-30, 1.0], dtype=torch.bfloat16)  # of which float16 has only the last
    (tmp_path / "source").mkdir()
    save_file({"a": values, "steps": torch.tensor([3])}, tmp_path / "source" / "model.safetensors")
    save_file({"b": values.float()[2:]}, tmp_path / "source" / "decoder.safetensors")
    carry.half(tmp_path / "source", tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(stored["a"], values)
    assert stored["steps"].dtype == torch.int64
    assert load_file(tmp_path / "half" / "decoder.safetensors")["b"].dtype == torch.float16


def test_weights_that_float16_cannot_hold_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"ok": torch.ones(2), "too large": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^too large of .* no finite values in float16"):
        carry.half(tmp_path, tmp_path / "half")


@pytest.mark.parametrize("name", carry.SETS)
def test_a_set_is_small_and_where_its_comparison_looks(name, shared_data, tmp_path, capsys):
    """MiniLM is in a package that need not be here: another model takes its place, and the true size is added."""
    from safetensors.torch import load_file

    minilm = 22_713_216 * 2 + 2**20  # its values in 16 bits, and its tokenizer
    encoder = shared_data / "models" / "stories260K"
    given = [name, "--data", str(shared_data), "--into", str(tmp_path), "--encoder", str(encoder)]
    assert carry.main(given) == 0
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert f"{size / 2**20:.1f} MiB" in capsys.readouterr().err
    contents = carry.SETS[name]
    assert size + contents.encoder * minilm < carry.MOST
    for model in contents.models:
        assert (tmp_path / name / "models" / model / "config.json").exists()
        source = shared_data / "models" / model.removesuffix(carry.ROUNDED)
        for weights in source.glob("*.safetensors"):
            own, other = (load_file(folder / weights.name) for folder in (source, tmp_path / name / "models" / model))
            assert own.keys() == other.keys()
            assert all(value.element_size() == 2 for value in other.values())
            assert all(torch.equal(value.to(other[key].dtype), other[key]) for key, value in own.items())
    for table in contents.tables:
        for path in (shared_data / table).glob("*.parquet"):
            assert (tmp_path / name / table / path.name).read_bytes() == path.read_bytes()


def test_a_set_that_is_too_large_is_an_error(tmp_path, shared_data, monkeypatch, capsys):
    monkeypatch.setattr(carry, "MOST", 2**20)
    given = ["starts", "--data", str(shared_data), "--into", str(tmp_path)]
    assert carry.main([*given, "--encoder", str(shared_data / "models" / "stories260K")]) == 1
    assert "that is more than 1 MiB" in capsys.readouterr().err


def test_weights_go_only_where_git_does_not_look(tmp_path, capsys):
    with pytest.raises(SystemExit):
        carry.main(["tr-pts", "--data", str(tmp_path), "--into", str(ROOT / "benchmarks" / "results")])
    assert "git does not ignore" in capsys.readouterr().err
    assert carry.ignored(ROOT / "carry")
