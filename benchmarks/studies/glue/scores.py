"""GLUE's scores, as the paper takes them."""

from __future__ import annotations

from torch import Tensor


def metric(task: str, outputs: Tensor, labels: Tensor) -> float:
    """The paper's: Matthews for CoLA, the mean of F1 and accuracy for MRPC, of both correlations for STS-B."""
    if task == "stsb":
        values = outputs[:, 0].double()
        return (correlation(values, labels.double()) + correlation(ranks(values), ranks(labels.double()))) / 2
    predicted = outputs.argmax(1)
    accuracy = (predicted == labels).double().mean().item()
    if task == "cola":
        return correlation(predicted.double(), labels.double())
    if task == "mrpc":
        true = int((predicted & labels).sum())
        return (accuracy + 2 * true / max(1, int(predicted.sum() + labels.sum()))) / 2
    return accuracy


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; of two classes it is Matthews'. 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale else 0.0


def ranks(values: Tensor) -> Tensor:
    """Mean ranks, equal values sharing theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
