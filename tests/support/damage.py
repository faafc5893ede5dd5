"""Damaged files: truncated, with flipped bits, or written to be misread; and the reaction of every loader to them."""

from __future__ import annotations

import io
import json
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fishkern as fk
from fishkern import adapters
from fishkern.freezing.saved import FreezerState
from fishkern.selection import load_start, save_start
from fishkern.statistics import Covered
from fishkern.statistics.checkpoint import Checkpoint
from fishkern.tokens import TokenReduction

DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000
ODD = [None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**60, 2**63, 2**70, "", "x" * 5000, "a\nb\x1b[2J", "\ud800",
       [], {}, [[]], [-1], [2**60, 2**60], [0, 2**62], [1] * 500, {"a": {}}]  # fmt: skip


@dataclass(frozen=True)
class Loader:
    """A function that loads files of one kind, and one that writes a good file.

    Attributes:
        load: Takes the path of a file, and uses all of its content.
        write: Writes a good file, or shards with an index, and returns the path to load.
    """

    load: Callable[[Path], Any]
    write: Callable[[Path], Path]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3), nn.Linear(3, 4))


def selection() -> fk.Selection:
    """Indices, bits, all, none and ranges of a parameter."""
    shapes = {name: parameter.shape for name, parameter in small_model().named_parameters()}
    held = {"0.weight": torch.arange(0, 2000, 97), "1.weight": torch.arange(0, 150, 2)}
    ranges = {"2.weight": fk.Columns((1, 3)), "2.bias": fk.Rows((0, 1), (2, 4))}
    provenance = {"rule": {"name": "Mine"}, "k": 3}
    return fk.Selection(shapes, held, whole=["1.bias"], ranges=ranges, provenance=provenance)


def statistics() -> fk.Statistics:
    tensors = {name: parameter.detach().abs() for name, parameter in small_model().named_parameters()}
    coverage = {name: Covered("fused", tensor.numel()) for name, tensor in tensors.items()}
    precision = fk.statistics.Precision(3, 2, 2219, 2219, 1.5, {0.05: 2.5, 0.1: 1.25})
    provenance = {"runs": [{"seed": 0}]}
    return fk.Statistics(tensors, count=3, provenance=provenance, coverage=coverage, precision=precision)


