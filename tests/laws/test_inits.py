"""Laws of every start of an adapter, on models of transformers, however it is chosen and sized."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from fishkern.initialization import probe_losses
from fishkern.layers import linear_maps
from tests.support import zoo


def first_layer(model: nn.Module) -> list[str]:
    return [name for name in linear_maps(model) if ".0." in name]


class Kind(NamedTuple):
    """A recipe, and the basis of its energies."""

    rule: fk.DirectionInit
    basis: str = "svd"

    def make(self, model: nn.Module, batches: list[dict], **options) -> fk.AdapterInit:
        names = first_layer(model)
        estimator = fk.DirectionEnergy(basis=self.basis)
        energies = fk.estimate(model, batches, estimator, parameters=lambda name, _: name in names, **options)
        return fk.initialize(model, energies, self.rule)


INITS = {
    "largest components": Kind(fk.DirectionInit(4, score="weighted")),
    "smallest components": Kind(fk.DirectionInit(4, order="smallest", score="weighted", scaling=2.0)),
    "smallest energies": Kind(fk.DirectionInit(3, order="smallest", magnitude="energy", floor=1e-4)),
    "largest exact energies": Kind(fk.DirectionInit(3, fisher="joint", magnitude="uniform", scaling=0.5)),
    "power basis": Kind(fk.DirectionInit(3, order="smallest", magnitude="uniform", distinct=0.9), "power"),
}
every_init = pytest.mark.parametrize("kind", INITS.values(), ids=INITS)
MODELS = {"llama": zoo.llama, "gpt2": zoo.gpt2, "bert": zoo.bert_classifier}
# What is announced is not the matter of these laws.
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore:.*chosen (scores|directions) are:UserWarning")]
every_model = pytest.mark.parametrize("family", MODELS)


def specimen(family: str) -> tuple[nn.Module, list[dict]]:
    """A model in float64, with grouped queries, transposed weights or an encoder; and batches with padding."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = MODELS[family]()
    return made.model.double().eval(), [made.batch(4, 9, seed=seed) for seed in range(2)]


@contextmanager
def with_adapter(model: nn.Module, init: fk.AdapterInit) -> Iterator[nn.Module]:
    """A copy whose weights lack the start, which runs beside them as PEFT runs it: x A^T B^T times the scaling."""
    copied = copy.deepcopy(model)
    for path, start in init.items():
        module = copied.get_submodule(path)
        A, B = start.A.double().requires_grad_(), start.B.double().requires_grad_()
        delta = (start.scaling * (B @ A)).detach()
        with torch.no_grad():
            module.weight -= delta.T if type(module).__name__ == "Conv1D" else delta
        module.register_forward_hook(
            lambda module, args, output, A=A, B=B, scaling=start.scaling: (
                output + scaling * F.linear(F.linear(args[0], A), B)
            )
        )
        module.factors = (A, B)
    yield copied


def logits_and_loss(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    answer = model(**batch)
    return answer.logits, answer.loss


@every_model
@every_init
def test_the_model_starts_as_it_was(kind: Kind, family: str):
    model, batches = specimen(family)
    init = kind.make(model, batches)
    assert init.keys() == {name.removesuffix(".weight") for name in first_layer(model)}
    init.check(model)
    with with_adapter(model, init) as adapted:
        expected, _ = logits_and_loss(model, batches[0])
        found, loss = logits_and_loss(adapted, batches[0])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        moved = max(start.delta().norm() for start in init.values())
        assert moved > 1e-5
        loss.backward()
        for path in init:
            A, B = adapted.get_submodule(path).factors
            assert A.grad.any()
            assert B.grad.any()
            assert A.grad.isfinite().all()
            assert B.grad.isfinite().all()
    losses = probe_losses(model, init, batches, {"same": batches}, steps=0, lr=1.0)
    own = torch.cat([fk_losses(model, batch) for batch in batches]).mean().item()
    assert losses["same"] == pytest.approx(own, rel=1e-6)  # the loss of transformers is of float32 logits


def fk_losses(model: nn.Module, batch: dict) -> Tensor:
    """The loss of each row alone."""
    rows = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(len(batch["input_ids"]))]
    with torch.no_grad():
        return torch.stack([model(**row).loss for row in rows])


@every_model
@every_init
def test_directions_have_length_one(kind: Kind, family: str):
    model, batches = specimen(family)
    for start in kind.make(model, batches).values():
        A, B = start.A.double(), start.B.double()
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-5, atol=0)
        if kind.basis == "svd":
            for factor in (A / A.norm(dim=1, keepdim=True), (B / B.norm(dim=0)).T):
                torch.testing.assert_close(
                    factor @ factor.T, torch.eye(start.rank, dtype=torch.float64), rtol=0, atol=1e-5
                )


@every_init
def test_batches_and_their_order_do_not_matter(kind: Kind):
    model, batches = specimen("llama")
    init = kind.make(model, batches)
    singles = [{key: value[n : n + 1] for key, value in batch.items()} for batch in batches for n in range(4)]
    for other in (singles, singles[::-1], batches[::-1]):
        assert_same_choice(kind.make(model, other), init)


@every_init
def test_padding_on_the_right_does_not_matter(kind: Kind):
    model, batches = specimen("llama")
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = [{key: F.pad(value, (0, 3), value=fill[key]) for key, value in batch.items()} for batch in batches]
    assert_same_choice(kind.make(model, padded), kind.make(model, batches))


@every_init
def test_the_scale_of_the_loss_does_not_matter_to_the_choice(kind: Kind):
    model, batches = specimen("llama")

    def scaled(model: nn.Module, batch: dict, by: float) -> Tensor:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return by * losses.sum(1)

    inits = [kind.make(model, batches, likelihood=lambda m, b, by=by: scaled(m, b, by)) for by in (1.0, 37.0)]
    for path in inits[0]:
        assert torch.equal(inits[0][path].chosen, inits[1][path].chosen)


@every_init
def test_a_start_is_loaded_as_it_was_saved(kind: Kind, tmp_path: Path):
    model, batches = specimen("gpt2")
    init = kind.make(model, batches)
    loaded = fk.AdapterInit.load(init.save(tmp_path / "adapter_init"))
    assert loaded == init
    assert loaded.provenance == init.provenance
    loaded.check(model)


@every_init
def test_nothing_is_changed_in_the_model(kind: Kind):
    model, batches = specimen("llama")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind.make(model, batches)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def assert_same_choice(found: fk.AdapterInit, expected: fk.AdapterInit) -> None:
    assert found.keys() == expected.keys()
    for path, start in expected.items():
        assert torch.equal(found[path].chosen, start.chosen), path
        torch.testing.assert_close(found[path].delta(), start.delta(), rtol=1e-4, atol=1e-8)
