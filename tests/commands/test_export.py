"""``fishkern export``: whole models out of adapters and deltas, and deltas out of models, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fishkern as fk
from fishkern.integrations.merged import changes, merge_adapter
from tests.support import zoo
from tests.support.command import command, refused


def exported(capsys, *arguments: object) -> dict:
    status, output, error = command(capsys, "export", *arguments, "--json")
    assert status == 0, error
    return json.loads(output)


def test_an_adapter_becomes_a_whole_model(capsys, models, tmp_path):
    result = exported(capsys, models / "lora", "--out", tmp_path / "whole")
    assert result["folder"] == str(tmp_path / "whole")
    base = AutoModelForCausalLM.from_pretrained(models / "llama").eval()
    batch = zoo.text_batch(3)
    plain = base(**batch).logits
    adapted = PeftModel.from_pretrained(base, models / "lora").eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(whole(**batch).logits, adapted(**batch).logits)
    assert not torch.allclose(whole(**batch).logits, plain), "the adapter does something"
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    assert not list((tmp_path / "whole").glob("adapter_*"))


def test_a_delta_there_and_back(capsys, models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    selection = fk.select(dict(model.named_parameters()), fk.GlobalTopK(k=30))
    with torch.no_grad():
        for name in selection.names:
            p = model.get_parameter(name)
            p[selection.mask(name)] += 0.5
        model.model.norm.weight[0] = -0.0
    model.save_pretrained(tmp_path / "trained")
    result = exported(capsys, tmp_path / "trained", "--since", models / "llama", "--out", tmp_path / "delta")
    assert result["changed"] == 31
    delta = fk.Delta.load(result["file"])
    again = AutoModelForCausalLM.from_pretrained(models / "llama")
    fk.apply_delta(again, delta)
    exported(capsys, models / "llama", "--delta", result["file"], "--out", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for name, p in model.named_parameters():
        for other in (again, whole):
            assert torch.equal(other.get_parameter(name).view(torch.int32), p.view(torch.int32)), name


@pytest.mark.parametrize("start", ["pissa", "gaussian"])
def test_an_adapter_becomes_a_plain_lora(capsys, models, tmp_path, start):
    """It gives the trained model's output on the base as it is, without a decomposition at loading."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=start)
    trained = get_peft_model(base, config)
    selection = fk.Selection({name: p.shape for name, p in trained.named_parameters() if p.requires_grad}, {}, whole=[
        name for name, p in trained.named_parameters() if p.requires_grad
    ])  # fmt: skip
    trained.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        for name in selection.names:
            trained.get_parameter(name).add_(0.1)
    file = fk.delta(trained, selection).save(tmp_path / "delta")
    batch, options = zoo.text_batch(3), ["--base", models / "llama", "--lora", "--delta", file]
    result = exported(capsys, tmp_path / "adapter", *options, "--out", tmp_path / "plain")
    assert result["rank"] == (4 if start == "pissa" else 2)
    plain_base = AutoModelForCausalLM.from_pretrained(models / "llama")
    before = {name: p.clone() for name, p in plain_base.named_parameters()}
    plain = PeftModel.from_pretrained(plain_base, tmp_path / "plain")
    assert plain.peft_config["default"].init_lora_weights in (True, "gaussian")
    for name, p in plain.named_parameters():
        if "lora_" not in name:
            bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, before[bare]), "the base is as it was"
    expected = trained.eval()(**batch).logits
    torch.testing.assert_close(plain.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(models / "llama").eval()(**batch).logits, expected)


def test_what_is_no_plain_lora(capsys, models, tmp_path):
    torch.manual_seed(0)
    for name, options in (("dora", {"use_dora": True}), ("random", {"init_lora_weights": "pissa_niter_1"})):
        base = AutoModelForCausalLM.from_pretrained(models / "llama")
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
    capsys.readouterr()
    out = ["--base", models / "llama", "--lora", "--out", tmp_path / "out"]
    assert "an adapter of type DoRA is no plain LoRA" in refused(capsys, "export", tmp_path / "dora", *out)
    assert "is another one each time" in refused(capsys, "export", tmp_path / "random", *out)
    assert "and --lora writes an adapter" in refused(capsys, "export", models / "llama", "--lora", *out[3:])
    line = refused(capsys, "export", models / "llama", "--since", "a", "--lora")
    assert "--lora writes an adapter, and --since" in line
    assert not (tmp_path / "out").exists()


