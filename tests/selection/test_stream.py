"""The stream of trained values: a sampler that reads it has the trainer's weights, to the bit, after every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

import fishkern as fk
from fishkern.selection import Entries
from tests.support.patching import write_patches


def net(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3), nn.LayerNorm(3)).to(dtype)


def chosen(model: nn.Module, seed: int) -> fk.Selection:
    """Few entries of one parameter, ranges, everything of another, nothing of a third."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    at = torch.randperm(2000, generator=generator)[:60]
    ranges = {"2.weight": fk.Rows((seed % 2, 2))}
    return fk.Selection(
        shapes, {"0.weight": at, "0.bias": (at[:5] % 50).unique()[: 3 * (seed != 3)]}, whole=["2.bias"], ranges=ranges
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(number))
    model(x.to(next(model.parameters()).dtype)).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def bits(model: nn.Module) -> dict[str, list]:
    return {
        name: p.detach().view(torch.int16 if p.dtype.itemsize == 2 else torch.int32).tolist()
        for name, p in model.named_parameters()
    }


def test_ten_steps_with_master_weights_and_two_changes_of_the_selection(tmp_path: Path):
    """Through files, to a model and to an independent reader of the patches."""
    trainer, sampler = net(), net()
    checkpoint = {name: p.detach().clone() for name, p in net().named_parameters()}
    optimizer = fk.MaskedAdamW(trainer, chosen(trainer, 1), lr=1e-2)
    stream, reader, other = fk.Delta.stream(trainer), fk.DeltaReader(), fk.DeltaReader()
    kinds = []
    for number in range(10):
        if number in (4, 7):
            step(trainer, optimizer, 100 + number)  # which moves what the new selection may lack
            optimizer.reselect(chosen(trainer, number))
        step(trainer, optimizer, number)
        update = stream.update(optimizer.selection)
        received = fk.DeltaUpdate.load(update.save(tmp_path / f"{number}"))
        reader.apply(received, sampler)
        write_patches(checkpoint, other.patches(received))
        assert bits(sampler) == bits(trainer), number
        assert all(torch.equal(checkpoint[name], p) for name, p in trainer.named_parameters()), number
        kinds.append(update.entries is not None)
    assert kinds == [number in (0, 4, 7) for number in range(10)]
    assert not torch.equal(sampler[0].weight, net()[0].weight)


def test_later_updates_are_the_values_alone():
    trainer = net()
    optimizer = fk.MaskedAdamW(trainer, chosen(trainer, 1), lr=1.0)  # so that every value changes
    stream, count = fk.Delta.stream(trainer), optimizer.selection.count
    first = stream.update(optimizer.selection)
    step(trainer, optimizer, 0)
    second, third = (stream.update(optimizer.selection) for _ in range(2))
    assert second.nbytes == 2 * count
    assert 2 * count < first.nbytes < 3 * count
    assert third.nbytes == 0, "nothing has changed"
    assert repr(second).startswith(f"DeltaUpdate(number 1: {count} values, ")
    assert repr(first).startswith(f"DeltaUpdate(number 0: {count} entries and values, ")


@pytest.mark.parametrize("changed", [1, 30, 700, 1950])
def test_of_few_changed_values_only_these_are_sent(changed, tmp_path: Path):
    """Those of other bits, and their places; and all where that is less."""
    trainer, sampler, reader = nn.Linear(40, 50).bfloat16(), nn.Linear(40, 50).bfloat16(), fk.DeltaReader()
    sampler.load_state_dict(trainer.state_dict())
    selection = fk.Selection({"weight": (50, 40)}, {"weight": torch.arange(2000)})
    stream = fk.Delta.stream(trainer)
    reader.apply(stream.update(selection), sampler)
    with torch.no_grad():
        trainer.weight.view(-1)[torch.randperm(2000)[:changed]] += 1
        trainer.weight[0, 0] = -trainer.weight[0, 0] if changed == 1950 else trainer.weight[0, 0]
    update = fk.DeltaUpdate.load(stream.update(selection).save(tmp_path / "u"))
    reader.apply(update, sampler)
    assert bits(sampler) == bits(trainer)
    assert update.nbytes <= min(4000, 2 * changed + 250)
    assert (len(update.values["weight"]) == 2000) == (changed == 1950)


