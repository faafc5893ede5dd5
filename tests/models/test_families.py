"""Every family of models is exact: equal to a batch-size-1 loop in float64, parameter by parameter."""

from __future__ import annotations

import pytest
import torch

import fishkern as fk
from tests.support import zoo
from tests.support.exactness import LIMIT, as_dtype, assert_exact, paths
from tests.support.oracle import squares_one_by_one, worst_error

pytest.importorskip("transformers")

pytestmark = pytest.mark.matrix

# parameters of modules without a rule, which take a slower exact path
GENERIC = {
    "gemma3": set(),
    "opt": {"model.decoder.embed_positions.weight"},
    "t5": {f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")},
    "vit": {"vit.embeddings.position_embeddings"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_equals_the_loop(family, dtype):
    """Among them are tied weights (gemma, gpt2, bert, t5), norms of many names, and fused experts."""
    specimen = zoo.FAMILIES[family]()
    statistics = assert_exact(specimen, [specimen.batch(3, 7), specimen.batch(2, 6, seed=5)], dtype)
    assert sum(covered.numel for covered in statistics.coverage.values()) == sum(
        parameter.numel() for parameter in specimen.model.parameters()
    )
    by_path = paths(statistics)
    assert "loop" not in by_path
    if family not in ("swin", "deberta"):
        assert by_path.get("generic", set()) == GENERIC.get(family, set())


def test_mixtral_with_its_default_experts():
    """Those refuse float64, so the truth comes from the eager ones with the same weights."""
    batch = zoo.text_batch(5, 7)
    model = zoo.mixtral("grouped_mm").model
    truth_model = zoo.mixtral("eager").model
    truth_model.load_state_dict(model.state_dict())
    truth = squares_one_by_one(truth_model.double(), [batch], zoo.mixtral().loss)
    error, name = worst_error(fk.estimate(model, [batch]), truth, torch.float32)
    assert error < 1e-4, name


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_padding(family, pad):
    """Padding has no loss, but its activations are not zero."""
    specimen = zoo.FAMILIES[family]()
    assert_exact(specimen, [specimen.batch(4, 9, pad=pad)])


@pytest.mark.parametrize("sizes", [(1,) * 5, (3, 2), (5,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_batch_sizes(family, sizes):
    """The square of a batch's gradient, or a division by the number of batches, would depend on the sizes."""
    specimen = zoo.FAMILIES[family]()
    whole = specimen.batch(5, 7)
    rows = torch.arange(5).split(list(sizes))
    batches = [{key: value[part] for key, value in whole.items()} for part in rows]
    assert assert_exact(specimen, batches).count == 5


@pytest.mark.parametrize(("N", "T"), [(4, 4), (7, 7), (2, 2), (3, 4)], ids=["N=T=heads", "N=T", "N=T=2", "T=heads"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "opt", "mixtral"])
def test_sizes_that_coincide(family, N, T):
    """An axis that happens to be as long as the batch is not taken for the example axis."""
    specimen = zoo.FAMILIES[family]()
    batch = specimen.batch(N, T, low=2)
    assert_exact(specimen, [batch])


def test_one_token_per_row():
    specimen = zoo.bert()
    batch = zoo.masked_batch(4, 2)
    assert_exact(specimen, [{key: value[:, 1:] for key, value in batch.items() if key != "attention_mask"}])


def test_order_of_the_data():
    specimen = zoo.llama()
    model = specimen.model
    batch = specimen.batch(6, 7)
    shuffled = {key: value[torch.tensor([4, 0, 5, 2, 1, 3])] for key, value in batch.items()}
    one, other = fk.estimate(model, [batch]), fk.estimate(model, [shuffled])
    error, name = worst_error(one, other, torch.float32)
    assert error < LIMIT[torch.float32], name


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_the_same_batches_give_the_same_bits(family):
    specimen = zoo.FAMILIES[family]()
    batches = [as_dtype(specimen.batch(4, 7), torch.float32)]
    one, other = fk.estimate(specimen.model, batches), fk.estimate(specimen.model, batches)
    assert all(torch.equal(one[name], other[name]) for name in one)
