"""The same exactness under checkpointing, 16 bits, compilation, and the ways in which modules are shared and reused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fishkern as fk
from tests.support import zoo
from tests.support.exactness import LIMIT, as_dtype, assert_exact, paths
from tests.support.oracle import squares_one_by_one, worst_error

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

ROOT = Path(__file__).resolve().parents[2]


def with_lora(specimen: zoo.Specimen) -> zoo.Specimen:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    return zoo.Specimen(peft.get_peft_model(specimen.model, config), specimen.batch, specimen.loss)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "lora", "vit"])
def test_activation_checkpointing(family, reentrant):
    """A recomputed forward counts once, and no parameter falls to the loop."""
    specimen = with_lora(zoo.llama()) if family == "lora" else zoo.FAMILIES[family]()
    batch = as_dtype(specimen.batch(3, 7), torch.float64)
    without = fk.estimate(specimen.model.double(), [batch])
    specimen.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    specimen.model.train()
    statistics = assert_exact(specimen, [batch])
    assert "loop" not in paths(statistics)
    error, name = worst_error(statistics, without, torch.float64)
    assert error < LIMIT[torch.float64], name


def test_checkpointing_stays_on_and_dropout_off():
    """With dropout every batch would be that of another model; without checkpointing it might not fit."""
    specimen = zoo.gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    specimen.model.gradient_checkpointing_enable({"use_reentrant": False})
    specimen.model.train()
    calls = []
    block = specimen.model.transformer.h[0]
    block.attn.register_forward_hook(lambda module, args, output: calls.append((module.training, block.training)))
    assert_exact(specimen, [specimen.batch(3, 7)], check=False)
    survey, estimate = calls[:3], calls[-2 - 3 : -3]
    assert len(survey) == 3  # a forward pass and one recomputation for each of two examples
    assert len(estimate) == 2
    assert not any(training for training, _ in calls[:-3])
    assert specimen.model.training


def assert_at_most_twice_the_loops_error(specimen, batch, autocast=False):
    """The tolerance rule for 16 bits: the error of each parameter against the loop in the same dtype."""
    model = specimen.model

    def loop(model):
        return squares_one_by_one(model, [batch], specimen.loss)

    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, plain = fk.estimate(model, [batch]), loop(model)
    else:
        ours, plain = fk.estimate(model, [batch]), loop(model)
    truth = loop(model.double())
    largest = max(value.max() for value in truth.values())
    for name, true in truth.items():
        scale = true.norm() + 1e-6 * largest
        error, allowed = (ours[name].double() - true).norm() / scale, (plain[name] - true).norm() / scale
        rounding = torch.finfo(torch.bfloat16).eps / 2  # of one number: the model's own noise is not the loop's
        assert error <= 2 * allowed + rounding, f"{name}: {error:.1e}, the loop's {allowed:.1e}"
    return ours


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma", "mixtral"])
def test_bfloat16_weights(family):
    """Nothing is squared or accumulated in 16 bits."""
    specimen = zoo.mixtral("grouped_mm") if family == "mixtral" else zoo.FAMILIES[family]()
    specimen.model.bfloat16()
    if family == "mixtral":
        specimen.model.set_experts_implementation("eager")
    ours = assert_at_most_twice_the_loops_error(specimen, specimen.batch(5, 7))
    assert all(value.dtype == torch.float32 for value in ours.values())
    assert "loop" not in paths(ours)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_autocast(family):
    specimen = zoo.FAMILIES[family]()
    ours = assert_at_most_twice_the_loops_error(specimen, specimen.batch(5, 7), autocast=True)
    assert "loop" not in paths(ours)


@pytest.mark.slow
def test_a_model_that_was_compiled_and_run_before():
    specimen = zoo.llama()
    specimen.model.double()
    specimen.model.model.layers[0].compile(backend="eager")
    batch = specimen.batch(3, 7)
    with torch.no_grad():
        specimen.model(**batch)
    assert_exact(specimen, [batch])
    compiled = torch.compile(specimen.model, backend="eager")
    with torch.no_grad():
        compiled(**batch)
    statistics = fk.estimate(compiled, [batch])
    assert statistics.keys() == dict(specimen.model.named_parameters()).keys()


class Tower(nn.Module):
    """A token model whose middle is given."""

    def __init__(self, middle: nn.Module, D: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.V, D)
        self.middle = middle
        self.head = nn.Linear(D, classes)

    def forward(self, input_ids, **unused):
        return self.head(self.middle(self.embed(input_ids)).mean(1))


def per_row_loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def assert_tower_exact(middle: nn.Module, batch: dict | None = None, **options) -> fk.Statistics:
    batch = zoo.class_batch(5, 7) if batch is None else batch
    specimen = zoo.Specimen(Tower(middle), zoo.class_batch, lambda model, row: per_row_loss(model, row)[0])
    assert_exact(specimen, [batch], torch.float32, likelihood=per_row_loss, **options)
    return assert_exact(specimen, [batch], likelihood=per_row_loss, **options)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)

    def forward(self, x):
        return self.linear(self.norm(torch.tanh(self.linear(self.norm(x)))))


def test_a_module_called_twice():
    assert paths(assert_tower_exact(Twice())).keys() == {"fused"}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return F.relu_(self.b(F.relu_(self.a(x))))


def test_in_place_activations_behind_captured_layers():
    assert paths(assert_tower_exact(InPlace())).keys() == {"fused"}


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12, bias=False) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x).tanh() + self.v(x)


def test_siblings_that_share_one_input():
    """One input is kept for all three, so changing it in place would change the gradients of the others."""
    assert paths(assert_tower_exact(Siblings())).keys() == {"fused"}


def test_layer_norm_without_bias():
    """Its ``bias`` is ``None``, on which a rule that reads it would fail."""
    assert paths(assert_tower_exact(nn.LayerNorm(12, bias=False))).keys() == {"fused"}


class PastItsModule(nn.Module):
    """The second use of the weight calls no module, so no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x):
        return F.linear(self.linear(x).tanh(), self.linear.weight)