def test_zeros_of_both_signs_differ_and_equal_nan_do_not():
    trainer = nn.Linear(2, 2, bias=False)
    selection = fk.Selection({"weight": (2, 2)}, {}, whole=["weight"])
    stream = fk.Delta.stream(trainer)
    with torch.no_grad():
        trainer.weight.copy_(torch.tensor([[0.0, torch.nan], [1.0, 2.0]]))
        stream.update(selection)
        trainer.weight[0, 0] = -0.0
    assert stream.update(selection).changed["weight"].indices().tolist() == [0]


def test_a_reader_that_begins_later_gets_whatever_has_moved():
    trainer, sampler = net(), net()
    optimizer = fk.MaskedAdamW(trainer, chosen(trainer, 1), lr=1e-2)
    stream = fk.Delta.stream(trainer)
    for seed in (1, 2, 3):
        optimizer.reselect(chosen(trainer, seed))
        step(trainer, optimizer, seed)
        stream.update(optimizer.selection)
    reader = fk.DeltaReader()
    stream.restart()
    step(trainer, optimizer, 9)
    reader.apply(stream.update(optimizer.selection), sampler)
    assert bits(sampler) == bits(trainer)
    step(trainer, optimizer, 10)
    reader.apply(stream.update(optimizer.selection), sampler)
    assert bits(sampler) == bits(trainer)
    stream.restart()
    optimizer.reselect(chosen(trainer, 4))  # a change and a restart at once
    step(trainer, optimizer, 11)
    again = net()
    fk.DeltaReader().apply(stream.update(optimizer.selection), again)
    assert bits(again) == bits(trainer)


def test_an_equal_selection_sends_no_entries():
    trainer = net()
    stream = fk.Delta.stream(trainer)
    stream.update(chosen(trainer, 1))
    assert stream.update(chosen(trainer, 1)).entries is None
    assert stream.update(chosen(trainer, 2)).entries is not None


def test_rounded_for_a_sampler_of_another_dtype():
    trainer, sampler = net(torch.float32), net(torch.float32).bfloat16()
    optimizer = fk.MaskedAdamW(trainer, chosen(trainer, 1), lr=1e-2)
    stream, reader = fk.Delta.stream(trainer, dtype=torch.bfloat16), fk.DeltaReader()
    for number in range(3):
        step(trainer, optimizer, number)
        reader.apply(stream.update(optimizer.selection), sampler)
    assert bits(sampler) == bits(trainer.bfloat16())


def test_of_values_of_one_byte_the_changed_ones_are_sent():
    trainer = net(torch.float32)
    stream, reader = fk.Delta.stream(trainer, dtype=torch.float8_e4m3fn), fk.DeltaReader()
    selection = chosen(trainer, 1)
    reader.patches(stream.update(selection))
    with torch.no_grad():
        trainer[0].bias[selection.entries("0.bias").indices()[0]] += 8
    (made,) = reader.patches(stream.update(selection))
    at = selection.entries("0.bias").indices()[:1]
    assert (made.name, made.indices.tolist()) == ("0.bias", at.tolist())
    assert torch.equal(made.values.float(), trainer[0].bias[at].to(torch.float8_e4m3fn).float())


def test_order_and_models_are_checked_before_anything_is_written(tmp_path: Path):
    trainer, sampler, reader = net(), net(), fk.DeltaReader()
    optimizer = fk.MaskedAdamW(trainer, chosen(trainer, 1), lr=1e-2)
    stream = fk.Delta.stream(trainer)
    step(trainer, optimizer, 0)
    updates = [stream.update(optimizer.selection) for _ in range(3)]
    before = bits(sampler)
    with pytest.raises(ValueError, match=r"update 0 is next, and this is number 1: .* restart\(\)"):
        reader.apply(updates[1], sampler)
    other = net(seed=1)
    with pytest.raises(ValueError, match="the model is not the delta's base: 3 of 6 parameters differ"):
        reader.apply(updates[0], other)
    assert bits(other) == bits(net(seed=1))
    with pytest.raises(
        ValueError, match=r"in the update and .* torch.float32 in the model: make the stream with dtype="
    ):
        reader.apply(updates[0], net(torch.float32))
    with pytest.raises(ValueError, match=r"the model has no 0.weight: .* layout="):
        reader.apply(updates[0], nn.Linear(3, 3))
    lacking = net()[:3]
    with pytest.raises(ValueError, match="it has no 3.weight, 3.bias"):
        reader.apply(updates[0], lacking)
    assert bits(sampler) == before, "and a refused update can be read again"
    reader.apply(updates[0], sampler)
    with pytest.raises(ValueError, match="update 1 is next, and this is number 2"):
        reader.apply(updates[2], sampler)
    with pytest.raises(ValueError, match="update 1 is next, and this is number 2"):
        reader.patches(updates[2])
    for name, size in (("0.weight", 61), ("4.weight", 60)):
        all_of = Entries.all(torch.Size([size]))
        strange = fk.DeltaUpdate(1, {name: torch.zeros(size).bfloat16()}, changed={name: all_of})
        with pytest.raises(ValueError, match="with other entries than the ones before: it is of another stream"):
            reader.apply(strange, sampler)
    reader.apply(updates[1], sampler)
    with pytest.raises(ValueError, match="update 2 is next, and this is number 1"):
        reader.apply(updates[1], sampler)
    reader.apply(updates[0], other, check=False)
    assert not torch.equal(other[0].weight, net(seed=1)[0].weight)


