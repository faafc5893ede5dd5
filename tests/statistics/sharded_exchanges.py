"""What each process of ``test_sharded_exchanges.py`` runs: squares or factors, whichever are fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import combinations
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import fishkern as fk
from fishkern.statistics import sharded_factors, sharded_states
from tests.statistics import sharded_program as program
from tests.statistics.sharded_program import CASES, case, sharded
from tests.support.oracle import next_token, squares_one_by_one, worst_error

# which linear maps of a layer read one input
READERS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def batches(shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Batches of examples of one length, which differ from rank to rank."""
    rng = torch.Generator().manual_seed(program.rank)
    every = [torch.randint(1, 61, shape, generator=rng) for shape in shapes]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in every]


class Received(TorchDispatchMode):
    """Counts the bytes that this rank receives from others."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            kind, (first, second) = function.__name__, args[:2]
            if kind.startswith(("_reduce_scatter_base", "_allgather_base")):  # output, input
                self.bytes += abs(first.nbytes - second.nbytes)
            elif kind.startswith("alltoall_base"):  # output, input, group, sizes of the output
                self.bytes += first.nbytes - args[3][program.rank % len(args[3])] * first.element_size()
            elif kind.startswith("allreduce"):
                self.bytes += sum(one.nbytes for one in first)
            else:
                raise AssertionError(f"{kind} is not counted")
        return function(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[tuple[Received, set[str]]]:
    """Count what the exchanges inside the ``with`` block send, and whose factors."""
    received, by_factors = Received(), set()
    exchange, add_ = sharded_states.ShardedStates.exchange, sharded_factors.FactorExchange.add_

    def counted(states: sharded_states.ShardedStates) -> None:
        with received:
            exchange(states)

    def noted(one: sharded_factors.FactorExchange, *args: Any) -> None:
        by_factors.update(one.parts)
        add_(one, *args)

    with (
        patch.object(sharded_states.ShardedStates, "exchange", counted),
        patch.object(sharded_factors.FactorExchange, "add_", noted),
    ):
        yield received, by_factors


def least(model: nn.Module, tokens: int, itemsize: int, sums: int) -> tuple[float, set[str]]:
    """Count what a rank receives by formula, if each layer sends the factors of the best subset of its maps."""
    R, total, by_factors = program.world, 0.0, set()
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}

    def squares(name: str) -> float:
        rows, *others = shapes[name]
        return sums * -(-rows // R) * (R - 1) * (others[0] if others else 1)

    groups: list[list[str]] = [["lm_head.weight"]]
    for readers in READERS:
        groups += [
            [name for name in shapes if f"layers.{layer}." in name and name.split(".")[-2] in readers]
            for layer in range(2)
        ]
    for group in groups:
        choices = []
        for count in range(len(group) + 1):
            for chosen in combinations(group, count):
                inputs = itemsize * tokens * (R - 1) * shapes[group[0]][1] if chosen else 0
                grads = sum(itemsize * tokens * (R - 1) / R * shapes[name][0] for name in chosen)
                rest = sum(squares(name) for name in group if name not in chosen)
                choices.append((inputs + grads + rest, chosen))
        best, chosen = min(choices, key=lambda one: one[0])
        total += best
        by_factors.update(chosen)
    rest = shapes.keys() - {name for group in groups for name in group}
    return total + sum(map(squares, rest)), by_factors


def counted(
    shape: tuple[int, int], dtype: torch.dtype = torch.float64, sums: int = 8, **options: Any
) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        whole = net(dtype)
        with counting() as (received, by_factors):
            fk.estimate(sharded(net(dtype)), iter(batches([shape])), check=False, **options)
        formula, expected = least(whole, shape[0] * shape[1], dtype.itemsize, sums)
        return {
            "bytes": received.bytes, "formula": formula, "as by formula": by_factors == expected,
            "by factors": len(by_factors), "maps": 15,
        }  # fmt: skip

    return run


CASES |= {
    "few positions": counted((1, 3)),
    "some positions": counted((2, 16)),
    "many positions": counted((3, 40)),
    "some positions, 16 bits": counted((2, 24), torch.bfloat16, 4),
}


def compared(shapes: list[tuple[int, int]], *, check: bool = True, **options: Any) -> dict[str, Any]:
    """Compare an estimate with the loop over the examples of all ranks."""
    own = batches(shapes)
    with counting() as (_, by_factors):
        statistics = fk.estimate(sharded(net(), **options), iter(own), check=check)
    every: list[Any] = [None] * program.world
    torch.distributed.all_gather_object(every, own)
    truth = squares_one_by_one(net(), [batch for part in every for batch in part], next_token)
    error, where = worst_error({name: statistics.full(name) for name in truth}, truth)
    return {"error": error, "where": where, "by factors": len(by_factors), "count": statistics.count}


@case("few, then many")
def few_then_many(**options: Any) -> dict[str, Any]:
    return compared([(1, 3), (3, 40)], **options)


@case("unequal lengths")
def unequal(**options: Any) -> dict[str, Any]:
    """Each rank has other numbers of examples and positions, and the last rank no second batch."""
    first = (1 + program.rank, 3 + 2 * program.rank)
    return compared([first] if program.rank == program.world - 1 else [first, (2, 4)], **options)


@case("in blocks")
def _() -> dict[str, Any]:
    with patch.object(sharded_factors, "_BLOCK", 2**9):
        return unequal()


CASES["unequal lengths, replicated"] = lambda: unequal(replicas=2)


def planted(target: Any = None, name: str = "", wrong: Any = None) -> dict[str, Any]:
    with patch.object(target, name, wrong) if target else nullcontext():
        return compared([(2, 3)], check=False)


_exchanged, _gathered = sharded_factors.FactorExchange._exchanged, sharded_factors.FactorExchange._gathered


def _of_the_next_row(one: sharded_factors.FactorExchange, *args: Any) -> list[Tensor]:
    return [features.roll(1, -1) for features in _exchanged(one, *args)]


def _without_one(one: sharded_factors.FactorExchange, *args: Any) -> list[Tensor]:
    *others, last = _gathered(one, *args)
    return [*others, torch.cat([last[:-1], torch.zeros_like(last[-1:])])]


def _twice(one: sharded_factors.FactorExchange, *args: Any) -> list[Tensor]:
    first, *others = _gathered(one, *args)
    return [first, *(first for _ in others)]


CASES |= {
    "as it is": planted,
    "features of other rows": lambda: planted(sharded_factors.FactorExchange, "_exchanged", _of_the_next_row),
    "an example missing": lambda: planted(sharded_factors.FactorExchange, "_gathered", _without_one),
    "inputs of the first rank": lambda: planted(sharded_factors.FactorExchange, "_gathered", _twice),
}
