"""A checkpoint whose weights are the Fisher information, for tools of quantisation that read one."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import torch

from fishkern import hosts
from fishkern.files import AnyTensor, atomic_folder, atomic_write, check_new_folder, write_one
from fishkern.layers import UnsupportedModuleError
from fishkern.names import listed, renamed, without_wrappers
from fishkern.statistics import Statistics

LIST = "fisher.json"


def export_fisher(statistics: Statistics, model: torch.nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a checkpoint of the model's architecture whose weights are the Fisher information.

    SqueezeLLM reads one (``--model`` of its ``chunk_models.py``): squares of gradients in the place of weights, loaded
    by ``from_pretrained``. As in the files of its own script, what has no statistics keeps the model's values (norms,
    embeddings); ``fisher.json`` lists which tensors are the Fisher information. Tied weights stand under each of their
    names. The config asks for float32, since most of a Fisher information is zero in float16.

    Its script sums over the examples, and statistics are means: a weighted k-means does not change by a factor.

    Args:
        statistics: One number for each entry; lazily loaded ones are read piece by piece.
        model: A model of transformers, with the names of the statistics.
        folder: New or empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is not empty.
        FileNotFoundError: The folder that it is in does not exist.
        ValueError: The statistics are of other parameters or shapes, or of groups; or a tied weight has two.
        UnsupportedModuleError: The model is sharded, is none of transformers, or has an adapter of PEFT.
    """
    folder = check_new_folder(folder)
    plain = hosts.unwrap(model)
    if reason := hosts.sharded(plain):
        raise UnsupportedModuleError(f"{reason}.")
    if not hasattr(getattr(plain, "config", None), "save_pretrained"):
        raise UnsupportedModuleError(f"{type(plain).__name__} has no config of transformers, which a loader needs.")
    if hasattr(plain, "peft_config"):
        raise UnsupportedModuleError(
            f"{type(plain).__name__} has an adapter of PEFT, whose names no loader of a whole model reads: merge it "
            "(model.merge_and_unload()), and estimate the merged model."
        )
    if "groups" in statistics.provenance["definition"]:
        raise ValueError("a checkpoint has one number for each entry, and these statistics are of groups.")
    tensors, written = _tensors(statistics, plain)
    config = copy.deepcopy(plain.config)
    config.dtype = torch.float32
    with atomic_folder(folder) as temporary:
        config.save_pretrained(temporary)
        with atomic_write(temporary / LIST, "w") as file:
            json.dump({"fisher": written, "count": statistics.count, **statistics.provenance}, file, indent=2)
        write_one(temporary / "model.safetensors", tensors, {"format": "pt"})
    return folder


def _tensors(statistics: Statistics, model: torch.nn.Module) -> tuple[dict[str, AnyTensor], list[str]]:
    """Give every tensor of the state by name, and the names of those that are the Fisher information."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in hosts.named_parameters(model, remove_duplicate=False).items():
        names.setdefault(parameter, []).append(name)
    scores: dict[str, AnyTensor] = {}
    for parameter, aliases in names.items():
        if not (given := [name for name in aliases if name in statistics]):
            continue
        if len(given) > 1:
            raise ValueError(f"{listed(given)} are one parameter with statistics under each name: leave one out.")
        if statistics.shapes[given[0]] != parameter.shape:
            raise ValueError(
                f"the statistics hold {given[0]} with shape {tuple(statistics.shapes[given[0]])}, the model has "
                f"{tuple(parameter.shape)}."
            )
        scores |= dict.fromkeys(aliases, statistics.blocks[given[0]])
    if missing := [name for name in statistics if name not in scores]:
        raise ValueError(f"{type(model).__name__} has no parameter {listed(missing)}: rename the statistics.")
    state = renamed(model.state_dict(), without_wrappers)
    return {name: scores.get(name, tensor) for name, tensor in state.items()}, [
        name for name in state if name in scores
    ]
