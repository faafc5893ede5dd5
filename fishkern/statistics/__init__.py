"""Model and batches in, statistics out."""

from fishkern.statistics.base import Constant, Estimator, ParameterInfo
from fishkern.statistics.checkpoint import unfinished
from fishkern.statistics.coverage import Covered
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.diagonal_kronecker import DiagonalKronecker
from fishkern.statistics.direction_energy import DirectionEnergy
from fishkern.statistics.drawn import Drawn, Draws
from fishkern.statistics.energies import Energies, MatrixEnergies
from fishkern.statistics.estimate import estimate
from fishkern.statistics.factored import FactoredStatistics, FactoredValues
from fishkern.statistics.group_fisher import GroupFisher
from fishkern.statistics.held import Held
from fishkern.statistics.input_norms import InputNorms
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
from fishkern.statistics.merge import merge
from fishkern.statistics.online import OnlineFisher
from fishkern.statistics.pass_plan import PassPlan
from fishkern.statistics.plan import plan
from fishkern.statistics.precision import Entries, Precision
from fishkern.statistics.predictive import Bernoulli, Categorical, Gaussian, PackedCategorical, Predictive
from fishkern.statistics.preference import Preference
from fishkern.statistics.preference_losses import PairLogps
from fishkern.statistics.prepared import Prepared, prepare
from fishkern.statistics.ranks_plan import RanksPlan
from fishkern.statistics.result import Statistics
from fishkern.statistics.sketched_fisher import SketchedFisher
from fishkern.statistics.token_losses import TokenLosses
from fishkern.statistics.union import union
from fishkern.statistics.verification import Compared, Verification
from fishkern.statistics.verify import verify

__all__ = [
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "Classification",
    "Compared",
    "Constant",
    "Covered",
    "DiagonalFisher",
    "DiagonalKronecker",
    "DirectionEnergy",
    "Drawn",
    "Draws",
    "Energies",
    "Entries",
    "Estimator",
    "FactoredStatistics",
    "FactoredValues",
    "Gaussian",
    "GroupFisher",
    "Held",
    "InputNorms",
    "Likelihood",
    "MaskedLM",
    "MatrixEnergies",
    "MultiLabel",
    "OnlineFisher",
    "PackedCategorical",
    "PairLogps",
    "ParameterInfo",
    "PassPlan",
    "Precision",
    "Predictive",
    "Preference",
    "Prepared",
    "QuestionAnswering",
    "RanksPlan",
    "Regression",
    "Seq2SeqLM",
    "SketchedFisher",
    "Statistics",
    "TokenClassification",
    "TokenLosses",
    "Verification",
    "estimate",
    "merge",
    "plan",
    "prepare",
    "unfinished",
    "union",
    "verify",
]
