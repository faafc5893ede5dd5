"""What a comparison needs on a machine without this one's files: 16-bit weights, tokenizers, parquet files.

    python -m benchmarks carry starts --data DATA

Each set is a folder of its own in ``carry/``, which git ignores, and stays below 50 MiB. Weights of 32 bits are rounded
to float16, and all are read back as float32. So runs with rounded weights are those of another model, and their
records name its folder. Those of the vision transformer have 16 bits already and stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine import ROOT
from benchmarks.studies.glue.data import packaged_encoder

MOST = 50 * 2**20  # bytes
WEIGHTS = "model.safetensors", "decoder.safetensors"
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
BESIDE += ("special_tokens_map.json", "tokenizer.model")


@dataclass(frozen=True)
class Contents:
    """What a comparison reads.

    Args:
        says: For which comparison it is.
        models: Folders below ``models``, by the names that they get.
        tables: Folders of parquet files, below the data.
        encoder: Whether MiniLM is needed.
    """

    says: str
    models: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    encoder: bool = False


ROUNDED = "-f16"  # end of the name of a model whose weights are not the original's
VISION = "dinov2_small_focus"
SETS = {
    "starts": Contents("starts", (f"stories260K{ROUNDED}",), ("glue/sst2", "glue/cola"), encoder=True),
    "freezing": Contents("freezing, the tasks of MiniLM", (), ("glue/sst2",), encoder=True),
    "nuclei": Contents("freezing --task nuclei", (VISION,), ("vision/dsb2018_nuclei",)),
    "tr-pts": Contents("tr-pts", (VISION,), ("vision/cifar10_slice",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a folder for each set, and say how large it is."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not ignored(given.into):
        parser.error(f"git does not ignore {given.into}, and weights do not belong into it: name an ignored folder.")
    status = 0
    for name in given.sets:
        size = sum(path.stat().st_size for path in write(SETS[name], given.data, given.into / name, given.encoder))
        print(f"{given.into / name}: {size / 2**20:.1f} MiB, for {SETS[name].says}", file=sys.stderr)
        if size > MOST:
            print(f"that is more than {MOST / 2**20:.0f} MiB", file=sys.stderr)
            status = 1
    return status


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:12} for {contents.says}" for name, contents in SETS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks carry",
        description=__doc__,
        epilog="\n".join(["sets:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sets", nargs="+", choices=list(SETS), metavar="SET", help="one or more of those below")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="holds what is needed of glue, vision and models"
    )
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT; by default the packaged MiniLM")
    parser.add_argument("--into", type=Path, default=ROOT / "carry", metavar="FOLDER", help="default: %(default)s")
    return parser


def write(contents: Contents, data: Path, into: Path, encoder: Path | None = None) -> list[Path]:
    """Write what a comparison reads, in the places where it looks for it.

    Args:
        contents: What.
        data: Holds the originals.
        into: The folder.
        encoder: A BERT; None: the packaged MiniLM.

    Returns:
        The files.
    """
    sources = {name: data / "models" / name.removesuffix(ROUNDED) for name in contents.models}
    if contents.encoder:
        sources[f"minilm{ROUNDED}"] = encoder or packaged_encoder()
    files = [path for name, source in sources.items() for path in half(source, into / "models" / name)]
    for table in contents.tables:
        files += _copied(data / table, into / table, [path.name for path in (data / table).glob("*.parquet")])
    return files


def half(source: Path, target: Path) -> list[Path]:
    """Copy a model with what is beside its weights; those of more than 16 bits become float16."""
    from safetensors.torch import load_file, save_file

    files = _copied(source, target, [name for name in BESIDE if (source / name).exists()])
    for weights in (path for name in WEIGHTS if (path := source / name).exists()):
        tensors = load_file(weights)
        wide = [name for name, value in tensors.items() if value.dtype in (torch.float32, torch.float64)]
        tensors |= {name: tensors[name].half() for name in wide}
        if overflown := [name for name in wide if not bool(torch.isfinite(tensors[name]).all())]:
            raise ValueError(f"{', '.join(overflown)} of {source} have no finite values in float16.")
        save_file(tensors, target / weights.name, metadata={"format": "pt"})
        files.append(target / weights.name)
    return files


def _copied(source: Path, target: Path, names: Sequence[str]) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return [target / name for name in names]


def ignored(folder: Path) -> bool:
    """Whether git leaves the folder out; one outside the checkout is."""
    if not folder.resolve().is_relative_to(ROOT):
        return True
    return subprocess.run(["git", "check-ignore", "-q", str(folder.resolve() / "models")], cwd=ROOT).returncode == 0
