"""Adapters of PEFT as plain LoRAs: what a loader gets on the base as it is."""

from __future__ import annotations

import pytest
import torch

from fishkern.layers import UnsupportedModuleError
from tests.support import zoo

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
write_plain_lora = pytest.importorskip("fishkern.integrations.plain").write_plain_lora

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
TOKENS = torch.arange(1, 13).view(2, 6)


def base(classifier: bool = False):
    torch.manual_seed(3)
    kind = transformers.LlamaForSequenceClassification if classifier else transformers.LlamaForCausalLM
    return kind(transformers.LlamaConfig(**SIZES, num_labels=3)).eval()


def trained(model, **options):
    """An adapter whose every trainable value has moved."""
    torch.manual_seed(4)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
@pytest.mark.parametrize(
    ("classifier", "options"),
    [
        (True, dict(task_type="SEQ_CLS")),
        (False, dict(modules_to_save=["lm_head"])),
        (False, dict(trainable_token_indices=[1, 2])),
    ],
    ids=["classifier", "modules to save", "tokens"],
)
def test_what_is_trained_besides_factors_is_written(classifier, options, start, tmp_path):
    model = trained(base(classifier), target_modules=["q_proj"], init_lora_weights=start, **options)
    rank = write_plain_lora(model, base(classifier), tmp_path)
    assert rank == (4 if start is True else 8)
    loaded = peft.PeftModel.from_pretrained(base(classifier), tmp_path).eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_adapted_experts_are_written_as_they_are(tmp_path):
    targets = dict(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])

    def experts():
        torch.manual_seed(3)
        return zoo.mixtral().model.eval()

    model = trained(experts(), **targets)
    assert write_plain_lora(model, experts(), tmp_path) == 4
    loaded = peft.PeftModel.from_pretrained(experts(), tmp_path).eval()
    batch = zoo.text_batch(2, 5)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["embed_tokens", "q_proj"]), "of an embedding's LoRA .*lora_embedding_A"),
        (dict(target_modules=["q_proj"], bias="lora_only"), "bias='lora_only' and the start 'pissa'"),
        (dict(target_modules=["q_proj"], layer_replication=[[0, 1], [0, 1]]), "layer_replication= repeats layers"),
    ],
)
def test_what_no_plain_lora_holds_is_refused_by_name(options, message, tmp_path):
    model = trained(base(), init_lora_weights="pissa", **options)
    with pytest.raises(UnsupportedModuleError, match=message):
        write_plain_lora(model, base(), tmp_path)
