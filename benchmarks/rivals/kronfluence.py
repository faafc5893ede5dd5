"""kronfluence: its ``diagonal`` strategy, for linears alone; results go to a file and come back."""

from __future__ import annotations

import tempfile

from torch import Tensor, nn

from benchmarks.rivals.loops import Batches

SETTINGS = "strategy diagonal, empirical Fisher, float32, no partitions, through files in a temporary folder"


def kronfluence(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """The library's lambda matrices, whose last column is the bias where a linear has one."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class SummedLoss(Task):
        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            return len(batch["input_ids"]) * model(**batch).loss

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    batches = list(batches)
    rows = [{key: value[n] for key, value in batch.items()} for batch in batches for n in range(len(batch["labels"]))]
    task = SummedLoss()
    model = prepare_model(model, task)
    on_cpu = next(model.parameters()).device.type == "cpu"
    arguments = FactorArguments(strategy="diagonal", use_empirical_fisher=True)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("fisher", model, task, cpu=on_cpu, disable_tqdm=True, output_dir=folder)
        size = len(batches[0]["input_ids"])
        analyzer.fit_all_factors("diagonal", rows, per_device_batch_size=size, factor_args=arguments)
        matrices = analyzer.load_lambda_matrices("diagonal")["lambda_matrix"]
    squares = {}
    for name, matrix in matrices.items():
        inputs = model.get_submodule(name).in_features
        squares[f"{name}.weight"] = matrix[:, :inputs]
        if matrix.shape[1] > inputs:
            squares[f"{name}.bias"] = matrix[:, inputs]
    return squares
