"""Scores in files: refusals, and, in a sparse file, more scores than 32 bits can count."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fishkern.backend import BackendUnavailableError
from fishkern.files import Format, open_tensors, save_tensors
from fishkern.ops import streaming_topk

FORMAT = Format("fishkern.test", version=1, saved_by="Test.save")
LARGE = 2**31 + 2**22 + 77  # its last indices need int64
SMALL = 2**31 - 1


@pytest.fixture
def stored(tmp_path: Path) -> list:
    save_tensors(tmp_path / "scores", {"a": torch.rand(100)}, format=FORMAT, metadata={})
    return list(open_tensors(tmp_path / "scores", format=FORMAT)[1].values())


def test_a_file_that_changes_is_noticed(stored: list, tmp_path: Path):
    (tmp_path / "scores.safetensors").write_bytes(b"other")
    with pytest.raises(RuntimeError, match="has changed since it was opened: load it again"):
        streaming_topk(stored, 3)
    (tmp_path / "scores.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is gone since it was opened: load it again"):
        streaming_topk(stored, 3)


def test_a_file_does_not_go_through_triton(stored: list):
    with pytest.raises(BackendUnavailableError, match="streaming_topk cannot run on Triton"):
        streaming_topk([*stored, torch.rand(3)], 3, backend="triton")


@pytest.fixture
def scores(tmp_path: Path):
    """Two tensors of bfloat16 zeros with some positive scores, by place: a score's place decides its value."""
    places = {"large": [0, 5, 2**31 - 1, 2**31, 2**31 + 1, LARGE - 1], "small": [0, 2**30, SMALL - 1]}
    sizes = {"large": LARGE, "small": SMALL}
    header, start = {"__metadata__": {"format": FORMAT.name, "format_version": "1"}}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size], "data_offsets": [start, start + 2 * size]}
        start += 2 * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "scores.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, written in places.items():
            for rank, place in enumerate(written):
                file.seek(8 + len(text) + header[name]["data_offsets"][0] + 2 * place)
                file.write(torch.tensor([1.0 + rank % 2]).bfloat16().view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + start)
    if os.stat(path).st_blocks * 512 > 2**30:
        pytest.skip("the file system keeps no sparse files")
    stored = open_tensors(path, format=FORMAT)[1]
    return [stored["large"], stored["small"]], places


@pytest.mark.slow
def test_past_2_to_the_31(scores):
    blocks, places = scores
    large, small = streaming_topk(blocks, 4)  # the twos
    assert (large.dtype, small.dtype) == (torch.int64, torch.int32)
    assert large.tolist() == places["large"][1::2]
    assert small.tolist() == places["small"][1::2]
    large, small = streaming_topk(blocks, 7)  # and the first three ones
    assert large.tolist() == sorted([*places["large"][1::2], *places["large"][::2]])
    assert small.tolist() == places["small"][1::2]


@pytest.mark.slow
def test_ties_past_2_to_the_31(scores):
    """Two thousand of four billion zeros: the first ones."""
    blocks, places = scores
    large, small = streaming_topk(blocks, 2009)
    assert small.tolist() == places["small"]
    zeros = [index for index in range(2002) if index not in places["large"]][:2000]
    assert large.tolist() == sorted([*zeros, *places["large"]])


@pytest.mark.slow
@pytest.mark.gpu
def test_past_2_to_the_31_on_a_gpu():
    scores = torch.zeros(LARGE, dtype=torch.bfloat16, device="cuda")
    places = [3, 2**31 - 1, 2**31, LARGE - 1]
    scores[torch.tensor(places, device="cuda")] = 1.0
    for backend in ("triton", "torch"):
        few, none = streaming_topk([scores, scores[:100]], 6, backend=backend)
        assert (few.dtype, none.dtype) == (torch.int64, torch.int32)
        assert few.tolist() == [0, *places]
        assert none.tolist() == [3]
