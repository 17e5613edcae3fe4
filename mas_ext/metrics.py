"""Accuracy, rank correlation, and summaries of accuracy[t, k], that on task k after training task t.

The summaries take it as a (T, T) matrix. Entries above the diagonal (tasks not yet trained) are never read
and may be NaN. Another shape, or NaN on or below the diagonal, raises ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples whose largest logit is the label's: (N, C), (N,) -> [0, 1]."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def average_accuracy(matrix: Tensor) -> float:
    """1/T sum_k accuracy[T, k]: over all tasks, after the last one."""
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


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of ranks. Equal numbers share their mean rank; a constant gives NaN."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = x.flatten().unique(return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return middle[place]


def _checked(matrix: Tensor) -> Tensor:
    """The matrix with -inf above the diagonal, where no maximum will find it."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"matrix must be of shape (T, T), T > 0, got {tuple(matrix.shape)}")
    trained = torch.ones_like(matrix, dtype=torch.bool).tril()
    if matrix[trained].isnan().any():
        raise ValueError("matrix must not have NaN on or below its diagonal, got some")
    return matrix.masked_fill(~trained, -torch.inf)
