"""Exact per-example Fisher information of PyTorch models, and the fine-tuning methods that stand on it."""

from fishkern.backend import BackendUnavailableError, use_backend, why_not_triton
from fishkern.layers import UnsupportedModuleError
from fishkern.methods import fish_tuning
from fishkern.names import canonical_name
from fishkern.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD
from fishkern.selection import (
    Delta,
    GlobalTopK,
    PerRowTopK,
    PerTensorTopK,
    Random,
    Rule,
    Selection,
    apply_delta,
    delta,
    select,
)
from fishkern.statistics import (
    CausalLM,
    Classification,
    DiagonalFisher,
    Drawn,
    Estimator,
    Likelihood,
    MaskedLM,
    MultiLabel,
    QuestionAnswering,
    Regression,
    Seq2SeqLM,
    SketchedFisher,
    Statistics,
    TokenClassification,
    Verification,
    estimate,
    merge,
    verify,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CausalLM",
    "Classification",
    "Delta",
    "DiagonalFisher",
    "Drawn",
    "Estimator",
    "GlobalTopK",
    "Likelihood",
    "MaskedAdamW",
    "MaskedLM",
    "MaskedOptimizer",
    "MaskedSGD",
    "MultiLabel",
    "PerRowTopK",
    "PerTensorTopK",
    "QuestionAnswering",
    "Random",
    "Regression",
    "Rule",
    "Selection",
    "Seq2SeqLM",
    "SketchedFisher",
    "Statistics",
    "TokenClassification",
    "UnsupportedModuleError",
    "Verification",
    "apply_delta",
    "canonical_name",
    "delta",
    "estimate",
    "fish_tuning",
    "merge",
    "select",
    "use_backend",
    "verify",
    "why_not_triton",
]
