"""The summaries against hand-computed values and a plain loop over their definitions."""

import math

import numpy as np
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


def test_comparisons_follow_their_definitions() -> None:
    matrix, other = torch.rand(4, 4).double(), torch.rand(4).double()
    a, b = matrix.tolist(), other.tolist()
    ahead = sum(a[k - 1][k] - b[k] for k in range(1, 4)) / 3
    assert metrics.forward_transfer(matrix, other) == pytest.approx(ahead)
    missed = sum(b[k] - a[k][k] for k in range(4)) / 4
    assert metrics.intransigence(matrix, other) == pytest.approx(missed)
    gap = sum(b[k] - a[3][k] for k in range(4)) / 4
    assert metrics.single_task_gap(matrix, other) == pytest.approx(gap)


def test_comparisons_read_no_more_than_they_need() -> None:
    other = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)
    expected = ((0.9 - 0.8) + (0.8 - 0.7) + (0.7 - 1.0)) / 3
    assert metrics.intransigence(BY_HAND, other) == pytest.approx(expected)
    expected = ((0.9 - 0.5) + (0.8 - 0.75) + (0.7 - 1.0)) / 3
    assert metrics.single_task_gap(BY_HAND, other) == pytest.approx(expected)
    ahead = BY_HAND.clone()
    ahead[0, 1], ahead[1, 2], other[0] = 0.4, 0.6, NAN
    expected = ((0.4 - 0.8) + (0.6 - 0.7)) / 2
    assert metrics.forward_transfer(ahead, other) == pytest.approx(expected)
    assert metrics.forward_transfer(torch.tensor([[0.6]]), torch.tensor([0.1])) == 0.0


@pytest.mark.parametrize(
    ("summary", "name"),
    [
        (metrics.forward_transfer, "initial"),
        (metrics.intransigence, "reference"),
        (metrics.single_task_gap, "single"),
    ],
)
def test_comparisons_that_cannot_be_made(summary, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: got shape \(3,\), expected \(2,\)"):
        summary(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=f"{name}: got NaN"):
        summary(torch.zeros(2, 2), torch.tensor([0.0, NAN]))
    with pytest.raises(ValueError, match="matrix: got NaN on or below its diagonal"):
        summary(torch.full((2, 2), NAN), torch.zeros(2))


def test_forward_transfer_needs_accuracies_ahead() -> None:
    with pytest.raises(ValueError, match="matrix: got NaN just above its diagonal"):
        metrics.forward_transfer(BY_HAND, torch.zeros(3))


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    # From the usual tables (two-sided); the first by hand, tan(0.475 pi).
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 3, 3.1824),
        (0.95, 4, 2.7764),
        (0.95, 9, 2.2622),
        (0.95, 30, 2.0423),
        (0.95, 120, 1.9799),
        (0.99, 4, 4.6041),
        (0.9, 5, 2.0150),
        (0.5, 1, 1.0),
    ],
)
def test_students_quantile(confidence: float, degrees: int, expected: float) -> None:
    assert metrics.student_quantile(confidence, degrees) == pytest.approx(expected, abs=5.1e-5)


def test_mean_over_seeds() -> None:
    """By hand: mean 3, standard deviation sqrt(2.5), Student's quantile for 4 degrees 2.7764."""
    mean, half = metrics.mean_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    mean, half = metrics.mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(half)


def test_interval_in_words() -> None:
    # Of 3 and 5: t(0.975, 1) = 12.7062, times sqrt(2) / sqrt(2).
    assert metrics.interval_text([3.0, 5.0], 2) == "4.00 ± 12.71"
    assert metrics.interval_text([0.25], 1) == "0.2"


def test_the_interval_has_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(7.0, 2.0, (4000, 4))
    found = sum(
        abs(mean - 7) < half
        for mean, half in (metrics.mean_interval(d.tolist(), 0.8) for d in draws)
    )
    assert found / 4000 == pytest.approx(0.8, abs=0.02)  # three standard errors


def test_runs_that_have_no_mean() -> None:
    for values in ([], [0.5, NAN], [[0.5]]):
        with pytest.raises(
            ValueError, match=r"values: got .*, expected one or more numbers without NaN"
        ):
            metrics.mean_interval(values)
    for confidence in (0, 1, 95, NAN):
        with pytest.raises(
            ValueError, match=f"confidence: got {confidence}, expected a number between 0 and 1"
        ):
            metrics.mean_interval([0.5, 0.6], confidence)


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
        with pytest.raises(ValueError, match=r"matrix: got shape .*, expected \(T, T\)"):
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
