"""Everything that the comparison needs on a machine without this one's files: 16-bit weights, tokenizers, parquet.

    python -m benchmarks.studies.starts.weights --data FOLDER [--into carry]

The folder is one that git ignores, and stays below 50 MiB. Weights are rounded to float16 and read back as float32, so
runs with them are another model than runs with the originals; their records name the folder of the model.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.engine import ROOT
from benchmarks.studies.glue.data import packaged_encoder
from benchmarks.studies.starts.setting import SETTINGS

MOST = 50 * 2**20  # bytes
TOKENIZER = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
TOKENIZER += ("special_tokens_map.json", "tokenizer.model")


def main(arguments: list[str] | None = None) -> int:
    """Write the folder, and say how to use it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.starts.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="GLUE: holds sst2/train.parquet etc."
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="stories260K; by default in ../models of the data")
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT; by default the packaged MiniLM")
    parser.add_argument("--into", type=Path, default=ROOT / "carry", metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args(arguments)
    if not ignored(given.into):
        parser.error(f"git does not ignore {given.into}, and weights do not belong into it: name an ignored folder.")
    half(given.model or given.data.parent / "models" / "stories260K", given.into / "models" / "stories260K-f16")
    half(given.encoder or packaged_encoder(), given.into / "models" / "minilm-f16")
    for task in {setting.texts for setting in SETTINGS.values()}:
        (given.into / "glue" / task).mkdir(parents=True, exist_ok=True)
        for part in ("train", "validation"):
            shutil.copyfile(given.data / task / f"{part}.parquet", given.into / "glue" / task / f"{part}.parquet")
    size = sum(path.stat().st_size for path in given.into.rglob("*") if path.is_file())
    print(f"{given.into}: {size / 2**20:.1f} MiB", file=sys.stderr)
    if size > MOST:
        print(f"that is more than {MOST / 2**20:.0f} MiB", file=sys.stderr)
        return 1
    return 0


def half(source: Path, target: Path) -> None:
    """Copy a model with its tokenizer, the weights as float16."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    rounded = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    if overflown := [name for name, value in rounded.items() if not bool(torch.isfinite(value).all())]:
        raise ValueError(f"{', '.join(overflown)} of {source} have no finite values in float16.")
    save_file(rounded, target / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def ignored(folder: Path) -> bool:
    """Whether git leaves the folder out; one outside the checkout is."""
    if not folder.resolve().is_relative_to(ROOT):
        return True
    return subprocess.run(["git", "check-ignore", "-q", str(folder.resolve() / "models")], cwd=ROOT).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
