"""From a module's activations and output gradients to per-example gradients."""

from fishkern.layers.adapted_experts import AdaptedExperts
from fishkern.layers.as_found import as_found
from fishkern.layers.base import Call, Layer, own_parameters, positions
from fishkern.layers.capture import Capture
from fishkern.layers.columns import Columns, columns_of
from fishkern.layers.convolution import Convolution
from fishkern.layers.documents import Documents, Span
from fishkern.layers.embedding import Embedding
from fishkern.layers.experts import Experts, are_experts
from fishkern.layers.grads import (
    DenseGrads,
    EmbeddingGrads,
    Factors,
    OuterProductGrads,
    PerExampleGrads,
    PositionGrads,
    SummedGrads,
    TiedRows,
    join,
)
from fishkern.layers.groups import Groups, group_shape, group_squares
from fishkern.layers.hooks import Arrival, Hooks, hooks_of_others
from fishkern.layers.layer_norm import LayerNorm
from fishkern.layers.linear import Conv1D, Linear, QuantizedLinear, weight_shape
from fishkern.layers.linear_maps import LinearMap, linear_maps
from fishkern.layers.packed_capture import PackedCapture, capture_of
from fishkern.layers.packed_grads import PackedEmbeddingGrads, PackedOuterProductGrads, PackedPositionGrads
from fishkern.layers.parts import Part, of_part
from fishkern.layers.path_plan import Plan
from fishkern.layers.planner import Whole
from fishkern.layers.quantized import (
    gradient_kept,
    has_gradient_dtype,
    is_stored,
    is_wrapped,
    scored_tensors,
    stored_weights,
)
from fishkern.layers.reentrant import Connection
from fishkern.layers.replay import Replay, groups
from fishkern.layers.routed import RoutedBiasGrads, RoutedGrads, Routes
from fishkern.layers.router import Router
from fishkern.layers.row_order import ONE_EACH, RowOrder
from fishkern.layers.rules import LAYERS
from fishkern.layers.scale import Factor, LayerNormScale, OnePlusFactor, RMSScale, Scale
from fishkern.layers.site import Layout, Site
from fishkern.layers.strays import Strays
from fishkern.layers.survey import foresee, hooked_parameters, served_by_rule, survey
from fishkern.layers.twins import ResidualA, ResidualB, TwinA, TwinB, Twins
from fishkern.layers.unsupported import UnsupportedModuleError, leave_out, without_gradient
from fishkern.layers.watch import watch

__all__ = [
    "LAYERS",
    "ONE_EACH",
    "AdaptedExperts",
    "Arrival",
    "Call",
    "Capture",
    "Columns",
    "Connection",
    "Conv1D",
    "Convolution",
    "DenseGrads",
    "Documents",
    "Embedding",
    "EmbeddingGrads",
    "Experts",
    "Factor",
    "Factors",
    "Groups",
    "Hooks",
    "Layer",
    "LayerNorm",
    "LayerNormScale",
    "Layout",
    "Linear",
    "LinearMap",
    "OnePlusFactor",
    "OuterProductGrads",
    "PackedCapture",
    "PackedEmbeddingGrads",
    "PackedOuterProductGrads",
    "PackedPositionGrads",
    "Part",
    "PerExampleGrads",
    "Plan",
    "PositionGrads",
    "QuantizedLinear",
    "RMSScale",
    "Replay",
    "ResidualA",
    "ResidualB",
    "RoutedBiasGrads",
    "RoutedGrads",
    "Router",
    "Routes",
    "RowOrder",
    "Scale",
    "Site",
    "Span",
    "Strays",
    "SummedGrads",
    "TiedRows",
    "TwinA",
    "TwinB",
    "Twins",
    "UnsupportedModuleError",
    "Whole",
    "are_experts",
    "as_found",
    "capture_of",
    "columns_of",
    "foresee",
    "gradient_kept",
    "group_shape",
    "group_squares",
    "groups",
    "has_gradient_dtype",
    "hooked_parameters",
    "hooks_of_others",
    "is_stored",
    "is_wrapped",
    "join",
    "leave_out",
    "linear_maps",
    "of_part",
    "own_parameters",
    "positions",
    "scored_tensors",
    "served_by_rule",
    "stored_weights",
    "survey",
    "watch",
    "weight_shape",
    "without_gradient",
]