def test_what_a_stream_refuses():
    trainer = net()
    with pytest.raises(ValueError, match="values are floating, and dtype= is torch.int8"):
        fk.Delta.stream(trainer, dtype=torch.int8)
    stream = fk.Delta.stream(trainer)
    with pytest.raises(ValueError, match="the selection does not fit the model"):
        stream.update(fk.Selection({"9.weight": (3,)}, {}))
    stream.update(chosen(trainer, 1))
    with pytest.raises(ValueError, match="the pool of the selection has changed: make another stream"):
        stream.update(fk.Selection({"2.bias": (3,)}, {}, whole=["2.bias"]))
    assert stream.update(chosen(trainer, 1)).number == 1, "what was refused was not sent"
    with pytest.raises(ValueError, match="update 0 of a stream has entries"):
        fk.DeltaUpdate(0, {})
    with pytest.raises(ValueError, match="of the same names as the entries"):
        fk.DeltaUpdate(1, {"a": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="has entries, or says which of those before"):
        fk.DeltaUpdate(1, {}, {}, changed={})
    with pytest.raises(AttributeError, match="frozen"):
        stream.update(chosen(trainer, 1)).number = 3


def test_files_of_updates(tmp_path: Path):
    trainer = net()
    stream = fk.Delta.stream(trainer)
    stream.update(chosen(trainer, 1))
    update = stream.update(chosen(trainer, 2))
    with torch.no_grad():
        trainer[0].weight.add_(1)
    later = stream.update(chosen(trainer, 2))
    assert fk.DeltaUpdate.load(later.save(tmp_path / "later")).changed == later.changed
    file = update.save(tmp_path / "u")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    good, loaded = load_file(file), fk.DeltaUpdate.load(file)
    assert loaded.number == 1
    assert loaded.ended
    for one in ("values", "entries", "ended", "last"):
        ours, theirs = getattr(update, one), getattr(loaded, one)
        assert list(ours) == list(theirs)
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(ours.values(), theirs.values(), strict=True)
        )
    spoilt = [
        ({"values:x": torch.zeros(3)}, {}, "its header does not know values:x"),
        ({}, {"number": "-1"}, "is not a count"),
        ({}, {"digests": "[]"}, "the digests are a text for each name"),
        ({}, {"entries": "[]"}, "entries are a shape and a form"),
        ({}, {"changed": metadata["entries"], "entries": "{}"}, "its header does not know"),
        ({}, {"ended": json.dumps({"0.weight": [[50, 40]]})}, "0.weight has a shape and a form"),
        ({}, {"ended": json.dumps({"x": [[50, 40], "whole"]})}, "last:x is missing"),
        ({"values:2.bias": torch.zeros(3).long()}, {}, r"values are \[K\], floating"),
        ({"values:2.bias": torch.zeros(2)}, {}, "of the same names as the entries"),
    ]
    for tensors, header, message in spoilt:
        save_file(good | tensors, tmp_path / "bad.safetensors", metadata | header)
        with pytest.raises(ValueError, match=f"holds no valid delta update.*{message}"):
            fk.DeltaUpdate.load(tmp_path / "bad")


def test_the_patches_of_a_delta_are_its_values():
    trainer = net()
    with torch.no_grad():
        for p in trainer.parameters():
            p.add_(1)
    delta = fk.delta(trainer, chosen(trainer, 1))
    for one in delta.patches():
        assert one.shape == tuple(delta.selection.shapes[one.name])
        assert torch.equal(one.values, delta.values(one.name))
        assert torch.equal(one.indices, delta.selection.indices(one.name))
