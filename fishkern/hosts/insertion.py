"""Where modules can be inserted into a transformer layer, and how they are put in and taken out.

A :class:`Wrapper` goes around a part of the layer, as in PEFT: the part becomes its ``base_layer``, with its own
weights and code. What a wrapper computes, and whether it is trained, is up to its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fishkern.names import without_wrappers


@dataclass(frozen=True)
class Branch:
    """One of the two residual branches of a layer, as paths inside the layer.

    Attributes:
        module: The attention module or the MLP; ``None`` if the layer has none, as BERT, which has two linear layers.
        output: The last linear layer; ``None`` if it cannot be wrapped: a mixture of experts has many, and T5 reads the
            weight of its own.
        norm: The norm of the input, if the branch adds ``module(norm(x))`` to ``x``, or ``scale(module(norm(x)))``, and
            nothing else; ``None`` otherwise. Known for vision transformers.
        scale: The layer scale of the output, as in DINOv2; ``None`` if there is none.
    """

    module: str | None
    output: str | None
    norm: str | None = None
    scale: str | None = None


@dataclass(frozen=True)
class InsertionPoints:
    """The parts of a transformer layer that can be wrapped, as paths inside the layer.

    Attributes:
        attention: Self-attention. Cross-attention is not listed.
        projections: The linear layers of queries, keys and values, in this order; a single one if they are fused.
        feed_forward: The feed-forward part.
    """

    attention: Branch
    projections: tuple[str, ...]
    feed_forward: Branch


class Wrapper(nn.Module):
    """A module around a part of a model, which becomes its ``base_layer``.

    A wrapper has no other attributes of the part: a model that reads some of them (ModernBERT does so of its layers)
    needs a wrapper that defines them.

    Args:
        base_layer: The part.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def insertion_points(layer: nn.Module) -> InsertionPoints | None:
    """Recognise the parts of a transformer layer by their names.

    Args:
        layer: A layer, from :func:`fishkern.hosts.stacks`, with or without adapters and wrappers in it.

    Returns:
        The points, or ``None`` if the layer is of no known kind. ``_ATTENTIONS`` and ``_FEED_FORWARDS`` list the known
        ones; any combination of the two will do.
    """
    paths = _paths(layer)
    attention = next((known for known in _ATTENTIONS if known.modules() <= paths.keys()), None)
    feed_forward = next((known for known in _FEED_FORWARDS if known.modules() <= paths.keys()), None)
    if attention is None or feed_forward is None:
        return None
    bare = _is_bare(layer, paths, attention.module)
    norms = next((pair for pair in _NORMS if bare and paths.keys() >= set(pair)), (None, None))
    scales = _SCALES if norms[0] and paths.keys() >= set(_SCALES) else (None, None)

    def branch(part: _Attention | _FeedForward, number: int) -> Branch:
        names = (part.module, part.output, norms[number], scales[number])
        return Branch(*(None if name is None else paths[name] for name in names))

    projections = tuple(paths[f"{attention.module}.{name}"] for name in attention.projections)
    return InsertionPoints(branch(attention, 0), projections, branch(feed_forward, 1))


def insert(model: nn.Module, wrappers: Mapping[str, Wrapper]) -> None:
    """Put wrappers around parts of a model. Nothing is frozen.

    Args:
        model: A model or a part of one, changed in place.
        wrappers: By path in ``model``, each made around the module at this path. A path may be inside another.

    Raises:
        AttributeError: There is no module at a path.
        ValueError: A wrapper was made around another module. Nothing is inserted then.
    """
    for path, wrapper in wrappers.items():
        if model.get_submodule(path) is not wrapper.base_layer:
            raise ValueError(f"the wrapper for {path!r} was made around another module than the one at this path.")
    for path in sorted(wrappers, key=lambda path: path.count("."), reverse=True):  # a wrapper changes the paths inside
        model.set_submodule(path, wrappers[path])


