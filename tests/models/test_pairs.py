"""Examples of several rows: pairs in one forward pass equal a loop over the pairs alone, on the fused path."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.layers import RowOrder
from fishkern.layers.rows import Rows
from tests.support import zoo
from tests.support.oracle import worst_error
from tests.support.pairs import Pair, Wide, collated, interleaved, pairs, rows_alone

transformers = pytest.importorskip("transformers")

# the self-check would mend rows that are joined wrongly by the loop, and the result would be right all the same
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("error:.*take the slow exact path")]

BETA = 0.3

MODELS = {
    "llama": lambda: zoo.llama().model,
    "llama-tied": lambda: zoo.llama(tie_word_embeddings=True).model,
    "qwen3": lambda: zoo.qwen3().model,
    "gpt2": lambda: zoo.gpt2().model,
    "mixtral": lambda: zoo.mixtral().model,
}


def made(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[family]().double().eval()
    if family == "mixtral":
        model.set_experts_implementation("eager")
    return model


def dpo_alone(model: nn.Module, pair: Pair) -> Tensor:
    """Equation 7 of the DPO paper, of one pair alone: each answer in a forward pass of its own, without padding."""
    (chosen, rejected), (reference_chosen, reference_rejected) = rows_alone(model, pair), pair.reference
    return -F.logsigmoid(BETA * ((chosen - rejected) - (reference_chosen - reference_rejected)))


def squares_alone(
    model: nn.Module, data: Sequence[Pair], loss: Callable[[nn.Module, Pair], Tensor] = dpo_alone
) -> dict[str, Tensor]:
    """The oracle: the squared gradient of each pair's own loss by ordinary autograd, in mean."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    total = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in parameters.items()}
    for pair in data:
        grads = torch.autograd.grad(loss(model, pair), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] += grad.double().square() / len(data)
    return total


def row_logps(model: nn.Module, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return (logits.gather(-1, ids[:, 1:, None])[..., 0] * counted[:, 1:]).sum(1)


def losses_of_rows(order: RowOrder) -> Callable[[nn.Module, dict], Tensor]:
    """A user's own loss: one forward pass of the rows of all pairs, in one order or the other."""

    def losses(model: nn.Module, batch: dict) -> Tensor:
        N = len(batch["chosen_ids"])
        entries = []
        for key in ("ids", "mask", "counted"):
            both = torch.cat([batch[f"chosen_{key}"], batch[f"rejected_{key}"]])
            entries.append(both.view(2, N, -1).transpose(0, 1).flatten(0, 1) if order.adjacent else both)
        logps = row_logps(model, *entries)
        chosen, rejected = logps.view(N, 2).mT if order.adjacent else logps.view(2, N)
        return -F.logsigmoid(BETA * ((chosen - rejected) - (batch["reference"][:, 0] - batch["reference"][:, 1])))

    return losses


def of_columns(data: Sequence[Pair]) -> dict[str, Tensor]:
    """Chosen and rejected answers as entries of their own, as a user's loss function takes them."""
    batch = collated(data)
    names = {"ids": "input_ids", "mask": "attention_mask", "counted": "completion_mask"}
    columns = {
        f"{side}_{key}": half
        for key, name in names.items()
        for side, half in zip(("chosen", "rejected"), batch[name].chunk(2), strict=True)
    }
    return {**columns, "reference": torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]], 1)}


HALVES, INTERLEAVED = RowOrder(2, adjacent=False), RowOrder(2, adjacent=True)
ORDERS = pytest.mark.parametrize("order", [HALVES, INTERLEAVED], ids=["halves", "interleaved"])


def paths(statistics: fk.Statistics) -> set[str]:
    return {one.path for one in statistics.coverage.values()}


