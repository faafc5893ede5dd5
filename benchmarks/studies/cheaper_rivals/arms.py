"""Every way to an importance of the entries: the exact Fisher, what is cheaper, and two floors.

Each is a function of a trained model and of examples of its task, and gives one number at least 0 for each entry.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.studies.cheaper_rivals.setting import Setting
from benchmarks.studies.cheaper_rivals.subjects import Batch, Loaded, Rows
from fishkern.statistics.base import Estimator

Importance = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A model that has learnt a task, and what an arm may look at.

    Args:
        model: Whose parameters that require a gradient are the pool.
        optimizer: That trained it.
        rows: Examples of the task.
        loaded: For batches and losses.
        setting: Sizes of batches.
        seed: Of draws.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rows: Rows
    loaded: Loaded
    setting: Setting
    seed: int

    @property
    def pool(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def batches(self, size: int | None = None, count: int | None = None) -> list[Batch]:
        return list(self.loaded.batches(self.rows[:count], size or self.setting.passes))


Way = Callable[[Trained], Importance]


@dataclass(frozen=True)
class Arm:
    """One way.

    Args:
        says: What it is, in words.
        way: From a trained model to importances.
        package: That it needs, beside those of the checkout.
    """

    says: str
    way: Way
    package: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here."""
        if self.package is None or find_spec(self.package):
            return None
        return f'the package {self.package} is not installed: pip install -e ".[rivals]"'


def estimated(
    recipe: Callable[[int], Estimator], *, size: Callable[[Setting], int] | None = None, few: bool = False
) -> Way:
    """Estimate by a recipe of fishkern's, made from a seed."""

    def way(trained: Trained) -> Importance:
        setting = trained.setting
        batches = trained.batches(size(setting) if size else None, setting.few if few else None)
        return dict(fk.estimate(trained.model, batches, recipe(trained.seed)))

    return way


def second_moment(trained: Trained) -> Importance:
    return dict(fk.Statistics.from_optimizer(trained.optimizer, trained.model))


def ekfac(trained: Trained) -> Importance:
    """The diagonal of kronfluence's EK-FAC: eigenvectors of both Kronecker factors, squares of examples along them."""
    factors = kronfluence_factors(trained, "ekfac")
    diagonal = {}
    for name, parameter in trained.pool.items():
        module = name.removesuffix(".weight")
        U, V = (factors[f"{side}_eigenvectors"][module] for side in ("gradient", "activation"))
        L = factors["lambda_matrix"][module] / factors["num_lambda_processed"][module]
        diagonal[name] = diagonal_along(U, L, V)[:, : parameter.shape[1]].float()  # without the column of the bias
    return diagonal


def diagonal_along(U: Tensor, L: Tensor, V: Tensor) -> Tensor:
    """The diagonal ``[O, I]`` of ``(U x V) diag(L) (U x V)^T``, for eigenvectors ``U [O, O]``, ``V [I, I]`` in columns.

    ``L [O, I]`` are the mean squares along them, of ``U^T g V`` for an example's gradient ``g [O, I]``.
    """
    U, L, V = (matrix.double() for matrix in (U, L, V))
    return U.square() @ L @ V.square().mT


def kronfluence_factors(trained: Trained, strategy: str) -> dict[str, dict[str, Tensor]]:
    """Let kronfluence fit its factors on a copy of the model, and read all that it has kept."""
    import tempfile

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    loaded = trained.loaded

    class SummedLoss(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            return loaded.losses(model, batch).sum()

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name.removesuffix(".weight") for name in trained.pool]

        def get_attention_mask(self, batch: Batch) -> Tensor | None:
            return batch.get("attention_mask")

    whole = loaded.collate(trained.rows)  # padded to one length, for its own loader
    rows = [{key: value[n] for key, value in whole.items()} for n in range(len(trained.rows))]
    task = SummedLoss()
    model = prepare_model(copy.deepcopy(trained.model), task)
    arguments = FactorArguments(strategy=strategy, use_empirical_fisher=True)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("rival", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        size = trained.setting.passes
        analyzer.fit_all_factors(strategy, rows, per_device_batch_size=size, factor_args=arguments)
        loads = (analyzer.load_covariance_matrices, analyzer.load_eigendecomposition, analyzer.load_lambda_matrices)
        return {name: matrices for load in loads for name, matrices in (load(strategy) or {}).items()}


def ones(trained: Trained) -> Importance:
    return {name: torch.ones_like(parameter) for name, parameter in trained.pool.items()}


def dealt_at_random(trained: Trained) -> Importance:
    """The exact values, each at a random place of the whole pool."""
    exact = fk.estimate(trained.model, trained.batches())
    values = torch.cat([score.flatten() for score in exact.values()])
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(trained.seed))]
    parts = values.split([score.numel() for score in exact.values()])
    return {name: part.view(exact[name].shape) for name, part in zip(exact, parts, strict=True)}


ARMS = {
    "exact": Arm("the exact Fisher of examples (fk.DiagonalFisher())", estimated(lambda _: fk.DiagonalFisher())),
    "few": Arm("the same of an eighth of the examples", estimated(lambda _: fk.DiagonalFisher(), few=True)),
    "mc": Arm("exact squares, labels drawn from the model", estimated(lambda seed: fk.DiagonalFisher("mc", seed=seed))),
    "adam": Arm("Adam's second moment, of the training itself (Statistics.from_optimizer)", second_moment),
    "batch-8": Arm(
        'squares of the gradients of batches of 8 (unit="batch")',
        estimated(lambda _: fk.DiagonalFisher(unit="batch"), size=lambda setting: setting.small_passes),
    ),
    "batch-32": Arm(
        'squares of the gradients of batches of 32 (unit="batch")',
        estimated(lambda _: fk.DiagonalFisher(unit="batch")),
    ),
    "sketch-1": Arm("one draw of signs (fk.SketchedFisher)", estimated(lambda seed: fk.SketchedFisher(1, seed))),
    "sketch-8": Arm("eight draws of signs", estimated(lambda seed: fk.SketchedFisher(8, seed))),
    "kfac": Arm("the diagonal of K-FAC (fk.DiagonalKronecker)", estimated(lambda _: fk.DiagonalKronecker())),
    "ekfac": Arm("the diagonal of kronfluence's EK-FAC", ekfac, package="kronfluence"),
    "ones": Arm("1 for all: magnitude, the plain mean, weight decay to the start", ones),
    "random": Arm("the exact values, dealt out at random", dealt_at_random),
}