def optimizer(cls: type = fk.MaskedAdamW) -> torch.optim.Optimizer:
    model = small_model().bfloat16()
    optimizer = cls(model, selection(), lr=0.1, **({"momentum": 0.9} if cls is fk.MaskedSGD else {}))
    model(torch.ones(2, 40, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return optimizer


def read_all(path: Path, *, lazy: bool) -> None:
    statistics = fk.Statistics.load(path, lazy=lazy)
    repr(statistics)
    for name in statistics:
        statistics[name]


def load_selection(path: Path) -> None:
    selection = fk.Selection.load(path)
    repr(selection)
    selection.check(small_model())


def load_delta(path: Path) -> None:
    delta = fk.Delta.load(path)
    repr(delta)
    fk.apply_delta(small_model(), delta)


def load_update(path: Path) -> None:
    update = fk.DeltaUpdate.load(path)
    repr(update)
    reader = fk.DeltaReader()
    reader.apply(fk.DeltaUpdate(0, *_moved(selection())), small_model())
    reader.apply(update, small_model())


def write_update(path: Path) -> Path:
    """One that changes the entries: those of before, and ones of its own."""
    fewer = selection() - fk.Selection({"0.weight": (50, 40)}, {"0.weight": torch.arange(400)})
    stream = fk.Delta.stream(small_model())
    stream.update(selection())
    return stream.update(fewer).save(path)


def write_changed_values(path: Path) -> Path:
    """One of values alone, of a few of the entries before."""
    model = small_model()
    stream = fk.Delta.stream(model)
    stream.update(selection())
    with torch.no_grad():
        model[0].weight.view(-1)[:500] += 1
        model[1].bias += 1
    return stream.update(selection()).save(path)


def _moved(of: fk.Selection) -> tuple[dict[str, Any], dict[str, Any]]:
    entries = {name: of.entries(name) for name, count in of.counts.items() if count}
    return {name: torch.zeros(one.count) for name, one in entries.items()}, entries


def load_adapter(path: Path) -> None:
    from tests.support import zoo  # needs transformers, as no other loader does

    adapters.load(zoo.bert_classifier().model, path)


def write_adapter(path: Path) -> Path:
    from tests.support import zoo

    model, adapter = zoo.bert_classifier().model, adapters.UniPELTAdapter()
    adapters.attach(model, adapter)
    return adapters.save(model, adapter, path)


def adapter_init() -> fk.AdapterInit:
    modules = {
        path: fk.ModuleInit(torch.ones(rank, width), torch.ones(height, rank), 2.0, torch.arange(rank))
        for path, (rank, height, width) in {"0": (4, 50, 40), "1": (2, 3, 50)}.items()
    }
    return fk.AdapterInit(modules, digests={"0": (1.5, -0.5), "1": (2.5, 1.0)}, provenance={"rule": {"name": "Mine"}})


def load_adapter_init(path: Path) -> None:
    init = fk.AdapterInit.load(path)
    repr(init)
    for module in init.values():
        module.delta()


def energies() -> fk.Energies:
    tensors = {}
    for name, (height, width) in {"0.weight": (50, 40), "1.weight": (3, 50)}.items():
        K = min(height, width)
        tensors |= {f"{name}/{part}": torch.ones(K) for part in ("input", "output", "joint", "singular_values")}
        tensors[f"{name}/positions"] = torch.tensor(6.5)
        tensors[f"{name}/matrix"] = torch.tensor([height, width, 1.5, -0.5])
        tensors[f"{name}/grams"] = torch.ones(2, K, K)
    coverage = {name: Covered("fused", 3) for name in ("0.weight", "1.weight")}
    return fk.Energies(tensors, count=3, provenance={"runs": [{"seed": 0}]}, coverage=coverage)


def load_energies(lazy: bool) -> Callable[[Path], None]:
    def load(path: Path) -> None:
        loaded = fk.Energies.load(path, lazy=lazy)
        repr(loaded)
        for one in loaded.values():
            repr(one)
            _ = one.input, one.output, one.joint, one.singular_values, one.importance, one.digest

    return load


def factored() -> fk.FactoredStatistics:
    tensors = {}
    for name, parameter in small_model().named_parameters():
        parts = {"rows": parameter[:, 0], "columns": parameter[0]} if parameter.ndim == 2 else {"values": parameter}
        tensors |= {f"{name}/{part}": tensor.detach().abs() for part, tensor in parts.items()}
        tensors[f"{name}/positions"] = torch.tensor(6.5)
    coverage = {name: Covered("fused", parameter.numel()) for name, parameter in small_model().named_parameters()}
    return fk.FactoredStatistics(tensors, count=3, provenance={"runs": [{"seed": 0}]}, coverage=coverage)


def load_factored(lazy: bool) -> Callable[[Path], None]:
    def load(path: Path) -> None:
        loaded = fk.FactoredStatistics.load(path, lazy=lazy)
        repr(loaded)
        for name in loaded:
            loaded.factors(name)
            loaded[name]

    return load


def write_start(path: Path) -> Path:
    return save_start(small_model(), selection(), path)


def load_optimizer(cls: type) -> Callable[[Path], None]:
    def load(path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # torch.load is called by the user, and its messages are torch's
            raise ValueError("of torch.load") from error
        another = optimizer(cls)
        another.load_state_dict(state)
        another.param_groups[0]["params"][0].grad = None
        another.step()

    return load


def write_optimizer(cls: type) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path = path.with_suffix(".pt")  # torch.load reads a .safetensors by its suffix
        torch.save(optimizer(cls).state_dict(), path)
        return path

    return write


def write_freezer(path: Path) -> Path:
    from tests.support import samples  # imports this one's neighbours, which need transformers

    return samples.freezer_state().save(path)


def load_freezer(path: Path) -> None:
    state = FreezerState.load(path)
    assert FreezerState.selection_in(path) == state.selection
    assert FreezerState.count_in(path) == state.count
    repr(state)
    state.to_plain()


def write_checkpoint(path: Path) -> Path:
    def breaking():
        yield torch.ones(2, 40), torch.tensor([0, 1])
        raise ConnectionError

    try:
        fk.estimate(small_model(), breaking(), likelihood=fk.Classification(), checkpoint=path)
    except ConnectionError:
        return path


def load_checkpoint(path: Path) -> None:
    for tensor in Checkpoint.read(path).tensors.values():
        tensor.read()


LOADERS = {
    "statistics": Loader(lambda path: read_all(path, lazy=False), lambda path: statistics().save(path)),
    "lazy statistics": Loader(lambda path: read_all(path, lazy=True), lambda path: statistics().save(path)),
    "shards": Loader(
        lambda path: read_all(path, lazy=False), lambda path: statistics().save(path, max_shard_size=1000)
    ),
    "selection": Loader(load_selection, lambda path: selection().save(path)),
    "delta": Loader(load_delta, lambda path: fk.delta(small_model(), selection()).save(path)),
    "delta update": Loader(load_update, write_update),
    "delta values": Loader(load_update, write_changed_values),
    "start": Loader(lambda path: load_start(small_model(), path), write_start),
    "energies": Loader(load_energies(lazy=False), lambda path: energies().save(path)),
    "lazy energies": Loader(load_energies(lazy=True), lambda path: energies().save(path, max_shard_size=1000)),
    "factored statistics": Loader(load_factored(lazy=False), lambda path: factored().save(path)),
    "lazy factored statistics": Loader(
        load_factored(lazy=True), lambda path: factored().save(path, max_shard_size=1000)
    ),
    "adapter init": Loader(load_adapter_init, lambda path: adapter_init().save(path)),
    "adapter": Loader(load_adapter, write_adapter),
    "freezer": Loader(load_freezer, write_freezer),
    "token reduction": Loader(
        TokenReduction.load, lambda path: TokenReduction([1, 3], 0.7).save(path.with_suffix(".json"))
    ),
    "checkpoint": Loader(load_checkpoint, write_checkpoint),
    "MaskedAdamW": Loader(load_optimizer(fk.MaskedAdamW), write_optimizer(fk.MaskedAdamW)),
    "MaskedSGD": Loader(load_optimizer(fk.MaskedSGD), write_optimizer(fk.MaskedSGD)),
}


def damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    """Damage the bytes of a file once, in a way that any file or only one of its kind may have."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [_cut, _flipped, _filled, _lengthened]
    if kind.endswith(".index.json"):
        ways += [_odd_index] * 4
    elif kind.endswith(".json"):
        ways += [_odd_json] * 4
    elif content[:2] == b"PK":
        ways += [_odd_state] * 8
    else:
        ways += [_odd_header, _odd_metadata, _odd_entry, _twice, _odd_length] * 2
    return rng.choice(ways)(content, rng)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(content)
    end = len(flipped) if rng.random() < 0.3 else min(len(flipped), 3000)  # most of them in the header
    for _ in range(rng.choice([1, 1, 1, 5, 50])):
        flipped[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _filled(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + rng.choice([b"\0", b"\xff", b"[", b"9"]) * rng.choice([1, 8, 2000]) + content[start + 8 :]


def _lengthened(content: bytes, rng: random.Random) -> bytes:
    return content + bytes(rng.choice([1, 4, 4096]))


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def _odd_header(content: bytes, rng: random.Random) -> bytes:
    header, data = header_of(content)
    value = rng.choice(ODD)
    how = rng.randrange(4)
    if how == 0:
        return file_of(json.dumps(value), data)
    if how == 1:
        return file_of(DEEP, data)
    header[rng.choice([*header, "new" * 2000, "module.0.bias", "\x1b[31m"])] = value
    return file_of(header, data)


def _odd_metadata(content: bytes, rng: random.Random) -> bytes:
    """Replace an entry of the metadata, or a value inside the JSON that it contains."""
    header, data = header_of(content)
    metadata = header["__metadata__"]
    key = rng.choice([key for key in metadata if key != "format"] or ["format"])
    how = rng.randrange(5)
    if how == 0:
        del metadata[key]
    elif how == 1:
        metadata[key] = rng.choice([*map(str, ODD), DEEP, "[" * 100_000, "NaN", "1e999", "9" * 5000, "²", '"\\ud800"'])
    else:
        try:
            metadata[key] = json.dumps(replaced(json.loads(metadata[key]), rng))
        except ValueError:
            metadata[key] = rng.choice(list(map(str, ODD)))
    return file_of(header, data)


def _odd_entry(content: bytes, rng: random.Random) -> bytes:
    """Change the header's entry of one tensor: dtype, shape, or offsets, which may then overlap others."""
    header, data = header_of(content)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    how = rng.randrange(4)
    if how == 0:
        entry["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X", 3])
    elif how == 1:
        entry["shape"] = rng.choice([*ODD, [], [1, *entry["shape"]], [*entry["shape"], 1], entry["shape"][::-1], [0]])
    elif how == 2:
        entry["data_offsets"] = rng.choice([*ODD, [0, 4], [4, 0], [-4, 0], [0, len(data)], [2**60, 2**60 + 4]])
    else:
        other = header[rng.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        entry["dtype"], other["dtype"] = other["dtype"], entry["dtype"]
    return file_of(header, data)


def _twice(content: bytes, rng: random.Random) -> bytes:
    header, data = header_of(content)
    key = rng.choice(list(header))
    return file_of(json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}", data)


def _odd_length(content: bytes, rng: random.Random) -> bytes:
    length = rng.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, len(content)])
    return struct.pack("<Q", length) + content[8:]


def _odd_index(content: bytes, rng: random.Random) -> bytes:
    """Name shards elsewhere, outside the folder, or none; or replace the index by something else."""
    index = json.loads(content)
    names = list(index["weight_map"])
    elsewhere = ["/etc/passwd", "../x.safetensors", "..", ".", "", "a/b", "a\0b", "x" * 5000, "\ud800", "\x1b[2J",
                 "s.safetensors.index.json", "/dev/zero", "loop.safetensors", "folder.safetensors"]  # fmt: skip
    how = rng.randrange(6)
    if how == 0:
        index["weight_map"][rng.choice(names)] = rng.choice([*elsewhere, *ODD])
    elif how == 1:
        one, other = rng.choice(names), rng.choice(names)
        index["weight_map"][one] = index["weight_map"][other]
    elif how == 2:
        del index["weight_map"][rng.choice(names)]
    elif how == 3:
        index["metadata"][rng.choice([*index["metadata"], "more"])] = rng.choice(ODD)
    elif how == 4:
        index = replaced(index, rng)
    else:
        return rng.choice([DEEP.encode(), b"[" * 100_000, b"\xed\xa0\x80", b"\xff\xfe{", b"{}", b"3", b""])
    return json.dumps(index).encode()


def _odd_json(content: bytes, rng: random.Random) -> bytes:
    """Replace values of a JSON file, or all of it."""
    odd = [DEEP.encode(), b"[" * 100_000, b"\xed\xa0\x80", b"\xff\xfe{", b"{}", b"3", b"", content + content]
    return rng.choice([json.dumps(replaced(json.loads(content), rng)).encode()] * 3 + [rng.choice(odd)])


def _odd_state(content: bytes, rng: random.Random) -> bytes:
    """Replace values in the state of an optimizer."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.choice([1, 1, 3])):
        state = replaced(state, rng)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def replaced(value: Any, rng: random.Random) -> Any:
    """Copy a value, with one part of it replaced or missing."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        copy = dict(value)
        key = rng.choice(list(copy))
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = replaced(copy[key], rng)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], replaced(value[place], rng), *value[place + 1 :]]
    tensors = [torch.zeros(()), torch.zeros(3, 3), torch.full((3,), torch.nan), torch.zeros(2, dtype=torch.complex64)]
    if isinstance(value, torch.Tensor):
        return rng.choice([*tensors, value.bool(), value.to(torch.float64), value[None], None, "x", -1, [1]])
    return rng.choice(ODD)