def test_a_weight_used_past_its_module():
    with pytest.warns(UserWarning, match=r"middle\.linear\.weight"):
        statistics = assert_tower_exact(PastItsModule())
    assert paths(statistics)["loop"] == {"middle.linear.weight"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*slow exact path")
def test_multi_head_attention(batch_first):
    """Its projections are used by a function, past the modules that hold them."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            y, _ = self.attention(x, x, x, need_weights=False)
            return y if batch_first else y.transpose(0, 1)

    assert paths(assert_tower_exact(Attention()))["fused"] >= {"embed.weight", "head.weight"}


class Core(nn.Module):
    """Calls a module of torch's from the whole model."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(12, 5)

    def forward(self, x):
        x = x if self.core.batch_first else x.transpose(0, 1)
        y, _ = self.core(*[x] * (3 if isinstance(self.core, nn.MultiheadAttention) else 1))
        return self.head(y.mean(1 if self.core.batch_first else 0))


class Output(nn.Module):
    """Following the advice of the message and of docs/layers.md about a recurrent layer."""

    batch_first = True

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x):
        return self.core(x)[0], None


AXIS = "has its examples along the second axis: make it with batch_first=True"
ALONE = "put it into a module that returns its output alone"


@pytest.mark.parametrize(
    ("kind", "size", "batch_first", "advice"),
    [
        *((kind, (12,), True, f"{kind.__name__} also returns .*: {ALONE}") for kind in (nn.RNN, nn.GRU, nn.LSTM)),
        (nn.GRU, (12,), False, f"GRU {AXIS} and {ALONE}"),
        (nn.MultiheadAttention, (3,), False, f"MultiheadAttention {AXIS}"),
        (nn.MultiheadAttention, (3,), True, None),
    ],
)
def test_why_a_fused_function_of_torch_takes_the_loop(kind, size, batch_first, advice):
    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    core, batches = kind(12, *size, batch_first=batch_first), [(torch.randn(4, 7, 12), torch.tensor([0, 1, 2, 3]))]
    if advice:
        with pytest.warns(UserWarning, match=rf"keeps its examples apart \({advice}\)"):
            fk.estimate(Core(core), batches, likelihood=losses)
        core.batch_first = True  # and the advice helps
        core = Output(core) if isinstance(core, nn.RNNBase) else core
    assert paths(fk.estimate(Core(core), batches, likelihood=losses)).keys() == {"fused", "generic"}


class Experts(nn.Module):
    """One linear for each expert, called on the rows routed to it: their number depends on the data."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(12, count)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(count))

    def forward(self, x):
        rows = x.flatten(0, 1)
        choice = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            taken = choice == index
            if taken.any():
                out = out.index_put((taken.nonzero()[:, 0],), expert(rows[taken]))
        return out.unflatten(0, x.shape[:2])


@pytest.mark.parametrize("count", [2, 16])
def test_experts_with_few_tokens_or_none(count):
    """An expert may get tokens of some examples only, or none at all."""
    by_path = paths(assert_tower_exact(Experts(count)))
    assert all("router" in name or "expert" in name for name in by_path.get("generic", set()))


class TiedTo(nn.Module):
    """A weight that two linears and an embedding share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.V, 12)
        self.a, self.b = nn.Linear(12, zoo.V, bias=False), nn.Linear(12, zoo.V, bias=False)
        self.a.weight = self.b.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return (self.a(x).tanh() + self.b(x.cos()))[:, -1, :5]


def test_a_weight_shared_by_three_modules():
    specimen = zoo.Specimen(TiedTo(), zoo.class_batch, lambda model, row: per_row_loss(model, row)[0])
    statistics = assert_exact(specimen, [zoo.class_batch(5, 7)], likelihood=per_row_loss)
    assert paths(statistics) == {"fused": {"embed.weight"}}


def test_padding_row_of_a_tied_embedding():
    """Autograd gives the padding row of the table no gradient; the head gives it one."""
    specimen = zoo.llama(tie_word_embeddings=True, pad_token_id=0)
    assert specimen.model.model.embed_tokens.padding_idx == 0
    assert_exact(specimen, [specimen.batch(4, 7), specimen.batch(3, 5, seed=2)])


def test_where_operations_are_counted():
    """torch's counter hooks the inputs of modules, and lets no gradient be taken at those that are leaves."""
    model, batches = zoo.llama().model, [zoo.text_batch(4, 6), zoo.text_batch(3, 5)]
    with FlopCounterMode(display=False) as counter:
        counted = fk.estimate(model, batches)
    assert counter.get_total_flops() > 0
    assert paths(counted).keys() == {"fused"}
    error, _ = worst_error(counted, {name: one.double() for name, one in fk.estimate(model, batches).items()})
    assert error < 1e-5  # norms are counted by the operations that they consist of


@pytest.mark.slow
def test_where_warnings_are_errors():
    """Torch warns of its own rules when it first loads them, which a process of its own shows."""
    code = """
import torch, warnings
import fishkern as fk
warnings.simplefilter("error")
model = torch.nn.Sequential(torch.nn.RMSNorm(4), torch.nn.Linear(4, 3))
batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
found = fk.estimate(model, [batch], likelihood=fk.Classification())
print(found.coverage["0.weight"].path)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "fused\n", done.stderr
