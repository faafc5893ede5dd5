"""Masks for PEFT's SHiRA, and a checkpoint whose weights are the Fisher information."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import fishkern as fk
from tests.support import zoo

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from fishkern.integrations.export import LIST, export_fisher  # noqa: E402
from fishkern.integrations.shira import shira_config, shira_selection  # noqa: E402

TARGETS = ("*.q_proj.weight", "*.down_proj.weight")


def llama(**options):
    torch.manual_seed(0)
    return zoo.llama(**options).model.eval()


def fisher_of(model) -> fk.Statistics:
    return fk.estimate(model, [zoo.text_batch(4)])


def test_shira_trains_the_selected_entries_and_no_others(tmp_path):
    model, fisher = llama(), fisher_of(llama())
    selection = shira_selection(fisher, 2, targets=TARGETS)
    for name in selection.names:
        O, I = selection.shapes[name]
        scores = fisher[name].flatten()
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.double().argsort(descending=True, stable=True)[: 2 * (O + I)]] = True
        assert torch.equal(selection.mask(name).flatten(), chosen), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, shira_config(model, selection, task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == selection.count
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**zoo.text_batch(4)).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path)
    logits = adapted(**zoo.text_batch(4)).logits
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(again(**zoo.text_batch(4)).logits, logits)
    merged = dict(adapted.merge_and_unload().named_parameters())
    moved = 0
    for name, value in before.items():
        difference = merged[name].detach() != value
        mask = selection.mask(name) if name in selection else torch.zeros_like(difference)
        assert not (difference & ~mask).any(), name
        moved += int(difference.sum())
    assert moved > 0.9 * selection.count


def test_what_shira_cannot_train():
    model, fisher = llama(), fisher_of(llama())
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        shira_selection(fisher, 0, targets=TARGETS)
    with pytest.raises(ValueError, match=r"r=100 means [\d,]+ entries of model.layers.0"):
        shira_selection(fisher, 100, targets=TARGETS)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(24,\), and SHiRA adapts matrices"):
        shira_selection(fisher, 1, targets="model.norm.weight")
    with pytest.raises(ValueError, match="targets='zzz' matches no name"):
        shira_selection(fisher, 1, targets="zzz")
    with pytest.raises(ValueError, match=r"with one whole r for all, and .* has [\d,]+ selected"):
        shira_config(model, fk.select(fisher, fk.GlobalTopK(density=0.1, never=["*norm*", "*embed*", "lm_head*"])))
    with pytest.raises(ValueError, match=r"and model.embed_tokens.weight is none"):
        shira_config(model, shira_selection(fisher, 1, targets="*embed_tokens*"))
    selection = shira_selection(fisher, 1, targets=TARGETS)
    with pytest.raises(ValueError, match="the selection decides r: leave them out"):
        shira_config(model, selection, r=4)
    with pytest.raises(ValueError, match="the selection selects nothing"):
        shira_config(model, selection - selection)
    config = shira_config(model, selection)
    with pytest.raises(ValueError, match="has the masks of one model"):
        peft.get_peft_model(llama(), config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_the_fisher(tmp_path, tied):
    model = llama(tie_word_embeddings=tied).to(torch.float16 if not tied else torch.float32)
    fisher = fisher_of(llama(tie_word_embeddings=tied))
    part = {name: fisher[name] for name in fisher if "norm" not in name}
    statistics = fk.Statistics(part, count=fisher.count, provenance=fisher.provenance)
    lazy = fk.Statistics.load(statistics.save(tmp_path / "fisher"), lazy=True)
    folder = export_fisher(lazy, model, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in stored.items():
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        expected = fisher[source] if source in part else model.state_dict()[name]
        assert torch.equal(tensor, expected), name
    described = json.loads((folder / LIST).read_text())
    assert set(described["fisher"]) == {name for name in stored if "norm" not in name}
    assert described["definition"] == fisher.provenance["definition"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)  # what SqueezeLLM's reader does
    for name in part:
        assert torch.equal(dict(loaded.named_parameters())[name], fisher[name]), name
        assert fisher[name].any()


def test_what_is_not_exported(tmp_path):
    model, fisher = llama(), fisher_of(llama())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(FileExistsError, match="is there already: name a new or empty folder"):
        export_fisher(fisher, model, tmp_path / "full")
    with pytest.raises(fk.UnsupportedModuleError, match="Linear has no config of transformers"):
        export_fisher(fisher, torch.nn.Linear(1, 1), tmp_path / "out")
    renamed = fisher.rename(lambda name: f"base.{name}")
    with pytest.raises(ValueError, match=r"has no parameter base.model.embed_tokens.weight.*: rename the statistics"):
        export_fisher(renamed, model, tmp_path / "out")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(fk.UnsupportedModuleError, match=r"PeftModel has an adapter of PEFT.*: merge it"):
        export_fisher(fisher, adapted, tmp_path / "out")
    rows = fk.estimate(model, [zoo.text_batch(2)], fk.GroupFisher(by="row"))
    with pytest.raises(ValueError, match=r"hold model.embed_tokens.weight with shape \(41,\), the model has"):
        export_fisher(rows, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