@ORDERS
@pytest.mark.parametrize("family", MODELS)
def test_a_loss_function_of_rows_equals_the_loop(family, order):
    """With padding, tied heads, positions that all rows share, experts of flattened tokens, and several batches."""
    model, data, losses = made(family), pairs(), losses_of_rows(order)
    batches = [of_columns(data[:5]), of_columns(data[5:])]
    wide = fk.estimate(model, batches, Wide(), likelihood=losses)
    in_float32 = 1e-6 if family == "mixtral" else 1e-10  # its router computes in float32
    assert worst_error(wide, squares_alone(model, data))[0] < in_float32
    statistics = fk.estimate(model, batches, likelihood=losses)
    assert paths(statistics) == {"fused"}
    assert statistics.count == len(data)


@pytest.mark.parametrize("rows", ["halves", "interleaved"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_preference_equals_the_loop(family, rows):
    model, data = made(family), pairs()
    together = interleaved if rows == "interleaved" else collated
    likelihood = fk.Preference(BETA, rows=rows)
    wide = fk.estimate(model, [together(data)], Wide(), likelihood=likelihood)
    in_float32 = 1e-10 if family != "gpt2" else 1e-6
    assert worst_error(wide, squares_alone(model, data))[0] < in_float32
    assert paths(fk.estimate(model, [together(data)], likelihood=likelihood)) == {"fused"}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@ORDERS
def test_under_checkpointing(order, reentrant):
    model, data = made("llama-tied"), pairs()
    truth = squares_alone(model, data)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    wide = fk.estimate(model, [of_columns(data)], Wide(), likelihood=losses_of_rows(order))
    assert worst_error(wide, truth)[0] < 1e-10


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_adapters(kind):
    peft = pytest.importorskip("peft")
    if kind == "vera":
        config = peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"])
    else:
        options = dict(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        config = peft.LoraConfig(**options, use_dora=kind == "dora")
    data, model = pairs(), peft.get_peft_model(made(), config).double()
    for one in model.parameters():
        if one.requires_grad and not bool(one.any()):
            nn.init.normal_(one, std=0.1)
    wide = fk.estimate(model, [collated(data)], Wide(), likelihood=fk.Preference(BETA))
    assert worst_error(wide, squares_alone(model, data))[0] < 1e-10
    found = paths(fk.estimate(model, [collated(data)], likelihood=fk.Preference(BETA)))
    assert "loop" not in found
    assert kind == "vera" or "generic" not in found


def test_prompt_tuning():
    """Its virtual tokens come first; the prompt's own embedding has one row for all, and takes the loop."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    data, model = pairs(), peft.get_peft_model(made(), config).double()
    with pytest.warns(UserWarning, match="1 parameter.*prompt_encoder"):
        wide = fk.estimate(model, [collated(data)], Wide(), likelihood=fk.Preference(BETA))
    assert worst_error(wide, squares_alone(model, data))[0] < 1e-10


def test_batch_size_and_order_change_nothing():
    model, data = made(), pairs()
    likelihood = fk.Preference(BETA)
    truth = squares_alone(model, data)
    divisions = (
        [data],
        [data[::-1]],
        [data[n : n + 1] for n in range(len(data))],  # a plan of lone pairs
        [data[:1], data[1:]],  # and one of several after it
        [data[2:5], data[:2], data[5:]],
    )
    for parts in divisions:
        batches = [collated(part) for part in parts]
        assert worst_error(fk.estimate(model, batches, Wide(), likelihood=likelihood), truth)[0] < 1e-10


def test_rows_as_long_as_there_are_pairs():
    """``[4, 2]`` of two pairs might be ``[T, N]`` of two examples: the batch says that it is not."""
    model, data = made(), pairs(((1, 1, 1), (1, 1, 1), (1, 1, 1)))
    wide = fk.estimate(model, [collated(data)], Wide(), likelihood=fk.Preference(BETA))
    assert worst_error(wide, squares_alone(model, data))[0] < 1e-10


def test_max_examples_cuts_pairs():
    model, data = made(), pairs()
    for rows, together in (("halves", collated), ("interleaved", interleaved)):
        options = {"likelihood": fk.Preference(BETA, rows=rows), "max_examples": 5}
        batches = [together(data[:3]), together(data[3:])]
        assert fk.estimate(model, batches, **options).count == 5
        assert worst_error(fk.estimate(model, batches, Wide(), **options), squares_alone(model, data[:5]))[0] < 1e-10


def test_wrongly_joined_rows_are_found(monkeypatch):
    """Planted: rows ``{2 n, 2 n + 1}`` are taken for those of example ``n``, where they are ``{n, N + n}``."""
    model, data = made(), pairs()
    options = {"likelihood": fk.Preference(BETA)}
    truth = squares_alone(model, data)
    monkeypatch.setattr(RowOrder, "by_example", lambda self, tensor, num_examples: tensor)
    unchecked = fk.estimate(model, [collated(data)], Wide(), check=False, **options)
    assert worst_error(unchecked, truth)[0] > 1e-2
    with pytest.warns(UserWarning, match="take the slow exact path"):
        checked = fk.estimate(model, [collated(data)], Wide(), **options)
    assert worst_error(checked, truth)[0] < 1e-10


def test_a_wrong_order_of_rows_does_not_pass_the_survey(monkeypatch):
    from fishkern.layers.observe import _Observer

    monkeypatch.setattr(_Observer, "order", lambda self, said: INTERLEAVED)
    model, data = made(), pairs()
    with pytest.warns(UserWarning, match="21 parameter.* take the slow exact path"):
        wide = fk.estimate(model, [collated(data)], Wide(), likelihood=fk.Preference(BETA), check=False)
    assert worst_error(wide, squares_alone(model, data))[0] < 1e-10


def test_rows_in_no_order_take_the_loop():
    """The rejected answers stand behind the chosen ones, and in reverse."""
    model, data = made(), pairs()[:4]

    def losses(model: nn.Module, batch: dict) -> Tensor:
        names = ("ids", "mask", "counted")
        rows = [torch.cat([batch[f"chosen_{key}"], batch[f"rejected_{key}"].flip(0)]) for key in names]
        chosen, rejected = row_logps(model, *rows).chunk(2)
        margins = chosen - rejected.flip(0) - (batch["reference"][:, 0] - batch["reference"][:, 1])
        return -F.logsigmoid(BETA * margins)

    with pytest.warns(UserWarning, match="21 parameter.* take the slow exact path"):
        wide = fk.estimate(model, [of_columns(data)], Wide(), likelihood=losses)
    assert worst_error(wide, squares_alone(model, data))[0] < 1e-10


def test_a_head_that_gets_its_rows_in_another_order_later():
    """A loss that calls parts of the model: what leaves the first part says nothing of the rows of the second."""
    model, data = made(), pairs()

    def losses(model: nn.Module, batch: dict) -> Tensor:
        N = len(batch["chosen_ids"])
        ids, mask, counted = (
            torch.cat([batch[f"chosen_{key}"], batch[f"rejected_{key}"]]) for key in ("ids", "mask", "counted")
        )
        rows = torch.arange(2 * N) if N == 2 else torch.arange(2 * N).view(2, N).mT.flatten()
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = model.lm_head(hidden[rows])[:, :-1].log_softmax(-1)
        logps = (logits.gather(-1, ids[rows, 1:, None])[..., 0] * counted[rows, 1:]).sum(1)
        chosen, rejected = torch.zeros_like(logps).index_copy(0, rows, logps).view(2, N)
        return -F.logsigmoid(BETA * ((chosen - rejected) - (batch["reference"][:, 0] - batch["reference"][:, 1])))

    with pytest.warns(UserWarning, match="1 parameter.* take the slow exact path"):
        wide = fk.estimate(model, [of_columns(data[:2]), of_columns(data[2:])], Wide(), likelihood=losses)
    assert worst_error(wide, squares_alone(model, data))[0] < 1e-10


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["lora", "a trained head"])
def test_the_reference_by_switching_the_adapter_off(saved):
    """PEFT then lets the adapter's parameters require gradients, which autograd forms beside those of the examples."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    model, data = peft.get_peft_model(made(), config).double().eval(), pairs()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            nn.init.normal_(parameter, std=0.2)

    def losses(model: nn.Module, batch: dict) -> Tensor:
        names = ("ids", "mask", "counted")
        rows = [torch.cat([batch[f"chosen_{key}"], batch[f"rejected_{key}"]]) for key in names]
        with torch.no_grad(), model.disable_adapter():
            reference = row_logps(model, *rows).view(2, -1)
        (chosen, rejected) = row_logps(model, *rows).view(2, -1) - reference
        return -F.logsigmoid(BETA * (chosen - rejected))

    def alone(model: nn.Module, pair: Pair) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = rows_alone(model, pair)
        chosen, rejected = (one - other for one, other in zip(rows_alone(model, pair), reference, strict=True))
        return -F.logsigmoid(BETA * (chosen - rejected))

    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    batches = [of_columns(data[:4]), of_columns(data[4:])]
    wide = fk.estimate(model, batches, Wide(), likelihood=losses)
    truth = {fk.canonical_name(name): value for name, value in squares_alone(model, data, alone).items()}
    assert worst_error(wide, truth)[0] < 1e-10
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "loop" not in paths(fk.estimate(model, batches, likelihood=losses))


def test_first_pairs_without_a_gradient():
    """A hinge that is met gives none, which leaves it open whose rows they are until one does."""
    model, data = made(), pairs()
    met = [Pair(one.prompt, one.chosen, one.rejected, (-2e4, 0.0)) for one in data[:2]]
    data = [*met, *data[2:]]

    def hinge(model: nn.Module, pair: Pair) -> Tensor:
        (chosen, rejected), (reference_chosen, reference_rejected) = rows_alone(model, pair), pair.reference
        return (1 - BETA * ((chosen - rejected) - (reference_chosen - reference_rejected))).clamp_min(0)

    for batches in ([collated(data)], [collated(data[:2]), collated(data[2:])]):
        wide = fk.estimate(model, batches, Wide(), likelihood=fk.Preference(BETA, loss="hinge"))
        assert worst_error(wide, squares_alone(model, data, hinge))[0] < 1e-10


@pytest.mark.parametrize(
    "estimator",
    [
        fk.GroupFisher(by="row"),
        fk.DiagonalFisher(unit="position"),
        fk.DiagonalKronecker(),
        fk.DiagonalKronecker(positions="labelled"),
        fk.DirectionEnergy(importance="exact"),
    ],
    ids=["rows", "positions", "factors", "labelled", "energies"],
)
@pytest.mark.parametrize("rows", ["halves", "interleaved"])
def test_other_statistics(estimator, rows):
    """In one batch and pair by pair, where nothing has to be joined but the two rows of one example."""
    model, data = made(), pairs()
    together = interleaved if rows == "interleaved" else collated
    options = {"likelihood": fk.Preference(BETA, rows=rows)}
    batch = together(data)
    one = fk.estimate(model, [batch], estimator, **options)
    order = INTERLEAVED if rows == "interleaved" else HALVES
    parts = [
        {
            key: value[order.indices(n, n + 1, len(data)) if len(value) > len(data) else [n]]
            for key, value in batch.items()
        }
        for n in range(len(data))
    ]
    other = fk.estimate(model, parts, estimator, **options)
    assert one.count == other.count == len(data)
    for name in one:
        for ours, theirs in zip(_values(one[name]), _values(other[name]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def _values(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [result.input, result.output, result.joint]


class Pooled(nn.Module):
    """A classifier of token rows: shared positions, a module without a rule, flattened rows, and a pooler."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(zoo.V, 6), nn.Embedding(32, 6)
        self.gate, self.flat = Gate(), nn.Linear(6, 6)
        self.pool, self.score = nn.Linear(6, 6), nn.Linear(6, 1, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        R, T = input_ids.shape
        hidden = self.embed(input_ids) + self.places(torch.arange(T)[None])
        hidden = self.gate(hidden)
        hidden = hidden + self.flat(hidden.flatten(0, 1)).view(R, T, -1).tanh()
        return self.score(self.pool(hidden.mean(1)).tanh())[:, 0]


class Gate(nn.Module):
    """A module without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (hidden @ self.matrix).sigmoid()


@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "apart"])
@pytest.mark.parametrize("G", [2, 3, 5])
def test_groups_of_rows(G, adjacent):
    """Any number of rows, as of a group of sampled answers: each loss is of the scores of its own ``G`` rows."""
    model, order = Pooled().double(), RowOrder(G, adjacent=adjacent)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(zoo.V, (7, G, 6), generator=generator)
    rewards = torch.randn(7, G, generator=generator, dtype=torch.float64)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, rewards = batch
        rows = ids.flatten(0, 1) if order.adjacent else ids.transpose(0, 1).flatten(0, 1)
        scores = model(rows)
        scores = scores.view(-1, G) if order.adjacent else scores.view(G, -1).mT
        return -(rewards * scores.log_softmax(1)).sum(1)

    def alone(model: nn.Module, n: int) -> Tensor:
        scores = torch.cat([model(ids[n, g][None]) for g in range(G)])
        return -(rewards[n] * scores.log_softmax(0)).sum()

    truth = squares_alone(model, range(7), alone)
    batches = [(ids[:4], rewards[:4]), (ids[4:], rewards[4:])]
    assert worst_error(fk.estimate(model, batches, Wide(), likelihood=losses), truth)[0] < 1e-10
    coverage = fk.estimate(model, batches, likelihood=losses).coverage
    assert {name for name, one in coverage.items() if one.path == "generic"} == {"gate.matrix"}
    assert {one.path for one in coverage.values()} == {"fused", "generic"}


def test_multiple_choice_flattens_its_choices():
    """``[N, C, T]`` becomes ``N C`` rows inside the model, which is the layout of flattened positions."""
    torch.manual_seed(0)
    model = zoo.bert_for("MultipleChoice").double().eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, zoo.V, (5, 3, 6), generator=generator)
    labels = torch.randint(3, (5,), generator=generator)

    def alone(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(input_ids=ids[n : n + 1]).logits, labels[n : n + 1])

    truth = squares_alone(model, range(5), alone)
    batches = [{"input_ids": ids, "labels": labels}]
    names = [name for name in truth if "embeddings" not in name]
    options = {"likelihood": fk.Classification(), "parameters": names}
    wide = fk.estimate(model, batches, Wide(), **options)
    assert worst_error(wide, {name: truth[name] for name in names})[0] < 1e-10
    coverage = fk.estimate(model, batches, **options).coverage
    assert {coverage[name].path for name in names} == {"fused"}


class SecondAxis(nn.Module):
    """Takes ``[T, N, D]``, whose first axis may look like several rows of each example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.blocks = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.blocks(self.inner(hidden).tanh().transpose(0, 1))


@pytest.mark.parametrize("T", [2, 4, 6])
def test_positions_in_front_are_no_rows_of_examples(T):
    model = SecondAxis().double()
    inputs = torch.randn(5, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0].transpose(0, 1)).square().sum((1, 2))

    truth = squares_alone(model, range(5), lambda model, n: losses(model, (inputs[n : n + 1], None))[0])
    batches = [(inputs, torch.zeros(5))]
    with pytest.warns(UserWarning, match="2 parameter.* has its examples along the second axis"):
        assert worst_error(fk.estimate(model, batches, Wide(), likelihood=losses), truth)[0] < 1e-10
    with pytest.warns(UserWarning, match="2 parameter"):
        statistics = fk.estimate(model, batches, likelihood=losses)
    assert statistics.coverage["blocks.weight"].path == "fused"


def test_groups_of_another_size():
    """In later batches: whose their rows are is looked at anew, and nothing is wrong."""
    model = Pooled().double()
    generator = torch.Generator().manual_seed(3)
    groups = [torch.randint(zoo.V, (4, G, 6), generator=generator) for G in (2, 3, 1)]

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0].flatten(0, 1)).view(*batch[0].shape[:2]).logsumexp(1)

    for order in ((0, 1, 0), (2, 0, 1), (0, 2)):
        batches = [(groups[n], torch.zeros(4)) for n in order]
        parts = [one for n in order for one in groups[n]]
        truth = squares_alone(model, parts, lambda model, ids: model(ids).logsumexp(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was one row for each example does not become several
            wide = fk.estimate(model, batches, Wide(), likelihood=losses)
        assert worst_error(wide, truth)[0] < 1e-10


@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "apart"])
def test_rows_whose_numbers_follow_the_data(adjacent, monkeypatch):
    """Two rows for each of the first examples, later one and three: as many in all, and other examples' own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(zoo.V, 6), nn.Linear(6, 5), nn.Tanh()).double()
    ids = torch.randint(zoo.V, (4, 3, 6), generator=torch.Generator().manual_seed(3))
    counts = torch.tensor([[2, 2], [1, 3]])

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, counts = batch
        places = [(n, g) for n, count in enumerate(counts.tolist()) for g in range(count)]
        if not adjacent:
            places.sort(key=lambda place: place[1])
        scores = model(torch.stack([ids[place] for place in places])).square().sum((1, 2))
        owners = torch.tensor([n for n, _ in places])
        return torch.zeros(len(ids), dtype=scores.dtype).index_add(0, owners, scores)

    def alone(model: nn.Module, n: int) -> Tensor:
        return model(ids[n, : counts.flatten()[n]]).square().sum()

    batches = [(ids[:2], counts[0]), (ids[2:], counts[1])]
    truth = squares_alone(model, range(4), alone)
    with pytest.warns(UserWarning, match="take the slow exact path"):
        wide = fk.estimate(model, batches, Wide(), likelihood=losses)
    assert worst_error(wide, truth)[0] < 1e-10
    monkeypatch.setattr(Rows, "are_proved", lambda self, module, order: True)  # planted: the first batch speaks for all
    assert worst_error(fk.estimate(model, batches, Wide(), likelihood=losses), truth)[0] > 1e-2


def test_the_model_comes_back_as_found():
    model, data = made(), pairs()
    state = copy.deepcopy(model.state_dict())
    batch = collated(data)
    before = {key: value.clone() for key, value in batch.items()}
    fk.estimate(model, [batch], likelihood=fk.Preference(BETA))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert set(batch) == set(before)
    assert all(torch.equal(batch[key], before[key]) for key in before)


def test_verify_speaks_of_pairs():
    report = fk.verify(made(), [collated(pairs())], likelihood=fk.Preference(BETA))
    assert report.ok, report
    assert report.examples == len(pairs())


@ORDERS
def test_online(order):
    """In training the loss of a step is its mean over pairs, and a pair's share is of both rows."""
    model, data, losses = made("llama-tied"), pairs(), losses_of_rows(order)
    rows = "interleaved" if order.adjacent else "halves"
    truth = squares_alone(model, data)
    model.train()
    with fk.OnlineFisher(model, pairs=rows) as online:
        losses(model, of_columns(data)).mean().backward()
    statistics = online.statistics
    assert statistics.count == len(data)
    assert statistics.provenance["definition"]["example"] == "pair"
    assert worst_error(statistics, truth)[0] < 1e-6
    assert paths(statistics) == {"fused"}
    with pytest.raises(ValueError, match="do not count the same"):
        fk.OnlineFisher(model).load_state_dict(online.state_dict())


def test_online_with_picked_rows():
    """Rows ``[G N, D]`` inside ``[G N, T, D]`` are judged in training by what the model returns."""
    model, N = Reward().double().train(), 5
    ids = torch.randint(zoo.V, (2 * N, 6), generator=torch.Generator().manual_seed(3))

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        chosen, rejected = model(input_ids=ids).chunk(2)
        return -F.logsigmoid(chosen - rejected)

    truth = squares_alone(model, range(N), lambda model, n: losses(model, ids[[n, N + n]])[0])
    with fk.OnlineFisher(model, pairs="halves") as online:
        losses(model, ids).mean().backward()
    assert worst_error(online.statistics, truth)[0] < 1e-6


class Reward(nn.Module):
    """One score for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.pool = nn.Embedding(zoo.V, 6), nn.Linear(6, 6)
        self.score = nn.Linear(6, 1, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.score(self.pool(self.embed(input_ids).mean(1)).tanh())[:, 0]
