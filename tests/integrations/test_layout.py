"""Patches under the names and at the places of a checkpoint, as save_pretrained writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import fishkern as fk
from fishkern.integrations.layout import checkpoint_layout
from fishkern.selection import CheckpointLayout
from tests.support import zoo
from tests.support.patching import write_patches

SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=30)


def tied() -> nn.Module:
    return zoo.llama(tie_word_embeddings=True).model


def mixtral() -> nn.Module:
    """Its experts are one tensor in the model, and one matrix each in the checkpoint, under other names."""
    return zoo.mixtral().model


def fused() -> nn.Module:
    """Its checkpoint has queries, keys, values and gates in one tensor."""
    if not hasattr(transformers, "HrmTextConfig"):
        pytest.skip("needs a transformers that has HrmText")
    options = dict(num_layers_per_stack=1, head_dim=16, L_cycles=1, H_cycles=1, L_bp_cycles=[1])
    config = transformers.HrmTextConfig(**SIZES | {"num_hidden_layers": 2, "num_attention_heads": 2}, **options)
    return transformers.HrmTextForCausalLM(config)


def renamed() -> nn.Module:
    """Its checkpoint begins ``visual.``, where the model begins ``model.visual.``."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    text = dict(SIZES, num_key_value_heads=2, rope_parameters=rope, bos_token_id=1, eos_token_id=2)
    vision = dict(depth=1, embed_dim=16, hidden_size=24, num_heads=2, mlp_ratio=2, patch_size=4)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def stored(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def some(model: nn.Module, names: Callable[[str], bool] = lambda name: True, seed: int = 0) -> fk.Selection:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters() if names(name)}
    at = {name: torch.randperm(s.numel(), generator=generator)[: max(s.numel() // 40, 1)] for name, s in shapes.items()}
    return fk.Selection(shapes, at)


def moved(model: nn.Module, selection: fk.Selection) -> fk.Delta:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in selection:
                p[selection.mask(name)] += 1 + torch.arange(selection.counts[name]) / 64
    return fk.delta(model, selection)


@pytest.mark.parametrize("make", [tied, mixtral, fused, renamed])
def test_patches_make_the_checkpoint_of_the_trained_model(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    checkpoint, selection = stored(model, tmp_path / "before"), some(model)
    patches = moved(model, selection).patches(checkpoint_layout(model))
    write_patches(checkpoint, patches)
    expected = stored(model, tmp_path / "after")
    assert checkpoint.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint[name], tensor), name
    assert sum(len(one.indices) for one in patches) == selection.count


def test_experts_and_fused_tensors_have_the_names_of_the_checkpoint():
    layout = checkpoint_layout(mixtral())
    assert layout.names["model.layers.0.mlp.gate.weight"] == "model.layers.0.block_sparse_moe.gate.weight"
    assert ("model.layers.0.mlp.experts.gate_up_proj",) in layout.groups
    groups = checkpoint_layout(fused()).groups
    assert {"q_proj", "k_proj", "v_proj", "gate_proj"} in [{name.split(".")[-2] for name in group} for group in groups]


def test_ten_steps_of_experts_in_16_bits(tmp_path):
    """The sampler has the trainer's checkpoint, to the bit, through a change of the selection and files."""
    torch.manual_seed(0)
    specimen = zoo.mixtral()
    model = specimen.model.bfloat16()
    checkpoint = stored(model, tmp_path / "base")
    optimizer = fk.MaskedAdamW(model, some(model), lr=1e-2)
    stream, reader = fk.Delta.stream(model, layout=checkpoint_layout(model)), fk.DeltaReader()
    for number in range(10):
        model(**specimen.batch(seed=number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 5:
            optimizer.reselect(some(model, seed=1))
        update = fk.DeltaUpdate.load(stream.update(optimizer.selection).save(tmp_path / "update"))
        write_patches(checkpoint, reader.patches(update))
        assert (update.entries is None) == (number not in (0, 5))
        for name, tensor in stored(model, tmp_path / "now").items():
            assert torch.equal(checkpoint[name].view(torch.int16), tensor.view(torch.int16)), (number, name)


def test_a_tied_weight_by_either_of_its_names():
    layout = checkpoint_layout(tied())
    assert layout.names["lm_head.weight"] == layout.names["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    shapes = {"lm_head.weight": (zoo.V, 24), "model.embed_tokens.weight": (zoo.V, 24)}
    twice = fk.Selection(shapes, {}, whole=list(shapes))
    with pytest.raises(ValueError, match="lm_head.weight, model.embed_tokens.weight are one tensor model.embed_tokens"):
        fk.Delta.stream(tied(), layout=layout).update(twice)


def test_prefixes_of_peft_and_wrappers_are_gone(tmp_path):
    torch.manual_seed(0)
    base = zoo.llama().model
    checkpoint = stored(base, tmp_path / "before")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = nn.DataParallel(peft.get_peft_model(base, config))
    layout = checkpoint_layout(model)
    names = {name for name in layout.names if "q_proj" in name or "lm_head" in name or "norm" in name}
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names
    selection = some(model.module, names.__contains__)
    write_patches(checkpoint, moved(model.module, selection).patches(layout))
    trained = {name: dict(model.module.named_parameters())[name] for name in names}
    assert len(trained) == 8
    for name, p in trained.items():
        assert torch.equal(checkpoint[layout.names[name]], p), name
    adapter = some(model.module, lambda name: "lora_A" in name)
    with pytest.raises(
        ValueError, match="lora_A.default.weight.* is in no checkpoint of the model: it is of an adapter: serve"
    ):
        fk.delta(model.module, adapter).patches(layout)


def test_what_is_refused():
    with pytest.raises(fk.UnsupportedModuleError, match="Linear is no model of transformers"):
        checkpoint_layout(nn.Linear(2, 2))
    selection = fk.Selection({"weight": (2, 3)}, {"weight": torch.tensor([1, 4])})
    delta = fk.delta(nn.Linear(3, 2), selection)
    with pytest.raises(ValueError, match="weight is in no checkpoint of the model: the layout is of another model"):
        delta.patches(CheckpointLayout({"bias": "bias"}))
    for spoilt in (lambda t: 2 * t, lambda t: t[:1], lambda t: t.float()):
        layout = CheckpointLayout(
            {}, [("weight",)], lambda tensors, f=spoilt: {"w": f(tensors["weight"])}, {"weight": torch.Size((2, 3))}
        )
        with pytest.raises(ValueError, match="stores weight by more than moving entries"):
            delta.patches(layout)
