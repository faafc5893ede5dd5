"""Compiles kernels for GPUs that are not here, and reads what the compiled code takes.

It runs in a process of its own, since in that of the tests the kernels may be interpreted::

    python -m tests.kernels.offline compile [all]    prints what each case takes, as JSON
    python -m tests.kernels.offline planted [all]    prints the same of tiles that are far too large
    python -m tests.kernels.offline relatives        prints the shared memory of chips that take the tables of another
    python -m tests.kernels.offline calls            compiles all launches of the benchmark's calls, prints how many
    python -m tests.kernels.offline record           writes it for this version of Triton into resources.json, and what
                                                     the loops of the tiles of TMA execute into instructions.json
    python -m tests.kernels.offline record WORD      the same of the cases with this word in their names alone

The cases go through the launchers, so that what is compiled is what they would launch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from fishkern.kernels._group_by_grams import launches_by_grams
from fishkern.kernels._hardware import A100, H100, MI300, Hardware
from fishkern.kernels._launch import Launch
from fishkern.kernels._project_sum_squared_configs import Cut
from fishkern.kernels._project_sum_squared_configs import configs as projection_configs
from fishkern.kernels._sum_grad_squared_configs import TOGETHER, Config, Loads, configs, widest_with_mean
from fishkern.kernels.log_histogram import log_histogram
from fishkern.kernels.masked_adamw import masked_adamw_
from fishkern.kernels.masked_sgd import masked_sgd_
from fishkern.kernels.sum_grad_squared import Operands, launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fishkern.kernels import expert_sum_grad_squared as experts
from fishkern.kernels import group_sum_grad_squared as group
from fishkern.kernels import project_sum_squared as projections
from fishkern.kernels import scale_sum_grad_squared as scales
from fishkern.kernels import streaming_topk as topk
from tests.kernels.disassembly import instructions, resources

RESOURCES, INSTRUCTIONS = (Path(__file__).with_name(f"{name}.json") for name in ("resources", "instructions"))
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What takes the tables of another.
RELATIVES = {
    **{f"sm_{number}": (A100, GPUTarget("cuda", number, 32)) for number in (86, 89, 120)},
    "sm_100": (H100, GPUTarget("cuda", 100, 32)),
    **{name: (MI300, GPUTarget("hip", name, 64)) for name in ("gfx90a", "gfx950")},
}
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Everything about a call of the operation that the compiled code depends on."""

    on: Hardware
    dtype: torch.dtype
    loads: Loads
    config: Config | None = None  # None: few positions
    packed: bool = False
    mean: bool = False
    tf32: bool = False
    T: int = 512
    by: str | None = None  # groups that are summed over, else none
    experts: bool = False

    def __str__(self) -> str:
        tiles = "x".join(map(str, list(self.config.constants.values())[:3])) if self.config else f"T={self.T}"
        options = {
            "packed": self.packed, "mean": self.mean, "tf32": self.tf32, "experts": self.experts,
            "single": bool(self.config) and self.T <= self.config.BLOCK_T, f"by {self.by}": bool(self.by),
            "of few registers": bool(self.config and self.config.maxnreg),
        }  # fmt: skip
        words = [name for name, value in options.items() if value]
        return " ".join([self.on.family, NAMES[self.dtype], self.loads, tiles, *words])

    @property
    def counted(self) -> bool:
        """Whether its loop is one of those whose instructions are recorded."""
        multiplies = self.on is H100 and self.loads == "tma" and self.dtype is torch.bfloat16 and self.config
        return bool(multiplies) and not (self.by or self.experts)

    def launch(self) -> Launch:
        odd = self.loads == "elements"
        O, I = 4096 + odd, (self.config.BLOCK_I if self.config else 4096) - odd
        x, g = (torch.empty(8, self.T, width, dtype=self.dtype, device="meta") for width in (I, O))
        offsets = None
        if self.packed or self.experts:
            x, g, offsets = x.flatten(0, 1), g.flatten(0, 1), torch.arange(9) * self.T
        if self.loads == "vectors" and self.on is H100:
            g = torch.empty(*g.mT.shape, dtype=self.dtype, device="meta").mT  # position last, as convolutions have it
        if self.by:
            rows = self.by == "row"
            sums = torch.empty(O if rows else I, device="meta")
            return group.launches(group.Operands(x, g, offsets, sums, rows=rows), self.on, self.config)[0]
        if self.experts:
            operands = experts.Operands(x, g, torch.arange(8) // 2, offsets, torch.empty(4, O, I, device="meta"))
            return experts.launch_of(operands, self.on, self.config)
        out = torch.empty(O, I, device="meta")
        grad_out = torch.empty(O, I, device="meta") if self.mean else None
        operands = Operands(x, g, offsets, out, grad_out, allow_tf32=self.tf32)
        return launches(operands, self.on, self.config)[0]


def cases(every: bool) -> Iterator[Case | Projected | Recorded]:
    """All configurations with every option, or the widest of each table, with the usual ones where it is the best."""
    for on in (A100, H100, MI300):
        seen = set()
        for itemsize, loads, config in configs(on):
            best = itemsize not in {size for size, _ in seen}
            widest = (itemsize, loads) not in seen
            seen.add((itemsize, loads))
            if not (every or widest):
                continue
            dtype = torch.bfloat16 if itemsize == 2 else torch.float32
            yield Case(on, dtype, loads, config)
            if every or (best and itemsize == 2 and on is not MI300):
                yield Case(on, dtype, loads, config, packed=True)
            if widest and (every or (best and itemsize == 2)):
                yield Case(on, dtype, loads, config, experts=True)
            if every or best:
                yield Case(on, dtype, loads, config, by="row")
            if itemsize == 2 and (best or (every and widest)):
                yield Case(on, dtype, loads, config, by="column")
            width = _widest_with_mean(on, itemsize, loads)
            if every and width == config.BLOCK_I:
                yield Case(on, dtype, loads, config, mean=True)
            if every and itemsize == 2:
                yield Case(on, torch.float16, loads, config)
            # Examples of one chunk: the whole table of TMA, elsewhere the widest tiles.
            of_tma = itemsize == 2 and loads == "tma"
            if (of_tma and (every or best)) or (every and widest and itemsize == 2):
                yield Case(on, dtype, loads, config, T=config.BLOCK_T)
            if every and of_tma and width == config.BLOCK_I:
                yield Case(on, dtype, loads, config, T=config.BLOCK_T, mean=True)
            if every and best and of_tma:
                yield Case(on, dtype, loads, config, T=config.BLOCK_T, by="row")
            if itemsize == 4 and on is not MI300 and (every or (best and on is H100)):
                yield Case(on, dtype, loads, config, tf32=True)
        if on is H100 and not every:
            yield Case(on, torch.bfloat16, "tma", Config(128, 128, 64, 8, 5), mean=True)
        if on is H100:
            for config in TOGETHER:
                yield Case(on, torch.bfloat16, "tma", config, T=128)
        for T in (1, 2, 3, 4) if every else (4,):
            yield Case(on, torch.bfloat16, "vectors", T=T)
        for name, launch in by_grams(on, every):
            yield Recorded(on, name, launch)
        if every or on is not A100:  # H100 has the same sources and constants
            yield from streaming(on, every)
            yield from scaled(on, every)
        yield from projected(on, every)


def _widest_with_mean(on: Hardware, itemsize: int, loads: Loads) -> int:
    widths = [config.BLOCK_I for *table, config in configs(on) if table == [itemsize, loads]]
    return max(width for width in widths if width <= widest_with_mean(on, itemsize))


def plain(on: Hardware) -> Iterator[Case | Projected | Recorded]:
    """Every configuration of one architecture, without options, and all that streams."""
    yield from (case for case in cases(every=False) if case.on is on)
    if on is A100:
        yield from streaming(on, every=False)
        yield from scaled(on, every=False)
    for itemsize, loads, config in configs(on):
        yield Case(on, torch.bfloat16 if itemsize == 2 else torch.float32, loads, config)
    yield from (case for case in projected(on, every=True) if isinstance(case, Projected) and case.T == 512)


@dataclass(frozen=True)
class Recorded:
    """A launch that a launcher without :class:`Launch` made of small tensors on the CPU."""

    on: Hardware
    name: str
    prepared: Launch

    def __str__(self) -> str:
        return f"{self.on.family} {self.name}"

    def launch(self) -> Launch:
        return self.prepared


def by_grams(on: Hardware, every: bool) -> Iterator[tuple[str, Launch]]:
    """What sums over groups launch for short examples, by dtype and positions."""
    for dtype in (torch.bfloat16, torch.float32) if every else (torch.bfloat16,):
        for T in (16, 32, 64) if every else (64,):
            x, g = (torch.empty(8, T, 4096, dtype=dtype, device="meta") for _ in range(2))
            problem = group.Operands(x, g, None, torch.empty(4096, device="meta")).problem
            of_positions, of_groups = launches_by_grams(x, g, problem, on)[0]
            yield f"{NAMES[dtype]} grams T{T} positions", of_positions
            yield f"{NAMES[dtype]} grams T{T} groups", of_groups


@dataclass(frozen=True)
class Projected:
    """Everything about projections on directions that the compiled code depends on."""

    on: Hardware
    dtype: torch.dtype  # that is multiplied
    cut: Cut
    tf32: bool = False
    half: bool = False  # factors of float16, which float32 directions are multiplied with
    pieces: int = 1
    transposed: bool = False
    T: int = 512

    def __str__(self) -> str:
        tiles = "x".join(map(str, (self.cut.config.ROWS, self.cut.config.BLOCK_K, self.cut.config.BLOCK_F)))
        options = {
            f"{self.pieces} pieces": self.pieces > 1, "transposed": self.transposed, "tf32": self.tf32,
            "of fp16": self.half,
        }  # fmt: skip
        words = [name for name, value in options.items() if value]
        return " ".join([self.on.family, NAMES[self.dtype], self.cut.loads, tiles, f"projections T{self.T}", *words])

    def launches(self) -> list[Launch]:
        odd = self.cut.loads == "elements"
        F, K = 4096 + odd, self.cut.config.BLOCK_K - odd
        dtype = torch.float16 if self.half else self.dtype
        x, g = (torch.empty(64, self.T, F, dtype=dtype, device="meta") for _ in range(2))
        v, u = (torch.empty(self.pieces, F, K, dtype=self.dtype, device="meta") for _ in range(2))
        if self.transposed:
            v, u = v.mT.contiguous().mT, u.mT.contiguous().mT
        counted, out = torch.empty(64, self.T, dtype=torch.bool, device="meta"), torch.empty(3, K, device="meta")
        return projections.launches(projections.Operands(x, g, v, u, counted, out, self.tf32), self.on, self.cut)

    def launch(self) -> Launch:
        return self.launches()[0]


def projected(on: Hardware, every: bool) -> Iterator[Projected | Recorded]:
    """Projections by all tiles, for long and short examples, or by the widest; and what adds up their sums."""
    seen, lines = set(), {}
    for kind, loads, config in projection_configs(on):
        widest = (kind, loads) not in seen
        seen.add((kind, loads))
        usual = widest and loads != "elements" and (kind == "16 bits" or on is H100)
        dtype = torch.bfloat16 if kind == "16 bits" else torch.float32
        for T in (512, 16) if every else (512,) if usual else ():
            of_columns = kind == "tf32" and loads == "tma"  # as the launcher brings them
            cut = Cut(loads, min(T, config.ROWS), config)
            case = Projected(on, dtype, cut, tf32=kind == "tf32", transposed=of_columns, T=T)
            yield case
            lines.setdefault(T, case.launches()[1])  # those of the first tile, which is among the widest
            if every and widest and kind == "16 bits":
                yield replace(case, pieces=3)
                yield replace(case, transposed=True)
            if every and widest and kind == "float32" and on is not MI300:
                yield replace(case, half=True)
    for T, launch in lines.items():
        yield Recorded(on, f"fp32 lines T{T}", launch)


def scaled(on: Hardware, every: bool) -> Iterator[Recorded]:
    """Scales, with and without a norm, by dtype and features; and what adds up their sums."""
    calls = {"rms 2048": ("rms", 2048)}
    if every:
        calls |= {"layer 768": ("layer", 768), "rms 128": ("rms", 128), "layer 16384": ("layer", 16384)}
        calls |= {"products": (None, 4096), "shifts": (None, 4096)}
    squares = []
    for dtype in (torch.bfloat16, torch.float32) if every else (torch.bfloat16,):
        for name, (norm, D) in calls.items():
            g = torch.empty(8, 512, D, dtype=dtype, device="meta")
            x = None if name == "shifts" else torch.empty_like(g)
            out = torch.empty(D, device="meta")
            of_positions, of_examples = scales.launches(scales.Operands(x, g, norm, 1e-6, dtype, out), on)
            yield Recorded(on, f"{NAMES[dtype]} scales {name} sums", of_positions)
            squares.append(of_examples)
    yield Recorded(on, "fp32 scales squares", squares[0])


def streaming(on: Hardware, every: bool) -> Iterator[Recorded]:
    """Streaming top-k and the masked steps, which are alike on all architectures."""
    for name, launch in others(every):
        yield Recorded(on, name, launch)


def others(every: bool) -> Iterator[tuple[str, Launch]]:
    """What streaming top-k, histograms and the masked steps launch, by dtype and what they were given."""
    # (dtype, whether at addresses of 16 bytes, whether the largest)
    pools = [(torch.float32, True, True)]
    if every:
        pools += [(torch.float32, True, False), (torch.float32, False, True)]
        pools += [(dtype, aligned, True) for dtype in (torch.bfloat16, torch.float16) for aligned in (True, False)]
    for dtype, aligned, largest in pools:
        pool = topk._Pool([torch.zeros(2**17, dtype=dtype)[0 if aligned else 1 :]], largest=largest)
        bits = torch.zeros(pool.chunks, topk._WORDS, dtype=torch.int32)
        counts = torch.ones(pool.chunks, dtype=torch.int32)
        words = torch.ones(64, dtype=torch.int32)
        read = topk._Pass(counts, counts, counts, [0, 0, 0, 64], bits, words, words, [64])
        said = ["topk", *(["smallest"] if not largest else []), *(["odd"] if not aligned else [])]
        calls = {
            "select": partial(pool._pass, 0.0, 1.0, 64),
            "collect": partial(pool._collected, read),
            "sample": partial(pool._bracket, 1),
            "ties": partial(pool._take_ties, bits, counts, counts, 1, 0.0),
        }
        for name, call in calls.items():
            yield " ".join([NAMES[dtype], *said, name]), launched(call)
    for dtype in (torch.int32, torch.int64) if every else (torch.int32,):
        yield f"{NAMES[dtype]} topk emit", launched(partial(pool.emit, bits, counts, dtype))

    edges = torch.linspace(-12, 0, 65, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if every else (torch.float32,):
        yield f"{NAMES[dtype]} histogram", launched(partial(log_histogram, torch.zeros(4096, dtype=dtype), edges))

    steps, scalars = torch.ones(1), {"lr": 0.1, "weight_decay": 0.1}
    adamw, sgd = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}, {"momentum": 0.9, "nesterov": True}
    for dtype, full in ((torch.float32, False), (torch.bfloat16, True)):
        params, grads = [torch.zeros(4096, dtype=dtype)], [torch.zeros(4096, dtype=dtype)]
        indices, state, kept = [None], torch.zeros(4096), scalars
        if full:
            indices, state = [torch.arange(1024, dtype=torch.int32)], torch.zeros(1024)
            kept = {**scalars, "master": state, "starts": state, "scale": torch.ones(()), "maximize": True}
        tensors, rest = (params, grads, indices), " full" if full else ""
        step = partial(masked_adamw_, *tensors, state, state, steps, **adamw, **kept)
        yield f"{NAMES[dtype]} adamw{rest}", launched(step)
        momentum = (state, sgd) if full else (None, {})
        step = partial(masked_sgd_, *tensors, momentum[0], steps, **momentum[1], **kept)
        yield f"{NAMES[dtype]} sgd{rest}", launched(step)


def launched(run: Callable[[], object]) -> Launch:
    """What a launcher launches, once; nothing is run, so that results are whatever they were."""
    prepared = []

    def record(kernel: JITFunction, *given: object, grid: tuple[int, ...], warmup: bool, **named: object) -> None:
        arguments = dict(zip(kernel.arg_names, given, strict=False)) | named
        options = {name: arguments.pop(name) for name in named.keys() - set(kernel.arg_names)}
        prepared.append(Launch(kernel, grid, arguments, options))

    with patch.object(JITFunction, "run", record), suppress(ArithmeticError):  # of results that are NaN
        run()
    (launch,) = prepared
    return launch


def planted() -> Iterator[Case]:
    """Tiles whose accumulators no register file holds: for each architecture, and what multiplies otherwise."""
    yield Case(A100, torch.bfloat16, "vectors", Config(128, 256, 32, 4, 3))
    yield Case(H100, torch.bfloat16, "tma", Config(128, 256, 64, 4, 3))
    yield Case(MI300, torch.bfloat16, "vectors", Config(256, 256, 32, 4, 2))
    yield Case(A100, torch.float32, "vectors", Config(128, 256, 16, 4, 3))


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile ahead of time what Triton would specialise at the launch."""
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = launch.arguments.get(parameter.name)
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            tensor = isinstance(value, torch.Tensor)
            wide = not tensor and value >= 2**31
            signature[parameter.name] = f"*{NAMES[value.dtype]}" if tensor else "i64" if wide else "i32"
            if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                attributes[(number,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=launch.options)


def calls(on: Hardware) -> Iterator[Launch]:
    """All that the benchmark's calls launch: splits, swapped sides, results that are overwritten."""
    from benchmarks.cases import project_sum_squared
    from benchmarks.cases.sum_grad_squared import CASES, DTYPES, lognormal_offsets

    for case in CASES.values():
        dtype, offsets = DTYPES[case.dtype], None
        x, g = (torch.empty(case.N, case.T, width, dtype=dtype, device="meta") for width in (case.I, case.O))
        if case.grads == "transposed":
            g = torch.empty(*g.mT.shape, dtype=dtype, device="meta").mT
        if case.lengths != "equal":
            x, g, offsets = x.flatten(0, 1), g.flatten(0, 1), lognormal_offsets(case.N, case.N * case.T)
        out = torch.empty(case.O, case.I, device="meta")
        mean = torch.empty_like(out) if case.mean else None
        for add in (True, False):
            yield from launches(Operands(x, g, offsets, out, mean, add=add, allow_tf32=case.allow_tf32), on)
    for case in project_sum_squared.CASES.values():
        dtype, of_directions = DTYPES[case.dtype], DTYPES[case.directions]
        x, g = (torch.empty(case.N, case.T, side, dtype=dtype, device="meta") for side in (case.I, case.O))
        V, U = (torch.empty(side, case.K, dtype=of_directions, device="meta") for side in (case.I, case.O))
        counted, out = (
            torch.empty(case.N, case.T, dtype=torch.bool, device="meta"),
            torch.empty(3, case.K, device="meta"),
        )
        for operands in projections.prepared(x, g, V, U, counted, out, allow_tf32=case.allow_tf32, on=on):
            yield from projections.launches(operands, on)


def main(command: str, which: str = "some") -> None:
    if command == "calls":
        compiled = [compile_launch(launch, TARGETS[on.family]) for on in (A100, H100, MI300) for launch in calls(on)]
        print(json.dumps({"triton": triton.__version__, "compiled": len(compiled)}))
        return
    if command == "relatives":
        compiled = {
            f"{name} {case}": compile_launch(case.launch(), target)
            for name, (on, target) in RELATIVES.items()
            for case in plain(on)
        }
        print(json.dumps({name: kernel.metadata.shared for name, kernel in compiled.items()}))
        return
    every = command == "record" or which == "all"
    selected = planted() if command == "planted" else cases(every)
    if command == "record" and which != "some":
        selected = [case for case in selected if which in str(case).split()]
    taken, counted = {}, {}
    for case in selected:
        compiled = compile_launch(case.launch(), TARGETS[case.on.family])
        taken[str(case)] = resources(compiled)
        if isinstance(case, Case) and case.counted:
            counted[str(case)] = instructions(compiled)
    if command in ("compile", "planted"):
        print(json.dumps({"triton": triton.__version__, "taken": taken, "instructions": counted}))
        return
    for path, values in ((RESOURCES, taken), (INSTRUCTIONS, counted)):
        record(path, values, which)


def record(path: Path, taken: dict[str, dict[str, int]], which: str = "some") -> None:
    """Write a table of this version of Triton, or its cases with a word in their names, one in a line."""
    records = json.loads(path.read_text()) if path.exists() else {}
    kept = records.get(triton.__version__, {}) if which != "some" else {}
    records[triton.__version__] = {name: values for name, values in kept.items() if which not in name.split()} | taken
    lines = [
        f'  "{version}": {{\n'
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(records[version].items()))
        + "\n  }"
        for version in sorted(records)
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
