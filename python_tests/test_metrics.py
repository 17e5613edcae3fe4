"""The summaries against hand-computed values and a plain loop over their definitions."""

import math

import pytest
import torch

from mas_ext import metrics

NAN = math.nan
# By hand: the best earlier accuracy on task 0 is 0.9 and on task 1 is 0.7, the last 0.5 and 0.75.
BY_HAND = torch.tensor([[0.8, NAN, NAN], [0.9, 0.7, NAN], [0.5, 0.75, 1.0]], dtype=torch.float64)


def test_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [5.0, 4.0, 4.5]])
    assert metrics.accuracy(logits, torch.tensor([0, 2, 0, 2])) == 0.5


def test_summaries_by_hand() -> None:
    assert metrics.average_accuracy(BY_HAND) == pytest.approx((0.5 + 0.75 + 1.0) / 3)
    assert metrics.forgetting(BY_HAND) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.75)) / 2)
    assert metrics.backward_transfer(BY_HAND) == pytest.approx(((0.5 - 0.8) + (0.75 - 0.7)) / 2)


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_summaries_follow_their_definitions(tasks: int) -> None:
    matrix = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(tasks))
    a, last = matrix.tolist(), tasks - 1
    forgotten = sum(max(a[t][k] for t in range(k, last)) - a[last][k] for k in range(last)) / last
    transfer = sum(a[last][k] - a[k][k] for k in range(last)) / last
    assert metrics.average_accuracy(matrix) == pytest.approx(sum(a[last]) / tasks)
    assert metrics.forgetting(matrix) == pytest.approx(forgotten)
    assert metrics.backward_transfer(matrix) == pytest.approx(transfer)


def test_accuracy_before_a_task_is_trained_does_not_count() -> None:
    lucky = BY_HAND.clone()
    lucky[0, 1] = 1.0
    assert metrics.forgetting(lucky) == metrics.forgetting(BY_HAND)


def test_a_single_task_forgets_nothing() -> None:
    single = torch.tensor([[0.6]], dtype=torch.float64)
    assert metrics.average_accuracy(single) == 0.6
    assert metrics.forgetting(single) == 0.0
    assert metrics.backward_transfer(single) == 0.0


@pytest.mark.parametrize(
    "summary", [metrics.average_accuracy, metrics.forgetting, metrics.backward_transfer]
)
def test_a_matrix_that_is_none_is_refused(summary) -> None:
    for shape in [(2, 3), (4,), (0, 0)]:
        with pytest.raises(ValueError, match=r"matrix must be of shape \(T, T\)"):
            summary(torch.zeros(shape))
    with pytest.raises(ValueError, match="NaN"):
        summary(torch.tensor([[0.9, NAN], [NAN, 0.8]]))


def test_rank_correlation_is_of_ranks_alone() -> None:
    a = torch.randn(50)
    assert metrics.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert metrics.rank_correlation(a, -(a**3)) == pytest.approx(-1)


def test_equal_numbers_share_a_rank() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: covariance 1, variances 1.5 and 5 / 3, by hand."""
    a, b = torch.tensor([0.0, 7.0, 7.0, 9.0]), torch.tensor([2.0, 1.0, 3.0, 4.0])
    assert metrics.rank_correlation(a, b) == pytest.approx(1 / math.sqrt(1.5 * 5 / 3))
    assert math.isnan(metrics.rank_correlation(a, torch.ones(4)))