def remove(model: nn.Module, kind: type[Wrapper] = Wrapper) -> None:
    """Take wrappers out, and put the parts that they were made around back.

    Args:
        model: A model or a part of one, changed in place.
        kind: Class of the wrappers; others stay.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a second name of a child
            part = child
            while isinstance(part, kind):
                part = part.base_layer
            if part is not child:
                setattr(parent, name, part)


class _Attention(NamedTuple):
    module: str
    projections: tuple[str, ...]  # inside the module
    output: str

    def modules(self) -> set[str]:
        return {self.module, *(f"{self.module}.{name}" for name in self.projections), self.output}


class _FeedForward(NamedTuple):
    module: str | None
    output: str | None

    def modules(self) -> set[str]:
        return {name for name in self if name is not None}


_QKV = ("q_proj", "k_proj", "v_proj")

_ATTENTIONS = (
    _Attention("self_attn", _QKV, "self_attn.o_proj"),  # LLaMA, Mistral, Mixtral, Qwen, Gemma
    _Attention("self_attn", ("qkv_proj",), "self_attn.o_proj"),  # Phi-3
    _Attention("self_attn", _QKV, "self_attn.out_proj"),  # BART, OPT, Whisper, CLIP, SigLIP
    _Attention("attention", _QKV, "attention.o_proj"),  # ViT, DeiT, BEiT, DINOv2, DINOv3, Swin
    _Attention("attention", _QKV, "attention.out_proj"),  # wav2vec 2.0, HuBERT
    _Attention("attention.self", ("query", "key", "value"), "attention.output.dense"),  # BERT, RoBERTa, ELECTRA
    _Attention("attention.self", ("query_proj", "key_proj", "value_proj"), "attention.output.dense"),  # DeBERTa
    _Attention("attention.attention", ("query", "key", "value"), "attention.output.dense"),  # YOLOS, former ViTs
    _Attention("attention", ("q_lin", "k_lin", "v_lin"), "attention.out_lin"),  # DistilBERT
    _Attention("attention", ("query_key_value",), "attention.dense"),  # GPT-NeoX
    _Attention("self_attention", ("query_key_value",), "self_attention.dense"),  # BLOOM, Falcon
    _Attention("attn", ("c_attn",), "attn.c_proj"),  # GPT-2
    _Attention("attn", ("Wqkv",), "attn.Wo"),  # ModernBERT
    _Attention("layer.0.SelfAttention", ("q", "k", "v"), "layer.0.SelfAttention.o"),  # T5
)

_FEED_FORWARDS = (
    _FeedForward("mlp", "mlp.down_proj"),  # LLaMA, Mistral, Qwen, Gemma, Phi-3, DINOv3, gated DINOv2
    _FeedForward("mlp", "mlp.fc2"),  # ViT, DeiT, BEiT, DINOv2, Swin, CLIP, SigLIP
    _FeedForward("mlp", "mlp.c_proj"),  # GPT-2
    _FeedForward("mlp", "mlp.dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    _FeedForward("mlp", "mlp.Wo"),  # ModernBERT
    _FeedForward("mlp", None),  # Mixtral
    _FeedForward("ffn", "ffn.lin2"),  # DistilBERT
    _FeedForward("feed_forward", "feed_forward.output_dense"),  # wav2vec 2.0, HuBERT
    _FeedForward("layer.2.DenseReluDense", None),  # T5's decoder, which has cross-attention before it
    _FeedForward("layer.1.DenseReluDense", None),  # T5's encoder
    _FeedForward(None, "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    _FeedForward(None, "fc2"),  # BART, OPT, Whisper
)

# Norms before attention and before the MLP: of ViT and DeiT, of DINOv2 and DINOv3, of CLIP and SigLIP.
_NORMS = (("layernorm_before", "layernorm_after"), ("norm1", "norm2"), ("layer_norm1", "layer_norm2"))
_SCALES = ("layer_scale1", "layer_scale2")
_WITHOUT_WEIGHTS = {"dropout", "drop_path"}


def _is_bare(layer: nn.Module, paths: Mapping[str, str], attention: str) -> bool:
    """Whether a layer consists of two branches with a norm each, and nothing else."""
    # BEiT scales its branches by parameters of the layer itself; Swin cuts windows around attention, which shows in the
    # table of positions that attention has. Neither adds module(norm(x)).
    while part := _wrapped(layer):
        _, layer = part
    parts = {attention, "mlp", *_SCALES, *_WITHOUT_WEIGHTS, *(name for pair in _NORMS for name in pair)}
    inside = {name.removeprefix(f"{attention}.") for name in paths if name.startswith(f"{attention}.")}
    return (
        not list(layer.parameters(recurse=False))
        and {name for name, _ in layer.named_children()} <= parts
        and inside <= {*_QKV, "o_proj", "out_proj", "dropout"}
    )


def _paths(layer: nn.Module) -> dict[str, str]:
    """Map the paths that modules have in the bare layer to those that they have under its wrappers."""
    paths: dict[str, str] = {}

    def visit(module: nn.Module, name: str, path: str) -> None:
        paths.setdefault(name, path)  # of a part and its wrappers, the outermost
        if part := _wrapped(module):
            visit(part[1], name, _joined(path, part[0]))
        else:
            for child, inner in module.named_children():
                visit(inner, _joined(name, child), _joined(path, child))

    visit(layer, "", "")
    return paths


def _wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the child that a wrapper (ours, PEFT's or torch's) was made around, with its name."""
    for name, child in module.named_children():
        if name == "base_layer" or without_wrappers(f"{name}.weight") == "weight":  # a name that torch's wrappers add
            return name, child
    return None


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