def good_files(name: str, folder: Path) -> tuple[str, dict[str, bytes]]:
    """The name of the file that a loader opens, and the content of all files that belong to it."""
    folder.mkdir()
    opened = LOADERS[name].write(folder / "s.safetensors")
    return opened.name, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tried(name: str, good: tuple[str, dict[str, bytes]], folder: Path, seed: int) -> str | None:
    """Damage a file of one kind, load it, and describe the fault of the loader; ``None`` if it has none.

    A loader must return a value, or raise a ``ValueError``, ``OSError`` or ``MemoryError`` of one short line.
    """
    rng = random.Random(f"{name} {seed}")
    opened, files = good
    victim = rng.choice(list(files))
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(damaged(content, file, rng) if file == victim else content)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    try:
        LOADERS[name].load(folder / opened)
    except (ValueError, OSError, MemoryError) as error:
        text = str(error)
        if isinstance(error, UnicodeError | json.JSONDecodeError) or not text:
            return f"{name} {seed}: {type(error).__name__}: {text[:200]}"
        if not text.isprintable() or len(text) > 700:
            return f"{name} {seed}: not one short line: {text[:200]!r}"
    except Exception as error:
        return f"{name} {seed}: {type(error).__name__}: {str(error)[:200]}"
    return None


def main(cases: int, gibibytes: float) -> None:
    """Try each loader on damaged files, with so much more memory than good ones need, and print the faults."""
    import resource
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        good = {name: good_files(name, Path(folder) / name) for name in LOADERS}
        for name, (opened, _) in good.items():
            LOADERS[name].load(Path(folder) / name / opened)  # imports the packages that are imported late
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name in LOADERS:
            for seed in range(cases):
                if fault := tried(name, good[name], Path(folder) / f"{name}-{seed}", seed):
                    print(fault)
    print(f"{cases * len(LOADERS)} files tried")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
