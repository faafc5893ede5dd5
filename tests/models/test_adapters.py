"""PEFT's adapters are exact, in PEFT's own sense of a gradient (DoRA detaches its norm)."""

from __future__ import annotations

import pytest
import torch

import fishkern as fk
from tests.support import zoo
from tests.support.exactness import assert_exact, paths

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.matrix

CAUSAL = dict(task_type="CAUSAL_LM")
LINEARS = ["q_proj", "v_proj", "down_proj"]


def adapted(base, config) -> zoo.Specimen:
    specimen = base()
    return zoo.Specimen(peft.get_peft_model(specimen.model, config), specimen.batch, specimen.loss)


def away_from_zero(specimen: zoo.Specimen) -> zoo.Specimen:
    """Adapters that start at zero hide half of their gradients."""
    for parameter in specimen.model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return specimen


def lora(**changes):
    return peft.LoraConfig(**{**dict(r=4, target_modules=LINEARS), **CAUSAL, **changes})


CASES = {
    "lora": lambda: away_from_zero(adapted(zoo.llama, lora())),
    "lora-pissa": lambda: adapted(zoo.llama, lora(init_lora_weights="pissa")),
    "lora-embedding": lambda: away_from_zero(adapted(zoo.llama, lora(target_modules=[*LINEARS, "embed_tokens"]))),
    "lora-conv1d": lambda: away_from_zero(
        adapted(zoo.gpt2, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    ),
    "dora": lambda: adapted(zoo.llama, lora(use_dora=True, init_lora_weights="pissa")),
    "ia3": lambda: adapted(
        zoo.llama,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL),
    ),
    "prefix": lambda: adapted(zoo.llama, peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL)),
    "prefix-projection": lambda: adapted(
        zoo.llama,
        peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **CAUSAL),
    ),
    "prompt": lambda: adapted(zoo.llama, peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL)),
    "vera": lambda: away_from_zero(
        adapted(zoo.llama, peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **CAUSAL))
    ),
    "oft": lambda: away_from_zero(
        adapted(zoo.llama, peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj", "o_proj"], **CAUSAL))
    ),
    "modules-to-save": lambda: away_from_zero(
        adapted(
            zoo.bert_classifier,
            lora(target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
        )
    ),
}
FUSED = {"lora", "lora-pissa", "lora-conv1d", "dora", "prefix", "prefix-projection", "modules-to-save"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_equals_the_loop(case, dtype):
    specimen = CASES[case]()
    statistics = assert_exact(specimen, [specimen.batch(3, 7), specimen.batch(2, 6, seed=5)], dtype)
    by_path = paths(statistics)
    assert statistics.keys() == {
        name for name, parameter in specimen.model.named_parameters() if parameter.requires_grad
    }
    if case in FUSED:
        assert by_path.keys() == {"fused", "left out"}


def test_prompt_embeddings_say_that_they_take_the_loop():
    specimen = CASES["prompt"]()
    with pytest.warns(UserWarning, match=r"prompt_encoder\.default\.embedding\.weight"):
        statistics = assert_exact(specimen, [specimen.batch(3, 7)])
    assert paths(statistics)["loop"] == {"prompt_encoder.default.embedding.weight"}


def test_default_lora_start_scores_every_entry_of_A_zero():
    """With ``B = 0`` no gradient reaches ``A``; its layout is never needed, and its score is exactly zero."""
    specimen = adapted(zoo.llama, lora())
    statistics = assert_exact(specimen, [specimen.batch(3, 7), specimen.batch(4, 7, seed=1)])
    for name, value in statistics.items():
        assert value.any() == ("lora_B" in name)


def test_a_gradient_that_shows_up_late():
    """A parameter without a gradient on two examples takes the loop when it gets one, and is then surveyed again."""
    specimen = away_from_zero(adapted(zoo.llama, lora()))
    adapted_linear = specimen.model.base_model.model.model.layers[1].mlp.down_proj

    class Gate(torch.autograd.Function):
        """Passes no gradient for rows that begin with token 0."""

        @staticmethod
        def forward(ctx, value, keep):
            ctx.save_for_backward(keep)
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            (keep,) = ctx.saved_tensors
            return grad * keep[:, None, None], None

    model = specimen.model
    keep: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: keep.append((kwargs["input_ids"][:, 0] > 0).double()), with_kwargs=True
    )
    adapted_linear.register_forward_hook(lambda module, args, output: Gate.apply(output, keep[-1]))
    first, second, third = (specimen.batch(4, 7, seed=seed) for seed in range(3))
    first["input_ids"][:, 0] = 0
    statistics = assert_exact(specimen, [first, second, third])
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    assert statistics[name].any()


def test_a_prefix_that_checkpointing_would_drop_is_refused_by_name():
    """transformers hands no cache to a checkpointed layer, and PEFT's prefix is one."""
    specimen = CASES["prefix"]()
    specimen.model.gradient_checkpointing_enable()
    specimen.model.train()
    with pytest.raises(fk.UnsupportedModuleError, match=r"loses its prefix.*PrefixAdapter"):
        fk.estimate(specimen.model, [specimen.batch()])
    with pytest.raises(fk.UnsupportedModuleError, match="loses its prefix"):
        fk.fish_tuning(specimen.model, [], k=5, order="magnitude")
    specimen.model.eval()
    assert_exact(specimen, [specimen.batch()])
    selection = fk.fish_tuning(specimen.model, [], k=5, order="magnitude")
    fk.MaskedAdamW(specimen.model, selection, lr=1e-3)
    specimen.model.train()
    with pytest.raises(fk.UnsupportedModuleError, match="loses its prefix"):
        fk.MaskedAdamW(specimen.model, selection, lr=1e-3)


@pytest.mark.parametrize("family", [zoo.modernbert, zoo.deberta])
def test_a_prefix_that_the_model_would_not_see_is_refused_by_name(family):
    """PEFT hands it over all the same; ModernBERT's forward swallows it without a word."""
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, token_dim=24, num_attention_heads=4, num_layers=2
    )
    specimen = adapted(family, config)
    message = rf"{type(specimen.model.get_base_model()).__name__} takes no past_key_values.*such as LoRA"
    with pytest.raises(fk.UnsupportedModuleError, match=message):
        fk.estimate(specimen.model, [specimen.batch()])
    for order in ("random", "magnitude"):  # which estimate nothing
        with pytest.raises(fk.UnsupportedModuleError, match=message):
            fk.fish_tuning(specimen.model, [], k=5, order=order)
    trained = {name: p.detach() for name, p in specimen.model.named_parameters() if p.requires_grad}
    selection = fk.select(trained, fk.GlobalTopK(k=5))
    with pytest.raises(fk.UnsupportedModuleError, match=message):
        fk.MaskedAdamW(specimen.model, selection, lr=1e-3)
    bert = adapted(zoo.bert, config)
    assert fk.estimate(bert.model, [bert.batch()])["prompt_encoder.default.embedding.weight"].all()
