"""Model and batches in, statistics out."""

from fishkern.statistics.base import Estimator
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.estimate import estimate
from fishkern.statistics.likelihood import (
    CausalLM,
    Classification,
    Likelihood,
    MaskedLM,
    MultiLabel,
    QuestionAnswering,
    Regression,
    Seq2SeqLM,
    TokenClassification,
)
from fishkern.statistics.predictive import Bernoulli, Categorical, Gaussian, Predictive
from fishkern.statistics.result import Covered, Statistics, merge
from fishkern.statistics.sketched_fisher import SketchedFisher

__all__ = [
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "Classification",
    "Covered",
    "DiagonalFisher",
    "Estimator",
    "Gaussian",
    "Likelihood",
    "MaskedLM",
    "MultiLabel",
    "Predictive",
    "QuestionAnswering",
    "Regression",
    "Seq2SeqLM",
    "SketchedFisher",
    "Statistics",
    "TokenClassification",
    "estimate",
    "merge",
]
