"""Accuracy, rank correlation, summaries of accuracy[t, k], and how sure one is of a mean over seeds.

accuracy[t, k] is the accuracy on task k after training task t, a (T, T) matrix. Its entries above the diagonal
(tasks not yet trained) may be NaN and are read by `forward_transfer` alone. Another shape, or NaN where a
summary reads, raises a ValueError.

Sources: Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, section 2 (average accuracy, both
transfers); Chaudhry et al., Riemannian Walk, ECCV 2018 (forgetting, intransigence); the consistency extension
of MAS (single-task gap, which it calls forgetting).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples whose largest logit is that of their label: (N, C), (N,) -> [0, 1]."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def average_accuracy(matrix: Tensor) -> float:
    """1/T sum_k accuracy[T, k]: the mean over all tasks after the last one."""
    return float(_checked(matrix)[-1].mean())


def forgetting(matrix: Tensor) -> float:
    """1/(T-1) sum_{k<T} (max_{k<=t<T} accuracy[t, k] - accuracy[T, k]); 0 for a single task.

    The best earlier accuracy minus the last one, averaged over all but the last task. Negative
    where later tasks helped the earlier ones.
    """
    learned = _checked(matrix)
    if len(learned) == 1:
        return 0.0
    best = learned[:-1, :-1].amax(dim=0)
    return float((best - learned[-1, :-1]).mean())


def backward_transfer(matrix: Tensor) -> float:
    """1/(T-1) sum_{k<T} (accuracy[T, k] - accuracy[k, k]); 0 for a single task.

    What the later tasks changed since each task was learned: negative where they harmed it.
    """
    learned = _checked(matrix)
    if len(learned) == 1:
        return 0.0
    return float((learned[-1] - learned.diagonal())[:-1].mean())


def forward_transfer(matrix: Tensor, initial: Tensor) -> float:
    """1/(T-1) sum_{k>1} (accuracy[k-1, k] - initial[k]); 0 for a single task.

    How much the earlier tasks help a task before it is trained.

    Args:
        matrix: accuracy[t, k], (T, T).
        initial: accuracy of the untrained network on each task, (T,); the first is not read.
    """
    _checked(matrix)
    before, untrained = matrix.diagonal(1), _reference("initial", initial, len(matrix), first=1)
    if before.isnan().any():
        raise ValueError("matrix: got NaN just above its diagonal, expected accuracies")
    return float((before - untrained).mean()) if len(matrix) > 1 else 0.0


def intransigence(matrix: Tensor, reference: Tensor) -> float:
    """1/T sum_k (reference[k] - accuracy[k, k]).

    How much less of a task is learned, when its turn comes, than by a network that has nothing to preserve.
    Negative where learning in sequence is better.

    Args:
        matrix: accuracy[t, k], (T, T).
        reference: accuracy on task k of a network trained jointly on the tasks up to k, (T,).
    """
    learned = _checked(matrix).diagonal()
    return float((_reference("reference", reference, len(matrix)) - learned).mean())


def single_task_gap(matrix: Tensor, single: Tensor) -> float:
    """1/T sum_k (single[k] - accuracy[T, k]).

    How much is lost by learning all tasks in one network.

    Args:
        matrix: accuracy[t, k], (T, T).
        single: accuracy on task k of a network that is trained on task k alone, (T,).
    """
    last = _checked(matrix)[-1]
    return float((_reference("single", single, len(matrix)) - last).mean())


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean of n runs, and h: with that confidence, the true mean is in [mean - h, mean + h].

    h = q s / sqrt(n), with the standard deviation s (n - 1 in its denominator) and Student's
    quantile q for n - 1 degrees of freedom; for normally distributed values. For a single run h is NaN.

    Raises:
        ValueError: no values, NaN among them, or a confidence not in (0, 1).
    """
    runs = torch.as_tensor(values, dtype=torch.float64)
    if runs.ndim != 1 or len(runs) == 0 or runs.isnan().any():
        raise ValueError(f"values: got {values}, expected one or more numbers without NaN")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
    mean = float(runs.mean())
    if len(runs) == 1:
        return mean, math.nan
    half = student_quantile(confidence, len(runs) - 1) * float(runs.std()) / math.sqrt(len(runs))
    return mean, half


def interval_text(values: Sequence[float], digits: int) -> str:
    """`mean_interval` as text, such as "97.45 ± 2.20"; for a single run the value alone."""
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def student_quantile(confidence: float, degrees: int) -> float:
    """q such that Student's t with this many degrees of freedom is in [-q, q] with that probability.

    Found by bisection over the angle atan(q / sqrt(degrees)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _student(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    term = math.cos(angle) if degrees % 2 else 1.0
    series = 0.0
    for power in range(degrees % 2, degrees - 1, 2):
        series += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    if degrees % 2:
        return 2 / math.pi * (angle + math.sin(angle) * series)
    return math.sin(angle) * series


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of ranks. Equal numbers share their mean rank; a constant gives NaN."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = x.flatten().unique(return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return middle[place]


def _reference(name: str, values: Tensor, tasks: int, first: int = 0) -> Tensor:
    """One accuracy per task, from the task `first` on."""
    if values.shape != (tasks,):
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected ({tasks},)")
    if values[first:].isnan().any():
        raise ValueError(f"{name}: got NaN, expected accuracies")
    return values[first:]


def _checked(matrix: Tensor) -> Tensor:
    """The matrix with -inf above the diagonal, which no maximum takes."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"matrix: got shape {tuple(matrix.shape)}, expected (T, T) with T > 0")
    trained = torch.ones_like(matrix, dtype=torch.bool).tril()
    if matrix[trained].isnan().any():
        raise ValueError("matrix: got NaN on or below its diagonal, expected accuracies")
    return matrix.masked_fill(~trained, -torch.inf)