def test_equal_bits_are_equal_and_nothing_else():
    before, model = (torch.nn.Linear(3, 3).requires_grad_(False) for _ in range(2))
    model.load_state_dict(before.state_dict())
    assert changes(model, before).count == 0
    for one in (before, model):
        one.weight[0, 0] = torch.nan
    before.weight[1, 1], model.weight[1, 1] = 0.0, -0.0
    taken = changes(model, before)
    assert taken.selection.indices("weight").tolist() == [4]
    fk.apply_delta(before, taken)
    assert torch.equal(before.weight.view(torch.int32), model.weight.view(torch.int32))


class WithState(torch.nn.Linear):
    """A linear with a buffer, a parameter of integers, and state that is no tensor."""

    def __init__(self, state: dict) -> None:
        super().__init__(2, 2)
        self.state = state
        self.register_buffer("seen", torch.tensor([torch.nan, 1.0]))
        self.levels = torch.nn.Parameter(torch.arange(3), requires_grad=False)

    def get_extra_state(self) -> dict:
        return self.state

    def set_extra_state(self, state: dict) -> None:
        self.state = state


def test_what_no_delta_holds_is_refused_only_if_it_differs():
    before, model = WithState({"scale": 1}), WithState({"scale": 1})
    model.load_state_dict(before.state_dict())
    assert changes(model, before).count == 0
    model.seen[1] = 2
    with pytest.raises(ValueError, match="seen is a buffer or an extra state and differs"):
        changes(model, before)
    model.load_state_dict(before.state_dict())
    model.state = {"scale": 2}
    with pytest.raises(ValueError, match="_extra_state is a buffer or an extra state and differs"):
        changes(model, before)
    model.state = before.state
    model.levels[1] = 7
    with pytest.raises(ValueError, match=r"levels is of torch.int64 and differs, and a delta has floating values"):
        changes(model, before)


@pytest.mark.parametrize("tied_before", [True, False])
def test_models_of_other_ties_have_no_delta(tied_before):
    before, model = (zoo.llama(tie_word_embeddings=tied).model for tied in (tied_before, not tied_before))
    with pytest.raises(ValueError, match="lm_head.weight is tied in one of the models and not in the other"):
        changes(model, before)


def test_what_is_refused(capsys, models, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, tokenizer_name_or_path=None)
    prompted = get_peft_model(base, config)
    with pytest.raises(fk.UnsupportedModuleError, match="PROMPT_TUNING is no change of weights and cannot be merged"):
        merge_adapter(prompted)
    prompted.save_pretrained(tmp_path / "prompt")
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("")
    other = zoo.llama(intermediate_size=24).model
    other.save_pretrained(tmp_path / "other")
    out = ["--out", tmp_path / "out"]
    cases = [
        ((models / "llama", *out), ("is a whole model already", "--since")),
        ((models / "llama", "--delta", "a", "--since", "b", *out), ("--delta", "--since", "one of them")),
        ((models / "lora", "--out", full), ("is there already", "new or empty")),
        ((models / "lora", "--out", tmp_path / "no" / "out"), ("does not exist", "create it")),
        ((models / "bert", "--task", "sequence-classification", "--delta", "a", *out), ("lacks", "random", "--task")),
        ((models / "llama", "--since", tmp_path / "other", "--out", tmp_path / "d"), ("(24, 24)", "a delta is of one")),
        ((models / "llama", "--since", models / "lora", "--out", tmp_path / "d"), ("is an adapter", "--since")),
        ((tmp_path / "prompt", "--base", models / "llama", *out), ("no adapter can be loaded", "prompt learning")),
    ]
    capsys.readouterr()  # what loading has printed
    for arguments, words in cases:
        line = refused(capsys, "export", *arguments)
        assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.tmp"))
    bert = zoo.bert().model
    with pytest.raises(ValueError, match="which one of them lacks: a delta is of one model"):
        changes(base, bert)
